"""Models of releases to come: what is not understood is left alone, with a reason, or is equal."""

import functools
import os
import types
import warnings

import pytest
import torch
from torch import nn

import vlm_fast
from vlm_fast.patching import image_token_merge

IMAGE, VIDEO, HIDDEN = 95, 96, 4
IDS = torch.tensor([[5, IMAGE, IMAGE, 7, VIDEO], [IMAGE, 94, VIDEO, VIDEO, 96 + 1]])


class Model(nn.Module):
    """As transformers writes it today."""

    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(image_token_id=IMAGE, video_token_id=VIDEO)
        self.embed = nn.Embedding(99, HIDDEN)

    def get_input_embeddings(self):
        return self.embed

    def get_placeholder_mask(self, input_ids, inputs_embeds, image_features):
        if input_ids is None:
            number = torch.tensor(self.config.image_token_id, dtype=torch.long)
            mask = (inputs_embeds == self.get_input_embeddings()(number)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        tokens = mask.sum()
        mask = mask.unsqueeze(-1).to(inputs_embeds.device)
        if tokens * inputs_embeds.shape[-1] != image_features.numel():
            raise ValueError(f"Image features and image tokens do not match, tokens: {tokens}")
        return mask

    def forward(self, input_ids, features, embeds=None):
        embeds = self.embed(input_ids) if embeds is None else embeds
        mask = self.get_placeholder_mask(input_ids, inputs_embeds=embeds, image_features=features)
        return embeds.masked_scatter(mask, features)


# ---- methods of other words and other meanings ----


class Expanded(Model):
    def get_placeholder_mask(self, input_ids, inputs_embeds, image_features):
        mask = (input_ids == self.config.image_token_id).unsqueeze(-1).expand_as(inputs_embeds)
        if inputs_embeds[mask].numel() != image_features.numel():
            raise ValueError("do not match")
        return mask


class TokenIsGiven(Model):
    def get_placeholder_mask(self, input_ids, inputs_embeds, features, token_id):
        mask = (input_ids == token_id).unsqueeze(-1)
        if mask.sum() * inputs_embeds.shape[-1] != features.numel():
            raise ValueError("do not match")
        return mask

    def forward(self, input_ids, features):
        embeds = self.embed(input_ids)
        mask = self.get_placeholder_mask(input_ids, embeds, features, self.config.image_token_id)
        return embeds.masked_scatter(mask, features)


class Renamed(Model):
    def get_placeholder_mask(self, ids, embeds, image_features):
        mask = (ids == self.config.image_token_id).unsqueeze(-1)
        if mask.sum() * embeds.shape[-1] != image_features.numel():
            raise ValueError("do not match")
        return mask

    def forward(self, input_ids, features):
        embeds = self.embed(input_ids)
        mask = self.get_placeholder_mask(input_ids, embeds=embeds, image_features=features)
        return embeds.masked_scatter(mask, features)


class OneMoreArgument(Model):
    def get_placeholder_mask(self, input_ids, inputs_embeds, image_features, where=None):
        return (input_ids == self.config.image_token_id).unsqueeze(-1)


class AnyArguments(Model):
    def get_placeholder_mask(self, input_ids, inputs_embeds, image_features=None, **more):
        return (input_ids == self.config.image_token_id).unsqueeze(-1)


class OtherId(Model):
    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(image_placeholder=IMAGE)

    def get_placeholder_mask(self, input_ids, inputs_embeds, image_features):
        return (input_ids == self.config.image_placeholder).unsqueeze(-1)


class TwoDimensions(Model):
    def get_placeholder_mask(self, input_ids, inputs_embeds, image_features):
        mask = input_ids == self.config.image_token_id
        if mask.sum() * inputs_embeds.shape[-1] != image_features.numel():
            raise ValueError("do not match")
        return mask

    def forward(self, input_ids, features):
        embeds = self.embed(input_ids)
        mask = self.get_placeholder_mask(input_ids, embeds, features)
        return embeds.masked_scatter(mask[..., None], features)


class Negated(Model):
    def get_placeholder_mask(self, input_ids, inputs_embeds, image_features):
        mask = (input_ids == self.config.image_token_id).unsqueeze(-1)
        if mask.sum() * inputs_embeds.shape[-1] != image_features.numel():
            raise ValueError("do not match")
        return ~mask

    def forward(self, input_ids, features):
        embeds = self.embed(input_ids)
        return embeds.masked_scatter(
            ~self.get_placeholder_mask(input_ids, embeds, features), features
        )


class Integers(Negated):
    def get_placeholder_mask(self, input_ids, inputs_embeds, image_features):
        mask = (input_ids == self.config.image_token_id).unsqueeze(-1)
        if mask.sum() * inputs_embeds.shape[-1] != image_features.numel():
            raise ValueError("do not match")
        return mask.to(torch.long)

    def forward(self, input_ids, features):
        embeds = self.embed(input_ids)
        mask = self.get_placeholder_mask(input_ids, embeds, features)
        return embeds.masked_scatter(mask == 1, features)


class Shifted(Model):
    """The first placeholder of a row is no place."""

    def get_placeholder_mask(self, input_ids, inputs_embeds, image_features):
        mask = input_ids == self.config.image_token_id
        mask[:, 1:] = mask[:, 1:] & (input_ids[:, :-1] == self.config.image_token_id)
        if mask.sum() * inputs_embeds.shape[-1] != image_features.numel():
            raise ValueError("do not match")
        return mask.unsqueeze(-1)


class EitherId(Model):
    def get_placeholder_mask(self, input_ids, inputs_embeds, image_features):
        image, video = self.config.image_token_id, self.config.video_token_id
        mask = (input_ids == image) | (input_ids == video)
        if mask.sum() * inputs_embeds.shape[-1] != image_features.numel():
            raise ValueError("do not match")
        return mask.unsqueeze(-1)


class AtLeast(Model):
    """More features than placeholders are taken."""

    def get_placeholder_mask(self, input_ids, inputs_embeds, image_features):
        mask = (input_ids == self.config.image_token_id).unsqueeze(-1)
        if mask.sum() * inputs_embeds.shape[-1] > image_features.numel():
            raise ValueError("do not match")
        return mask


class Uncounted(Model):
    def get_placeholder_mask(self, input_ids, inputs_embeds, image_features):
        return (input_ids == self.config.image_token_id).unsqueeze(-1)


class InAList(Model):
    def get_placeholder_mask(self, input_ids, inputs_embeds, image_features):
        mask = (input_ids == self.config.image_token_id).unsqueeze(-1)
        if mask.sum() * inputs_embeds.shape[-1] != image_features.numel():
            raise ValueError("do not match")
        return [mask]

    def forward(self, input_ids, features):
        embeds = self.embed(input_ids)
        (mask,) = self.get_placeholder_mask(input_ids, embeds, features)
        return embeds.masked_scatter(mask, features)


class InATuple(InAList):
    def get_placeholder_mask(self, input_ids, inputs_embeds, image_features):
        mask = (input_ids == self.config.image_token_id).unsqueeze(-1)
        if mask.sum() * inputs_embeds.shape[-1] != image_features.numel():
            raise ValueError("do not match")
        return (mask,)


class ManyIds(Model):
    """What was a number is a list: the method cannot be asked as it was."""

    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(image_token_id=[IMAGE])

    def get_placeholder_mask(self, input_ids, inputs_embeds, image_features):
        mask = (input_ids == self.config.image_token_id[0]).unsqueeze(-1)
        if mask.sum() * inputs_embeds.shape[-1] != image_features.numel():
            raise ValueError("do not match")
        return mask


class WithInnerFunctions(Model):
    def get_placeholder_mask(self, input_ids, inputs_embeds, image_features):
        find = lambda number: (input_ids == number).unsqueeze(-1)  # noqa: E731
        return find(self.config.image_token_id)


class Compiled:
    """A method that is no function."""

    def __get__(self, model, kind):
        return self if model is None else functools.partial(Model.get_placeholder_mask, model)


class WithoutCode(Model):
    get_placeholder_mask = Compiled()


# ---- forwards that do other things with the mask ----


class Adds(Model):
    def forward(self, input_ids, features):
        embeds = self.embed(input_ids)
        mask = self.get_placeholder_mask(input_ids, embeds, features).expand_as(embeds)
        return embeds.masked_scatter(mask, embeds[mask] + features.reshape(-1))


class Expands(Model):
    def forward(self, input_ids, features):
        embeds = self.embed(input_ids)
        mask = self.get_placeholder_mask(input_ids, embeds, features).expand(-1, -1, HIDDEN)
        return embeds.masked_scatter(mask, features)


class Selects(Model):
    def forward(self, input_ids, features):
        embeds = self.embed(input_ids)
        mask = self.get_placeholder_mask(input_ids, embeds, features)
        if features.ndim > 9:
            return embeds.masked_scatter(mask, features)
        places = mask.squeeze(-1).nonzero(as_tuple=True)
        return embeds.index_put(places, features.view(-1, HIDDEN)[: len(places[0])])


class Moves(Model):
    def forward(self, input_ids, features):
        embeds = self.embed(input_ids)
        mask = self.get_placeholder_mask(input_ids, embeds, features)
        mask = mask.to(embeds.device)
        return embeds.masked_scatter(mask, features)


class Flat(Model):
    def forward(self, input_ids, features):
        embeds = self.embed(input_ids)
        mask = self.get_placeholder_mask(input_ids, embeds, features)
        return embeds.masked_scatter(mask, features.flatten())


class AllAlone(Model):
    get_placeholder_mask = None

    def forward(self, input_ids, features):
        mask = (input_ids == self.config.image_token_id).unsqueeze(-1)
        return self.embed(input_ids).masked_scatter(mask, features)


SERVED = {Model, Expanded, TokenIsGiven, Moves, Flat}
EQUAL = {Expands, Selects}  # merged plainly, and counted
SKIPPED = {
    Renamed: "takes ids, embeds, image_features",
    OneMoreArgument: "takes input_ids, inputs_embeds, image_features, where",
    AnyArguments: "takes input_ids, inputs_embeds, image_features and more",
    OtherId: "uses image_placeholder",
    TwoDimensions: "gives no masks of rows",
    Negated: "gives masks that are not those of one id",
    Integers: "gives masks that are not those of one id",
    Shifted: "gives masks that are not those of one id",
    EitherId: "gives masks that are not those of one id",
    AtLeast: "does not count image_features",
    Uncounted: "does not count image_features",
    InAList: "gives no masks of rows",
    InATuple: "gives no masks of rows",
    ManyIds: "cannot be asked: TypeError",
    WithInnerFunctions: "has functions inside",
    WithoutCode: "cannot be asked: AttributeError",
    Adds: "its forward expands the mask",
    AllAlone: "its forward merges by itself",
}
ROWS = {Shifted: 2, EitherId: 6, AtLeast: 5}  # of features; others have three


def run(model, rows):
    """What it gives, and gradients of its features and its embeddings."""
    torch.manual_seed(0)
    features = torch.randn(rows, HIDDEN, requires_grad=True)
    merged = model(IDS, features)
    wanted = [features, model.embed.weight]
    return [merged, *torch.autograd.grad(merged.square().sum(), wanted, allow_unused=True)]


@pytest.mark.parametrize("kind", [*SERVED, *EQUAL, *SKIPPED], ids=lambda kind: kind.__name__)
def test_served_or_equal_or_skipped(kind):
    model, rows = kind(), ROWS.get(kind, 3)
    before = run(model, rows)
    with warnings.catch_warnings(record=True):
        report = vlm_fast.patch(model)
    vlm_fast.stats(reset=True)
    for ours, theirs in zip(run(model, rows), before, strict=True):
        assert type(ours) is type(theirs)
        assert ours is None or torch.equal(ours, theirs)
    merges = vlm_fast.stats().get("merge_image_tokens", {}).get("fast", 0)
    assert merges == (kind in SERVED)
    if kind in SKIPPED:
        assert SKIPPED[kind] in report.skipped[""] and not report.patched
    else:
        assert report.patched == {"": f"{kind.__name__} by FusedMerge"} and not report.skipped


@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("kind", [*SERVED, *EQUAL], ids=lambda kind: kind.__name__)
def test_a_wrong_count_raises_wherever_the_mask_goes(kind, rows, monkeypatch):
    """On the host in the model's words; on CUDA on the device, by whoever sees the mask first."""
    model = kind()
    with pytest.raises(ValueError, match="do not match"):
        run(model, rows)
    vlm_fast.patch(model)
    with pytest.raises(ValueError, match="do not match"):
        run(model, rows)
    monkeypatch.setattr(image_token_merge, "_would_wait", lambda tensor: True)
    where = "merge_image_tokens: image_" if kind in SERVED else "get_placeholder_mask: "
    with pytest.raises(ValueError, match=f"{where}features has {rows} rows, expected 3"):
        run(model, rows)
    run(model, 3)


def test_features_that_are_no_rows_are_named_on_the_host():
    model = Model()
    vlm_fast.patch(model)
    with pytest.raises(ValueError, match="do not match"):
        model(IDS, torch.randn(7))


def test_ids_of_a_config_may_change():
    model = Model()
    vlm_fast.patch(model)
    model.config.image_token_id = 94
    theirs = Model()
    theirs.config.image_token_id, theirs.embed = 94, model.embed
    for ours, expected in zip(run(model, 1), run(theirs, 1), strict=True):
        assert torch.equal(ours, expected)
    assert run(model, 1)[1].abs().sum() > 0


def test_everything_but_the_merge_sees_a_plain_tensor():
    model = Model()
    vlm_fast.patch(model)
    embeds = model.embed(IDS)
    mask = model.get_placeholder_mask(IDS, embeds, torch.zeros(3, HIDDEN))
    assert isinstance(mask, image_token_merge.PlaceholderMask)
    assert isinstance(mask.to("cpu"), image_token_merge.PlaceholderMask)
    others = [mask[..., 0], mask | mask, ~mask, mask.sum(), mask.to(torch.float), embeds.to(mask)]
    others += [torch.where(mask, embeds, 0.0), torch.cat([mask, mask]), embeds.masked_fill(mask, 0)]
    assert {type(other) for other in others} == {torch.Tensor}
    assert type(model.get_placeholder_mask(IDS, embeds, image_features=None)) is torch.Tensor


def test_found_by_their_embeddings_and_merged():
    model, features = Model(), torch.randn(3, HIDDEN)
    before = model(IDS, features)
    vlm_fast.patch(model)
    assert torch.equal(model(None, features, model.embed(IDS)), before)
    assert vlm_fast.stats()["merge_image_tokens"]["fast"] == 1
    with pytest.raises(ValueError, match="do not match"):
        model(None, features[1:], model.embed(IDS))


SWITCH = "TRANSFORMERS_DISABLE_TORCH_CHECK"


def torch_compilable_check(condition, message):
    if os.getenv(SWITCH, "0") != "1" and not condition:
        raise ValueError(message)


class Checks(Model):
    def get_placeholder_mask(self, input_ids, inputs_embeds, image_features):
        mask = (input_ids == self.config.image_token_id).unsqueeze(-1)
        fits = mask.sum() * inputs_embeds.shape[-1] == image_features.numel()
        torch_compilable_check(fits, "do not match")
        return mask


def test_a_class_is_read_with_its_checks_on(monkeypatch):
    """Where they are turned off, the host does not check either; the device does all the same."""
    monkeypatch.setenv(SWITCH, "1")
    model = Checks()
    unchecked = run(model, 5)
    assert vlm_fast.patch(model).patched and os.environ[SWITCH] == "1"
    for ours, theirs in zip(run(model, 5), unchecked, strict=True):
        assert torch.equal(ours, theirs)
    monkeypatch.setattr(image_token_merge, "_would_wait", lambda tensor: True)
    with pytest.raises(ValueError, match="image_features has 5 rows, expected 3"):
        run(model, 5)
    monkeypatch.delenv(SWITCH)
    assert vlm_fast.patch(Checks()).patched and SWITCH not in os.environ
