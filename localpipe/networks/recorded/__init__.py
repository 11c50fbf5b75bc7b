"""Any network cut into blocks: one forward pass is recorded and replayed in pieces."""
