"""The benchmark of host time: its connectors, and how a row is measured."""

import functools

import pytest
import torch
from torch import nn

from tests.support import reference_flamingo, tiny_llava
from vlm_fast.benchmarks.host import gated_layers, measure
from vlm_fast.benchmarks.host.connector import Connector, features
from vlm_fast.patching.families import FAMILIES

# Their layers have rows, with the masks that these models prepare.
MODELS_OF_LAYERS = {"FusedIdeficsModel", "FusedMllamaModel"}


@functools.cache
def built():
    """Every connector with its patched copy, without memory for parameters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gated_layers, "open_flamingo", lambda: reference_flamingo)
        return {c.name: measure.build(c, "meta") for c in measure.CONNECTORS}


def test_every_patched_family_has_a_row():
    kinds = {type(module).__mro__ for _, after in built().values() for module in after.modules()}
    found = {kind.__name__ for order in kinds for kind in order}
    families = {mixin.__name__ for mixin, _ in FAMILIES}
    assert families - found == MODELS_OF_LAYERS


def test_names_are_unique():
    assert len(built()) == len(measure.CONNECTORS)


def test_connector_that_is_not_patched_is_an_error():
    with pytest.raises(ValueError, match="nothing is patched"):
        measure.build(Connector("linear", lambda: nn.Linear(2, 2), features(1, 2)), "cpu")


def test_row_has_times_of_both_in_inference_and_training():
    projector = Connector(
        "tiny",
        lambda: tiny_llava.llava().model.multi_modal_projector.bfloat16(),
        features(1, 5, 48),
    )
    rows = list(measure.rows_of(projector, [1, 2], runs=2, device="cpu"))
    assert [(row["batch"], row["mode"]) for row in rows] == [
        (1, "inference"), (1, "training"), (2, "inference"), (2, "training"),
    ]  # fmt: skip
    for row in rows:
        assert row["before_us"] > 0 and row["ratio"] == row["after_us"] / row["before_us"]


def test_training_differentiates_what_needs_a_gradient():
    linear = nn.Linear(3, 2)
    linear.bias.requires_grad_(False)
    x = torch.randn(4, 3, requires_grad=True)
    connector = Connector("linear", lambda: linear, features(4, 3))
    gradients = measure.training(connector, linear, (x,))()
    assert [g.shape for g in gradients] == [(2, 3), (4, 3)]


def test_mean_ratio_is_geometric():
    assert measure.mean_ratio([{"ratio": 0.5}, {"ratio": 2.0}]) == pytest.approx(1.0)
