"""localpipe: train neural networks that are cut into gradient-isolated stages."""

__version__ = "0.1.0"
