"""Tests of `max_similarity` beyond those that every op has."""

import sys

import pytest
import torch

from tests.support.cases import DTYPES, OPS
from vlm_fast.devtools.memory import peak_bytes
from vlm_fast.ops import max_similarity as declared
from vlm_fast.verification import tolerance

SIMILARITY = OPS["max_similarity"]


@pytest.mark.parametrize("limit", [1, 40, 200, 1000])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_tiled_similarity_matches_reference(monkeypatch, limit, dtype):
    """Tiles of one or several images or texts, with a shorter last tile, or of all."""
    args, options = SIMILARITY.sample(dict(shape=(7, 5, 9), texts=11), dtype)
    whole = tolerance.outputs_and_gradients(SIMILARITY.fast, args, options)
    monkeypatch.setitem(sys.modules[SIMILARITY.__module__].TILE, "cpu", limit)
    assert all(verdict.ok for verdict in tolerance.check(SIMILARITY, args, options))
    tiled = tolerance.outputs_and_gradients(SIMILARITY.fast, args, options)
    torch.testing.assert_close(tiled, whole)


@pytest.mark.parametrize("sizes", [(0, 32, 8, 5), (3, 32, 8, 0), (3, 32, 0, 5), (0, 5, 8, 0)])
def test_empty_inputs(sizes):
    images, queries, width, texts = sizes
    args, _ = SIMILARITY.sample(dict(shape=(images, queries, 1), texts=texts))
    args = tuple(t.expand(*t.shape[:-1], 1).repeat_interleave(width, -1) for t in args)
    found = tolerance.outputs_and_gradients(SIMILARITY.fast, args, {})
    expected = tolerance.outputs_and_gradients(SIMILARITY.reference, args, {})
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("from_queries", [1, 10**9], ids=["winners", "GEMMs"])
def test_both_gradient_paths_match_reference(monkeypatch, dtype, from_queries):
    monkeypatch.setattr(sys.modules[SIMILARITY.__module__], "SPARSE", from_queries)
    for shape in SIMILARITY.test_shapes:
        args, options = SIMILARITY.sample(shape, dtype)
        assert all(verdict.ok for verdict in tolerance.check(SIMILARITY, args, options))


def test_ties_take_the_first_query():
    images = torch.ones(2, 4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(declared(images, torch.ones(5, 3)).sum(), images)
    assert gradient[:, 0].eq(5).all() and gradient[:, 1:].eq(0).all()


def test_full_similarity_is_never_allocated():
    images, texts = torch.randn(64, 32, 16), torch.randn(512, 16)
    scores = 4 * 64 * 32 * 512
    most = peak_bytes(lambda: declared(images, texts), "cpu")
    assert most < scores / 2
    assert peak_bytes(lambda: declared.reference(images, texts), "cpu") >= scores


@pytest.mark.parametrize("queries, size", [(256, 1), (257, 2)])
def test_saves_one_byte_per_pair(queries, size):
    needs = declared.NeedsGrad(True, True)
    with torch.no_grad():
        kept = declared._path.forward(needs, torch.randn(3, queries, 4), torch.randn(5, 4))[1]
    assert [t.element_size() * t.numel() for t in kept[2:]] == [15 * size, 0]
