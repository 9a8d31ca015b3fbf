"""The command line ``vlm-fast``."""
