// Declarations of the Hopper GEMMs, without CUTLASS and CUDA headers.
//
// All pointers are to device memory. They and all rows are 16-byte aligned, which the caller
// checks. A function returns null or an error message.
#pragma once

#include <cstdint>

namespace vlm_fast {

// x (rows, inner) with a row stride of `x_row` elements, weight (hidden, inner), bias (hidden,) or
// null, z (rows, hidden) or null, h (rows, hidden).
const char* linear_gelu(const void* x, int64_t x_row, const void* weight, const void* bias, void* z,
                        void* h, int64_t rows, int64_t hidden, int64_t inner, void* stream);

// dy (rows, out_features) with a row stride of `dy_row` elements, weight (out_features, hidden), z
// and dz (rows, hidden), h (rows, hidden) or null, bias_sums fp32 (tiles of rows, hidden rounded up
// to whole tiles) or null.
const char* gelu_backward(const void* dy, int64_t dy_row, const void* weight, const void* z,
                          void* dz, void* h, void* bias_sums, int64_t rows, int64_t hidden,
                          int64_t out_features, void* stream);

}  // namespace vlm_fast
