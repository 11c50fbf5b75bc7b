"""Every error and note that the project can print, read from its source."""
