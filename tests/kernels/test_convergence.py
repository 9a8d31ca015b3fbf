"""A hundred steps of AdamW of four small models, fused and unfused, on a GPU."""

import pytest
import torch

pytest.importorskip("skimage", reason="the photographs come with scikit-image")
pytest.importorskip("transformers")

from tests.support.captioned_models import FAMILIES
from tests.support.captioned_training import fused_training_is_unfused_training

pytestmark = pytest.mark.devices("cuda")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fused_training_matches_unfused(device, family, dtype):
    fused_training_is_unfused_training(family, dtype, device)
