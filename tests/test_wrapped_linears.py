"""A linear that does more than its parameters say is called, never read.

Every case: the same wrapping on a patched and on an unpatched projector gives the same output and
gradients, and the reason for the fallback can be read.
"""

import copy
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import vlm_fast
from tests.tiny_llava import llava
from vlm_fast.modules import MLPProjector


def projectors(**options):
    """An unpatched and a patched projector of LLaVA with the same parameters."""
    model = llava(**options)
    plain = copy.deepcopy(model.model.multi_modal_projector)
    vlm_fast.patch(model)
    return plain, model.model.multi_modal_projector


def outputs(projector, x):
    x = x.detach().clone().requires_grad_()
    parameters = [p for p in projector.parameters() if p.requires_grad]
    y = projector(x)
    torch.manual_seed(3)
    grads = torch.autograd.grad(y, [x, *parameters], torch.randn_like(y), allow_unused=True)
    return [y, *grads]


def assert_same(plain, patched, x=None):
    x = torch.randn(3, 5, 48) if x is None else x
    pairs = list(zip(outputs(patched, x), outputs(plain, x), strict=True))
    assert len(pairs) > 1
    for ours, theirs in pairs:
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def assert_fused(projector):
    assert vlm_fast.explain(projector) == {"": None}
    vlm_fast.stats(reset=True)
    with vlm_fast.strict():
        projector(torch.randn(3, 5, 48))
    assert vlm_fast.stats()["mlp"]["fast"] == 1


def assert_falls_back(projector, reason):
    why = vlm_fast.explain(projector)[""]
    assert why is not None and reason in why, why
    with vlm_fast.strict(), pytest.raises(vlm_fast.VlmFastFallbackError, match=r"linear_|act:"):
        projector(torch.randn(3, 5, 48))
    vlm_fast.stats(reset=True)
    projector(torch.randn(3, 5, 48))
    (counts,) = vlm_fast.stats().values()
    assert counts == {"fast": 0, "fallback": {why: 1}}


def wrap(case):
    """A wrapping applied to both projectors; returns them."""
    plain, patched = projectors()
    case(plain)
    case(patched)
    return plain, patched


@pytest.mark.parametrize("bias", [True, False])
def test_plain_is_fused(bias):
    plain, patched = projectors(multimodal_projector_bias=bias)
    assert_same(plain, patched)
    assert_fused(patched)


def test_tensor_hook_on_a_parameter_is_fused_and_fires():
    fired = []
    plain, patched = wrap(lambda p: p.linear_1.weight.register_hook(lambda g: fired.append(1)))
    assert_same(plain, patched)
    assert len(fired) == 2
    assert_fused(patched)


def test_functional_call_is_fused():
    plain, patched = projectors()
    x = torch.randn(3, 5, 48)
    other = {name: p.detach() + 0.1 for name, p in plain.named_parameters()}
    with vlm_fast.strict():
        ours = torch.func.functional_call(patched, other, (x,))
    torch.testing.assert_close(ours, torch.func.functional_call(plain, other, (x,)))


def test_inference_mode_parameters_are_fused():
    plain, patched = projectors()
    with torch.inference_mode():
        for projector in (plain, patched):
            for linear in (projector.linear_1, projector.linear_2):
                linear.weight = nn.Parameter(linear.weight.clone())
        assert patched.linear_1.weight.is_inference()
        x = torch.randn(3, 5, 48)
        torch.testing.assert_close(patched(x), plain(x))
        assert_fused(patched)


def test_lora():
    peft = pytest.importorskip("peft")
    plain, patched = projectors()
    config = peft.LoraConfig(target_modules=["linear_1", "linear_2"], init_lora_weights=False)
    torch.manual_seed(5)
    plain = peft.get_peft_model(plain, config)
    torch.manual_seed(5)
    patched = peft.get_peft_model(patched, config)
    assert_same(plain, patched)
    inner = patched.base_model.model
    assert_falls_back(inner, "peft.tuners.lora")
    y = patched(torch.randn(2, 48)).sum()
    adapters = [p for n, p in patched.named_parameters() if "lora_" in n]
    assert len(adapters) == 4
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(y, adapters))


