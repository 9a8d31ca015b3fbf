"""What users wrap around a linear, or make of it: each changes a child of a module, in place.

`WRAPPINGS` maps a name to the change and to what the reason for the fallback says.
"""

import accelerate.hooks
import peft
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune


class Doubling(accelerate.hooks.ModelHook):
    def post_forward(self, module, output):
        return output * 2


class PackedLinear(nn.Linear):
    """As 4-bit libraries do: the weight is packed bytes, unpacked in forward."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 64, self.bias)


def lora(parent, name):
    config = peft.LoraConfig(target_modules=[name], init_lora_weights=False)
    peft.inject_adapter_in_model(config, parent)


def saved(parent, name):
    setattr(parent, name, peft.utils.ModulesToSaveWrapper(getattr(parent, name), "default"))


def compiled(parent, name):
    setattr(parent, name, torch.compile(getattr(parent, name), backend="eager"))


def quantised(parent, name):
    quantise = torch.ao.quantization.quantize_dynamic
    quantise(parent, {name: torch.ao.quantization.default_dynamic_qconfig}, inplace=True)


def packed(linear):
    linear.__class__ = PackedLinear
    packed = (torch.arange(linear.weight.numel()) % 256).to(torch.uint8)
    linear.weight = nn.Parameter(packed.view_as(linear.weight), requires_grad=False)


def hidden(linear):
    linear.__dict__["weight"] = linear.weight.detach() * 2


def partitioned(linear):
    linear.weight.data, linear.weight.ds_id = torch.empty(0), 1


def of_weight(change):
    def case(linear):
        linear.weight = nn.Parameter(change(linear.weight.detach()), requires_grad=False)

    return case


def of_bias(change):
    def case(linear):
        linear.bias = nn.Parameter(change(torch.full((linear.out_features,), 0.3)))

    return case


def hook(kind):
    """A hook of this kind, that changes what it may."""

    def fired(module, *values):
        module.fired = getattr(module, "fired", 0) + 1
        if kind == "forward":
            return values[1] * 2
        if kind == "forward_pre":
            return (values[0][0] * 2,)

    return lambda linear: getattr(linear, f"register_{kind}_hook")(fired)


def of(change):
    """A change of the linear itself as one of its parent."""
    return lambda parent, name: change(getattr(parent, name))


HOOKS = ("forward", "forward_pre", "full_backward", "full_backward_pre")
WRAPPINGS = {
    "LoRA": (lora, "peft.tuners.lora"),
    "modules_to_save": (saved, "ModulesToSaveWrapper is not a plain nn.Linear"),
    **{f"{kind} hook": (of(hook(kind)), "it has hooks") for kind in HOOKS},
    "accelerate's hook": (
        of(lambda linear: accelerate.hooks.add_hook_to_module(linear, Doubling())),
        "its forward has been replaced",
    ),
    "weight_norm": (of(parametrizations.weight_norm), "is not a plain nn.Linear"),
    "pruning": (
        of(lambda linear: prune.l1_unstructured(linear, "weight", amount=0.5)), "hooks|hides",
    ),
    "a tensor hiding the parameter": (of(hidden), "hides a parameter"),
    "compile()": (of(lambda linear: linear.compile(backend="eager")), "compiled on its own"),
    "torch.compile": (compiled, "OptimizedModule is not a plain nn.Linear"),
    "dynamic quantisation": (quantised, "quantized.dynamic"),
    "packed weight": (of(packed), "PackedLinear is not a plain nn.Linear"),
    "fp8 weight": (of(of_weight(lambda w: w.to(torch.float8_e4m3fn))), "dtype torch.float8"),
    "sparse weight": (of(of_weight(lambda w: w.to_sparse_csr())), "layout torch.sparse_csr"),
    "meta weight": (of(of_weight(lambda w: w.to("meta"))), "meta device"),
    "bias of another dtype": (of(of_bias(lambda b: b.to(torch.bfloat16))), "bias differs"),
    "bias of shape (1,)": (of(of_bias(lambda b: b[:1])), r"bias has shape \(1,\)"),
    "ZeRO-3 partition": (of(partitioned), "ZeRO-3"),
}  # fmt: skip
