"""Several dtypes in one model, with and without autocast: a patched model runs or raises where
the unpatched one does, with the same dtypes."""

import copy
import functools

import pytest
import torch

import vlm_fast
from tests.support.mixed_dtypes import BF16, FP32, arranged, assert_alike, cast, norms, run
from tests.support.selection import REPRESENTATIVES, slow_except
from tests.support.tiny_models import MODELS, build
from vlm_fast import modules

pytestmark = [
    pytest.mark.filterwarnings("ignore::vlm_fast.VlmFastFallbackWarning"),
    pytest.mark.filterwarnings("ignore:no connector of"),
]
every_model = pytest.mark.parametrize("name", slow_except(REPRESENTATIVES, MODELS))
both_ways = pytest.mark.parametrize("dtypes", [(BF16, FP32), (FP32, BF16)], ids=["bf16", "fp32"])


def captured(model, inputs, names):
    """The arguments of the first call of each module."""
    seen = {}

    def look(name):
        return lambda module, args, kwargs: seen.setdefault(name, (args, kwargs)) and None

    hooks = [
        model.get_submodule(n).register_forward_pre_hook(look(n), with_kwargs=True) for n in names
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


def changes(connector):
    """Submodules to put into another dtype: none, all norms, and each one by itself."""
    owners = [[name] for name, m in connector.named_modules() if m._parameters]
    of_norms = [name for name, m in connector.named_modules() if m in norms(connector)]
    return [[], of_norms, *owners] if len(of_norms) > 1 else [[], *owners]


def of_dtypes(connector, dtypes, changed):
    connector = copy.deepcopy(connector).to(dtypes[0])
    own = dict(connector.named_modules())
    for name in changed:
        own[name].to(dtypes[1])
    return connector


@both_ways
@every_model
def test_connectors_in_mixed_dtypes_match_unpatched(name, dtypes):
    model, inputs = build(name)
    fast = copy.deepcopy(model)
    report = vlm_fast.patch(fast)
    names = [name for name, _ in vlm_fast.connectors(fast)] if report.patched else []
    for at, given in captured(model, inputs, names).items():
        for changed in changes(model.get_submodule(at)):
            plain, ours = (of_dtypes(m.get_submodule(at), dtypes, changed) for m in (model, fast))
            exact = copy.deepcopy(plain).double()
            for dtype in dtypes:
                args = cast(given, dtype)
                for autocast in (False, True):
                    run_plain = functools.partial(run, plain, *args, autocast=autocast)
                    wide = cast(args, torch.float64)
                    found = run(ours, *args, autocast=autocast)
                    assert_alike(run_plain, found, functools.partial(run, exact, *wide))


@pytest.mark.parametrize("autocast", slow_except([True], [False, True]), ids=["plain", "autocast"])
@every_model
def test_whole_models_in_mixed_dtypes_match_unpatched(name, autocast):
    model, inputs = build(name)
    names = ["all in fp32"] * autocast
    names += ["connectors in fp32", "connectors in bf16", "norms in fp32", "language model in bf16"]
    for arrangement in names:
        plain, ours, dtype = arranged(model, arrangement)
        given = cast(inputs, dtype)
        run_plain = functools.partial(run, plain, (), given, autocast=autocast)
        exact = copy.deepcopy(plain).float()
        wide = functools.partial(run, exact, (), cast(inputs, FP32))
        assert_alike(run_plain, run(ours, (), given, autocast=autocast), wide)


# ---- the modules ----


def disabled(call):
    with vlm_fast.disabled():
        return call()


def tokens():
    return (torch.randn(2, 16, 24),)


MODULES = {
    "MLPProjector": (lambda: modules.MLPProjector(24, 32), tokens),
    "SequentialProjector": (lambda: modules.SequentialProjector(24, 32, depth=3), tokens),
    "PatchMerger, layer": (lambda: modules.PatchMerger(24, 16), lambda: (torch.randn(16, 24),)),
    "PatchMerger, rms": (
        lambda: modules.PatchMerger(24, 16, norm="rms", norm_after=True, keys="qwen2"),
        lambda: (torch.randn(16, 24),),
    ),
    "PixelShuffleProjector": (lambda: modules.PixelShuffleProjector(24, 32), tokens),
    "PixelShuffleConnector": (lambda: modules.PixelShuffleConnector(24, 32), tokens),
    "PixelShuffleMLP": (lambda: modules.PixelShuffleMLP(24, 32), tokens),
    "RaggedMergerProjector": (
        lambda: modules.RaggedMergerProjector(24, 32),
        lambda: (torch.randn(20, 24), [(4, 4), (2, 2)]),
    ),
    "PooledMLPProjector": (lambda: modules.PooledMLPProjector(24, 32), tokens),
    "PooledNormProjector": (lambda: modules.PooledNormProjector(24, 32, stride=2), tokens),
}


@both_ways
@pytest.mark.parametrize("name", MODULES)
def test_modules_in_mixed_dtypes_match_disabled(name, dtypes):
    """The reference is the module under `vlm_fast.disabled`, which runs no kernel."""
    make, given = MODULES[name]
    torch.manual_seed(0)
    module, args = make(), given()
    ran = 0
    for changed in changes(module):
        ours = of_dtypes(module, dtypes, changed)
        for dtype in dtypes:
            for autocast in (False, True):
                fast = run(ours, cast(args, dtype), {}, autocast=autocast)
                run_ours = functools.partial(run, ours, cast(args, dtype), {}, autocast=autocast)
                exact = copy.deepcopy(ours).double()
                wide = cast(args, torch.float64)
                assert_alike(
                    functools.partial(disabled, run_ours), fast,
                    functools.partial(run, exact, wide, {}),
                )  # fmt: skip
                ran += fast.raised is None
    assert ran > 1


def test_merging_projector_falls_back_where_dtypes_differ():
    projector = modules.MLPProjector(24, 32)
    embeds, mask = torch.randn(1, 20, 32), torch.arange(20)[None] < 16
    x = torch.randn(16, 24)
    for half in (False, True):
        projector.linear_2.to(BF16 if half else FP32)
        with torch.autocast("cpu", BF16):
            merged = projector.merge(embeds, x, mask)
            assert torch.equal(merged[0, :16], projector(x).to(FP32))
    with pytest.raises(RuntimeError, match="dtype"):
        projector.merge(embeds, x, mask)


def test_newline_in_another_dtype():
    model, inputs = build("llava_next")
    model.to(BF16).model.image_newline.data = model.model.image_newline.data.float()
    fast = copy.deepcopy(model)
    vlm_fast.patch(fast)
    with vlm_fast.strict():
        ours = run(fast, (), cast(inputs, BF16))
    exact = copy.deepcopy(model).float()
    plain = functools.partial(run, model, (), cast(inputs, BF16))
    assert_alike(plain, ours, lambda: run(exact, (), inputs))
    assert ours.found["model.image_newline"].dtype is FP32


# ---- the reason ----


def why(model):
    return [reason for reason in vlm_fast.explain(model).values() if reason is not None]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "mistral3"])
