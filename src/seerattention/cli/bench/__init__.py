"""Measure speed on this machine, beside dense attention and other peers."""
