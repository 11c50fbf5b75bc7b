"""Tests of a user's own Dataset."""
