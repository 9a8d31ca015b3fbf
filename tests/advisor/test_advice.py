"""The advisor: token counts, cost models and the ranking of connectors."""

import dataclasses
import functools
import json

import pytest
import torch
from typer.testing import CliRunner

import vlm_fast
from tests.support.selection import slow_except
from vlm_fast import advisor, ops
from vlm_fast.advisor import connectors, cost_counter, language_model, published_results
from vlm_fast.advisor.connector_modules import DesignPoint, gated_blocks
from vlm_fast.advisor.connectors import CONNECTORS
from vlm_fast.advisor.model_shapes import MODELS
from vlm_fast.cli import advisor_options, main
from vlm_fast.modules import MLPProjector, PooledMLPProjector
from vlm_fast.ops.declaration import OPS, Cost
from vlm_fast.verification import results_files

LLAVA = MODELS["llava-1.5-7b"]
BF16 = torch.bfloat16
pytestmark = pytest.mark.filterwarnings("error")  # a fallback would be counted as another op


def call(*arguments):
    return CliRunner().invoke(main.app, ["advise", *arguments])


def options(scenario="documents", **given):
    return {(o.connector, o.seen_tokens): o for o in vlm_fast.advise(scenario, **given).options}


def on_meta(*shape):
    return torch.empty(*shape, device="meta", dtype=BF16)


# ---- cost models ----


@pytest.mark.parametrize("saved", ["all", "preactivation", "input"])
def test_mlp_cost_equals_op_cost(saved):
    work = connectors.connector_cost(DesignPoint(LLAVA, "mlp", 576, prompts=2, saved=saved))
    weights = [on_meta(4096, 1024), on_meta(4096), on_meta(4096, 4096), on_meta(4096)]
    assert work.cost == ops.mlp.cost_of(on_meta(2, 576, 1024), *weights, saved=saved)
    assert work.parameters == sum(w.numel() for w in weights)
    z = 2 * 576 * 4096 * 2
    assert work.saved_bytes == {"all": 2 * z, "preactivation": z, "input": 0}[saved]


def test_token_merging_cost_is_rounds_plus_mlp_on_kept_tokens():
    x, size, parts = on_meta(1, 576, 1024), None, []
    for _ in range(2):
        r = x.shape[1] // 2
        match = ops.bipartite_match(x, r=r)
        parts.append(ops.bipartite_match.cost_of(x, r=r))
        parts.append(ops.merge_tokens.cost_of(x, match, size))
        x, size = ops.merge_tokens(x, match, size)
    weights = [on_meta(4096, 1024), on_meta(4096), on_meta(4096, 4096), on_meta(4096)]
    parts.append(ops.mlp.cost_of(x, *weights))
    found = connectors.connector_cost(DesignPoint(LLAVA, "merge", 144)).cost
    assert found == functools.reduce(cost_counter.add_costs, parts)


def test_aten_cost_matches_torch_flop_counter_and_views_are_free():
    work = cost_counter.count_cost(
        lambda: torch.nn.Linear(8, 4, bias=False),
        lambda: (torch.randn(3, 8, requires_grad=True).view(3, 8),),
    )
    x, w, y = 3 * 8 * 4, 8 * 4 * 4, 3 * 4 * 4
    assert work.cost == Cost(2 * 3 * 8 * 4, x + w + y, 2 * 2 * 3 * 8 * 4, 2 * (x + w + y))


def test_cost_of_pooling_before_second_linear():
    work = cost_counter.count_cost(
        lambda: PooledMLPProjector(64, 96, stride=2),
        lambda: (torch.randn(1, 16, 64, requires_grad=True),),
    )
    gemms = 2 * 16 * 64 * 96 + 2 * 4 * 96 * 96
    pool = ops.spatial_pool.cost_of(
        torch.empty(1, 16, 96, device="meta"), height=4, width=4, stride=2
    )
    assert work.cost.forward_flops == gemms + pool.forward_flops


def test_saved_bytes_match_a_real_training_step():
    from vlm_fast.devtools.memory import saved_bytes

    module = MLPProjector(64, 96, saved="all")
    x = torch.randn(2, 16, 64, requires_grad=True)
    kept = saved_bytes(lambda: module(x), [x, *module.parameters()])
    counted = cost_counter.count_cost(
        lambda: MLPProjector(64, 96, saved="all"),
        lambda: (torch.randn(2, 16, 64, requires_grad=True),),
    )
    assert counted.saved_bytes == kept > 0


@pytest.mark.parametrize("name", slow_except(list(MODELS)[:2], MODELS))
def test_cost_exists_for_each_connector_and_model(name):
    model = MODELS[name]
    assert model.connector in CONNECTORS
    assert CONNECTORS[model.connector].token_counts(model)
    deep = {"qformer", "resampler", "gated"}  # those of LLaVA are counted elsewhere
    for connector in CONNECTORS.values():
        for tokens in [] if connector.name in deep else connector.token_counts(model)[:1]:
            point = DesignPoint(model, connector.name, tokens, text=4)
            assert connectors.connector_cost(point).parameters > 0


