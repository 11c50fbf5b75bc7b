"""Weights to begin with: files of a state_dict, and published weights by their names."""
