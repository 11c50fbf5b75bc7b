"""A user's own Dataset: its items are read in loader processes, and come here as arrays."""
