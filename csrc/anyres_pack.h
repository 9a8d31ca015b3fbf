// Packing of rows of image tiles by an index, on a CPU. An entry of `index` is a row of the source;
// an entry outside of [0, limit) selects the `fill` row, or zeros if `fill` is null.
//
// Strides and row lengths are in bytes, and outputs are contiguous.
#pragma once

#include <cstdint>

#include "rows.h"

namespace vlm_fast {

// out[j] = source[index[j]], or source[slots[index[j]]] if slots is not null.
void pack_rows(Rows source, const int32_t* slots, const int32_t* index, int64_t limit,
               const char* fill, char* out, int64_t rows, int64_t row_bytes, int threads);

// out = embeds, except that the j-th row whose mask is true is source[index[j]]. That row's number
// is written to positions[j], unless it is null. Returns how many entries are true; those beyond
// `count` leave their rows unwritten.
int64_t merge_packed_rows(Rows embeds, const uint8_t* mask, Rows source, const int32_t* index,
                          int64_t count, int64_t limit, const char* fill, char* out,
                          int32_t* positions, int64_t rows, int64_t row_bytes, int threads);

// out[j] = sum over k < 4 of source[taps[4 j + k]] * weights[4 j + k] * 2^-30, in fp32. A tap that
// is no row of the source adds nothing; if the first tap is none, out[j] is `fill` or zeros. The
// rows are bf16 if `bf16`, else fp32.
void blend_rows(Rows source, const int32_t* taps, const int32_t* weights, int64_t limit,
                const char* fill, char* out, int64_t rows, int64_t cols, bool bf16, int threads);

}  // namespace vlm_fast
