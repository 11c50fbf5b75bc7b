"""Forecasts for described clusters, next to rival systems. The machines need not exist."""
