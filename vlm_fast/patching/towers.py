"""Find the modules of vision towers and language models: stacks of equal transformer blocks."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from vlm_fast.modules.fusable_runs import is_linear
from vlm_fast.modules.parameter_access.original_code import class_before_patch

MIN_EQUAL_BLOCKS = 3


def modules_in_towers(model: nn.Module) -> set[nn.Module]:
    """All blocks of stacks in ``model``, with all of their submodules.

    A member of an nn.ModuleList or nn.Sequential counts as a block if it has at least two siblings
    of the same class, or if it holds an attention and an MLP, recognised by their linears.
    """
    found: set[nn.Module] = set()
    for stack in model.modules():
        if isinstance(stack, (nn.ModuleList, nn.Sequential)) and stack not in found:
            members = [child for child in stack.children() if any(True for _ in child.children())]
            alike = Counter(map(_structure, members))
            for member in members:
                if alike[_structure(member)] >= MIN_EQUAL_BLOCKS or _is_block(member):
                    found.update(member.modules())
    return found


def _structure(module: nn.Module) -> Any:
    """What equal blocks have in common: the class; for a container also the classes inside."""
    kind = class_before_patch(module)
    if issubclass(kind, (nn.ModuleList, nn.Sequential)):
        return kind, *map(_structure, module.children())
    return kind


def _is_block(member: nn.Module) -> bool:
    """Whether one child has two linears or more, and the other children two or more together.

    Modules with an nn.ModuleList inside are whole models, not blocks.
    """
    if isinstance(member, nn.Sequential):
        return False
    if any(isinstance(m, nn.ModuleList) for m in member.modules() if m is not member):
        return False
    counts = [sum(map(is_linear, child.modules())) for child in member.children()]
    return max(counts) > 1 and sum(counts) - max(counts) > 1
