"""Ways to run a model, such as training steps and generation; each returns named results."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import vlm_fast
from vlm_fast.patching.patched_module import PatchedModule
from vlm_fast.verification import tolerance

Inputs = dict[str, Any]
Results = dict[str, Any]
GREEDY = dict(
    max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True,
    output_logits=True,
)  # fmt: skip


def labels(model: Any, inputs: Inputs) -> Inputs:
    if "labels" not in inspect.signature(model.forward).parameters:
        return {}
    ids = inputs["input_ids"]
    return {"labels": ids.masked_fill(ids > 90, -100)}  # placeholders, and what encloses them


def step(model: Any, inputs: Inputs, **options: Any) -> Results:
    """Loss, logits, hidden states and gradients of a training step."""
    model.zero_grad(set_to_none=True)
    output = model(**inputs, **labels(model, inputs), **options)
    loss = output.get("loss")
    if loss is None:
        score = next(t for _, t in tensors(dict(output)) if t.requires_grad)
        loss = (score * tolerance.random_upstream(score)).sum()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return dict(tensors(dict(output))) | gradients


def full_step(model: Any, inputs: Inputs) -> Results:
    return step(model, inputs, output_hidden_states=True)


def forward(model: Any, inputs: Inputs, **options: Any) -> Results:
    with torch.no_grad():
        output = model(**inputs, **options)
    return dict(tensors(output if isinstance(output, tuple) else dict(output)))


def without_a_cache(model: Any, inputs: Inputs) -> Results:
    return forward(model, inputs, use_cache=False)


def as_a_tuple_with_maps(model: Any, inputs: Inputs) -> Results:
    return forward(model, inputs, return_dict=False, output_attentions=True)


def generated(model: Any, inputs: Inputs, **options: Any) -> Results:
    torch.manual_seed(3)
    found = model.generate(**inputs, **GREEDY | options)
    return dict(tensors(found if isinstance(found, Tensor) else dict(found)))


def beams(model: Any, inputs: Inputs) -> Results:
    return generated(model, inputs, num_beams=3, num_return_sequences=2)


def sampled(model: Any, inputs: Inputs) -> Results:
    return generated(model, inputs, do_sample=True, top_k=20)


def generated_from_another_layer(model: Any, inputs: Inputs) -> Results:
    method = getattr(model, "get_image_features", None)
    if method is None or "vision_feature_layer" not in inspect.signature(method).parameters:
        raise NotImplementedError("it has no such option")
    return generated(model, inputs, vision_feature_layer=-1)


def checkpointed(model: Any, inputs: Inputs, reentrant: bool = False) -> Results:
    model = copy.deepcopy(model).train()
    model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    if reentrant:
        model.enable_input_require_grads()
    return step(model, inputs)


def checkpointed_reentrant(model: Any, inputs: Inputs) -> Results:
    return checkpointed(model, inputs, reentrant=True)


def in_bfloat16(model: Any, inputs: Inputs) -> Results:
    return step(copy.deepcopy(model).bfloat16(), converted(inputs, torch.bfloat16))


def with_hooks(names: list[str]) -> Callable[[Any, Inputs], Results]:
    """A forward with hooks on these children, so that they must be called."""

    def run(model: Any, inputs: Inputs) -> Results:
        if not names:
            raise NotImplementedError("no connector has a linear")
        hooks = [
            model.get_submodule(name).register_forward_hook(lambda module, args, y: y * 1.5)
            for name in names
        ]
        try:
            tokens = generated(model, inputs)
            return step(model, inputs) | {f"generated {name}": t for name, t in tokens.items()}
        finally:
            for hook in hooks:
                hook.remove()

    return run


def disabled(model: Any, inputs: Inputs) -> Results:
    with vlm_fast.disabled():
        return full_step(model, inputs)


def disabled_generation(model: Any, inputs: Inputs) -> Results:
    with vlm_fast.disabled():
        return generated(model, inputs)


WAYS: dict[str, Callable[[Any, Inputs], Results]] = {
    "training step": full_step,
    "without a cache": without_a_cache,
    "a tuple, with attention maps": as_a_tuple_with_maps,
    "greedy generation": generated,
    "beams": beams,
    "sampling": sampled,
    "generation from another layer": generated_from_another_layer,
    "gradient checkpointing": checkpointed,
    "reentrant checkpointing": checkpointed_reentrant,
    "bfloat16": in_bfloat16,
    "disabled": disabled,
    "disabled generation": disabled_generation,
}


def hookable(model: nn.Module) -> list[str]:
    """The first linear in the first innermost connector of each class."""
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, PatchedModule) or isinstance(
            module, transformers.PreTrainedModel
        ):
            continue
        if any(isinstance(m, PatchedModule) for m in list(module.modules())[1:]):
            continue
        linears = [n for n, m in module.named_modules() if isinstance(m, nn.Linear)]
        if linears:
            found.setdefault(type(module).__name__, f"{name}.{linears[0]}".lstrip("."))
    return list(found.values())


def tensors(value: Any, path: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested containers and caches, by path."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from tensors(item, f"{path}[{i}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{path}.{key}")
    elif type(value).__module__.startswith("transformers.cache_utils"):
        yield from tensors(vars(value), path)


def converted(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
