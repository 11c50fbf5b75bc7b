"""Measurements of a pipeline beside its bound."""
