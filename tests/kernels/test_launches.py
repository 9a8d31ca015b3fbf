"""The number of kernels that a forward launches: ATen kernels and our recorded launches."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vlm_fast
from tests.support.tiny_qformers import blip2
from vlm_fast.kernels import _launcher
from vlm_fast.kernels._launcher import recording
from vlm_fast.ops.declaration import OPS

pytestmark = pytest.mark.devices("interpreter")

FREE = {"_unsafe_view", "detach", "lift_fresh"}


class Launches(TorchDispatchMode):
    """Count the ATen ops that launch a kernel; views and allocations are excluded."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vlm_fast":  # not counted as an op: its launches are recorded
            with self:
                return OPS[func._opname]._path._run(*args, **(kwargs or {}))
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        name = func._opname
        if not (is_view or name.startswith(("empty", "new_empty")) or name in FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def launches(model, **given):
    with torch.no_grad(), recording() as recorded, Launches() as seen:
        model(**given)
    return len(seen.names) + len(recorded)


def test_qformer_launches_at_most_two_thirds_of_transformers_kernels(monkeypatch):
    # The same number of layers as BLIP-2. The count does not depend on the widths.
    sizes = dict(
        hidden_size=16, num_attention_heads=1, intermediate_size=16, num_hidden_layers=12,
        encoder_hidden_size=16,
    )  # fmt: skip
    model = blip2(**sizes).bfloat16()
    given = dict(
        query_embeds=torch.randn(1, 17, 16, dtype=torch.bfloat16),
        encoder_hidden_states=torch.randn(1, 3, 16, dtype=torch.bfloat16),
    )
    # Launches are recorded but not run, so that the interpreter's own work is not counted.
    monkeypatch.setattr(_launcher, "is_traced", lambda tensor: True)
    before = launches(model, **given)
    vlm_fast.patch(model, strict=True)
    with vlm_fast.strict():
        after = launches(model, **given)
    assert before == 187  # 96 products, 18 of attention, 31 norms, 30 sums, 12 of GELU
    # Twelve self-attentions of 5, six cross-attentions of 4, twelve MLPs of 3, and 3 before the
    # layers. Thirteen of them put weights together.
    assert after == 123
