"""The systems that a benchmark compares, one file for each family."""
