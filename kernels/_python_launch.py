"""A launcher of known kernels in Python, for machines without a C compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._triton import triton

SPECIALIZE, ALIGN, CONSTANT = 1, 2, 4  # flags of an argument, as in csrc/launch_key.h
MAX_ENTRIES = 4096


class PythonLauncher:
    """A launcher without compiled code, which calls ``CompiledKernel.run``.

    Args:
        slow: as in `_fast_launch.make_launcher`.
        flags: `_fast_launch.argument_flags`.
        blocks: the block sizes of each config.
        idle: dicts and lists that are empty while a call may be launched, and settings (dict, key,
            value) that are absent, false or this value then.
    """

    def __init__(
        self,
        slow: Callable[..., Any],
        flags: bytes,
        blocks: tuple[dict[str, int], ...],
        idle: tuple[Any, ...],
    ) -> None:
        self.slow, self.flags, self.blocks = slow, flags, blocks
        self.settings = [item for item in idle if isinstance(item, tuple)]
        self.knobs = [settings for settings, _, _ in self.settings]
        self.idle = [item for item in idle if not isinstance(item, tuple)]
        # By the types of the arguments: what makes a key, and the known kernels by key.
        self.known: dict[tuple[type, ...], tuple[Callable[..., Any], dict[Any, Any]]] = {}
        active = triton.runtime.driver.active
        self.current_device = active.get_current_device
        self.current_stream = active.get_current_stream

    def _is_set(self) -> bool:
        """Whether a setting of Triton has another value than usual."""
        found = [(s.get(name, usual), usual) for s, name, usual in self.settings]
        return any(value and value is not usual for value, usual in found)

    def _of_types(self, types: tuple[type, ...]) -> tuple[Callable[..., Any], dict[Any, Any]]:
        found = self.known.get(types)
        if found is None:
            plain = _without_parameters(types)
            found = self.known.get(plain) or (key_function(plain, self.flags), {})
            self.known[types] = self.known[plain] = found
        return found

    def key(self, config: int, *arguments: Any) -> Any:
        """What distinguishes the compiled kernels; None if the slow call must serve."""
        types = tuple(map(type, arguments))
        key = self._of_types(types)[0](config, self.current_device(), *arguments)
        return None if key is None else (_without_parameters(types), key)

    def __call__(self, config: int, grid: Callable[..., tuple[int, ...]], *arguments: Any) -> None:
        key = None
        if not any(self.idle) and (not any(self.knobs) or not self._is_set()):
            make_key, kernels = self._of_types(tuple(map(type, arguments)))
            device = self.current_device()
            key = make_key(config, device, *arguments)
            found = kernels.get(key)
            if found is not None:
                x, y, z, *_ = *grid(self.blocks[config]), 1, 1
                if x and y and z:
                    compiled, constants = found
                    compiled.run(
                        x, y, z, self.current_stream(device), compiled.function,
                        compiled.packed_metadata, None, None, None, *arguments, *constants,
                    )  # fmt: skip
                return
        made = self.slow(config, grid, *arguments)
        if made is not None and key is not None and len(kernels) < MAX_ENTRIES:
            kernels[key] = made.compiled, tuple(self.blocks[config].values())


def _without_parameters(types: tuple[type, ...]) -> tuple[type, ...]:
    return tuple(Tensor if kind is torch.nn.Parameter else kind for kind in types)


class IntegerClasses(dict[int, str]):
    """Triton's class of each integer: its width and, if specialised, whether 1 or divisible."""

    def __init__(self, flags: int) -> None:
        self.flags = flags

    def __missing__(self, value: int) -> str:
        found = "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
        if self.flags & SPECIALIZE and value == 1:
            found = "1"
        elif self.flags & SPECIALIZE and self.flags & ALIGN and value % 16 == 0:
            found += " divisible"
        if len(self) < MAX_ENTRIES:
            self[value] = found
        return found


CLASSES = [IntegerClasses(flags) for flags in range(4)]


def key_function(types: tuple[type, ...], flags: bytes) -> Callable[..., Any]:
    """``key(config, device, *arguments)`` for arguments of these types.

    The key is None if only the slow call serves: for other types, another device than that of the
    first tensor, and integers beyond 64 bits.
    """
    parts, first, names = ["config", "device"], None, [f"a{i}" for i in range(len(types))]
    served = True
    for name, kind, flag in zip(names, types, flags, strict=True):
        if flag & CONSTANT:
            served &= kind in (int, float, str, bool, type(None))
            parts.append(name)
        elif issubclass(kind, Tensor):
            served &= kind is Tensor
            first = first or name
            parts.append(f"{name}.dtype")
            if flag & SPECIALIZE:
                parts.append(f"{name}.data_ptr() & 15 == 0")
        elif kind is int:
            parts.append(f"classes_{flag & (SPECIALIZE | ALIGN)}[{name}]")
        else:
            served &= kind in (float, bool, type(None))
    if not served or first is None:
        return lambda config, device, *arguments: None
    source = (
        f"lambda config, device, {', '.join(names)}: "
        f"({', '.join(parts)}) if {first}.get_device() == device else None"
    )
    key: Callable[..., Any] = eval(source, {f"classes_{i}": CLASSES[i] for i in range(4)})
    return key
