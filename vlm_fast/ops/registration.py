"""The call path of an op: cheap in plain eager, a registered torch op everywhere else.

Plain eager calls go straight to an ``autograd.Function``. Compilation, dispatch modes, tensor
subclasses and stand-ins without data go through ``torch.ops.vlm_fast.<name>``, whose fake is the
forward itself run on fake tensors (launches are skipped there), so no op writes one.

The private torch names this needs are all in this file; tests check that they exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.jit._builtins import _register_builtin
from torch.library import Library, register_autograd, register_fake, register_vmap

from vlm_fast.fallback import count_fast

F = TypeVar("F", bound=Callable[..., Any])

_functorch_level = torch._C._functorch.maybe_current_level
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_PLAIN = {Tensor, torch.nn.Parameter, type(None)}

LIBRARY = Library("vlm_fast", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def constant_while_compiling(function: F) -> F:
    """Let Dynamo run a function while it makes a graph, and take its result as a constant.

    As ``torch.compiler.assume_constant_result`` does, without importing Dynamo for it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def in_functorch() -> bool:
    """Whether grad, vmap and the like of torch.func are on the stack."""
    return _functorch_level() is not None


def is_batched(grads: Sequence[Tensor]) -> bool:
    """Whether gradients came from ``is_grads_batched=True`` or ``jacobian(vectorize=True)``.

    Both use a vmap of their own, which is older than that of torch.func and is not seen as one.
    """
    return any(map(_is_batched, grads))


def in_each(call: Callable[..., list[Tensor]], grads: list[Tensor], kept: list[Any]) -> Any:
    """``call(grads, kept)`` under the vmap of torch.func, in place of the older one."""
    own = [_is_batched(grad) for grad in grads]
    whole = [
        torch._remove_batch_dim(grad, 1, 0, 0) if batched else grad
        for grad, batched in zip(grads, own, strict=True)
    ]
    if is_batched(whole):
        raise RuntimeError("vlm_fast: batched gradients inside batched gradients; use torch.func")
    dims = ([0 if batched else None for batched in own], None)
    return [torch._add_batch_dim(made, 0, 1) for made in torch.vmap(call, dims)(whole, kept)]


def refuse_forward_mode(name: str) -> None:
    """Registered ops give a zero tangent in forward mode, silently; so raise."""
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            f"vlm_fast.{name}: forward-mode AD (jvp) is not supported; "
            f"use vlm_fast.ops.{name}.reference or vlm_fast.disabled()"
        )


def _refuse_double_backward(name: str) -> None:
    raise RuntimeError(
        f"vlm_fast.{name}: double backward is not supported; "
        f"use vlm_fast.ops.{name}.reference or vlm_fast.disabled()"
    )


