"""Networks of the papers beside the ResNets."""
