"""A training run: preparing it, its directory, its records, its checkpoints and its summary."""
