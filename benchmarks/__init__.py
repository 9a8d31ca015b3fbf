"""Measurements: the ops, their overhead, and a whole LLaVA; run as ``python -m benchmarks``."""

import os

# Before torch reads them: its profiler's own messages, and warnings about it.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
