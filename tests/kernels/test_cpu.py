"""The compiled CPU code on large tensors, with one and several threads."""

import pytest
import torch

from tests.support.cases import OPS
from vlm_fast.verification import tolerance


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("mebibytes", [1, 17, 33])
def test_large_rows_in_threads(mebibytes, threads):
    """Sizes at which the compiled code uses threads, non-temporal stores and huge pages."""
    hidden = 4095
    rows = (mebibytes << 20) // (2 * hidden)
    op = OPS["merge_image_tokens"]
    args, options = op.sample(
        dict(batch=1, sequence=rows, hidden=hidden, images=2, tokens=rows // 3), torch.bfloat16
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = tolerance.outputs_and_gradients(op.fast, args, options)
        gathered = OPS["gather_image_tokens"].fast(args[0], args[2], count=2 * (rows // 3))
    finally:
        torch.set_num_threads(before)
    expected = tolerance.outputs_and_gradients(op.reference, args, options)
    for one, other in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(gathered, args[0][args[2]])
