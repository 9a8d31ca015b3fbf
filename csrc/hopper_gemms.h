// The Hopper GEMMs as the binding sees them: no CUTLASS and no CUDA in here.
//
// All pointers are to device memory, 16-byte aligned as are all rows; the caller has checked. A
// function returns null, or what went wrong.
#pragma once

#include <cstdint>

namespace vlm_fast {

// x (rows, inner) at a pitch of `x_row` elements, weight (hidden, inner), bias (hidden,) or null,
// z (rows, hidden) or null, h (rows, hidden).
const char* linear_gelu(const void* x, int64_t x_row, const void* weight, const void* bias, void* z,
                        void* h, int64_t rows, int64_t hidden, int64_t inner, void* stream);

// dy (rows, out_features) at a pitch of `dy_row` elements, weight (out_features, hidden), z and dz (rows, hidden),
// h (rows, hidden) or null, bias_sums fp32 (tiles of rows, hidden rounded up to tiles) or null.
const char* gelu_backward(const void* dy, int64_t dy_row, const void* weight, const void* z,
                          void* dz, void* h, void* bias_sums, int64_t rows, int64_t hidden,
                          int64_t out_features, void* stream);

}  // namespace vlm_fast
