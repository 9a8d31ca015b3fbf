"""LLaVA's MLP projector: linear, activation, linear."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.modules.fused_sequence import fused_mlp
from vlm_fast.modules.parameter_access.activation import activation_module
from vlm_fast.modules.parameter_access.chain import find_chain
from vlm_fast.ops.mlp import SAVED


class MLPProjector(nn.Module):
    """LLaVA-1.5's projector (arXiv 2310.03744): ``linear_2(act(linear_1(x)))``.

    Mirrors transformers' ``LlavaMultiModalProjector``, with its parameter names. Children that are
    wrapped or replaced (LoRA, quantization, hooks, sharding), or whose dtype is not that of the
    input, are called as usual; otherwise `vlm_fast.ops.mlp` runs.

    Args:
        in_features: width of the vision features.
        hidden_features, out_features: widths of the two linears; ``out_features`` defaults to
            ``hidden_features``.
        bias: whether both linears have a bias.
        activation: "gelu" (exact), "gelu_tanh", "quick_gelu", "silu" or "relu".
        saved: which tensors are kept for backward, see `vlm_fast.ops.mlp`.

    Shapes: ``(..., in_features)`` to ``(..., out_features)``.

    Raises:
        ValueError: unknown ``activation`` or ``saved``.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        bias: bool = True,
        activation: str = "gelu",
        saved: str = "preactivation",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_features = hidden_features if out_features is None else out_features
        factory: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.linear_1 = nn.Linear(in_features, hidden_features, **factory)
        self.act = activation_module(activation)
        self.linear_2 = nn.Linear(hidden_features, out_features, **factory)
        self.saved = _known_saved(saved)

    @classmethod
    def from_module(cls, module: nn.Module, *, saved: str = "preactivation") -> MLPProjector:
        """A projector that shares the children of ``module``, and so their parameters.

        Args:
            module: e.g. a ``LlavaMultiModalProjector``, or an nn.Sequential with these names.
            saved: see the class.

        Raises:
            ValueError: ``module`` is not exactly ``linear_1 -> act -> linear_2``.
        """
        found = find_chain(module)
        why = "it is not linear_1 -> act -> linear_2"
        if isinstance(found, str):
            why = found
        match getattr(found, "calls", None):
            case ("linear_1", str(act), "linear_2"):
                pass
            case _:
                raise ValueError(f"module is a {type(module).__name__}: {why}")
        projector = cls.__new__(cls)
        nn.Module.__init__(projector)
        for name, child in (("linear_1", "linear_1"), ("act", act), ("linear_2", "linear_2")):
            setattr(projector, name, getattr(module, child))
        projector.saved = _known_saved(saved)
        projector.train(module.training)
        return projector

    def forward(self, x: Tensor) -> Tensor:
        """Project ``x (..., in_features)`` to ``(..., out_features)``.

        Args:
            x: float32, float16 or bfloat16; other dtypes run as plain PyTorch.

        Raises:
            TypeError, ValueError: as `vlm_fast.ops.mlp`.
        """
        return fused_mlp(self, x, _children_of, self.saved)

    def merge(self, inputs_embeds: Tensor, x: Tensor, image_mask: Tensor) -> Tensor:
        """Project ``x`` and put its rows into ``inputs_embeds``, in order, where the mask is true.

        Args:
            inputs_embeds: ``(batch, sequence, out_features)``.
            x: ``(..., in_features)``; as many rows as the mask has true elements.
            image_mask: bool ``(batch, sequence)``.

        Returns:
            A new tensor with the shape of ``inputs_embeds``.

        Raises:
            TypeError, ValueError: as `vlm_fast.ops.merge_image_tokens`.
        """
        return ops.merge_image_tokens(inputs_embeds, self(x), image_mask)

    def extra_repr(self) -> str:
        return f"saved={self.saved!r}"


_children_of = attrgetter("linear_1", "act", "linear_2")


def _known_saved(saved: str) -> str:
    if saved not in SAVED:
        raise ValueError(f"saved is {saved!r}, expected one of {SAVED}")
    return saved
