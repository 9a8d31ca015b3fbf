"""A profile of a model so small that measuring takes seconds."""

import time

import pytest
import torch

from vlm_fast.advisor import measure_points, profile_points
from vlm_fast.advisor.model_shapes import MODELS, LanguageModel, ModelShape, VisionTower
from vlm_fast.cli import profile
from vlm_fast.devtools.timing import Ceilings

TINY = ModelShape(
    "Tiny", VisionTower(width=16, side=6, tokens=36, hidden=16, layers=1, intermediate=32),
    LanguageModel(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate=48,
                  vocabulary=64, context=256),
    "mlp", "a test",
)  # fmt: skip
NAMES = ("linear", "mlp", "pool", "merge", "gated", "anyres")
NAME = "internvl3-8b"  # whose place the tiny model takes


def make_tiny(patch):
    patch.setitem(MODELS, NAME, TINY)
    patch.setattr(profile.timing, "ceilings", lambda *_: Ceilings(1e10, 1e10))
    patch.setattr(measure_points, "ROUNDS", (3, 3))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    make_tiny(monkeypatch)


def groups(mode="forward", tokens=(36, 9), batches=(1,), levels=("all",), names=NAMES):
    return profile_points.points(TINY, names, tokens, batches, levels, mode, 8, torch.float32)


def setting(**changes):
    given = dict(device="cpu", dtype=torch.float32, flops_per_second=1e10,
                 deadline=time.monotonic() + 60, seconds=0.0)  # fmt: skip
    return measure_points.MeasureSettings(**{**given, **changes})
