"""Networks as blueprints."""
