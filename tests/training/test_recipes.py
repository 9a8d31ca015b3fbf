"""Training recipes on tiny models: trained parts, learning rates, batch sizes, stages."""

import copy
import pickle

import pytest
import torch

import vlm_fast
from tests.support.tiny_blip2 import generative, parts
from tests.support.tiny_flamingos import idefics, idefics_inputs, mllama, mllama_inputs
from tests.support.tiny_llava import llava, prompt
from vlm_fast.training import recipes
from vlm_fast.training.recipes import RECIPES
from vlm_fast.training.recipes.freezing import Frozen, FrozenTower, Skipped


def with_labels(inputs):
    return inputs | {"labels": inputs["input_ids"]}


def retrieval():
    model, _, _, ids, mask = parts(4)
    del model.temp  # the recipe brings its own
    return model, dict(pixel_values=torch.randn(4, 3, 8, 8), input_ids=ids, attention_mask=mask)


def captioned():
    ids = torch.randint(4, 70, (4, 6))
    pixels = torch.randn(4, 3, 8, 8)
    return generative(), dict(
        pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids)
    )


# A recipe, and a model with inputs.
CASES = {
    "llava-stage1": ("llava-stage1", lambda: (llava(), with_labels(prompt()))),
    "llava-stage2": ("llava-stage2", lambda: (llava(), with_labels(prompt()))),
    "blip2-stage1": ("blip2-stage1", retrieval),
    "blip2-stage2": ("blip2-stage2", captioned),
    "idefics": ("flamingo", lambda: (idefics(), with_labels(idefics_inputs()))),
    "mllama": ("flamingo", lambda: (mllama(), with_labels(mllama_inputs()))),
}
LEARNS = {
    "llava-stage1": lambda name: "projector" in name,
    "llava-stage2": lambda name: "vision_tower" not in name,
    "blip2-stage1": lambda name: "vision_model" not in name,
    "blip2-stage2": lambda name: "vision_model" not in name and "language_model" not in name,
    "idefics": lambda name: "perceiver_resampler" in name or "gated_cross" in name,
    "mllama": lambda name: "projector" in name or "layers.1." in name or "layers.3." in name,
}


@pytest.mark.parametrize("case", CASES)
def test_trained_parts_get_gradients_and_the_loss_falls(case):
    name, make = CASES[case]
    model, inputs = make()
    keys = list(model.state_dict())
    vlm_fast.patch(model)
    recipe = RECIPES[name]
    trained = recipe.prepare(model)
    before = copy.deepcopy(model.state_dict())
    optimizer = recipe.optimizer(trained, lr=3e-3)
    schedule = recipe.schedule(optimizer, 10)
    losses = []
    for _ in range(10):
        trained.train()
        optimizer.zero_grad()
        loss = trained(**inputs)["loss"]
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    learns = {n for n, _ in model.named_parameters() if "vision_model" not in n}
    learns = {n for n in learns if LEARNS[case](n)}
    assert learns and {n for n, p in model.named_parameters() if p.requires_grad} == learns
    assert {n for n, p in model.named_parameters() if p.grad is not None} == learns
    assert all(torch.isfinite(torch.tensor(losses))) and losses[-1] < losses[0] * 0.999
    assert list(model.state_dict()) == keys
    after = model.state_dict()
    still = {n for n in keys if torch.equal(before[n], after[n])}
    tower = {n for n in keys if "vision_model" in n or "vision_tower" in n}
    assert tower and tower <= still


@pytest.mark.parametrize("name", ["llava-stage1", "llava-stage2"])
def test_frozen_parts_have_no_graph_and_no_dropout(name):
    model = llava()
    tower, language = model.model.vision_tower, model.model.language_model
    RECIPES[name].prepare(model)
    model.train()
    assert not any(module.training for module in tower.modules())
    assert language.training == (name == "llava-stage2")
    # Embeddings that require gradients, as for checkpointing with adapters.
    tower.embeddings.register_forward_hook(lambda *a: a[2].requires_grad_())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kept = []
        out = tower(prompt()["pixel_values"], output_hidden_states=True)
    assert out.hidden_states[-2].grad_fn is None and not kept
    assert isinstance(tower, FrozenTower)


