"""Kernels of the backends beside this folder, and what starts them."""
