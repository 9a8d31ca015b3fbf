"""Mixed dtypes in models with Q-Formers, resamplers and gated layers, as in `test_mixed_dtypes`.

Kernels round in another order than the model's code, so mean errors are compared.
"""

import copy
import functools
import itertools

import pytest
import torch

import vlm_fast
from tests.support import tiny_flamingos, tiny_qformers
from tests.support.mixed_dtypes import ARRANGEMENTS, arranged, cast, dtypes, run
from tests.support.selection import slow_except
from vlm_fast.verification.summation_orders import ReorderedRuns

pytestmark = pytest.mark.filterwarnings("ignore::vlm_fast.VlmFastFallbackWarning")
NAMES = ["idefics", "mllama", *tiny_qformers.FAMILIES]
QUICK = ["idefics", "mllama", next(iter(tiny_qformers.FAMILIES))]


def built(name):
    if name in tiny_qformers.FAMILIES:
        return tiny_qformers.whole(name)
    return getattr(tiny_flamingos, name)(), getattr(tiny_flamingos, f"{name}_inputs")()


def error(found, exact):
    """The mean relative error over results that are not zero up to rounding."""
    pairs = [(t.double(), exact[name].double()) for name, t in found.items() if t is not None]
    largest = max(true.norm() for _, true in pairs)
    kept = [(t - true).norm() / true.norm() for t, true in pairs if true.norm() > 1e-4 * largest]
    assert len(kept) > 10
    return torch.stack(kept).mean()


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("name", slow_except(QUICK, NAMES))
def test_whole_models_in_mixed_dtypes_match_unpatched(name, arrangement, autocast):
    model, inputs = built(name)
    plain, ours, dtype = arranged(model, arrangement)
    again = functools.partial(run, args=(), kwargs=cast(inputs, dtype), autocast=autocast)
    theirs, found = again(plain), again(ours)
    if theirs.raised is not None:
        assert isinstance(found.raised, (RuntimeError, TypeError)), found.raised
        assert "dtype" in str(found.raised) or "torch." in str(found.raised)
        return
    assert found.raised is None, f"only the patched one raises: {found.raised}"
    assert dtypes(found) == dtypes(theirs)
    exact = run(copy.deepcopy(plain).double(), (), cast(inputs, torch.float64)).found
    apart = error(found.found, exact)
    draws = itertools.chain([theirs], ReorderedRuns(lambda: again(plain)))
    assert any(
        apart <= 1.5 * error(one.found, exact) for one in draws
    )  # the same factor as the tolerance rule


@pytest.mark.parametrize("parameters", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_qformer_runs_or_raises_as_unpatched(parameters, given, autocast):
    plain = tiny_qformers.blip2(**tiny_qformers.SMALL).to(parameters)
    fast = copy.deepcopy(plain)
    vlm_fast.patch(fast)
    query, image = torch.randn(2, 5, 48).to(given), torch.randn(2, 7, 40).to(given)
    found = []
    for model in (plain, fast):
        try:
            with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                out = model(query_embeds=query, encoder_hidden_states=image)
            found.append(out.last_hidden_state)
        except (RuntimeError, TypeError) as error:
            found.append(type(error))
    if isinstance(found[0], type):
        assert isinstance(found[1], type), "only the patched one runs"
        return
    assert isinstance(found[1], torch.Tensor), f"only the plain one runs: {found[1]}"
    assert found[0].dtype == found[1].dtype
    torch.testing.assert_close(found[1], found[0], rtol=0.1, atol=0.1)
