"""Are the parameters of a module sharded, by FSDP2, DTensor or DeepSpeed ZeRO-3?"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_fsdp_class(kind: type) -> bool:
    """Whether FSDP2's ``fully_shard`` has made this class for a module."""
    return any(base.__name__ == "FSDPModule" for base in kind.__mro__)


def is_sharded(module: nn.Module) -> bool:
    """Whether this module is an FSDP2 unit: ``fully_shard`` was called with it."""
    return is_fsdp_class(type(module))


def is_zero3_parameter(parameter: Any) -> bool:
    """Whether DeepSpeed ZeRO-3 manages this parameter, partitioned or gathered."""
    return hasattr(parameter, "ds_id")


def is_zero3_partitioned(parameter: Tensor | None) -> bool:
    """Whether DeepSpeed ZeRO-3 manages this parameter and has not gathered it.

    ZeRO-3 gathers the parameters of a module by hooks on that module. Only inside a module that was
    set as a leaf module are the parameters of children gathered without hooks on the children.
    """
    if not (hasattr(parameter, "ds_id") or hasattr(parameter, "ds_status")):
        return False
    return getattr(getattr(parameter, "ds_status", None), "name", None) != "AVAILABLE"


def why_sharded(module: nn.Module) -> str | None:
    """How a module or one of its parameters is sharded, to be read after its name; or None."""
    why = "is already sharded by FSDP2" if is_sharded(module) else None
    for name, parameter in module.named_parameters(recurse=True):
        if is_zero3_parameter(parameter):
            why = f"has {name} partitioned by ZeRO-3"
        elif any(base.__name__ == "DTensor" for base in type(parameter.data).__mro__):
            why = f"has the DTensor {name}"
    return why
