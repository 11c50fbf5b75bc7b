"""Image files are read before the first step: checked, counted, and left out where broken."""
