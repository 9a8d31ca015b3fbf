"""Small gated cross-attention layers as their models call them, for budgets of the host's work."""

import torch

from tests.support import tiny_flamingos
from tests.support.connectors_of_every_kind import Connector
from vlm_fast.patching.media_masks import MediaMask

WORDS, MEDIA = 8, 2


def _sets():
    seen = torch.ones(1, WORDS, MEDIA, dtype=torch.bool)
    return MediaMask.from_bool(seen, seen.shape[:2])


def _for_idefics():
    return dict(
        hidden_states=torch.randn(1, WORDS, 64), attention_mask=None,
        image_hidden_states=torch.randn(1, MEDIA * 6, 40),
        image_attention_mask=torch.zeros(1, 1, WORDS, MEDIA * 6),
        cross_attention_gate=torch.ones(1, WORDS), media_mask=_sets(),
    )  # fmt: skip


def _for_mllama():
    return dict(
        hidden_states=torch.randn(1, WORDS, 64),
        cross_attention_states=torch.randn(1, MEDIA * 16, 64), cross_attention_mask=None,
        attention_mask=None, full_text_row_masked_out_mask=None, media_mask=_sets(),
    )  # fmt: skip


LAYERS = {
    "patched IDEFICS layer": Connector(
        lambda: tiny_flamingos.idefics("sdpa").model.gated_cross_attn_layers[0], _for_idefics, None
    ),
    "patched Llama 3.2 layer": Connector(
        lambda: tiny_flamingos.mllama("sdpa").model.language_model.layers[1], _for_mllama, None
    ),
}  # fmt: skip
