// Rows of image tiles packed by a table on the CPU: `index` names a row of the source, and whatever
// lies outside of its `limit` rows stands for the `fill` row, or zeros where that is null.
//
// Strides and row lengths are in bytes, outputs are contiguous.
#pragma once

#include <cstdint>

#include "rows.h"

namespace vlm_fast {

// out[j] = source[index[j]], or source[slots[index[j]]] where there are slots.
void pack_rows(Rows source, const int32_t* slots, const int32_t* index, int64_t limit,
               const char* fill, char* out, int64_t rows, int64_t row_bytes, int threads);

// out = embeds, but its row slots[j] is source[index[j]]; `slots` ascend.
void merge_packed_rows(Rows embeds, const int32_t* slots, Rows source, const int32_t* index,
                       int64_t count, int64_t limit, const char* fill, char* out, int64_t rows,
                       int64_t row_bytes, int threads);

// out[j] = sum over four taps of source[taps[4 j + k]] weights[4 j + k] 2^-30, in fp32, of those
// that are rows of the source; `fill` or zeros where the first is none. Of bf16, or else of fp32.
void blend_rows(Rows source, const int32_t* taps, const int32_t* weights, int64_t limit,
                const char* fill, char* out, int64_t rows, int64_t cols, bool bf16, int threads);

}  // namespace vlm_fast
