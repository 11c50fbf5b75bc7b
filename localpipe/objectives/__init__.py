"""Local losses, one file each."""
