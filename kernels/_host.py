"""The compiled part of the host's work for a call, csrc/launch.c: `describe` and the launcher.

It is built when the package is installed. Where it was not, Triton's own builder makes it before
the first launch, because Triton needs a C compiler itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

SOURCES = Path(__file__).resolve().parent.parent / "csrc"


class Host:
    """The extension, if there is one.

    Attributes:
        describe: ``describe(values)``: dtypes, devices, shapes and strides of a tuple of tensors,
            None and lists of them, as bytes of which the last says whether any requires a
            gradient. None for anything else in it. The attribute is None without the extension.
    """

    def __init__(self) -> None:
        self.module: ModuleType | None = None
        self.describe: Callable[[tuple[object, ...]], bytes | None] | None = None
        self._load(installed)

    def _load(self, load: Callable[[], ModuleType]) -> None:
        try:
            module = load()
            module.read_tensors(Tensor, torch.nn.Parameter)
        except Exception:  # not built; no compiler; a torch without DLPack's table
            return
        self.module, self.describe = module, module.describe

    def launching_on(self, device_type: int) -> ModuleType | None:
        """The extension, set to launch on this type of device (a number of DLPack), or None."""
        if self.module is None:
            self._load(built_by_triton)
        if self.module is not None:
            try:
                self.module.use_driver(device_type)
            except ImportError:  # no CUDA driver
                return None
        return self.module


def installed() -> ModuleType:
    """The extension that was built when the package was installed."""
    return import_module(".._launch", __package__)


def built_by_triton() -> ModuleType:
    """The extension as Triton's builder makes it, kept in Triton's cache."""
    from triton.runtime.build import compile_module_from_src

    module: ModuleType = compile_module_from_src(
        src=one_source(SOURCES), name="_launch", library_dirs=[], include_dirs=[], libraries=[]
    )
    return module


def one_source(folder: Path) -> str:
    """launch.c with the headers of this folder in place of their first includes."""
    seen: set[str] = set()

    def text(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        return re.sub(r'#include "(\w+\.h)"', lambda f: text(f[1]), (folder / name).read_text())

    return text("launch.c").replace("#pragma once", "")


host = Host()
