// Merging of blocks of patches into one token each, normed before or after, on a CPU.
//
// Strides are in elements, outputs and gradients are contiguous, and the caller has checked shapes,
// dtypes and the rows in an index.
#pragma once

#include <cstdint>

namespace vlm_fast {

enum class Dtype { kFloat, kBFloat16 };
enum class NormKind { kLayer, kRms, kGemma };

struct Merge {
  int64_t merged, factor, cols;                // merged tokens; patches per side; channels
  int64_t blocks, blocks_across, width;        // per image; per row of blocks; of the grid
  int64_t tokens, batch_stride, token_stride;  // of x
  const int64_t* index;                        // (merged, factor * factor) rows of x, or null
  bool by_channel, after;
};

struct Norm {
  NormKind kind;
  const float* weight;  // of a patch or, if Merge::after, of a merged token
  const float* bias;    // or null
  float eps;
};

// Writes y (merged, factor * factor * cols) and, if not null, the mean and 1 / standard deviation
// of each normed row.
void pixel_shuffle_norm(const void* x, Dtype dtype, const Merge& merge, const Norm& norm, void* y,
                        float* mean, float* rstd, int threads);

// Writes the gradients that are not null: dx in the rows of blocks only; dweight and dbias are
// added to.
void pixel_shuffle_norm_backward(const void* dy, const void* x, Dtype dtype, const Merge& merge,
                                 const Norm& norm, const float* mean, const float* rstd, void* dx,
                                 float* dweight, float* dbias, int threads);

}  // namespace vlm_fast
