"""Small wrong edits of the package, and the tests that detect them."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One edit.

    Attributes:
        name: what is wrong.
        file: the file that is edited.
        old, new: a text in that file, and its replacement at the first occurrence.
        tests: pytest arguments of tests that fail with the edit.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


def interpreted(file: str, words: str) -> str:
    """Pytest arguments for interpreted kernel tests that match these words."""
    return f"--device interpreter tests/kernels/{file} -k '{words}'"


NORM = interpreted("test_kernels.py", "add_layer_norm")
TOKENS = interpreted("test_token_merging.py", "numbers_out_of_range or weighted_by_size")
IMAGE_TOKENS = interpreted("test_image_tokens.py", "copied_exactly or programs or outside")
GATED = interpreted("test_kernels.py", "gated_add")
ATTENTION = interpreted("test_kernels.py", "cross_attention and not self")

MUTANTS = (
    # ---- kernels ----
    Mutant(
        "variance of one row less", "kernels/add_layer_norm.py",
        "axis=1) / cols + eps)", "axis=1) / (cols - 1) + eps)",
        NORM,
    ),
    Mutant(
        "kept elements of dropout are not scaled", "kernels/add_layer_norm.py",
        "z *= survivor_scale * keep_tile(", "z *= keep_tile(",
        NORM,
    ),
    Mutant(
        "a program also sums rows of the next one", "kernels/_add_layer_norm_backward.py",
        "inside_rows = row < last", "inside_rows = row < rows",
        NORM,
    ),
    Mutant(
        "the variance is computed in one pass", "kernels/add_layer_norm.py",
        "rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=1) / cols + eps)",
        "rstd = 1.0 / tl.sqrt(tl.sum(z * z, axis=1) / cols - mean * mean + eps)",
        interpreted("test_add_layer_norm.py", "mean_far_above"),
    ),
    Mutant(
        "the last share of a gradient is left out", "kernels/_sum_shares.py",
        "inside = (row < count)[:, None]", "inside = (row < count - 1)[:, None]",
        interpreted("test_sum_shares.py", "31 and rule"),
    ),
    Mutant(
        "true entries before a program are not counted", "kernels/_image_token_kernels.py",
        "    found = count_true(mask_ptr, 0, begin, BLOCK_MASK)", "    found = 0",
        IMAGE_TOKENS,
    ),
    Mutant(
        "features beyond the last row are read", "kernels/_image_token_kernels.py",
        "(feature >= 0) & (feature < feature_rows)", "(feature >= 0)",
        IMAGE_TOKENS,
    ),
    Mutant(
        "a feature row is read past its end", "kernels/_image_token_kernels.py",
        "copied = is_row[:, None] & inside", "copied = is_row[:, None] & (col >= 0)",
        IMAGE_TOKENS,
    ),
    Mutant(
        "a wrong count of a merge is not asserted", "kernels/_image_token_kernels.py",
        'assert (end < rows) | (found == count), "image_mask has another count than rows of',
        'assert (end <= rows) | (found == count), "image_mask has another count than rows of',
        IMAGE_TOKENS,
    ),
    Mutant(
        "the gate has no tanh", "kernels/_tanh_gate.py",
        "    return _tanh(gate)\n", "    return gate\n",
        GATED,
    ),
    Mutant(
        "a norm omits eps", "kernels/gated_add.py",
        "rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=1) / cols + eps)",
        "rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=1) / cols)",
        GATED,
    ),
    Mutant(
        "the gap between images is not skipped", "kernels/mlp.py",
        "if period is not None:", "if False:",
        interpreted("test_kernels.py", "mlp and not gated"),
    ),
    Mutant(
        "attention includes a key of the next medium", "kernels/media_cross_attention.py",
        "    inside = n < tokens_per_media\n", "    inside = n <= tokens_per_media\n",
        ATTENTION,
    ),
    Mutant(
        "backward omits dropout", "kernels/_attention_gradient_tiles.py",
        "        dp *= factor\n", "",
        ATTENTION,
    ),
    Mutant(
        "an out-of-range start is used as an address", "kernels/merge_tokens.py",
        "tl.minimum(tl.load(at + 1), tokens)", "tl.load(at + 1)",
        TOKENS,
    ),
    Mutant(
        "an out-of-range destination is used as an address", "kernels/merge_tokens.py",
        "y = tl.load(at_y, mask=(col < cols) & inside, other=0.0)",
        "y = tl.load(at_y, mask=col < cols, other=0.0)",
        TOKENS,
    ),
    Mutant(
        "the last tap lies outside the grid", "kernels/spatial_pool.py",
        "return tl.minimum(first + tap, size - 1), tl.where", "return first + tap, tl.where",
        interpreted("test_kernels.py", "spatial_pool"),
    ),
    Mutant(
        "dropout drops half as much", "kernels/_dropout.py",
        "return int(p * 2**32)", "return int(p * 2**31)",
        "tests/kernels/test_dropout.py",
    ),
    # ---- ops ----
    Mutant(
        "dispatch modes do not see an op", "vlm_fast/ops/registration.py",
        "if _dispatch_modes() or values[0].is_meta:", "if values[0].is_meta:",
        "tests/ops/test_registered_op.py -k dispatch_modes",
    ),
    Mutant(
        "forward mode gives zero, silently", "vlm_fast/ops/registration.py",
        "        refuse_forward_mode(self.name)\n        record_fast_call",
        "        record_fast_call",
        "tests/ops/test_autograd.py -k forward_mode",
    ),
    Mutant(
        "a backward runs under autocast", "vlm_fast/ops/registration.py",
        "        if torch.is_autocast_enabled(device):\n", "        if False:\n",
        "tests/ops",
    ),
    Mutant(
        "a reference ignores eps", "vlm_fast/ops/gated_add_norm.py",
        "return h, F.layer_norm(h, (features,), weight.to(h.dtype), bias, eps)",
        "return h, F.layer_norm(h, (features,), weight.to(h.dtype), bias)",
        "tests/kernels/test_kernels.py -k gated_add_norm",
    ),
    # ---- modules and patches ----
    Mutant(
        "an option of a module is ignored", "vlm_fast/modules/mlp_projector.py",
        "        projector.saved = _known_saved(saved)", "        projector.saved = \"all\"",
        "tests/ops/test_saved_bytes.py tests/modules/test_chains.py tests/patching/test_patch.py",
    ),
    Mutant(
        "cached keys survive in-place writes to images", "vlm_fast/patching/image_kv_cache.py",
        "version = None if images.is_inference() else images._version", "version = None",
        "tests/patching/test_patched_flamingos.py",
    ),
    Mutant(
        "cached keys survive a new prompt", "vlm_fast/patching/image_kv_cache.py",
        "if length == 0 or tokens != 1 or cache not in _generations:",
        "if cache not in _generations:",
        "tests/patching/test_patched_flamingos.py",
    ),
    Mutant(
        "a replaced forward is not called", "vlm_fast/patching/patched_module.py",
        "        if current is not original:\n            record_fallback",
        "        if False:\n            record_fallback",
        "tests/patching/test_replaced_code.py -k forward_replaced",
    ),
    Mutant(
        "parameters of another dtype are fused", "vlm_fast/modules/parameter_access/linear.py",
        "if parameter.dtype != weight.dtype or parameter.device != weight.device:", "if False:",
        "tests/modules",
    ),
    Mutant(
        "a guard ignores hooks", "vlm_fast/modules/parameter_access/guard.py",
        "                self.test(\"not {0}[{1}]\", own, kind)\n", "                pass\n",
        "tests/modules/test_changed_linears.py -k 'hook and MLPProjector'",
    ),
    Mutant(
        "a guard ignores replaced parameters", "vlm_fast/modules/parameter_access/guard.py",
        "self.test(\"{0}[{1}] is {2}\", parameters, name, parameter)", "pass",
        "tests/modules/test_changed_linears.py -k 'no_fallback and weight'",
    ),
    Mutant(
        "a guard ignores the dtype of parameters", "vlm_fast/modules/parameter_access/guard.py",
        "        self.test(\"{0}.dtype is {1}\", parameter, parameter.dtype)\n", "",
        "tests/modules/test_changed_linears.py -k same_size",
    ),
    Mutant(
        "a shallow copy uses the answer of its original",
        "vlm_fast/modules/parameter_access/remembered.py",
        "if found is None or found.own is not own:\n        return None\n    if found.holds()",
        "if found is None:\n        return None\n    if found.holds()",
        "tests/modules/test_remembered_answers.py -k shallow_copy",
    ),
)  # fmt: skip
