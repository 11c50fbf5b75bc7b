"""What is done with a finished run: evaluate, export, compare and report."""
