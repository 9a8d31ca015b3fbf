"""Four small models trained for a hundred AdamW steps on a GPU, fused and unfused."""

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
