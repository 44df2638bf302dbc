"""Tools for testing kernels: inputs, the error budget, NaN poisoning, conformance checks, planted bugs.

A new backend is tested by running `conformance` over it; `mutants` show that the checks can fail.
"""
