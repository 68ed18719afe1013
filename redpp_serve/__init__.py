"""Data-free pruning of trained PyTorch networks, packaged and measured on a model server."""
__version__ = "0.1.0"
