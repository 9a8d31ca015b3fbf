"""Small models that merge image features like transformers, or as future releases might.

`SERVED`, `EQUAL` and `SKIPPED` list the expected outcome of patching each model.
"""

import functools
import types

import torch
from torch import nn

IMAGE, VIDEO, HIDDEN = 95, 96, 4
IDS = torch.tensor([[5, IMAGE, IMAGE, 7, VIDEO], [IMAGE, 94, VIDEO, VIDEO, 96 + 1]])


class Model(nn.Module):
    """A model as in current transformers."""

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


class TokenMayBeLeft(TokenIsGiven):
    def get_placeholder_mask(self, input_ids, inputs_embeds, features, token_id=IMAGE):
        mask = (input_ids == token_id).unsqueeze(-1)
        if mask.sum() * inputs_embeds.shape[-1] != features.numel():
            raise ValueError("do not match")
        return mask

    def forward(self, input_ids, features):
        embeds = self.embed(input_ids)
        return embeds.masked_scatter(
            self.get_placeholder_mask(input_ids, embeds, features), features
        )


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
    """The mask omits the first placeholder of a row."""

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
    """Accepts more features than placeholders."""

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
    """The token id is a list instead of a number, so the method cannot be probed."""

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
    """A descriptor in place of a method."""

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


SERVED = (Model, Expanded, TokenIsGiven, Moves, Flat)
EQUAL = (Expands, Selects)  # merged plainly, and counted
SKIPPED = {
    Renamed: "takes ids, embeds, image_features",
    TokenMayBeLeft: "need not be given token_id",
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
    ManyIds: "cannot be probed: TypeError",
    WithInnerFunctions: "has functions inside",
    WithoutCode: "cannot be probed: AttributeError",
    Adds: "its forward expands the mask",
    AllAlone: "its forward merges by itself",
}
ROWS = {Shifted: 2, EitherId: 6, AtLeast: 5}  # of features; others have three
