"""The kernel of the gradients of media attention's keys and values in 16 bits.

A program takes a tile of a medium's keys and a share of the tokens that may attend to it, whose
mean of dp `media_query_gradient_kernel` has stored.
"""

from __future__ import annotations

from ._attention_gradient_tiles import tile_offsets, tile_product
from ._attention_tiles import SIZES, load_part, store_part
from ._launcher import kernel
from ._media_attention_tilings import OF_KEYS
from ._media_gradient_tiles import media_probabilities_and_gradients, scale_of_dp
from ._media_mask import first_of_tile, is_visible, tokens_of_medium
from ._triton import tl, triton


@kernel(*OF_KEYS, exclusive=True)
@triton.jit(do_not_specialize=[*SIZES, "media", "splits"])
def media_key_gradient_kernel(
    q_ptr, q_batch, q_head, q_query,  # (batch, heads, queries, d), normed if there is a norm
    do_ptr, do_batch, do_head, do_query,
    stats_ptr,  # (count, 2) fp32: lse and delta
    k_ptr, k_batch, k_head, k_key, v_ptr, v_batch, v_head, v_key,  # (batch, kv_heads, keys, d)
    index_ptr,  # (batch, queries) int64
    dk_ptr, dv_ptr, dk_batch, dk_head, dk_key,  # of both the same strides
    dk_split,  # with several splits dk and dv are fp32 shares
    kv_heads, group, queries, media, tokens_per_media, splits, scale,
    ATTEND: tl.constexpr, UNATTENDED: tl.constexpr, WIDE: tl.constexpr,
    KEYS: tl.constexpr,  # the axis of the keys in a tile of scores
    d: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    program = tl.program_id(0)
    split, program = (program % splits).to(tl.int64), program // splits
    per_medium = tl.cdiv(tokens_per_media, BLOCK_N)
    start = first_of_tile(program % per_medium, BLOCK_N)
    medium = program // per_medium % media
    kv_head = (program // per_medium // media % kv_heads).to(tl.int64)
    image = (program // per_medium // media // kv_heads).to(tl.int64)
    local = tl.arange(0, BLOCK_N)
    inside_keys = start + local < tokens_per_media
    far = medium.to(tl.int64) * tokens_per_media + start
    k_ptr += image * k_batch + kv_head * k_head + far * k_key
    v_ptr += image * v_batch + kv_head * v_head + far * v_key
    k = load_part(k_ptr, tile_offsets(local, k_key, WIDE), inside_keys, 0, d, D)
    v = load_part(v_ptr, tile_offsets(local, v_key, WIDE), inside_keys, 0, d, D)
    index_ptr += image * queries
    first, last, _ = tokens_of_medium(index_ptr, medium, queries, ATTEND, UNATTENDED)
    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, D], tl.float32)
    first_head = kv_head * group
    q_ptr += image * q_batch + first_head * q_head
    do_ptr += image * do_batch + first_head * do_head
    stats_ptr += (image * kv_heads * group + first_head) * queries * 2
    r = tl.arange(0, BLOCK_M)
    q_local, do_local = tile_offsets(r, q_query, WIDE), tile_offsets(r, do_query, WIDE)
    blocks = tl.maximum(tl.cdiv(last - first, BLOCK_M), 0)
    steps = blocks.to(tl.int64) * group
    share = tl.cdiv(steps, splits)
    begin = tl.minimum(split * share, steps).to(tl.int32)
    for step in range(begin, tl.minimum((split + 1) * share, steps).to(tl.int32)):
        head = (step // blocks).to(tl.int64)  # of those that share a key head
        token = first + first_of_tile(step % blocks, BLOCK_M)  # the tile's first
        inside = r < last - token
        far = tl.cast(token, tl.int64)
        own = q_ptr + head * q_head + far * q_query
        q = load_part(own, q_local, inside, 0, d, D)
        own = do_ptr + head * do_head + far * do_query
        do = load_part(own, do_local, inside, 0, d, D)
        pair = (head * queries + far) * 2 + (r[:, None] * 2 + tl.arange(0, 2)[None, :])
        pairs = tl.load(stats_ptr + pair, mask=inside[:, None])
        lse, delta = tl.split(pairs)
        index = tl.load(index_ptr + far + r, mask=inside, other=0)
        unattended_rows = index == 0 if ATTEND == "listed" else index <= 0
        seen = is_visible(index, unattended_rows, inside, medium, ATTEND, UNATTENDED)
        lse = tl.where(seen, lse, float("inf"))
        factor = scale_of_dp(unattended_rows, scale, UNATTENDED, dtype, KEYS)
        s = tile_product(k, k, q, q, 0, KEYS)
        if UNATTENDED == "uniform":
            s = tl.where(tl.expand_dims(unattended_rows, KEYS), 0.0, s)
        p, ds = media_probabilities_and_gradients(
            s, tile_product(v, v, do, do, 0, KEYS),
            lse, delta, inside_keys, lse != float("inf"), scale, factor, KEYS,
        )  # fmt: skip
        p, ds = p.to(dtype), ds.to(dtype)
        if KEYS == 1:
            p, ds = tl.trans(p), tl.trans(ds)
        dv = tl.dot(p, do, dv)
        dk = tl.dot(ds, q, dk)
    if dtype != tl.bfloat16:
        dk *= scale
    # Computed again: registers that hold them through the loop would spill.
    local = tl.minimum(media, 0) + tl.arange(0, BLOCK_N)
    inside_keys = start + local < tokens_per_media
    far = medium.to(tl.int64) * tokens_per_media + start
    at = split * dk_split + image * dk_batch + kv_head * dk_head + far * dk_key
    local = tile_offsets(local, dk_key, WIDE)
    store_part(dv_ptr + at, local, inside_keys, dv, 0, d, D)
    store_part(dk_ptr + at, local, inside_keys, dk, 0, d, D)
