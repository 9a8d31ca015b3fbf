"""Patches for the connectors of each model family."""