@pytest.mark.parametrize("saved_modules", [["linear_1"], ["multi_modal_projector"]])
def test_modules_to_save(saved_modules):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=saved_modules)
    plain, patched = llava(), llava()
    vlm_fast.patch(patched)
    plain, patched = peft.get_peft_model(plain, config), peft.get_peft_model(patched, config)
    x = torch.randn(3, 5, 48)
    ours, theirs = (m.base_model.model.model.multi_modal_projector for m in (patched, plain))
    torch.testing.assert_close(ours(x), theirs(x))
    copies = [p for n, p in patched.named_parameters() if "modules_to_save" in n]
    grads = torch.autograd.grad(ours(x).sum(), [p for p in copies if p.requires_grad])
    assert len(grads) == len(copies) > 0
    (why,) = [
        w for n, w in vlm_fast.explain(patched).items() if n.endswith(("projector", "default"))
    ]
    if saved_modules == ["linear_1"]:
        assert "ModulesToSaveWrapper" in why
    else:
        assert why is None  # the copy that trains is itself a patched projector


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_fire(kind):
    fired = []

    def register(projector):
        def hook(module, *values):
            fired.append(module)
            if kind == "forward":
                return values[1] * 2
            if kind == "forward_pre":
                return (values[0][0] * 2,)

        getattr(projector.linear_2, f"register_{kind}_hook")(hook)

    plain, patched = wrap(register)
    assert_same(plain, patched)
    assert len(fired) == 2 and fired[0] is patched.linear_2
    assert_falls_back(patched, "linear_2: it has hooks")


def test_global_hook_fires():
    plain, patched = projectors()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, y: y + 1 if isinstance(module, nn.Linear) else None
    )
    try:
        assert_same(plain, patched)
        assert_falls_back(patched, "global module hooks")
    finally:
        handle.remove()
    assert_fused(patched)


def test_hook_on_the_activation_fires():
    plain, patched = wrap(lambda p: p.act.register_forward_hook(lambda m, args, y: y * 3))
    assert_same(plain, patched)
    assert_falls_back(patched, "act: it has hooks")


def test_accelerate_hook():
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubling(hooks.ModelHook):
        def post_forward(self, module, output):
            return output * 2

    plain, patched = wrap(lambda p: hooks.add_hook_to_module(p.linear_1, Doubling()))
    assert_same(plain, patched)
    assert_falls_back(patched, "linear_1: its forward has been replaced")


def test_accelerate_offload():
    accelerate = pytest.importorskip("accelerate")
    plain, patched = projectors()
    accelerate.cpu_offload(patched, execution_device="cpu")
    assert patched.linear_1.weight.is_meta
    x = torch.randn(3, 5, 48)
    with torch.no_grad():
        torch.testing.assert_close(patched(x), plain(x))
    assert_falls_back(patched, "its forward has been replaced")


def test_linear_forward_replaced_for_the_class(monkeypatch):
    right = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: right(self, x) * 2)
    plain, patched = projectors()
    assert_same(plain, patched)
    assert_falls_back(patched, "nn.Linear.forward has been replaced")


def test_weight_norm():
    plain, patched = wrap(lambda p: parametrizations.weight_norm(p.linear_1))
    assert_same(plain, patched)
    assert_falls_back(patched, "is not a plain nn.Linear")


def test_pruning():
    plain, patched = wrap(lambda p: prune.l1_unstructured(p.linear_2, "weight", amount=0.5))
    assert_same(plain, patched)
    assert_falls_back(patched, "linear_2")


def test_tensor_hiding_the_parameter():
    def hide(projector):
        projector.linear_1.__dict__["weight"] = projector.linear_1.weight.detach() * 2

    plain, patched = wrap(hide)
    assert_same(plain, patched)
    assert_falls_back(patched, "hides a parameter")


