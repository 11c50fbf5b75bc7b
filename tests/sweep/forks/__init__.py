"""Commands in processes that are forked from a warm one: runner, ranks, what is imported."""