def test_tower_layers_after_the_feature_layer_are_not_run():
    model = llava()
    keys = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = llava()(**prompt()).logits
    RECIPES["llava-stage2"].prepare(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        ran = []
        for layer in copied.model.vision_tower.encoder.layers:
            layer.mlp.register_forward_hook(lambda m, *_, ran=ran: ran.append(m))
        with torch.no_grad():
            assert torch.equal(copied.eval()(**prompt()).logits, expected)
        assert ran == [copied.model.vision_tower.encoder.layers[0].mlp]
    assert all(torch.equal(tensor, keys[name]) for name, tensor in model.state_dict().items())
    # Reading the output of a skipped layer shows that it was not run.
    assert features(model, -1)[0].isnan().all()
    recipes.unfreeze(model)
    assert not any(isinstance(module, Frozen | Skipped) for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(**prompt()).logits, expected)


def features(model, layer):
    with torch.no_grad():
        return model.model.get_image_features(
            prompt()["pixel_values"], vision_feature_layer=layer,
            vision_feature_select_strategy="default",
        ).pooler_output  # fmt: skip


@pytest.mark.parametrize(
    "layer, unused", [(-1, []), (2, []), (1, [1]), ([0, -2], [1]), (0, [0, 1])]
)
def test_skip_unused_skips_exactly_the_unused_layers(layer, unused):
    model = llava(vision_feature_layer=layer) if isinstance(layer, list) else llava()
    expected = features(model, layer)
    found = recipes.freezing.skip_unused(model.model.vision_tower, layer)
    assert found == [*(f"encoder.layers.{i}" for i in unused), "post_layernorm"]
    assert all(torch.equal(a, b) for a, b in zip(expected, features(model, layer), strict=True))


def dropping_llava():
    model = llava()
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    return "llava-stage1", model, with_labels(prompt()), model.model.language_model.layers


def dropping_blip2():
    """OPT's layers call functional dropout, not a dropout module."""
    model, inputs = captioned()
    layers = model.language_model.model.decoder.layers
    for layer in layers:
        layer.dropout = 0.5
    return "blip2-stage2", model, inputs, layers


@pytest.mark.parametrize("make", [dropping_llava, dropping_blip2])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_frozen_language_model_is_checkpointed_without_dropout(make, checkpointed):
    name, model, inputs, layers = make()
    trained = RECIPES[name].prepare(model)
    if checkpointed:
        trained.gradient_checkpointing_enable({"use_reentrant": False})
    ran = []
    for child in layers[0].children():
        if isinstance(child, torch.nn.LayerNorm) or "norm" in type(child).__name__.lower():
            child.register_forward_pre_hook(lambda *_: ran.append(1))
            break
    gradients = []
    for _ in range(2):
        trained.train()
        trained.zero_grad()
        trained(**inputs)["loss"].backward()
        learning = [p for p in trained.parameters() if p.requires_grad]
        gradients.append(torch.cat([p.grad.flatten() for p in learning]))
    assert torch.equal(*gradients) and gradients[0].any()
    assert len(ran) == (4 if checkpointed else 2)


@pytest.mark.parametrize("case", ["llava-stage1", "llava-stage2", "mllama"])
def test_text_only_batch_gives_zero_gradients(case):
    name, make = CASES[case]
    model, inputs = make()
    plain = copy.deepcopy(model)
    vlm_fast.patch(model)
    RECIPES[name].prepare(model)
    ids = inputs["input_ids"].clamp(min=8)
    loss = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, plain(input_ids=ids, labels=ids).loss)
    loss.backward()
    connector = [
        parameter
        for _, parameter, part in RECIPES[name].parts(model).label_parameters(model)
        if part == "connector"
    ]
    assert connector and all(p.grad is not None and not p.grad.any() for p in connector)
    with torch.no_grad():
        assert model(input_ids=ids).logits.grad_fn is None


