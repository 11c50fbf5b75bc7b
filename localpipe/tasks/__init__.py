"""Tasks: the target of a sample, the loss, the metric, and the pooling of an exit."""
