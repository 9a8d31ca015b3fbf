"""Host time of connectors, patched and unpatched: ``python -m vlm_fast.benchmarks.host``."""