def test_batch_size_is_kept_for_any_process_count(monkeypatch):
    recipe = RECIPES["llava-stage1"]
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert recipe.accumulation(16) == 16 and recipe.accumulation(8, 4) == 8
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert recipe.accumulation(16) == 2 and recipe.accumulation(2, batch=32) == 2
    with pytest.raises(ValueError, match=r"a batch of 256 is no multiple of 3 .* 8 processes \(24"):
        recipe.accumulation(3)
    with pytest.raises(ValueError, match="no multiple of 0"):
        recipe.accumulation(0)


@pytest.mark.parametrize("examples, epochs", [(48, 1), (50, 2), (7, 1.5)])
@pytest.mark.parametrize("name", ["llava-stage1", "blip2-stage1"])
def test_training_arguments_match_the_paper_and_step_counts_match_trainer(
    tmp_path, name, examples, epochs
):
    from transformers import Trainer

    recipe = RECIPES[name]
    found = recipe.training_arguments(
        tmp_path, examples, device_batch=2, batch=6, epochs=epochs, use_cpu=True
    )
    assert (found.learning_rate, found.weight_decay) == (recipe.lr, recipe.weight_decay)
    assert (found.adam_beta1, found.adam_beta2) == recipe.betas
    assert found.gradient_accumulation_steps == 3 and not found.ddp_find_unused_parameters
    whole = name == "blip2-stage1"
    assert found.dataloader_drop_last == whole
    model = torch.nn.Linear(1, 1)
    trainer = Trainer(model, found, train_dataset=list(range(examples)))
    steps = trainer.set_initial_training_values(found, trainer.get_train_dataloader())[-1]
    own = recipe.steps(examples, device_batch=2, batch=6, epochs=epochs, whole=whole)
    assert own == steps and found.warmup_steps == recipe.warmup_steps(steps)


def test_schedules_match_the_papers():
    def rates(name, steps):
        recipe = RECIPES[name]
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=recipe.lr)
        schedule = recipe.schedule(optimizer, steps)
        found = []
        for _ in range(steps):
            optimizer.step()
            schedule.step()
            found.append(schedule.get_last_lr()[0])
        return found

    cosine = rates("llava-stage1", 100)
    assert cosine[2] == max(cosine) == 1e-3 and cosine[-1] == pytest.approx(0, abs=1e-9)
    assert RECIPES["blip2-stage2"].warmup_steps(40000) == 2000
    assert rates("blip2-stage2", 100)[-1] == pytest.approx(5e-5)
    assert rates("blip2-stage1", 100)[-1] == pytest.approx(1e-5)
    constant = rates("flamingo", 100)
    assert constant[9] == constant[-1] == 1e-4 and constant[4] == pytest.approx(0.5e-4)


def test_parameter_groups_have_weight_decay_and_learning_rate_of_their_part():
    from dataclasses import replace

    model = idefics(alpha_type="vector")
    recipe = RECIPES["flamingo"]
    recipe.prepare(model)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = recipe.parameter_groups(model)
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    spared = {names[id(p)] for g in groups if not g["weight_decay"] for p in g["params"]}
    assert any("q_proj" in name for name in decayed) and all("alpha" not in n for n in decayed)
    assert any("alpha" in name for name in spared)
    assert not any("resampler" in name or "norm" in name for name in decayed)

    recipe = replace(RECIPES["llava-stage2"], rates={"connector": 1e-4})
    model = recipe.prepare(llava())
    rates = {group["part"]: group["lr"] for group in recipe.parameter_groups(model, lr=4e-5)}
    assert rates == {"connector": pytest.approx(2e-4), "language": pytest.approx(4e-5)}


