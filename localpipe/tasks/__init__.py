"""What a network is trained for: the sample, the loss per sample, the exit and the metric."""
