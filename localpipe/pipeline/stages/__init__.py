"""One gradient-isolated stage: its plan, weights, boundary, optimizer and step."""