def test_explain_uses_input_dtype_of_last_call(name):
    model, inputs = build(name)
    model, ours, dtype = arranged(model, "connectors in fp32")
    given = cast(inputs, dtype)
    assert why(ours) == []
    with pytest.raises(vlm_fast.VlmFastFallbackError, match="its input"), vlm_fast.strict():
        ours(**given)
    ours(**given)
    assert why(ours) == ["norm is torch.float32, its input torch.bfloat16"]
    with torch.autocast("cpu", BF16):
        assert why(ours) == []
    ours.to(BF16)(**given)
    assert why(ours) == []


@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_vl", "mistral3", "aya_vision"])
def test_explain_names_mixed_parameter_dtypes(name):
    _, ours, _ = arranged(build(name)[0], "connectors in fp32")
    for _, connector in vlm_fast.connectors(ours):
        inner = [m for m in connector.modules() if "norm" in type(m).__name__.lower()]
        (inner or [connector.linear_2])[0].to(BF16)
    assert why(ours) and all(
        "torch.float32" in reason and "bfloat16" in reason for reason in why(ours)
    )
    with torch.autocast("cpu", BF16):
        assert why(ours) == []


def test_float64_is_not_cast_under_autocast():
    """Autocast does not cast float64, so no float32 kernel may run."""
    model, inputs = build("qwen2_5_vl")
    plain = model.double()
    norms(plain.model.visual.merger)[0].float()
    ours = copy.deepcopy(plain)
    vlm_fast.patch(ours)
    given = cast(inputs, torch.float64)
    with torch.no_grad(), torch.autocast("cpu", BF16):
        assert torch.equal(ours(**given).logits, plain(**given).logits)
