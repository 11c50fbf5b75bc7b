"""What is measured: localpipe, and its peers on the same network, batch, data and precision."""
