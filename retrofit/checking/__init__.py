"""Two models compared: `verify`, and what batch statistics change: `drift`."""
