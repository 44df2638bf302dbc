"""Named calls of every op, for tests and benchmarks."""
