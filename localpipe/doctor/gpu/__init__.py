"""`localpipe doctor --gpu`: steps that show, in a few minutes, what a machine with a GPU does."""
