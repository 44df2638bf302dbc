"""How fast: prefill attention beside its peers and the device's ceilings, and where dense is faster."""
