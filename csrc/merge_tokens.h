// Merging of similar tokens on the CPU.
//
// `destination`, `order` and `start` are explained in kernels/bipartite_match.py. Strides are in
// elements, rows are dense, outputs are contiguous, and the caller has checked shapes and dtypes.
// The token numbers are checked here: one that is out of range throws std::out_of_range.
#pragma once

#include <cstdint>

namespace vlm_fast {

enum class Element { kFloat32 = 0, kBfloat16 = 1 };

// (batch, tokens, cols), inner stride 1.
struct Tokens {
  const char* data;
  int64_t batch_stride, token_stride;
};

// For each row a: nearest[a] is the first column b with the largest scores[a][b] * inverse_b[b],
// and best[a] is that product times inverse_a[a]. NaN counts as -Inf; if best[a] is -Inf,
// nearest[a] is 0.
void nearest(const float* scores, int64_t rows, int64_t cols, const float* inverse_a,
             const float* inverse_b, float* best, int32_t* nearest);

// The match that merges r of the last `count` tokens of A, those with the largest `best`, into
// their nearest B.
void merged_order(const float* best, const int32_t* nearest, int64_t batch, int64_t count,
                  int64_t tokens, int64_t r, int64_t protected_a, int64_t protected_b,
                  int32_t* destination, int32_t* order, int32_t* start, int threads);

// Writes sums of rows to out. If total is not null, writes means weighted by size (null: ones)
// instead, and the total sizes to total.
void sum_tokens(Element element, Tokens x, const float* size, const int32_t* order,
                const int32_t* start, char* out, float* total, int64_t batch, int64_t tokens,
                int64_t merged, int64_t cols, int threads);

// out[i] = y[destination[i]], times size[i] (null: 1) / total[destination[i]] if total is not null.
void spread_tokens(Element element, Tokens y, const int32_t* destination, const float* size,
                   const float* total, char* out, int64_t batch, int64_t tokens, int64_t merged,
                   int64_t cols, int threads);

}  // namespace vlm_fast
