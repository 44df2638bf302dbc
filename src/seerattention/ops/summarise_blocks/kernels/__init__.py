"""Kernels of the backends beside this folder."""
