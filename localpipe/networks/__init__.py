"""Networks as blueprints: ordered blocks that are built on demand, a tail, and where to cut."""
