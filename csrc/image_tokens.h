// Copies of rows between image features and sequences of embeddings, on a CPU.
//
// A mask has one byte per row, which is not 0 at image tokens. Strides and row lengths are in bytes,
// outputs are contiguous, and the caller has checked shapes and dtypes.
#pragma once

#include <cstdint>
#include <vector>

#include "rows.h"

namespace vlm_fast {

struct RowBlock {
  Rows rows;
  int64_t count;
};

struct OutputBlock {
  char* out;
  int64_t first;
  int64_t count;
};

// out = embeds (or zeros, if it is null), except that the j-th row whose mask is true is row j of
// all features, concatenated. True entries beyond the features' rows leave their rows unwritten.
// Returns how many entries are true.
int64_t merge_image_tokens(Rows embeds, const uint8_t* mask, const std::vector<RowBlock>& features,
                           char* out, int64_t rows, int64_t row_bytes, int threads);

// Row j of a block is the source's row whose true entry has the number first + j; rows without one
// are not written. text = source, except that rows whose mask is true are zero; it may be null.
// Returns how many entries are true.
int64_t split_image_tokens(Rows source, const uint8_t* mask, char* text,
                           const std::vector<OutputBlock>& features, int64_t rows,
                           int64_t row_bytes, int threads);

}  // namespace vlm_fast
