"""Benchmarks of ops, connectors and whole models; ``vlm-fast bench`` runs them."""

import os

# They silence messages of torch's profiler, and must be set before torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
