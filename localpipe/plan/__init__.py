"""What a configuration costs and how fast it will be, counted, measured and predicted."""
