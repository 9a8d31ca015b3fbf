"""LLaVA's projector with the keys of its original code: an nn.Sequential of linears and GELUs."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from vlm_fast.modules.fusable_runs import Step
from vlm_fast.modules.fused_sequence import run_steps
from vlm_fast.modules.parameter_access.activation import activation_module
from vlm_fast.ops.argument_errors import wrong_value
from vlm_fast.ops.mlp import SAVED


class SequentialProjector(nn.Sequential):
    """LLaVA's ``mlp2x_gelu`` (``depth=3``: ``mlp3x_gelu``) through the fused ops.

    Mirrors ``build_vision_projector`` of LLaVA, with its keys ``0.weight``, ``2.weight``, ...: its
    ``mm_projector.bin`` loads once the prefix ``model.mm_projector.`` is stripped. Children can be
    read and replaced as in any nn.Sequential; a slice is a plain nn.Sequential. Wrapped
    children (LoRA, quantization, hooks, sharding) are called as usual.

    Args:
        in_features: width of the vision features.
        hidden_features, out_features: width between the linears, and after the last one, which
            defaults to ``hidden_features``.
        depth: number of linears, with an activation from each to the next.
        bias: whether the linears have a bias.
        activation: "gelu" (exact), "gelu_tanh", "quick_gelu", "silu" or "relu".
        saved: which tensors of the first two linears are kept for backward, see `vlm_fast.ops.mlp`.
            For each further linear the input of the activation before it is kept (see
            `vlm_fast.ops.act_linear`); with "all" the activation too.

    Shapes: ``(..., in_features)`` to ``(..., out_features)``.

    Raises:
        ValueError: ``depth`` is below 1; unknown ``activation`` or ``saved``.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        depth: int = 2,
        *,
        bias: bool = True,
        activation: str = "gelu",
        saved: str = "preactivation",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if depth < 1:
            raise wrong_value("SequentialProjector", "depth", depth, "at least 1")
        if saved not in SAVED:
            raise wrong_value("SequentialProjector", "saved", saved, f"one of {SAVED}")
        factory: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        out_features = hidden_features if out_features is None else out_features
        widths = [in_features, *[hidden_features] * (depth - 1), out_features]
        children: list[nn.Module] = []
        for i in range(depth):
            if i > 0:
                children.append(activation_module(activation))
            children.append(nn.Linear(widths[i], widths[i + 1], **factory))
        super().__init__(*children)
        self.saved = saved

    def forward(self, input: Tensor) -> Tensor:
        """Project ``input (..., in_features)`` to ``(..., out_features)``.

        Raises:
            TypeError, ValueError: as `vlm_fast.ops.mlp`.
        """
        result: Tensor = run_steps(self, input, self._steps, self.saved)
        return result

    def _steps(self) -> list[Step]:
        return [Step(name, child) for name, child in self._modules.items()]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)
