"""What each step of `localpipe doctor --gpu` does: a function `run(context)` in a file a step."""
