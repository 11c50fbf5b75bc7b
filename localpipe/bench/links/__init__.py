"""A benchmark over links of a given rate: throughput of every system beside its own without."""
