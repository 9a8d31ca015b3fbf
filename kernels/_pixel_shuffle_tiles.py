"""Tile operations that the forward and backward kernels of `pixel_shuffle_norm` share."""

from __future__ import annotations

from ._triton import tl, triton


@triton.jit
def patch_offsets(
    token, p, inside, index_ptr, x_batch, x_token,
    tokens, rows, blocks, blocks_across, width, FACTOR: tl.constexpr,
):  # fmt: skip
    """Offsets in x of the patches of merged tokens, ``[TOKENS, POSITIONS]``, and their mask."""
    if index_ptr is not None:
        at = index_ptr + token.to(tl.int64)[:, None] * (FACTOR * FACTOR) + p[None, :]
        row = tl.load(at, mask=inside, other=0).to(tl.int64)
        inside = inside & (row >= 0) & (row < rows)  # a wrong index is never used as an address
        return row // tokens * x_batch + row % tokens * x_token, inside
    else:
        image, block = (token // blocks).to(tl.int64), token % blocks
        y = (block // blocks_across).to(tl.int64)[:, None] * FACTOR + p[None, :] // FACTOR
        x = (block % blocks_across).to(tl.int64)[:, None] * FACTOR + p[None, :] % FACTOR
        return image[:, None] * x_batch + (y * width + x) * x_token, inside


@triton.jit
def merged_channels(p, c, cols, FACTOR: tl.constexpr, BY_CHANNEL: tl.constexpr):
    """The channel in a merged token of each patch and channel, ``[POSITIONS, COLS]``."""
    if BY_CHANNEL:
        return c[None, :].to(tl.int64) * (FACTOR * FACTOR) + p[:, None]
    else:
        return p.to(tl.int64)[:, None] * cols + c[None, :]


@triton.jit
def _by_group(x, AFTER: tl.constexpr):
    """``[TOKENS, POSITIONS, COLS]`` with all channels of a normed group in the last dimension."""
    if AFTER:
        return tl.reshape(x, [x.shape[0], 1, x.shape[1] * x.shape[2]])
    else:
        return x


@triton.jit
def group_sum(x, AFTER: tl.constexpr):
    """The sum over a normed group: the channels of a patch or, if AFTER, of a merged token."""
    return tl.sum(_by_group(x, AFTER), axis=2, keep_dims=True)


@triton.jit
def group_sums(x, y, AFTER: tl.constexpr):
    """`group_sum` of two tiles, with one exchange between the warps for both."""
    sums = tl.sum(tl.join(_by_group(x, AFTER), _by_group(y, AFTER)), axis=2)
    of_x, of_y = tl.split(sums)
    return of_x[:, :, None], of_y[:, :, None]


@triton.jit
def group_index(token, p, FACTOR: tl.constexpr, AFTER: tl.constexpr):
    """The index of each normed group in the tensors of statistics."""
    group = token.to(tl.int64)[:, None, None]
    if not AFTER:
        group = group * (FACTOR * FACTOR) + p[None, :, None]
    return group


@triton.jit
def load_parameter(ptr, channel, p, c, inside, cols, AFTER: tl.constexpr):
    """Load a weight or bias in fp32, broadcast to ``[TOKENS, POSITIONS, COLS]``."""
    if AFTER:
        return tl.load(ptr + channel, mask=inside, other=0.0).to(tl.float32)[None, :, :]
    else:
        return tl.load(ptr + c, mask=c < cols, other=0.0).to(tl.float32)[None, None, :]
