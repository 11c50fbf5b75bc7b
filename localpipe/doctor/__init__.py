"""The checks of `localpipe doctor`: whether this machine is ready to train."""
