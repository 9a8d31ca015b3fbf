"""Which modules belong to a tower or a language model: stacks of blocks, alike one to the next."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from vlm_fast.modules.fused_sequence import is_linear
from vlm_fast.modules.parameter_access.original_code import class_before_patch

MANY = 3


def modules_in_towers(model: nn.Module) -> set[nn.Module]:
    """Members of stacks, with all that is inside them.

    A member of an nn.ModuleList or nn.Sequential counts where two siblings or more are made as it
    is, or where it has an attention beside its MLP, told by their linears.
    """
    found: set[nn.Module] = set()
    for stack in model.modules():
        if isinstance(stack, (nn.ModuleList, nn.Sequential)) and stack not in found:
            members = [child for child in stack.children() if any(True for _ in child.children())]
            alike = Counter(map(_made_as, members))
            for member in members:
                if alike[_made_as(member)] >= MANY or _is_block(member):
                    found.update(member.modules())
    return found


def _made_as(module: nn.Module) -> Any:
    """What siblings have in common: the class, or of a container what it holds."""
    kind = class_before_patch(module)
    if issubclass(kind, (nn.ModuleList, nn.Sequential)):
        return kind, *map(_made_as, module.children())
    return kind


def _is_block(member: nn.Module) -> bool:
    """Whether a part has two linears, and the others two together; a whole model is no block."""
    if isinstance(member, nn.Sequential):
        return False
    if any(isinstance(m, nn.ModuleList) for m in member.modules() if m is not member):
        return False
    counts = [sum(map(is_linear, child.modules())) for child in member.children()]
    return max(counts) > 1 and sum(counts) - max(counts) > 1
