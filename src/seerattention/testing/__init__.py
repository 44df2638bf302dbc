"""Tools for testing kernels: inputs, error budget, NaN poisoning, memory, conformance, planted bugs.

A new backend is tested by running `conformance` over it; `mutants` show that the checks can fail.
"""
