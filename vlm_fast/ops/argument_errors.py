"""Errors for callers' mistakes: which op and argument, what came, what was expected."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Proxy


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype} on {value.device}"
    return repr(value)


def wrong_value(op: str, argument: str, got: object, expected: str) -> ValueError:
    return ValueError(f"vlm_fast.{op}: {argument} is {describe(got)}, expected {expected}")


def wrong_type(op: str, argument: str, got: object, expected: str) -> TypeError:
    return TypeError(f"vlm_fast.{op}: {argument} is {describe(got)}, expected {expected}")


def not_a_tensor(op: str, argument: str, got: object) -> TypeError:
    if isinstance(got, Proxy):
        return TypeError(
            f"vlm_fast.{op}: {argument} is a Proxy of torch.fx.symbolic_trace, expected a Tensor, "
            "whose sizes are known. Use torch.export, or a Tracer whose is_leaf_module says that "
            f"{op} is a leaf"
        )
    return TypeError(f"vlm_fast.{op}: {argument} is a {type(got).__name__}, expected a Tensor")


def once(name: str) -> RuntimeError:
    """A gradient of a gradient was asked for, which ``vlm_fast.<name>`` does not have."""
    return RuntimeError(f"vlm_fast.{name}: double backward is not supported")


def check_tensor(op: str, argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise not_a_tensor(op, argument, value)
