"""Ways in which users wrap or change a linear: each changes a child of a module in place.

`LINEAR_WRAPPERS` maps a name to the change and a pattern of the fallback's reason.
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
    """A linear as in 4-bit libraries: the weight is packed bytes, unpacked in forward."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 64, self.bias)


def add_lora(parent, name):
    config = peft.LoraConfig(target_modules=[name], init_lora_weights=False)
    peft.inject_adapter_in_model(config, parent)


def save_module(parent, name):
    setattr(parent, name, peft.utils.ModulesToSaveWrapper(getattr(parent, name), "default"))


def compile_module(parent, name):
    setattr(parent, name, torch.compile(getattr(parent, name), backend="eager"))


def quantise(parent, name):
    quantise = torch.ao.quantization.quantize_dynamic
    quantise(parent, {name: torch.ao.quantization.default_dynamic_qconfig}, inplace=True)


def pack_weight(linear):
    linear.__class__ = PackedLinear
    packed = (torch.arange(linear.weight.numel()) % 256).to(torch.uint8)
    linear.weight = nn.Parameter(packed.view_as(linear.weight), requires_grad=False)


def hide_weight(linear):
    linear.__dict__["weight"] = linear.weight.detach() * 2


def partition(linear):
    linear.weight.data, linear.weight.ds_id = torch.empty(0), 1


def weight(change):
    def case(linear):
        linear.weight = nn.Parameter(change(linear.weight.detach()), requires_grad=False)

    return case


def bias(change):
    def case(linear):
        linear.bias = nn.Parameter(change(torch.full((linear.out_features,), 0.3)))

    return case


def changing_hook(kind):
    """A change that registers a hook of this kind, which modifies inputs or outputs if it can."""

    def fired(module, *values):
        module.fired = getattr(module, "fired", 0) + 1
        if kind == "forward":
            return values[1] * 2
        if kind == "forward_pre":
            return (values[0][0] * 2,)

    return lambda linear: getattr(linear, f"register_{kind}_hook")(fired)


def on_child(change):
    """Apply a change of a linear to the child of this name."""
    return lambda parent, name: change(getattr(parent, name))


HOOKS = ("forward", "forward_pre", "full_backward", "full_backward_pre")
LINEAR_WRAPPERS = {
    "LoRA": (add_lora, "peft.tuners.lora"),
    "modules_to_save": (save_module, "ModulesToSaveWrapper is not a plain nn.Linear"),
    **{f"{kind} hook": (on_child(changing_hook(kind)), "it has hooks") for kind in HOOKS},
    "accelerate's hook": (
        on_child(lambda linear: accelerate.hooks.add_hook_to_module(linear, Doubling())),
        "its forward has been replaced",
    ),
    "weight_norm": (on_child(parametrizations.weight_norm), "is not a plain nn.Linear"),
    "pruning": (
        on_child(lambda linear: prune.l1_unstructured(linear, "weight", amount=0.5)),
        "hooks|hides",
    ),
    "a tensor hiding the parameter": (on_child(hide_weight), "hides a parameter"),
    "compile()": (on_child(lambda linear: linear.compile(backend="eager")), "compiled on its own"),
    "torch.compile": (compile_module, "OptimizedModule is not a plain nn.Linear"),
    "dynamic quantisation": (quantise, "quantized.dynamic"),
    "packed weight": (on_child(pack_weight), "PackedLinear is not a plain nn.Linear"),
    "fp8 weight": (on_child(weight(lambda w: w.to(torch.float8_e4m3fn))), "dtype torch.float8"),
    "sparse weight": (on_child(weight(lambda w: w.to_sparse_csr())), "layout torch.sparse_csr"),
    "meta weight": (on_child(weight(lambda w: w.to("meta"))), "meta device"),
    "bias of another dtype": (on_child(bias(lambda b: b.to(torch.bfloat16))), "bias differs"),
    "bias of shape (1,)": (on_child(bias(lambda b: b[:1])), r"bias has shape \(1,\)"),
    "ZeRO-3 partition": (on_child(partition), "ZeRO-3"),
}  # fmt: skip