@pytest.mark.parametrize(
    ("name", "connector", "tokens", "reason"),
    [
        ("llava-1.5-7b", "merge", 575, None),
        ("llava-1.5-7b", "merge", 576, "gives 1 to 575 tokens"),
        ("llava-1.5-7b", "pool", 288, "gives 144 or 64 or 36 or 16 or 9 tokens, not 288"),
        ("llava-1.5-7b", "qformer", 0, "gives 1 to 576 tokens"),
        ("blip2-opt-2.7b", "qformer", 257, None),  # the CLS token is included
        ("llama-3.2-11b-vision", "merge", 33, "as many tokens of each of 4 tiles"),
        ("llama-3.2-11b-vision", "anyres", 32000, "suits no grid"),
    ],
)
def test_valid_token_counts_per_connector(name, connector, tokens, reason):
    found = CONNECTORS[connector].why_not(MODELS[name], tokens)
    assert found is None if reason is None else reason in found
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            connectors.connector_cost(DesignPoint(MODELS[name], connector, tokens))


def test_model_shapes_match_transformers_default_configs():
    transformers = pytest.importorskip("transformers")
    llama = transformers.LlavaConfig().text_config
    vicuna = LLAVA.language
    assert (vicuna.hidden, vicuna.layers, vicuna.heads, vicuna.kv_heads, vicuna.intermediate) == (
        llama.hidden_size, llama.num_hidden_layers, llama.num_attention_heads,
        llama.num_key_value_heads, llama.intermediate_size,
    )  # fmt: skip
    mllama = transformers.MllamaConfig().text_config
    shape = MODELS["llama-3.2-11b-vision"]
    crossing = len(mllama.cross_attention_layers)
    assert shape.language.layers == mllama.num_hidden_layers - crossing
    assert gated_blocks(shape) == crossing
    assert shape.tower.width == transformers.MllamaConfig().vision_config.vision_output_dim
    eva = transformers.Blip2Config().vision_config
    tower = MODELS["blip2-opt-2.7b"].tower
    assert (tower.width, tower.layers, tower.intermediate, tower.side) == (
        eva.hidden_size, eva.num_hidden_layers, eva.intermediate_size,
        eva.image_size // eva.patch_size,
    )  # fmt: skip


def test_language_model_cost_matches_its_layers():
    vicuna = LLAVA.language
    assert language_model.key_value_bytes(vicuna, BF16) == 2 * 32 * 32 * 128 * 2
    matrices = 4 * 4096**2 + 3 * 4096 * 11008
    assert language_model.prefill_flops(vicuna, 10) == 32 * (
        2 * 10 * matrices + 4 * 10 * 10 * 4096
    )  # attention only:
    assert language_model.attention_flops(vicuna, 10) == 32 * 4 * 10 * 10 * 4096
    norms = 2 * 4096
    assert language_model.language_parameters(vicuna) == 32 * (matrices + norms) + 2 * 32064 * 4096


def test_timed_layer_is_causal():
    small = advisor.LanguageModel(
        hidden=16, layers=1, heads=4, kv_heads=2, head_dim=4, intermediate=24, vocabulary=8,
        context=16,
    )  # fmt: skip
    layer, x = language_model.LanguageLayer(small), torch.randn(1, 5, 16)
    changed = x.clone()
    changed[:, 3] += 1
    one, other = layer(x), layer(changed)
    assert torch.equal(one[:, :3], other[:, :3]) and not torch.equal(one[:, 3:], other[:, 3:])


# ---- advice ----


def test_remaining_text_tokens_in_context():
    found = options(context=4096)
    assert found["mlp", 576].text_tokens_left == 3520
    assert found["qformer", 32].text_tokens_left == 4064
    assert found["anyres", 2880].text_tokens_left == 1216
    assert found["gated", 64].text_tokens_left == 4096
    assert found["gated", 64].visual_tokens == 0
    assert found["qformer", 32].compression == 18.0


def test_option_figures_match_cost_models():
    for option in options("dialogue").values():
        point = DesignPoint(LLAVA, option.connector, option.seen_tokens, images=8, text=256)
        assert option.cost == connectors.connector_cost(point, BF16).cost
        sequence = 8 * option.visual_tokens + 256
        assert option.prefill_flops == language_model.prefill_flops(LLAVA.language, sequence)
        beside = 0 if option.visual_tokens else 8 * (2 * 8 * 64 * 4096 * 2)
        assert option.key_value_bytes == sequence * 524288 + beside


