"""Measurements of a pipeline, compared with its bound and with its peers."""
