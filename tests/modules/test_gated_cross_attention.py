"""Flamingo's gated block: parity with the published formulas, cached media, errors."""

import copy

import pytest
import torch

import vlm_fast
from tests.support import reference_flamingo
from tests.support.dispatch_modes import LargestResult
from tests.support.randomised_modules import assert_as_accurate
from vlm_fast.modules import GatedCrossAttentionBlock
from vlm_fast.verification import tolerance

SIZES = dict(dim=40, dim_visual=24, dim_head=16, heads=3)
LOCATIONS = {
    "interleaved": [1, 0, 0, 1, 0, 0, 0, 1, 0],
    "two in a row": [1, 1, 0, 0, 0, 1, 0, 0, 0],
    "text first": [0, 0, 1, 0, 0, 1, 0, 1, 0],
    "none named": [0] * 9,
}


def plain(immediate=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    block = reference_flamingo.GatedCrossAttentionBlock(
        **SIZES, only_attend_immediate_media=immediate
    )
    with torch.no_grad():
        block.attn_gate.fill_(0.7)
        block.ff_gate.fill_(-0.4)
        for norm in (block.attn.norm, block.ff[0]):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.1)
    return block.to(dtype)


def ours(block):
    immediate = block.attn.only_attend_immediate_media
    module = GatedCrossAttentionBlock(**SIZES, only_attend_immediate_media=immediate)
    module.load_state_dict(block.state_dict(), strict=True)
    return module.to(next(block.parameters()).dtype)


def given(locations, dtype=torch.float32, media=3):
    torch.manual_seed(1)
    x, images = torch.randn(2, 9, 40, dtype=dtype), torch.randn(2, media, 5, 24, dtype=dtype)
    if locations is not None:
        locations = torch.tensor([locations, locations[::-1]], dtype=torch.bool)
    return x, images, locations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("immediate", [True, False])
@pytest.mark.parametrize("locations", LOCATIONS)
def test_parity_with_the_published_formulas(locations, immediate, dtype):
    block = plain(immediate, dtype)
    with vlm_fast.strict():
        assert_as_accurate(ours(block), block, *given(LOCATIONS[locations], dtype))


@pytest.mark.parametrize("immediate", [True, False])
def test_without_locations_tokens_attend_to_all_media(immediate):
    block = plain(immediate)
    assert_as_accurate(ours(block), block, *given(None))


@pytest.mark.parametrize("immediate", [True, False])
@pytest.mark.parametrize("tokens", [1, 4])
def test_cached_media(immediate, tokens):
    block = plain(immediate)
    x, media, locations = given(LOCATIONS["interleaved"])
    assert_as_accurate(ours(block), block, x[:, :tokens], media, locations, True)


def test_media_written_in_place_are_read_again():
    """A buffer reused for every image, as in serving; also if writes do not bump its version."""
    block = plain().eval()
    module, (x, media, locations) = ours(block).eval(), given(LOCATIONS["interleaved"])
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            buffer = media.clone()
            for picture in (media, torch.randn_like(media), media * 3):
                for write in (buffer.copy_, buffer.data.copy_):
                    write(picture)
                    torch.testing.assert_close(
                        module(x, buffer, locations), block(x, picture, locations)
                    )


def test_precomputed_key_values():
    module, (x, media, locations) = ours(plain()), given(LOCATIONS["text first"])
    found = module(x, module.key_values(media), locations)
    assert torch.equal(found, module(x, media, locations))


def test_zero_media_and_zero_samples():
    block = plain()
    module = ours(block)
    x, media, _ = given(None)
    none = torch.zeros(2, 9, dtype=torch.bool)
    torch.testing.assert_close(
        module(x, media[:, :0], none), x + (block.ff(x) * block.ff_gate.tanh())
    )
    empty = module(x[:0], media[:0], none[:0])
    assert empty.shape == (0, 9, 40)
    empty.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_blocks_are_patched_by_structure():
    block, arguments = plain(), given(LOCATIONS["text first"])
    model = torch.nn.ModuleDict({"a": copy.deepcopy(block)})
    with vlm_fast.patch(model) as report, vlm_fast.strict():
        assert list(report.patched) == ["a"]
        assert_as_accurate(model["a"], block, *arguments)
        assert vlm_fast.explain(model) == {"a": None}
    assert type(model["a"]) is reference_flamingo.GatedCrossAttentionBlock
    model["a"].ff = torch.nn.Sequential(*block.ff, torch.nn.Dropout())
    report = vlm_fast.patch(model)
    assert list(report.patched) == ["a.ff"]  # patched as an ordinary chain
    assert "feed-forward" in report.skipped["a"]


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(x=torch.randn(2, 9, 41)), "x is .*40"),
        (dict(media=torch.randn(2, 3, 5, 25)), "media is .*24"),
        (dict(media=torch.randn(3, 3, 5, 24)), "2 samples, as x has"),
        (dict(media=None), "media is a NoneType"),
        (dict(locations=torch.ones(2, 8, dtype=torch.bool)), r"media_locations .*\(2, 9\)"),
        (dict(locations=torch.ones(2, 9)), "media_locations .*torch.bool"),
        (dict(locations=torch.ones(2, 9, dtype=torch.bool)), "expected 0 to 3 media"),
        (dict(locations=torch.ones(3, 9, dtype=torch.bool), cached=True), "media_locations"),
    ],
)
def test_invalid_arguments_raise(change, said):
    x, media, locations = given(LOCATIONS["interleaved"])
    arguments = dict(x=x, media=media, locations=locations, cached=False) | change
    with pytest.raises((TypeError, ValueError), match=said):
        ours(plain())(*arguments.values())


def test_no_tensor_of_text_by_latents_is_allocated():
    """Neither pass allocates a tensor as large as text by images by latents."""
    text, images, latents, heads = 512, 8, 64, 2
    q = torch.randn(1, heads, text, 16)
    k, v = (torch.randn(1, heads, images * latents, 16) for _ in range(2))
    index = torch.arange(text)[None] // (text // images) + 1
    op = vlm_fast.ops.media_cross_attention
    settings = dict(op.defaults, tokens_per_media=latents)
    needs = op.NeedsGrad(True, True, True, False, False)
    with LargestResult() as largest:
        o, kept = op._path.forward(needs, q, k, v, index, None, **settings)
        op._path.backward(needs, kept, torch.ones_like(o), **settings)
    assert largest.numbers <= heads * text * latents < text * images * latents


@pytest.mark.parametrize("attend", ["latest", "listed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_noncontiguous_tokens_of_the_same_media(dtype, attend):
    """Text that returns to an earlier image: tokens see image 1, 2, 1 and so on."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 16, dtype=dtype, requires_grad=True) for n in (7, 6, 6))
    index = torch.tensor([[1, 2, 1, 2, 0, 1, 0], [2, 2, 0, 1, 2, 2, 1]])
    op = vlm_fast.ops.media_cross_attention
    settings = dict(tokens_per_media=3, attend=attend)
    with vlm_fast.strict():
        assert all(v.ok for v in tolerance.check(op, (q, k, v, index, None), settings))
