"""INT8: what range each tensor has, where quantizers go, and the graphs that come of it."""
