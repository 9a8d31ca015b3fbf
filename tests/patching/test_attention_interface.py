"""The attention implementation registered with transformers, against its SDPA attention."""

import types

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import vlm_fast
from vlm_fast.patching.attention_interface import attention_forward

BATCH, HEADS, QUERIES, KEYS, D = 2, 4, 5, 7, 8


def random_tensor(heads=HEADS, tokens=KEYS, d=D, batch=BATCH):
    return torch.randn(batch, heads, tokens, d)


def seen(*shape):
    mask = torch.rand(shape) < 0.6
    mask[..., 0] = True  # every query attends to at least one key
    return mask


def module_of(causal=False, groups=1):
    return types.SimpleNamespace(is_causal=causal, num_key_value_groups=groups, training=True)


def assert_same(query, key, value, mask, module=None, **options):
    module = module or module_of()
    ours, theirs = (
        f(module, query, key, value, mask, **options)[0]
        for f in (attention_forward, sdpa_attention_forward)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    return vlm_fast.stats(reset=True).get("cross_attention", {"fast": 0})["fast"]


MASKS = {
    "none": lambda: None,
    "keys": lambda: seen(BATCH, 1, 1, KEYS),
    "keys of all": lambda: seen(1, 1, 1, KEYS),
    "one key of all": lambda: torch.ones(BATCH, 1, 1, 1, dtype=torch.bool),
    "queries": lambda: seen(BATCH, 1, QUERIES, KEYS),
    "heads": lambda: torch.randn(1, HEADS, QUERIES, KEYS),
    "added": lambda: torch.randn(BATCH, 1, QUERIES, KEYS),
}
OTHER_MASKS = {
    "2-D": lambda: seen(QUERIES, KEYS),
    "2-D, added": lambda: torch.randn(QUERIES, KEYS),
    "3-D": lambda: seen(1, QUERIES, KEYS),
    "3-D of heads": lambda: torch.randn(HEADS, QUERIES, KEYS),
}


@pytest.mark.parametrize("queries", [1, BATCH], ids=["one batch of queries", "one per row"])
@pytest.mark.parametrize("mask", MASKS)
def test_supported_masks_use_the_op(mask, queries):
    query = random_tensor(tokens=QUERIES, batch=queries)
    assert assert_same(query, random_tensor(), random_tensor(), MASKS[mask](), scaling=0.2) == 1


@pytest.mark.parametrize("groups", [1, 2], ids=["", "shared keys"])
@pytest.mark.parametrize("mask", OTHER_MASKS)
def test_unsupported_mask_shapes_use_sdpa(mask, groups):
    keys = HEADS // groups
    given = random_tensor(tokens=QUERIES), random_tensor(keys), random_tensor(keys)
    assert assert_same(*given, OTHER_MASKS[mask](), module_of(groups=groups)) == 0


@pytest.mark.parametrize("width", [3, 16])
@pytest.mark.parametrize("mask", MASKS | OTHER_MASKS)
def test_values_of_another_width_use_sdpa(mask, width):
    made = (MASKS | OTHER_MASKS)[mask]
    assert (
        assert_same(random_tensor(tokens=QUERIES), random_tensor(), random_tensor(d=width), made())
        == 0
    )


@pytest.mark.parametrize("mask", ["none", "keys", "added"])
@pytest.mark.parametrize("causal", [False, True])
def test_position_bias_is_applied(mask, causal):
    bias = torch.randn(1, HEADS, QUERIES, KEYS)
    given = random_tensor(tokens=QUERIES), random_tensor(), random_tensor(), MASKS[mask]()
    assert assert_same(*given, module_of(causal), position_bias=bias) == 0


def test_broadcast_keys_use_sdpa():
    keys = random_tensor(batch=1)
    assert assert_same(random_tensor(tokens=QUERIES), keys, keys, seen(BATCH, 1, 1, KEYS)) == 0


def test_invalid_shapes_raise_the_error_of_sdpa():
    given = random_tensor(tokens=QUERIES), random_tensor(), random_tensor()
    for mask in (seen(QUERIES, KEYS + 2), torch.ones(QUERIES, KEYS, dtype=torch.int64)):
        with pytest.raises(RuntimeError) as theirs:
            sdpa_attention_forward(module_of(), *given, mask)
        with pytest.raises(RuntimeError) as ours:
            attention_forward(module_of(), *given, mask)
        assert str(ours.value) == str(theirs.value)