class CallPath:
    """``path(values, settings)``: the result of the kernels, differentiable once."""

    def __init__(self, op: Any, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        self.op, self.name = op, op.name
        self.forward, self.backward = forward, backward
        self.needs: dict[tuple[Any, ...], Any] = {}
        self.none_needed = op.NeedsGrad(*[False] * len(op.tensors))
        annotations = [op.__signature__.parameters[name].annotation for name in op.tensors]
        lists = [i for i, a in enumerate(annotations) if _holds_list(a)]
        if len(lists) > 1:
            raise TypeError(f"{op.name}: at most one argument may be a list of tensors")
        self.list_at = lists[0] if lists else None
        self.single = op.__signature__.return_annotation is Tensor
        self.results = 1 if self.single else len(get_args(op.__signature__.return_annotation))
        self.function = _autograd_function(self)
        self.recipes: dict[tuple[Any, ...], tuple[int | None, ...]] = {}
        self.backward_recipes: dict[tuple[Any, ...], tuple[int | None, ...]] = {}
        self.registered = self._register(op, annotations)

    def __call__(self, values: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        flat = values if self.list_at is None else self.flatten(values)
        if torch.compiler.is_compiling():
            return self._call_registered(flat, values, settings)
        refuse_forward_mode(self.name)
        count_fast(self.name)
        if _dispatch_modes() or values[0].is_meta:
            return self._call_registered(flat, values, settings)
        for value in flat:
            if type(value) not in _PLAIN:
                return self._call_registered(flat, values, settings)
        if torch.is_grad_enabled():
            for value in flat:
                if value is not None and value.requires_grad:
                    return self.function.apply((self.count(values), settings), *flat)
        return self.forward(self.none_needed, *values, **settings)[0]

    # ---- one list of tensors among the arguments is flattened for autograd ----

    def count(self, values: tuple[Any, ...]) -> int:
        return 0 if self.list_at is None else len(values[self.list_at])

    def flatten(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.list_at is None:
            return values
        return (*values[: self.list_at], *values[self.list_at], *values[self.list_at + 1 :])

    def unflatten(self, flat: tuple[Any, ...], count: int) -> tuple[Any, ...]:
        if self.list_at is None:
            return flat
        i = self.list_at
        return (*flat[:i], list(flat[i : i + count]), *flat[i + count :])

    def needs_of(self, flat: tuple[bool, ...], count: int) -> Any:
        """Which gradients are wanted; of the list those of each tensor, or empty if none is."""
        key: tuple[Any, ...] = flat
        if self.list_at is not None:
            i = self.list_at
            of_list = flat[i : i + count]
            key = (*flat[:i], of_list if any(of_list) else (), *flat[i + count :])
        found = self.needs.get(key)
        if found is None:
            found = self.needs[key] = self.op.NeedsGrad(*key)
        return found

    def gradients(
        self, needs: tuple[bool, ...], count: int, kept: Any, grads: Any, settings: dict[str, Any]
    ) -> tuple[Tensor | None, ...]:
        """The flat gradients of one backward, None where not needed."""
        device = "cuda" if grads[0].is_cuda else "cpu"
        if torch.is_autocast_enabled(device):
            # The dtypes of the forward hold, wherever backward is called.
            with torch.autocast(device, enabled=False):
                return self.gradients(needs, count, kept, grads, settings)
        found = self.backward(self.needs_of(needs, count), kept, *grads, **settings)
        if self.list_at is not None:
            if found[self.list_at] is None:
                found = (*found[: self.list_at], [None] * count, *found[self.list_at + 1 :])
            found = self.flatten(found)
        if len(found) != len(needs):
            raise TypeError(f"{self.name}: backward gave {len(found)} gradients of {len(needs)}")
        return tuple([g if need else None for g, need in zip(found, needs)])  # noqa: B905

    # ---- the registered op ----

    def _call_registered(
        self, flat: tuple[Any, ...], values: tuple[Any, ...], settings: dict[str, Any]
    ) -> Any:
        grad = torch.is_grad_enabled()
        needs = [grad and v is not None and v.requires_grad for v in flat]
        outputs = self.registered(*values, **settings, needs=needs)
        return outputs[0] if self.single else tuple(outputs[: self.results])

    def _run(self, *values: Any, needs: list[bool], **settings: Any) -> list[Tensor]:
        """Results, then what else backward needs; nothing is returned twice, nor an input."""
        count = self.count(values)
        result, saved = self.forward(self.needs_of(tuple(needs), count), *values, **settings)
        results = [result] if self.single else list(result)
        known = [*self.flatten(values), *results]
        recipe: list[int | None] = []
        for tensor in saved:
            at = next((i for i, v in enumerate(known) if v is tensor), None)
            if tensor is not None and at is None:
                at = len(known)
                known.append(tensor)
            recipe.append(None if tensor is None else at)
        self.recipes[self._key(needs, count, settings)] = tuple(recipe)
        return known[len(self.flatten(values)) :]

    def _key(self, needs: Any, count: int, settings: dict[str, Any]) -> tuple[Any, ...]:
        # Not the sizes: hashing a symbolic one would fix it. Of a float only whether it is 0: a
        # schedule gives a new one in every step, and none changes what is kept but by being 0.
        plain = [
            (k, bool(v) if isinstance(v, float) else v)
            for k, v in settings.items()
            if isinstance(v, (str, float, bool))
        ]
        return (tuple(needs), count, *sorted(plain))

    def _run_backward(
        self,
        grads: list[Tensor],
        kept: list[Tensor | None],
        /,  # an option may be called "saved" too
        *,
        list_length: int,
        needs: list[bool],
        **settings: Any,
    ) -> list[Tensor]:
        """The gradients wanted; none is returned twice, nor one that came in."""
        known: list[Tensor | None] = [*grads, *kept]
        came_in = len(known)
        recipe: list[int | None] = []
        for gradient in self.gradients(tuple(needs), list_length, kept, grads, settings):
            at = next((i for i, v in enumerate(known) if v is gradient), None)
            if gradient is not None and at is None:
                # Two gradients may be parts of one buffer; torch wants results apart.
                if any(v is not None and _share_storage(gradient, v) for v in known):
                    gradient = gradient.clone()
                at = len(known)
                known.append(gradient)
            recipe.append(None if gradient is None else at)
        self.backward_recipes[self._key(needs, list_length, settings)] = tuple(recipe)
        return known[came_in:]  # type: ignore[return-value]  # those that came are not None

    def _register(self, op: Any, annotations: list[Any]) -> Any:
        arguments = ", ".join(
            f"{_schema_type(a)} {n}" for a, n in zip(annotations, op.tensors, strict=True)
        )
        options = "".join(
            f"{_schema_type(op.__signature__.parameters[n].annotation)} {n}, " for n in op.defaults
        )
        name, backward_name = self.name, f"{self.name}_backward"
        LIBRARY.define(f"{name}({arguments}, *, {options}bool[] needs) -> Tensor[]", tags=TAGS)
        LIBRARY.define(
            f"{backward_name}(Tensor[] gradients, Tensor?[] kept, *, {options}"
            "int list_length, bool[] needs) -> Tensor[]",
            tags=TAGS,
        )
        for registered, run in ((name, self._run), (backward_name, self._run_backward)):
            LIBRARY.impl(registered, run, "CompositeExplicitAutograd")
            register_fake(f"vlm_fast::{registered}", run, lib=LIBRARY)
        self.registered_backward = getattr(torch.ops.vlm_fast, backward_name).default
        self._register_for_script(op)

        def setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
            settings = dict(keyword_only_inputs)
            ctx.needs = settings.pop("needs")
            ctx.settings, ctx.count = settings, self.count(inputs)
            needs = self.needs_of(tuple(ctx.needs), ctx.count)
            ctx.mark_non_differentiable(*[output[i] for i in op.results_without_gradient(needs)])
            recipe = self.recipes[self._key(ctx.needs, ctx.count, settings)]
            available = (*self.flatten(inputs), *output)
            ctx.save_for_backward(*[None if at is None else available[at] for at in recipe])

        def backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
            if torch.is_grad_enabled():  # create_graph=True
                _refuse_double_backward(name)
            came, kept = list(grads[: self.results]), list(ctx.saved_tensors)
            flat = self._call_registered_backward(came, kept, ctx.settings, ctx.count, ctx.needs)
            return self.unflatten(flat, ctx.count)

        def double_backward(ctx: Any, *grads: Any) -> None:
            _refuse_double_backward(name)

        register_autograd(f"vlm_fast::{name}", backward, setup_context=setup, lib=LIBRARY)

        def of_each(info: Any, dims: Any, grads: Any, kept: Any, **keywords: Any) -> Any:
            """Under vmap (batched gradients, vectorized Jacobians): one backward after another."""

            def part(i: int, values: Any, dims: Any) -> list[Tensor | None]:
                pairs = zip(values, dims, strict=True)
                return [v if dim is None else v.select(dim, i) for v, dim in pairs]

            made = [
                self.registered_backward(
                    part(i, grads, dims[0]), part(i, kept, dims[1]), **keywords
                )
                for i in range(info.batch_size)
            ]
            stacked = [torch.stack(parts) for parts in zip(*made, strict=True)]
            return stacked, [0] * len(stacked)

        register_autograd(f"vlm_fast::{backward_name}", double_backward, lib=LIBRARY)
        register_vmap(f"vlm_fast::{backward_name}", of_each, lib=LIBRARY)
        return getattr(torch.ops.vlm_fast, name).default

    def _call_registered_backward(
        self, grads: list[Tensor], kept: list[Any], settings: Any, count: int, needs: Any
    ) -> tuple[Tensor | None, ...]:
        """The flat gradients, of which the registered op returns those that are new."""

        def made_of(grads: list[Tensor], kept: list[Any]) -> list[Tensor]:
            made: list[Tensor] = self.registered_backward(
                grads, kept, **settings, list_length=count, needs=list(needs)
            )
            return made

        made = in_each(made_of, grads, kept) if is_batched(grads) else made_of(grads, kept)
        recipe = self.backward_recipes[self._key(needs, count, settings)]
        available = (*grads, *kept, *made)
        return tuple(None if at is None else available[at] for at in recipe)

    def _register_for_script(self, op: Any) -> None:
        """A call of the op that torch.jit.script compiles is one of this overload, which calls it.

        A saved program needs ``import vlm_fast`` before it is loaded.
        """
        written: list[str] = []
        for parameter in op.__signature__.parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY and "*" not in written:
                written.append("*")
            argument = f"{_schema_type(parameter.annotation)} {parameter.name}"
            if isinstance(parameter.default, str):
                argument += f'="{parameter.default}"'
            elif parameter.default is not parameter.empty:
                argument += f"={parameter.default}"
            written.append(argument)
        results = ", ".join(["Tensor"] * self.results)
        results = results if self.single else f"({results})"
        LIBRARY.define(f"{self.name}.script({', '.join(written)}) -> {results}")
        LIBRARY.impl(f"{self.name}.script", op, "CompositeImplicitAutograd")
        _register_builtin(op, f"vlm_fast::{self.name}")


def _autograd_function(path: CallPath) -> Any:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, call: tuple[int, dict[str, Any]], *flat: Any) -> Any:
            count, settings = ctx.call = call
            needs = path.needs_of(ctx.needs_input_grad[1:], count)
            result, saved = path.forward(needs, *path.unflatten(flat, count), **settings)
            ctx.save_for_backward(*saved)
            if path.single:
                return _fresh(result)
            results = tuple(map(_fresh, result))
            ctx.mark_non_differentiable(
                *[results[i] for i in path.op.results_without_gradient(needs)]
            )
            return results

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            if torch.is_grad_enabled():  # create_graph=True
                _refuse_double_backward(path.name)
            count, settings = ctx.call
            needs = ctx.needs_input_grad[1:]
            if in_functorch() or is_batched(grads):  # no kernel can read these
                kept = list(ctx.saved_tensors)
                return None, *path._call_registered_backward(
                    list(grads), kept, settings, count, needs
                )
            # An iterator that is used up holds nothing, and autograd lets go unless the graph is
            # retained: what an op is done with is then freed before it allocates the next.
            kept = iter(list(ctx.saved_tensors))  # type: ignore[assignment]
            ctx.maybe_clear_saved_tensors()
            return None, *path.gradients(needs, count, kept, grads, settings)

    Function.__name__ = Function.__qualname__ = f"vlm_fast_{path.name}"
    return Function


def _fresh(result: Tensor) -> Tensor:
    # Autograd forbids in-place work on a view that a Function made; nn.Linear's result allows it.
    return result.data if result._is_view() else result


def _share_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _holds_list(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, UnionType):
        return any(_holds_list(a) for a in get_args(annotation))
    return get_origin(annotation) is not None and Tensor in get_args(annotation)


def _schema_type(annotation: Any) -> str:
    """The schema's word for an annotation; a tensor or a list of them is canonically a list."""
    if _holds_list(annotation):
        return "Tensor[]"
    if get_origin(annotation) in (Union, UnionType):
        kinds = [a for a in get_args(annotation) if a is not type(None)]
        return _schema_type(kinds[0]) + "?"
    words = {Tensor: "Tensor", str: "str", float: "float", int: "SymInt", bool: "bool"}
    return words[annotation]
