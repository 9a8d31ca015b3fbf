"""The kernel of all gradients of media attention in 16 bits where a row sees one tile of keys.

A program holds the keys of a medium and loops over a share of the tokens that attend to it. The
scores of a row are complete in its tile, so the gradient of its query is too, and so is the mean of
dp, which needs no result of the forward.
"""

from __future__ import annotations

from ._attention_gradient_tiles import tile_offsets
from ._attention_tiles import LOG2_E, SIZES, load_part, store_part
from ._launcher import kernel
from ._media_attention_tilings import OF_ALL
from ._media_mask import WINDOW, load_index, run_of_medium, tokens_of_medium
from ._triton import tl, triton


@triton.jit
def _probabilities_and_gradients(s, dp, lse, scale, dtype: tl.constexpr):
    """Tiles ``[rows, keys]`` of p and ds from the products s and dp of all keys of the rows.

    In bf16 ds includes the factor ``scale``; in fp16 that would make small numbers subnormal.
    """
    p = tl.exp2(s * (scale * LOG2_E) - lse[:, None])
    total = tl.sum(p, axis=1)  # 1 but for roundings; 0 if there is no row
    mean = tl.sum(p * dp, axis=1) / tl.where(total == 0.0, 1.0, total)
    # A key with all the weight has no gradient, but its dp and the mean may differ by a rounding.
    # Bits of numbers that are not negative have their order, and need fewer instructions.
    largest = tl.max(p.to(tl.int32, bitcast=True), axis=1)
    factor = tl.where(largest == total.to(tl.int32, bitcast=True), 0.0, 1.0)
    mean *= factor
    if dtype == tl.bfloat16:
        mean *= scale
        factor *= scale
    return p.to(dtype), (p * (dp * factor[:, None] - mean[:, None])).to(dtype)


