"""Transformers' BLIP-2 models of a few thousand parameters."""

import pytest
import torch

from vlm_fast.training import losses

VISION = dict(
    hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    image_size=8, patch_size=4,
)  # fmt: skip
QFORMER = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    encoder_hidden_size=12, vocab_size=64, max_position_embeddings=32,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
QUERIES = 4


def parts(batch, tokens=6):
    """A retrieval model with a temperature, a head, image features, and padded texts."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config=dict(QFORMER, use_qformer_text_input=True),
        num_query_tokens=QUERIES,
        image_text_hidden_size=8,
    )
    model = transformers.Blip2ForImageTextRetrieval(config)
    model.temp = torch.nn.Parameter(torch.tensor(0.07))
    torch.nn.init.normal_(model.query_tokens)
    head = losses.LanguageModelHead(model.embeddings.word_embeddings)
    torch.nn.init.normal_(head.decoder.bias, std=0.1)
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    for row in range(batch):
        mask[row, tokens - row % 2 * 2 :] = 0  # as much text in every pair of rows
    ids = torch.randint(1, 60, (batch, tokens)) * mask
    return model.train(), head, torch.randn(batch, 5, 12), ids, mask


def generative(vision=(), qformer=(), text=(), **options):
    """A stage-2 model on a tiny OPT, with changes to each config."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Blip2Config(
        vision_config=VISION | dict(vision),
        qformer_config=QFORMER | dict(qformer),
        text_config=dict(
            model_type="opt", hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            ffn_dim=24, vocab_size=70, max_position_embeddings=40, word_embed_proj_dim=16,
            dropout=0.0,
        ) | dict(text),
        num_query_tokens=QUERIES,
        **options,
    )  # fmt: skip
    model = transformers.Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)
    return model.train()
