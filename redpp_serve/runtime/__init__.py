"""The serving side: a graph with the fastest kernels of its device. Needs torch alone; copied into each archive."""
