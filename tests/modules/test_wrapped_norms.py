"""A norm in modules_to_save of peft is called, and its copy is trained."""

import copy

import peft
import pytest
import torch

import vlm_fast
from tests.support.tiny_models import build
from tests.support.ways_to_run import labels
from tests.support.whole_models import assert_close, step

# A model for each kind of norm, and the norm's name in it.
NORMS = {
    "qwen2_vl": "merger.ln_q", "qwen2_5_vl": "merger.ln_q", "qwen3_vl": "merger.norm",
    "internvl": "multi_modal_projector.layer_norm", "mistral3": "multi_modal_projector.norm",
    "gemma3": "multi_modal_projector.mm_soft_emb_norm", "aria": "multi_modal_projector.layer_norm",
}  # fmt: skip


def with_adapters(model, name):
    """LoRA on the language model, and one norm in modules_to_save."""
    config = peft.LoraConfig(
        target_modules=r".*language_model.*\.q_proj", modules_to_save=[NORMS[name]],
        init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(1)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("patched_first", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_modules_to_save_of_a_single_norm(name, patched_first):
    model, given = build(name)
    fast = copy.deepcopy(model)
    if patched_first:
        vlm_fast.patch(fast)
    plain, fast = with_adapters(model, name), with_adapters(fast, name)
    if not patched_first:
        vlm_fast.patch(fast)
    with torch.no_grad():
        for one in (plain, fast):
            saved = [(n, p) for n, p in one.named_parameters() if "modules_to_save" in n]
            assert saved and all(NORMS[name] in n for n, _ in saved)
            for n, parameter in saved:
                parameter.add_(0.1 if n.endswith("bias") else 0.2)  # it differs from the original
    given = given | labels(model, given)
    found = step(fast, given)
    assert_close(found, step(plain, given))
    assert any("modules_to_save" in n and g.any() for n, g in found.items() if g is not None)
    reasons = [why for why in vlm_fast.explain(fast).values() if why is not None]
    assert reasons and all("ModulesToSaveWrapper" in why for why in reasons), reasons
    merged = {m: one.merge_and_unload() for m, one in (("plain", plain), ("fast", fast))}
    assert_close(step(merged["fast"], given), step(merged["plain"], given))
    assert not any(vlm_fast.explain(merged["fast"]).values())
