"""The arguments of an op's call: bound to positions and names, and accepted or refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Generic, ParamSpec, TypeVar

from vlm_fast.ops.argument_errors import mistake
from vlm_fast.ops.signature import Signature, canonical_form

P = ParamSpec("P")
R = TypeVar("R")


class OpArguments(Generic[P, R]):
    """What an op takes.

    Args:
        reference: the op in plain PyTorch.
        declared, where: see `vlm_fast.ops.signature`.

    Attributes:
        name: of the op.
        signature: what arguments the op accepts.
        tensors: names of the tensor arguments.
        defaults: options and their default values.
    """

    def __init__(
        self, reference: Callable[P, R], declared: Mapping[str, Any], where: Mapping[str, str]
    ) -> None:
        self.reference = reference
        self.name = self.__name__ = self.__qualname__ = reference.__name__
        self.__module__ = reference.__module__
        self.__signature__ = inspect.signature(reference, eval_str=True)
        parameters = list(self.__signature__.parameters.values())
        self.tensors = tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)
        self.defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        self.signature = Signature(self.name, self.tensors, tuple(self.defaults), declared, where)
        self._accepts = self.signature.accepts
        self._check: Callable[..., Exception | None] | None = None
        self._canonical = canonical_form(self.signature)
        self._has_more_checks = self._canonical is not None
        self._count = len(self.tensors)
        self._tensor_defaults = {
            p.name: p.default
            for p in parameters
            if p.name in self.tensors and p.default is not p.empty
        }

    def accepted(self, values: tuple[Any, ...], settings: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments in canonical form: sequences as lists, detached for an `index_op`.

        Raises:
            TypeError, ValueError: the arguments do not match the declared signature.
        """
        if self._canonical is not None:
            values = self._canonical(values)
        if not self._accepts(*values, **settings):
            error: Exception | None = mistake(self.signature, values, settings)
            if error is not None:
                raise error
        if self._check is not None:
            error = self._check(*values, **settings)
            if error is not None:
                raise error
        return values

    def _bind(
        self, args: tuple[Any, ...], options: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Every tensor in its position and every option by name; tensors may come by keyword."""
        if len(args) != self._count or not self.defaults.keys() >= options.keys():
            args, options = self._in_position(args, options)
        if len(args) == self._count:
            if not options:
                return args, self.defaults
            if options.keys() <= self.defaults.keys():
                return args, {**self.defaults, **options}
        bound = self.__signature__.bind(*args, **options)
        bound.apply_defaults()
        return bound.args, dict(bound.kwargs)

    def _in_position(
        self, args: tuple[Any, ...], options: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Tensors that were named or left out in their positions; nothing moves in a wrong call."""
        rest, filled = dict(options), list(args)
        for name in self.tensors[len(args) :]:
            if name in rest:
                filled.append(rest.pop(name))
            elif name in self._tensor_defaults:
                filled.append(self._tensor_defaults[name])
            else:
                return args, dict(options)
        return tuple(filled), rest