@pytest.mark.parametrize("name, make", [("llava-stage1", idefics), ("flamingo", llava)])
def test_model_of_another_family_raises_and_is_unchanged(name, make):
    model = make()
    wants = [p.requires_grad for p in model.parameters()]
    with pytest.raises(TypeError, match=f"{name} is given a {type(model).__name__}, of the family"):
        RECIPES[name].prepare(model)
    with pytest.raises(TypeError, match="model is a Linear, expected one of these families"):
        RECIPES[name].prepare(torch.nn.Linear(1, 1))
    assert [p.requires_grad for p in model.parameters()] == wants
    model = generative()
    model.language_model.config.is_encoder_decoder = True
    with pytest.raises(TypeError, match="given a OPTForCausalLM with an encoder, expected"):
        RECIPES["blip2-stage2"].prepare(model)


def test_stage1_head_is_saved_beside_the_model(tmp_path):
    from safetensors.torch import load_file, save_file

    model, inputs = retrieval()
    trained = RECIPES["blip2-stage1"].prepare(model)
    trained(**inputs)["loss"].backward()
    assert trained.temperature.grad.abs() > 0
    trained.save(tmp_path)
    kept = load_file(tmp_path / "stage1_head.safetensors")
    assert {"temperature", "head.decoder.bias", "head.transform.dense.weight"} <= kept.keys()
    save_file(
        trained.state_dict(), tmp_path / "all.safetensors"
    )  # the optimizer accepts no parameter twice
    other = RECIPES["blip2-stage1"].prepare(retrieval()[0])
    for parameter in other.parameters():
        torch.nn.init.ones_(parameter)
    other.load_state_dict(load_file(tmp_path / "all.safetensors"))
    assert other.head.decoder.weight is other.model.embeddings.word_embeddings.weight
    for (name, ours), theirs in zip(trained.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("case", ["llava-stage1", "mllama", "blip2-stage2"])
def test_save_pretrained_weights_load_with_load_state_dict(tmp_path, case):
    """Trainer loads it with load_state_dict when it resumes, and only warns on mismatch."""
    from safetensors.torch import load_file

    name, make = CASES[case]
    model, _ = make()
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert case == "blip2-stage2" or not written.keys() & model.state_dict().keys()
    other, _ = make()
    RECIPES[name].prepare(other)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    result = other.load_state_dict(dict(written), strict=False)
    assert not result.unexpected_keys
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    with pytest.raises(ValueError, match=r"none of the names of \w+; its first is 'else'"):
        other.load_state_dict({"else": torch.zeros(1)}, strict=False)


def test_model_goes_through_all_stages():
    model = llava()
    for name in ("llava-stage1", "llava-stage2", "llava-stage1"):
        RECIPES[name].prepare(model)
        model.train()
        assert model.model.language_model.training == (name == "llava-stage2")
        learning = {n for n, p in model.named_parameters() if p.requires_grad}
        assert learning == {n for n, _ in model.named_parameters() if LEARNS[name](n)}
    assert len(model.model._forward_pre_hooks) == len(model._load_state_dict_pre_hooks) == 1
    recipes.unfreeze(model)
    assert type(model.model.vision_tower) is type(llava().model.vision_tower)


def test_custom_loop_with_accelerate():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    recipe = RECIPES["llava-stage1"]
    trained = recipe.prepare(llava())
    optimizer = recipe.optimizer(trained)
    steps = recipe.steps(12, device_batch=2, batch=4, epochs=2)
    schedule = recipe.schedule(optimizer, steps)
    accumulation = recipe.accumulation(2, batch=4)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model, optimizer = accelerator.prepare(trained, optimizer)
    losses = []
    for _ in range(steps * accumulation):
        with accelerator.accumulate(model):
            model.train()
            loss = model(**with_labels(prompt())).loss
            accelerator.backward(loss)
            optimizer.step()
            if accelerator.sync_gradients:
                schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert (steps, accumulation) == (6, 2) and schedule.get_last_lr()[0] == pytest.approx(0)
    assert losses[-1] < losses[0] and losses[0] == losses[1] != losses[2]
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
