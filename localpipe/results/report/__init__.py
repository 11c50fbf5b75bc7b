"""What a run looks like: pictures and one page, from what it left in its directory."""