@triton.jit
def _add_rows(
    dk, dv, k, v, q_ptr, q_query, do_ptr, do_query, lse_ptr, dq_ptr, dq_query, count,
    scale, WIDE: tl.constexpr, KEYS_TOO: tl.constexpr, d: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add the parts of dk and dv of the next rows, of which ``count`` are left; store their dq."""
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    r = tl.arange(0, BLOCK_M)
    inside = r < count
    q = load_part(q_ptr, tile_offsets(r, q_query, WIDE), inside, 0, d, d)
    do = load_part(do_ptr, tile_offsets(r, do_query, WIDE), inside, 0, d, d)
    lse = tl.load(lse_ptr + r, mask=inside, other=float("inf"))
    p, ds = _probabilities_and_gradients(
        tl.dot(q, tl.trans(k)), tl.dot(do, tl.trans(v)), lse, scale, dtype
    )
    if KEYS_TOO:
        dv = tl.dot(tl.trans(p), do, dv)
        dk = tl.dot(tl.trans(ds), q, dk)
    if dq_ptr is not None:  # the last product: before the others ptxas would run each alone
        dq = tl.dot(ds, k)
        if dtype != tl.bfloat16:
            dq *= scale
        store_part(dq_ptr, tile_offsets(r, dq_query, WIDE), inside, dq, 0, d, d)
    return dk, dv


@triton.jit
def _sees_none(index_ptr, query, end, media):
    """Which tokens before ``end`` attend to no medium."""
    index, _ = load_index(index_ptr, query, query < end, "latest")
    return ((index == 0) | (index > media)) & (query < end)


@triton.jit
def _store_zeros(
    dq_ptr, dq_query, index_ptr, begin, end, media,
    d: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Store the gradient of the tokens from ``begin`` to ``end`` that attend to no medium."""
    zeros = tl.zeros([BLOCK_M, d], tl.float32)
    for start in range(begin, end, BLOCK_M):
        query = start + tl.arange(0, BLOCK_M)
        none = _sees_none(index_ptr, query, end, media)
        store_part(dq_ptr, query.to(tl.int64) * dq_query, none, zeros, 0, d, d)


@triton.jit
def _share(first, last, number, count, SIZE: tl.constexpr):
    """The share ``number`` of ``count`` of the tokens from first to last, in tiles of SIZE."""
    tokens = tl.cdiv(tl.cdiv(last - first, SIZE), count).to(tl.int64) * SIZE
    begin = first + number * tokens
    end = tl.minimum(begin + tokens, last)
    return tl.minimum(begin, end).to(tl.int32), end.to(tl.int32)


@kernel(*OF_ALL, exclusive=True)
@triton.jit(do_not_specialize=[*SIZES, "heads", "media", "splits"])
def media_gradient_kernel(
    q_ptr, q_batch, q_head, q_query,  # (batch, heads, queries, d)
    do_ptr, do_batch, do_head, do_query,
    lse_ptr,  # (count,) fp32, to base 2
    k_ptr, k_batch, k_head, k_key, v_ptr, v_batch, v_head, v_key,  # (batch, heads, keys, d)
    index_ptr,  # (batch, queries) int64
    dq_ptr, dq_batch, dq_head, dq_query,  # or None
    dk_ptr, dv_ptr, dk_batch, dk_head, dk_key,  # of both the same strides; or None
    dk_split,  # with several splits dk and dv are fp32 shares
    heads, queries, media, splits, scale,
    WIDE: tl.constexpr, d: tl.constexpr, BLOCK_M: tl.constexpr,
    TOKENS: tl.constexpr,  # of a medium
):  # fmt: skip
    program = tl.program_id(0)
    split, program = (program % splits).to(tl.int64), program // splits
    medium = program % media
    head = (program // media % heads).to(tl.int64)
    image = (program // media // heads).to(tl.int64)
    local = tl.arange(0, TOKENS)
    every_key = tl.full([TOKENS], True, tl.int1)
    far = medium.to(tl.int64) * TOKENS
    k_ptr += image * k_batch + head * k_head + far * k_key
    v_ptr += image * v_batch + head * v_head + far * v_key
    k = load_part(k_ptr, tile_offsets(local, k_key, WIDE), every_key, 0, d, d)
    v = load_part(v_ptr, tile_offsets(local, v_key, WIDE), every_key, 0, d, d)
    index_ptr += image * queries
    q_ptr += image * q_batch + head * q_head
    do_ptr += image * do_batch + head * do_head
    lse_ptr += (image * heads + head) * queries
    if dq_ptr is not None:
        dq_ptr += image * dq_batch + head * dq_head
    dk = tl.zeros([TOKENS, d], tl.float32)
    dv = tl.zeros([TOKENS, d], tl.float32)
    first, last, count = tokens_of_medium(index_ptr, medium, queries, "latest", "zero")
    begin, end = _share(first, last, split, splits, BLOCK_M)
    while begin < end:
        if count == last - first:  # nearly always: the tokens that see it follow each other
            stop = end
        else:
            begin, stop = run_of_medium(index_ptr, medium, begin, end)
        at = tl.cast(begin, tl.int64)
        own_q, own_do, own_lse = q_ptr + at * q_query, do_ptr + at * do_query, lse_ptr + at
        own_dq = dq_ptr
        if dq_ptr is not None:
            own_dq += at * dq_query
        for token in range(begin, stop, BLOCK_M):
            dk, dv = _add_rows(
                dk, dv, k, v, own_q, q_query, own_do, do_query, own_lse, own_dq, dq_query,
                stop - token, scale, WIDE, dk_ptr is not None, d, BLOCK_M,
            )  # fmt: skip
            own_q += tl.cast(q_query, tl.int64) * BLOCK_M
            own_do += tl.cast(do_query, tl.int64) * BLOCK_M
            own_lse += BLOCK_M
            if dq_ptr is not None:
                own_dq += tl.cast(dq_query, tl.int64) * BLOCK_M
        begin = stop
    # Computed again: registers that hold them through the loop would spill.
    program = tl.program_id(0) + tl.minimum(media, 0)
    split, program = (program % splits).to(tl.int64), program // splits
    medium = program % media
    head = (program // media % heads).to(tl.int64)
    image = (program // media // heads).to(tl.int64)
    if dk_ptr is not None:
        if q_ptr.dtype.element_ty != tl.bfloat16:
            dk *= scale
        local = tl.minimum(media, 0) + tl.arange(0, TOKENS)
        far = medium.to(tl.int64) * TOKENS
        at = split * dk_split + image * dk_batch + head * dk_head + far * dk_key
        local = tile_offsets(local, dk_key, WIDE)
        store_part(dv_ptr + at, local, every_key, dv, 0, d, d)
        store_part(dk_ptr + at, local, every_key, dk, 0, d, d)
    if dq_ptr is not None:  # tokens that see no medium are divided among all programs of the head
        number = medium.to(tl.int64) * splits + split
        begin, end = _share(0, queries, number, tl.cast(media, tl.int64) * splits, BLOCK_M)
        for start in range(begin, end, WINDOW):
            query = start + tl.arange(0, WINDOW)
            none = _sees_none(index_ptr, query, end, media)
            first = tl.min(tl.where(none, query, end), axis=0)
            last = tl.max(tl.where(none, query + 1, 0), axis=0)
            _store_zeros(dq_ptr, dq_query, index_ptr, first, last, media, d, BLOCK_M)
