"""The parameters of a method that is overridden, by the names that the override has for them.

Releases of transformers rename parameters, reorder them and take some away. An override declares by
its own signature which parameters it knows. It is called by those names, and it calls the base's
method by the names that the base has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# An override whose ``**`` parameter has this name hands on what it does not know.
FORWARDED = "forwarded"
# Other names that releases and models have for a parameter.
ALSO_CALLED = {
    "cache": ("past_key_values", "past_key_value"),
    "x": ("hidden",),  # of Qwen3-Omni's merger
}


class ArgumentNames(NamedTuple):
    """How a call of the base's method becomes a call of its override, and back.

    Attributes:
        positional: the override's names for what the base takes by position.
        of_override: each name that a caller may use to the override's, where they differ.
        of_base: the override's name to the base's, where they differ.
        known: names of the base's parameters, as the override has them.
        needed: those of them without a default.
        unsaid: the override's defaults of parameters that the base lacks.
    """

    positional: tuple[str, ...]
    of_override: Mapping[str, str]
    of_base: Mapping[str, str]
    known: frozenset[str]
    needed: tuple[str, ...]
    unsaid: Mapping[str, Any]

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments of a call by the override's names; None if the base would refuse them."""
        if len(args) > len(self.positional):
            return None
        given = dict(zip(self.positional, args, strict=False))
        for name, value in kwargs.items():
            name = self.of_override.get(name, name)
            if name in given:
                return None
            given[name] = value
        for name in self.needed:  # Dynamo of torch 2.11 compares no sets
            if name not in given:
                return None
        return given

    def back(self, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments by the names of the base, without those that nobody gave."""
        return {
            self.of_base.get(name, name): value
            for name, value in given.items()
            if name not in self.unsaid or value is not self.unsaid[name]
        }


def match_arguments(
    base: Callable[..., Any], override: Callable[..., Any]
) -> ArgumentNames | str | None:
    """How the parameters of two methods belong together.

    Returns:
        The names; a reason why the base has other parameters than were read; or None for an
        override that takes whatever its base takes, as ``*args, **kwargs``.
    """
    declared = _parameters(override)
    if any(p.kind is p.VAR_POSITIONAL for p in declared.values()):
        return None
    hands_on = FORWARDED in declared
    also = {other: name for name in declared for other in ALSO_CALLED.get(name, ())}
    positional, of_base, known, needed = [], {}, set(), []
    for name, parameter in _parameters(base).items():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        own = also.get(name, name)
        if parameter.kind is parameter.VAR_POSITIONAL or (own not in declared and not hands_on):
            return f"{base.__qualname__} takes {name}, which was not read"
        if parameter.kind is not parameter.KEYWORD_ONLY:
            positional.append(own)
        known.add(own)
        if parameter.default is parameter.empty:
            needed.append(own)
        if own != name:
            of_base[own] = name
    for name, parameter in declared.items():
        if parameter.kind is parameter.VAR_KEYWORD or parameter.default is not parameter.empty:
            continue
        if name not in known:
            return f"{base.__qualname__} does not take {name}"
    unsaid = {name: p.default for name, p in declared.items() if name not in known}
    return ArgumentNames(tuple(positional), also, of_base, frozenset(known), tuple(needed), unsaid)


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Those of a method, without ``self``."""
    return dict(list(inspect.signature(function).parameters.items())[1:])
