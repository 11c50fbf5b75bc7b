"""Measurements of a pipeline beside its bound and its peers."""
