"""Small connectors of every kind, patched ones and those of `vlm_fast.modules`, with inputs."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers import Gemma3Config, Gemma3TextConfig, InternVLConfig, SiglipVisionConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger

import vlm_fast
from tests.support import reference_flamingo, tiny_flamingos, tiny_llava, tiny_qformers
from tests.support.chain_structures import mlp
from tests.support.randomised_modules import randomised
from vlm_fast import modules
from vlm_fast.modules.parameter_access.remembered import Remembered

QFORMER = {name: size for name, size in tiny_qformers.SMALL.items() if name != "vocab_size"}
GATED = dict(dim=24, dim_visual=12, dim_head=8, heads=2)
RESAMPLER = dict(dim=24, depth=2, dim_head=8, heads=2, num_latents=4)
KEY = "encoder.layer.0.crossattention.attention.key"


class Connector(NamedTuple):
    """A connector.

    Attributes:
        make: builds the module that is patched, or one of `vlm_fast.modules`.
        given: builds its inputs, by name.
        linear: the name of a linear whose parameters are read; None without one.
        norm: the name of a norm whose parameters are read; None without one.
    """

    make: Callable[[], nn.Module]
    given: Callable[[], dict[str, torch.Tensor]]
    linear: str | None
    norm: str | None = None

    def build(self) -> tuple[nn.Module, nn.Module]:
        """The fast module, and the same module that has never run, unpatched if it can be."""
        torch.manual_seed(0)
        fast = randomised(self.make()).eval()
        plain = copy.deepcopy(fast)
        if not type(fast).__module__.startswith("vlm_fast."):
            vlm_fast.patch(fast, strict=True)
        return fast, plain


def _gemma3():
    config = Gemma3Config(
        text_config=Gemma3TextConfig(hidden_size=24), mm_tokens_per_image=4,
        vision_config=SiglipVisionConfig(hidden_size=16, image_size=64, patch_size=8),
    )  # fmt: skip
    return Gemma3MultiModalProjector(config)


def _internvl():
    text = dict(
        model_type="qwen2", hidden_size=24, num_attention_heads=2, num_key_value_heads=2,
        num_hidden_layers=1,
    )  # fmt: skip
    vision = dict(hidden_size=16, num_hidden_layers=1)
    return InternVLMultiModalProjector(InternVLConfig(vision_config=vision, text_config=text))


def _rows(name, *shape):
    return lambda: {name: torch.randn(*shape)}


def _for_qformer():
    return dict(
        query_embeds=torch.randn(2, 5, 48), encoder_hidden_states=torch.randn(2, 7, 40),
        encoder_attention_mask=tiny_qformers.ones_but(2, 7, (1, 4)),
    )  # fmt: skip


def _for_block():
    return dict(x=torch.randn(1, 5, 24), media=torch.randn(1, 2, 3, 12))


CONNECTORS = {
    "patched LLaVA": Connector(
        lambda: tiny_llava.llava().model.multi_modal_projector,
        _rows("image_features", 2, 5, 48), "linear_1",
    ),
    "patched InternVL": Connector(_internvl, _rows("image_features", 2, 5, 64), "linear_2"),
    "patched Sequential": Connector(lambda: mlp(3), _rows("input", 2, 5, 16), "4"),
    "patched Qwen2.5-VL": Connector(
        lambda: Qwen2_5_VLPatchMerger(dim=24, context_dim=16), _rows("x", 8, 16), "mlp.2", "ln_q"
    ),
    "patched Gemma 3": Connector(
        _gemma3, _rows("vision_outputs", 1, 64, 16), None, "mm_soft_emb_norm"
    ),
    "patched BLIP-2": Connector(
        lambda: tiny_qformers.blip2(**tiny_qformers.SMALL), _for_qformer, KEY,
        "encoder.layer.1.attention.output.LayerNorm",
    ),
    "patched IDEFICS": Connector(
        lambda: tiny_flamingos.idefics().model.perceiver_resampler,
        _rows("context", 2, 7, 40), "blocks.0.0.v_proj", "blocks.0.1.ln",
    ),
    "patched Flamingo": Connector(
        lambda: reference_flamingo.GatedCrossAttentionBlock(**GATED), _for_block, "ff.3", "ff.0"
    ),
    "MLPProjector": Connector(
        lambda: modules.MLPProjector(16, 24), _rows("x", 2, 5, 16), "linear_2"
    ),
    "SequentialProjector": Connector(
        lambda: modules.SequentialProjector(16, 24, depth=3), _rows("input", 2, 5, 16), "2"
    ),
    "PatchMerger": Connector(
        lambda: modules.PatchMerger(16, 24, keys="qwen2"), _rows("x", 8, 16), "mlp.0", "ln_q"
    ),
    "PixelShuffleMLP": Connector(
        lambda: modules.PixelShuffleMLP(16, 24), _rows("x", 1, 16, 16), "mlp.fc1"
    ),
    "QFormer": Connector(
        lambda: modules.QFormer(**QFORMER), _for_qformer, KEY,
        "encoder.layer.1.attention.output.LayerNorm",
    ),
    "PerceiverResampler": Connector(
        lambda: modules.PerceiverResampler(**RESAMPLER), _rows("x", 1, 2, 1, 7, 24),
        "layers.0.0.to_kv", "layers.1.1.0",
    ),
    "GatedCrossAttentionBlock": Connector(
        lambda: modules.GatedCrossAttentionBlock(**GATED), _for_block, "ff.1", "attn.norm"
    ),
}  # fmt: skip


def call(module, given):
    found = module(**given)
    found = found[0] if isinstance(found, tuple) else found
    return getattr(found, "last_hidden_state", found)


def called(name):
    """A connector after two calls, its copy that has never run, and inputs."""
    connector = CONNECTORS[name]
    fast, plain = connector.build()
    torch.manual_seed(1)
    given = connector.given()
    for _ in range(2):
        call(fast, given)
    assert any(type(v) is Remembered for m in fast.modules() for v in vars(m).values())
    return fast, plain, given


def results(module, given):
    """The output and the gradients of all parameters, by name."""
    y = call(module, given)
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    gradients = torch.autograd.grad(y, list(named.values()), upstream, allow_unused=True)
    return {"output": y.detach(), **dict(zip(named, gradients, strict=True))}


def assert_close(ours, theirs):
    """Check results and gradients by name; an absent gradient equals zeros."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        found = ours[name]
        if found is None or expected is None:
            assert not any(t.any() for t in (found, expected) if t is not None), name
            continue
        atol = 1e-5 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_alike(fast, plain, given):
    theirs = results(plain, given)
    assert_close(results(fast, given), theirs)
    return theirs["output"]


def fallbacks():
    counts = vlm_fast.stats(reset=True)
    return [reason for count in counts.values() for reason in count["fallback"]]