def test_compiled_children():
    plain, patched = wrap(lambda p: p.linear_1.compile(backend="eager"))
    assert_same(plain, patched)
    assert_falls_back(patched, "compiled on its own")

    plain, patched = projectors()
    patched.linear_1 = torch.compile(patched.linear_1, backend="eager")
    assert_same(plain, patched)
    assert_falls_back(patched, "OptimizedModule is not a plain nn.Linear")


def test_dynamic_quantisation():
    plain, patched = projectors()
    quantise = torch.ao.quantization.quantize_dynamic
    plain, patched = (quantise(p, {nn.Linear}, dtype=torch.qint8) for p in (plain, patched))
    x = torch.randn(3, 5, 48)
    assert torch.equal(patched(x), plain(x))
    assert_falls_back(patched, "quantized.dynamic")


class PackedLinear(nn.Linear):
    """As 4-bit libraries do: the weight is packed bytes, unpacked in forward."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 64, self.bias)


def test_packed_weight():
    def pack(projector):
        linear = projector.linear_1
        linear.__class__ = PackedLinear
        packed = (torch.arange(linear.weight.numel()) % 256).to(torch.uint8)
        linear.weight = nn.Parameter(packed.view_as(linear.weight), requires_grad=False)

    plain, patched = wrap(pack)
    assert_same(plain, patched)
    assert_falls_back(patched, "PackedLinear is not a plain nn.Linear")


def _weight(change):
    def case(projector):
        weight = change(projector.linear_1.weight.detach())
        projector.linear_1.weight = nn.Parameter(weight, requires_grad=False)

    return case


def _bias(change):
    def case(projector):
        projector.linear_2.bias = nn.Parameter(change(projector.linear_2.bias.detach()))

    return case


def _partition(projector):
    weight = projector.linear_1.weight
    weight.data, weight.ds_id = torch.empty(0), 1


# The first call of a (module, reason) warns; every one is counted.
pytestmark = pytest.mark.filterwarnings("ignore::vlm_fast.VlmFastFallbackWarning")

UNUSABLE = {
    "fp8 weight": (_weight(lambda w: w.to(torch.float8_e4m3fn)), "dtype torch.float8"),
    "sparse weight": (_weight(lambda w: w.to_sparse_csr()), "layout torch.sparse_csr"),
    "meta weight": (_weight(lambda w: w.to("meta")), "meta device"),
    "bias of another dtype": (_bias(lambda b: b.to(torch.bfloat16)), "bias differs"),
    "bias of shape (1,)": (_bias(lambda b: b[:1]), "bias has shape (1,)"),
    "ZeRO-3 partition": (_partition, "ZeRO-3"),
}


@pytest.mark.parametrize("case", UNUSABLE, ids=str)
def test_unusable_parameters_behave_as_unpatched(case):
    change, reason = UNUSABLE[case]
    plain, patched = wrap(change)
    why = vlm_fast.explain(patched)[""]
    assert reason in why, why

    def outcome(projector):
        try:
            return projector(torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(0)))
        except Exception as error:  # whatever plain PyTorch raises here
            return type(error)

    ours, theirs = outcome(patched), outcome(plain)
    if case == "meta weight":  # plain PyTorch answers with uninitialised memory
        assert (ours.shape, ours.device) == (theirs.shape, theirs.device)
    elif isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs)
    else:
        assert ours is theirs


def test_instance_forward_is_not_patched_over():
    projector = llava().model.multi_modal_projector
    projector.forward = types.MethodType(lambda self, x: x, projector)
    with pytest.warns(UserWarning, match="its forward has been replaced"):
        report = vlm_fast.patch(projector)
    assert not report.patched


def test_the_module_has_the_same_guard():
    projector = MLPProjector(48, 64)
    x = torch.randn(3, 48)
    expected = projector.linear_2(projector.act(projector.linear_1(x)))
    with vlm_fast.strict():
        torch.testing.assert_close(projector(x), expected)
    projector.linear_1.register_forward_hook(lambda m, args, y: y + 1)
    with pytest.warns(vlm_fast.VlmFastFallbackWarning, match="MLPProjector"):
        assert not torch.allclose(projector(x), expected)
