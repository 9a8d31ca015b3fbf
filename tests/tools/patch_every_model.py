"""A pytest plugin that patches every transformers model, for example in transformers' own tests.

With a checkout of transformers, and this folder and the root of this project on the path:

    cd transformers
    PYTHONPATH=src:/project:/project/tests python -m pytest -p patch_every_model \\
        tests/models/blip_2/test_modeling_blip_2.py

A model is patched at the end of its ``post_init``: by then it has all its modules, and values at
random, or none as long as a checkpoint is still to be read. The models inside it came to the end of
theirs before. Where there is nothing to patch, nothing happens and nothing is said. A model that
refuses to be patched fails the test that made it.

The summary at the end says what was patched, what ran fused and what fell back, for a run in which
nothing was patched has shown nothing.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter

import vlm_fast

_patched: Counter[str] = Counter()


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore::vlm_fast.VlmFastFallbackWarning")
    patch_every_model()


def patch_every_model():
    """Patch every transformers model when it is constructed; calling this again has no effect."""
    from transformers import PreTrainedModel

    original = PreTrainedModel.post_init
    if hasattr(original, "patches"):
        return

    @functools.wraps(original)
    def post_init(self):
        original(self)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "no connector of")
            report = vlm_fast.patch(self)
        _patched.update(report.patched.values())

    post_init.patches = True
    PreTrainedModel.post_init = post_init


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("vlm_fast")
    for what, count in sorted(_patched.items()):
        terminalreporter.write_line(f"patched {count} times: {what}")
    if not _patched:
        terminalreporter.write_line("nothing was patched")
    for name, counts in vlm_fast.stats().items():
        if counts["fast"]:
            terminalreporter.write_line(f"{name}: {counts['fast']} calls were fused")
        for reason, count in counts["fallback"].items():
            terminalreporter.write_line(f"{name}: {count} calls fell back: {reason}")
