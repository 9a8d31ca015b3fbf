"""How an op is called: an ``autograd.Function`` in eager mode, a registered torch op otherwise.

Compilation, dispatch modes, tensor subclasses, fake tensors and meta tensors go through
``torch.ops.vlm_fast.<name>``. Its fake implementation is the forward itself, run on fake tensors
without launching kernels, so no op writes one.

The private names of torch that this needs are all here and in `transforms`; tests check that they
exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor
from torch.jit._builtins import _register_builtin
from torch.library import Library, register_autograd, register_fake, register_vmap

from vlm_fast.fallback import record_fast_call
from vlm_fast.ops.autograd_function import autograd_function
from vlm_fast.ops.schema import holds_list, schema_type, script_schema
from vlm_fast.ops.transforms import (
    in_each,
    is_batched,
    refuse_double_backward,
    refuse_forward_mode,
)

_dispatch_modes = torch._C._len_torch_dispatch_stack
_PLAIN = {Tensor, torch.nn.Parameter, type(None)}

LIBRARY = Library("vlm_fast", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


class CallPath:
    """Calls an op's kernels, ``path(values, settings)``; its result is differentiable once."""

    def __init__(self, op: Any, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        self.op, self.name = op, op.name
        self.forward, self.backward = forward, backward
        self.needs_grad: dict[tuple[Any, ...], Any] = {}
        self.none_needed = op.NeedsGrad(*[False] * len(op.tensors))
        annotations = [op.__signature__.parameters[name].annotation for name in op.tensors]
        lists = [i for i, a in enumerate(annotations) if holds_list(a)]
        if len(lists) > 1:
            raise TypeError(f"{op.name}: at most one argument may be a list of tensors")
        self.list_at = lists[0] if lists else None
        self.single = op.__signature__.return_annotation is Tensor
        self.results = 1 if self.single else len(get_args(op.__signature__.return_annotation))
        self.function = autograd_function(self)
        # Before torch 2.14 `Function.apply` is Python that unwraps tensors of functorch.
        self.apply = self.function.apply
        if "apply" in vars(torch.autograd.Function):
            self.apply = super(torch.autograd.Function, self.function).apply  # type: ignore[misc]
        self.saved_sources: dict[tuple[Any, ...], tuple[int | None, ...]] = {}
        self.backward_sources: dict[tuple[Any, ...], tuple[int | None, ...]] = {}
        self.registered = self._register(op, annotations)

    def __call__(self, values: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        flat = values if self.list_at is None else self.flatten(values)
        if torch.compiler.is_compiling():
            return self._call_registered(flat, values, settings)
        refuse_forward_mode(self.name)
        record_fast_call(self.name)
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
        """Which arguments need a gradient; of a list a tuple, empty if no tensor of it does."""
        key: tuple[Any, ...] = flat
        if self.list_at is not None:
            i = self.list_at
            list_needs = flat[i : i + count]
            key = (*flat[:i], list_needs if any(list_needs) else (), *flat[i + count :])
        found = self.needs_grad.get(key)
        if found is None:
            found = self.needs_grad[key] = self.op.NeedsGrad(*key)
        return found

    def gradients(
        self,
        needs_grad: tuple[bool, ...],
        count: int,
        saved_tensors: Any,
        grads: Any,
        settings: dict[str, Any],
    ) -> tuple[Tensor | None, ...]:
        """The flat gradients of one backward; None where none is needed."""
        device = "cuda" if grads[0].is_cuda else "cpu"
        if torch.is_autocast_enabled(device):
            # Gradients have the dtypes of forward, even if backward runs under autocast.
            with torch.autocast(device, enabled=False):
                return self.gradients(needs_grad, count, saved_tensors, grads, settings)
        found = self.backward(self.needs_of(needs_grad, count), saved_tensors, *grads, **settings)
        if self.list_at is not None:
            if found[self.list_at] is None:
                found = (*found[: self.list_at], [None] * count, *found[self.list_at + 1 :])
            found = self.flatten(found)
        if len(found) != len(needs_grad):
            raise TypeError(
                f"{self.name}: backward gave {len(found)} gradients of {len(needs_grad)}"
            )
        return tuple([g if need else None for g, need in zip(found, needs_grad)])  # noqa: B905

    # ---- the registered op ----

    def _call_registered(
        self, flat: tuple[Any, ...], values: tuple[Any, ...], settings: dict[str, Any]
    ) -> Any:
        grad = torch.is_grad_enabled()
        needs_grad = [grad and v is not None and v.requires_grad for v in flat]
        outputs = self.registered(*values, **settings, needs_grad=needs_grad)
        return outputs[0] if self.single else tuple(outputs[: self.results])

    def _run(self, *values: Any, needs_grad: list[bool], **settings: Any) -> list[Tensor]:
        """The results, then other tensors that backward needs, without repeats and inputs."""
        count = self.count(values)
        result, saved = self.forward(self.needs_of(tuple(needs_grad), count), *values, **settings)
        results = [result] if self.single else list(result)
        known = [*self.flatten(values), *results]
        sources: list[int | None] = []
        for tensor in saved:
            at = next((i for i, v in enumerate(known) if v is tensor), None)
            if tensor is not None and at is None:
                at = len(known)
                known.append(tensor)
            sources.append(None if tensor is None else at)
        self.saved_sources[self._key(needs_grad, count, settings)] = tuple(sources)
        return known[len(self.flatten(values)) :]

    def _key(self, needs_grad: Any, count: int, settings: dict[str, Any]) -> tuple[Any, ...]:
        # Sizes are left out, because hashing a symbolic size specialises on it. For a float only
        # whether it is 0 counts: what is saved depends on nothing else, and a schedule may change
        # the value in every step.
        plain = [
            (k, bool(v) if isinstance(v, float) else v)
            for k, v in settings.items()
            if isinstance(v, (str, float, bool))
        ]
        return (tuple(needs_grad), count, *sorted(plain))

    def _run_backward(
        self,
        grads: list[Tensor],
        saved_tensors: list[Tensor | None],
        /,  # an option may be called "saved" too
        *,
        list_length: int,
        needs_grad: list[bool],
        **settings: Any,
    ) -> list[Tensor]:
        """The gradients that are needed, without repeated tensors and without inputs."""
        known: list[Tensor | None] = [*grads, *saved_tensors]
        came_in = len(known)
        sources: list[int | None] = []
        for gradient in self.gradients(
            tuple(needs_grad), list_length, saved_tensors, grads, settings
        ):
            at = next((i for i, v in enumerate(known) if v is gradient), None)
            if gradient is not None and at is None:
                # Two gradients may be parts of one buffer; torch wants separate storage.
                if any(v is not None and _share_storage(gradient, v) for v in known):
                    gradient = gradient.clone()
                at = len(known)
                known.append(gradient)
            sources.append(None if gradient is None else at)
        self.backward_sources[self._key(needs_grad, list_length, settings)] = tuple(sources)
        return known[came_in:]  # type: ignore[return-value]  # the new ones are never None

    def _register(self, op: Any, annotations: list[Any]) -> Any:
        arguments = ", ".join(
            f"{schema_type(a)} {n}" for a, n in zip(annotations, op.tensors, strict=True)
        )
        options = "".join(
            f"{schema_type(op.__signature__.parameters[n].annotation)} {n}, " for n in op.defaults
        )
        name, backward_name = self.name, f"{self.name}_backward"
        LIBRARY.define(f"{name}({arguments}, *, {options}bool[] needs_grad) -> Tensor[]", tags=TAGS)
        LIBRARY.define(
            f"{backward_name}(Tensor[] gradients, Tensor?[] saved_tensors, *, {options}"
            "int list_length, bool[] needs_grad) -> Tensor[]",
            tags=TAGS,
        )
        for registered, run in ((name, self._run), (backward_name, self._run_backward)):
            LIBRARY.impl(registered, run, "CompositeExplicitAutograd")
            register_fake(f"vlm_fast::{registered}", run, lib=LIBRARY)
        self.registered_backward = getattr(torch.ops.vlm_fast, backward_name).default
        self._register_for_script(op)

        def setup(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
            settings = dict(keyword_only_inputs)
            ctx.needs_grad = settings.pop("needs_grad")
            ctx.settings, ctx.count = settings, self.count(inputs)
            needs_grad = self.needs_of(tuple(ctx.needs_grad), ctx.count)
            ctx.mark_non_differentiable(
                *[output[i] for i in op.results_without_gradient(needs_grad)]
            )
            sources = self.saved_sources[self._key(ctx.needs_grad, ctx.count, settings)]
            available = (*self.flatten(inputs), *output)
            ctx.save_for_backward(*[None if at is None else available[at] for at in sources])

        def backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
            if torch.is_grad_enabled():  # create_graph=True
                refuse_double_backward(name)
            came, saved_tensors = list(grads[: self.results]), list(ctx.saved_tensors)
            flat = self.call_registered_backward(
                came, saved_tensors, ctx.settings, ctx.count, ctx.needs_grad
            )
            return self.unflatten(flat, ctx.count)

        def double_backward(ctx: Any, *grads: Any) -> None:
            refuse_double_backward(name)

        register_autograd(f"vlm_fast::{name}", backward, setup_context=setup, lib=LIBRARY)

        def of_each(info: Any, dims: Any, grads: Any, saved_tensors: Any, **keywords: Any) -> Any:
            """The backward under vmap (batched gradients): one backward per sample."""

            def part(i: int, values: Any, dims: Any) -> list[Tensor | None]:
                pairs = zip(values, dims, strict=True)
                return [v if dim is None else v.select(dim, i) for v, dim in pairs]

            made = [
                self.registered_backward(
                    part(i, grads, dims[0]), part(i, saved_tensors, dims[1]), **keywords
                )
                for i in range(info.batch_size)
            ]
            stacked = [torch.stack(parts) for parts in zip(*made, strict=True)]
            return stacked, [0] * len(stacked)

        register_autograd(f"vlm_fast::{backward_name}", double_backward, lib=LIBRARY)
        register_vmap(f"vlm_fast::{backward_name}", of_each, lib=LIBRARY)
        return getattr(torch.ops.vlm_fast, name).default

    def call_registered_backward(
        self,
        grads: list[Tensor],
        saved_tensors: list[Any],
        settings: Any,
        count: int,
        needs_grad: Any,
    ) -> tuple[Tensor | None, ...]:
        """The flat gradients, of which the registered op returns only the new tensors."""

        def made_of(grads: list[Tensor], saved_tensors: list[Any]) -> list[Tensor]:
            made: list[Tensor] = self.registered_backward(
                grads, saved_tensors, **settings, list_length=count, needs_grad=list(needs_grad)
            )
            return made

        made = (
            in_each(made_of, grads, saved_tensors)
            if is_batched(grads)
            else made_of(grads, saved_tensors)
        )
        sources = self.backward_sources[self._key(needs_grad, count, settings)]
        available = (*grads, *saved_tensors, *made)
        return tuple(None if at is None else available[at] for at in sources)

    def _register_for_script(self, op: Any) -> None:
        """Register an overload for torch.jit.script, which calls the op.

        A saved program needs ``import vlm_fast`` before it is loaded.
        """
        LIBRARY.define(script_schema(f"{self.name}.script", op.__signature__, self.results))
        LIBRARY.impl(f"{self.name}.script", op, "CompositeImplicitAutograd")
        _register_builtin(op, f"vlm_fast::{self.name}")


def _share_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata
