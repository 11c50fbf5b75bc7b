"""Checks whether this machine is ready to train."""
