"""Match the parameters of an overriding method with those of the overridden method, by name.

Releases of transformers rename, reorder and remove parameters. An override declares the parameters
that it knows in its own signature. It is called by these names, and it calls the base's method by
the names that the base has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# An override whose ``**`` parameter has this name forwards unknown arguments to the base's method.
FORWARDED = "forwarded"
# Other names that some releases and models have for a parameter of an override.
ALIASES = {
    "cache": ("past_key_values", "past_key_value"),
    "x": ("hidden",),  # Qwen3-Omni's patch merger
}


class ArgumentNames(NamedTuple):
    """How to translate the arguments of a call from the base's method to its override and back.

    Attributes:
        positional: the override's names of the parameters that the base takes by position.
        override_names: for each alias that a caller may use, the override's name.
        base_names: for each of the override's names that the base spells otherwise, the base's.
        known: the base's parameters, by the override's names.
        required: those of them without a default.
        absent_defaults: for each of the override's parameters that the base lacks, its default.
        in_order: whether the override takes them by position too, in the same order, and those
            without a default come first.
    """

    positional: tuple[str, ...]
    override_names: Mapping[str, str]
    base_names: Mapping[str, str]
    known: frozenset[str]
    required: tuple[str, ...]
    absent_defaults: Mapping[str, Any]
    in_order: bool

    def by_position(self, count: int) -> bool:
        """Whether ``count`` arguments, none of them by name, need no translation."""
        return self.in_order and len(self.required) <= count <= len(self.positional)

    def to_override(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments of a call by the override's names; None if the base would reject them."""
        if len(args) > len(self.positional):
            return None
        arguments = dict(zip(self.positional, args, strict=False))
        for name, value in kwargs.items():
            name = self.override_names.get(name, name)
            if name in arguments:
                return None
            arguments[name] = value
        for name in self.required:  # Dynamo of torch 2.11 cannot compare sets
            if name not in arguments:
                return None
        return arguments

    def to_base(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments by the base's names, without those that the base lacks and nobody passed."""
        return {
            self.base_names.get(name, name): value
            for name, value in arguments.items()
            if name not in self.absent_defaults or value is not self.absent_defaults[name]
        }


def match_arguments(
    base: Callable[..., Any], override: Callable[..., Any]
) -> ArgumentNames | str | None:
    """Match the parameters of two methods.

    Returns:
        The names; a reason why the base has other parameters than the override expects; or None for
        an override with ``*args``, which takes whatever the base takes.
    """
    declared = _parameters(override)
    if any(p.kind is p.VAR_POSITIONAL for p in declared.values()):
        return None
    forwards_unknown = FORWARDED in declared
    aliases = {other: name for name in declared for other in ALIASES.get(name, ())}
    positional, base_names, known, required = [], {}, set(), []
    for name, parameter in _parameters(base).items():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        own = aliases.get(name, name)
        variadic = parameter.kind is parameter.VAR_POSITIONAL
        if variadic or (own not in declared and not forwards_unknown):
            return f"{base.__qualname__} takes {name}, which was not read"
        if parameter.kind is not parameter.KEYWORD_ONLY:
            positional.append(own)
        known.add(own)
        if parameter.default is parameter.empty:
            required.append(own)
        if own != name:
            base_names[own] = name
    for name, parameter in declared.items():
        if parameter.kind is parameter.VAR_KEYWORD or parameter.default is not parameter.empty:
            continue
        if name not in known:
            return f"{base.__qualname__} does not take {name}"
    absent = {name: p.default for name, p in declared.items() if name not in known}
    ordered = [name for name, p in declared.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    in_order = positional == ordered[: len(positional)] and required == ordered[: len(required)]
    return ArgumentNames(
        tuple(positional), aliases, base_names, frozenset(known), tuple(required), absent, in_order
    )


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a method, without ``self``."""
    return dict(list(inspect.signature(function).parameters.items())[1:])
