"""A plan on devices: components are loaded, placed, and asked for pictures."""
