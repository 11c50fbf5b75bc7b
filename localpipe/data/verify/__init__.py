"""Image files are checked before the first step, and those that cannot be read may be left out."""
