"""Patch of LLaVA-NeXT-Video's pooler of frames."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.fallback import record_fallback
from vlm_fast.modules.parameter_access.remembered import recall, remember_call
from vlm_fast.modules.spatial_pool import WINDOWS, why_not_window
from vlm_fast.modules.token_grid import side_of_square
from vlm_fast.patching.class_swap import is_class
from vlm_fast.patching.patched_module import PatchedModule


class FusedPooler(PatchedModule):
    """Replaces the forward of LlavaNextVideoPooler: pools frames in rows, without copies."""

    same_call_signature = True

    pool: Any

    remembered_forward: ClassVar[Any] = staticmethod(lambda self, x: _remembered_pooling(self, x))

    def forward(self, image_features: Tensor) -> Any:
        reason = self.why_not()
        side = side_of_square(image_features.shape[1]) if image_features.ndim == 3 else 0
        if side**2 != image_features.shape[-2]:
            reason = "its tokens are no square grid"
        if reason is not None:
            record_fallback(type(self).__name__, reason)
            return super().forward(image_features)  # type: ignore[misc]
        call = ops.spatial_pool.prepared(
            height=side, width=side, mode=WINDOWS[type(self.pool)],
            stride=int(self.pool.kernel_size),
        )  # fmt: skip
        remember_call(self, _POOLING, side, call, lambda: (self.pool,))
        return call(image_features)

    def why_not(self) -> str | None:
        return why_not_window(self.pool, self.pool.kernel_size)


_POOLING = "_pooling"  # where the poolings are stored, by the side of their grid


def _remembered_pooling(pooler: Any, x: Any) -> Any:
    """The result of an earlier call's pooling, if it is known to serve x; else NotImplemented."""
    calls = recall(pooler, _POOLING)
    if calls is None or type(x) is not Tensor or x.ndim != 3:
        return NotImplemented
    side = side_of_square(x.shape[1])
    call = calls.get(side)
    return NotImplemented if call is None or side**2 != x.shape[1] else call.if_known(x)


def recognise(module: nn.Module, **options: Any) -> tuple[()] | str | None:
    """Empty settings, a reason not to patch (pooling by a convolution), or None."""
    if not is_class(module, "llava_next_video", "LlavaNextVideoPooler"):
        return None
    pooler: Any = module
    return () if type(pooler.pool) in WINDOWS else "it pools by a convolution"
