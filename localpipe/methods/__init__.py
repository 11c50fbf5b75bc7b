"""The axes of local learning: objectives (local losses), context and reconciliation."""
