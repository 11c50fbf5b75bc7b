"""Tests of recorded networks."""
