"""Reference networks with real accuracy, their tasks, and the recipes that trained them (`catalog`, `train`).

Importable as ``redpp_serve.reference``; the checkpoint and the held-out images ship with the package,
so ``redpp-serve demo`` needs no download.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
CHECKPOINT = FOLDER / "digits_resnet20.safetensors"
HELD_OUT = FOLDER / "digits_held_out.npz"
ARCH = f"{FOLDER / 'resnet.py'}:digits_resnet20"
