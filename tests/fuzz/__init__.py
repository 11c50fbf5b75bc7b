"""A fuzz of configurations and data folders: `python -m tests.fuzz`."""
