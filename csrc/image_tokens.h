// Row movers on the CPU for image tokens inside a sequence of embeddings.
//
// `slots` are the ascending flat row numbers of the image tokens. Strides and row lengths are in
// bytes, outputs are contiguous, and the caller has checked shapes, dtypes and slot bounds.
#pragma once

#include <cstdint>
#include <vector>

#include "rows.h"

namespace vlm_fast {

struct RowBlock {
  Rows rows;
  int64_t count;
};

// Writes the row number of each true entry to slots[:capacity]; returns how many are true.
int64_t image_token_slots(const uint8_t* mask, int64_t rows, int32_t* slots, int64_t capacity);

// out = embeds, but its row slots[j] is the j-th row of the features, block after block.
void merge_image_tokens(Rows embeds, const int32_t* slots, const std::vector<RowBlock>& features,
                        char* out, int64_t rows, int64_t row_bytes, int threads);

// out[j] = source[slots[j]]
void gather_image_tokens(Rows source, const int32_t* slots, char* out, int64_t rows,
                         int64_t row_bytes, int threads);

// out = source with the rows in slots[:count] zeroed.
void clear_image_tokens(Rows source, const int32_t* slots, int64_t count, char* out, int64_t rows,
                        int64_t row_bytes, int threads);

}  // namespace vlm_fast
