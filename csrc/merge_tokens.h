// Merging of similar tokens on the CPU.
//
// `destination`, `order` and `start` are those of kernels/bipartite_match.py. Strides are in
// elements, rows are dense, outputs contiguous, and the caller has checked shapes and dtypes; numbers
// of tokens are checked here, and one that is out of range throws std::out_of_range.
#pragma once

#include <cstdint>

namespace vlm_fast {

enum class Element { kFloat32 = 0, kBfloat16 = 1 };

// (batch, tokens, cols), inner stride 1.
struct Tokens {
  const char* data;
  int64_t batch_stride, token_stride;
};

// Of each row the largest scores * inverse_b, the number of the first such column, and the value
// times inverse_a; NaN is taken for -Inf, and a value that is NaN gives column 0.
void nearest(const float* scores, int64_t rows, int64_t cols, const float* inverse_a,
             const float* inverse_b, float* best, int32_t* nearest);

// The match that merges the r best of the `count` last tokens A, each into its nearest B.
void merged_order(const float* best, const int32_t* nearest, int64_t batch, int64_t count,
                  int64_t tokens, int64_t r, int64_t protected_a, int64_t protected_b,
                  int32_t* destination, int32_t* order, int32_t* start, int threads);

// Sums of rows into out; with `total`, means weighted by size (null: ones), and total sizes.
void sum_tokens(Element element, Tokens x, const float* size, const int32_t* order,
                const int32_t* start, char* out, float* total, int64_t batch, int64_t tokens,
                int64_t merged, int64_t cols, int threads);

// out[i] = y[destination[i]]; with `total`, times size[i] (null: 1) / total[destination[i]].
void spread_tokens(Element element, Tokens y, const int32_t* destination, const float* size,
                   const float* total, char* out, int64_t batch, int64_t tokens, int64_t merged,
                   int64_t cols, int threads);

}  // namespace vlm_fast
