"""Measurements of ops, connectors and whole models; run as ``vlm-fast bench``."""

import os

# Before torch reads them: its profiler's own messages, and warnings about it.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