@pytest.mark.parametrize(
    ("scenario", "first", "given"),
    [
        ("documents", "anyres", {}),
        ("documents", "mlp", {"context": 2048}),  # no room for 2880
        ("concurrency", "qformer", {}),
        ("dialogue", "gated", {}),
        ("iteration", "linear", {}),
    ],
)
def test_ranking_order(scenario, first, given):
    found = vlm_fast.advise(scenario, **given)
    assert found.best.connector == first
    allowed = [o for o in found.options if not o.infeasible]
    order = advisor.advice.SCENARIOS[scenario].order
    assert list(map(order, allowed)) == sorted(map(order, allowed))


def test_invalid_options_rank_last_with_reason():
    found = vlm_fast.advise("documents", context=2048, memory=20 * 10**9, requests=32)
    whys = [o.infeasible for o in found.options]
    assert whys == sorted(whys, key=bool)
    reasons = {o.connector: o.infeasible for o in found.options}
    assert reasons["anyres"].startswith("1 x 2880 visual tokens leave 0 of 2048")
    assert "GB of keys and values of 32 requests" in reasons["mlp"]
    assert reasons["qformer"] is None
    for option in found.options:
        fits = option.most_requests >= 32 and option.text_tokens_left >= 256
        assert fits == (option.infeasible is None)
    assert vlm_fast.advise(memory=10**9).best is None


def test_reasons_contain_figures():
    found = options("documents", context=4096)
    assert "all 576 patches reach the language model" in found["mlp", 576].reasons_for
    assert any("576 patches become 32 (18x)" in r for r in found["qformer", 32].reasons_against)
    assert any("1216 of 4096" in r for r in found["anyres", 2880].reasons_against)
    assert "what LLaVA-1.5-7B was published with" in found["mlp", 576].reasons_for


def test_measured_figures_name_machine_and_source():
    row = {"part": "projector, forward", "state": "after", "median": 2e-3, "lower": 1e-3,
           "upper": 3e-3}  # fmt: skip
    now = {name: results_files.sources(OPS[name]) for name in CONNECTORS["mlp"].ops}
    llava = {"model": "LLaVA", "dtype": "float32", "rows": [row]}
    result = {"machine": "M", "sources": now, "models": {"llava": llava}}
    (new,) = published_results.measurements(CONNECTORS["mlp"], LLAVA, [result])
    assert str(new) == (
        "LLaVA: projector, forward: 2 ms (1-3), float32, measured on M, at this source"
    )
    (old,) = published_results.measurements(CONNECTORS["mlp"], LLAVA, [{**result, "sources": {}}])
    assert str(old).endswith("at an older source")
    assert published_results.measurements(CONNECTORS["mlp"], MODELS["idefics-9b"], [result]) == []
    assert published_results.measurements(CONNECTORS["qformer"], LLAVA, [result]) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scenario": "cooking"}, "scenario is 'cooking', expected one of documents"),
        ({"model": "gpt"}, "no model shape is called 'gpt'; there are llava-1.5-7b"),
        ({"connectors": ["glue"]}, "connectors is 'glue', expected one of linear"),
        ({"images": 0}, "images is 0, expected 1 or more"),
        ({"memory": -1}, "memory is -1"),
    ],
)
def test_invalid_arguments_raise(given, message):
    with pytest.raises(ValueError, match=message):
        vlm_fast.advise(**given)


# ---- the command ----


TWO = ("--connector", "mlp", "--connector", "qformer")


def test_command_prints_table_or_json():
    text = call(
        "--connector", "mlp", "--connector", "qformer", "--context", "4096", "--memory", "24GB"
    ).stdout
    assert text.isascii() and "3520" in text and "4064" in text and "+ " in text
    found = json.loads(call(*TWO, "--context", "4096", "--json").stdout)
    assert [o["connector"] for o in found["options"]] == ["mlp", "qformer"]
    option = options(context=4096)["mlp", 576]
    assert found["options"][0]["cost"] == dataclasses.asdict(option.cost)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scenario", "x"), "'x' is not one of 'documents'"),
        (("--model", "x"), "'x' is not one of 'llava-1.5-7b'"),
        (("--connector", "mlp", "--connector", "x"), "'x' is not one of 'linear'"),
        (("--memory", "24 parsec"), "write it like 24GB or 24GiB"),
        (("--images", "0"), "greater than or equal to 1"),
    ],
)
def test_invalid_arguments_are_usage_errors(arguments, message):
    found = call(*arguments)
    assert found.exit_code == main.Exit.USAGE
    assert message in found.output


def test_byte_sizes_are_formatted():
    assert advisor_options.in_bytes("24GB") == 24 * 10**9
    assert advisor_options.in_bytes("1.5 gib") == 3 * 2**29
    assert advisor_options.in_bytes("123") == 123
