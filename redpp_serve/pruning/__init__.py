"""Data-free pruning of captured networks: `pipeline.prune` runs its stages; README.md is the map of the files."""
