"""BLIP-2's Querying Transformer (Q-Former), as a module."""
