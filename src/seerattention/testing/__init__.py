"""Inputs, the error budget, NaN poisoning, conformance checks and planted bugs, for tests and users."""
