// Copies of rows between image features and sequences of embeddings, on a CPU.
//
// `slots` has the row numbers of the image tokens in ascending order. Strides and row lengths are
// in bytes, outputs are contiguous, and the caller has checked shapes, dtypes and slots.
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

// out = embeds, except that row slots[j] is row j of all features, concatenated.
void merge_image_tokens(Rows embeds, const int32_t* slots, const std::vector<RowBlock>& features,
                        char* out, int64_t rows, int64_t row_bytes, int threads);

// out[j] = source[slots[j]]
void gather_image_tokens(Rows source, const int32_t* slots, char* out, int64_t rows,
                         int64_t row_bytes, int threads);

// out = source, except that the rows slots[:count] are zero.
void clear_image_tokens(Rows source, const int32_t* slots, int64_t count, char* out, int64_t rows,
                        int64_t row_bytes, int threads);

}  // namespace vlm_fast
