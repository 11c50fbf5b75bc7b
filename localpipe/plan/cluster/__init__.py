"""Forecasts for machines that need not be present: localpipe beside its peers."""
