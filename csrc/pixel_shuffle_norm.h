// Blocks of patches into one token each on the CPU, normed before or after they are merged.
//
// Strides are in elements, outputs and gradients are contiguous, and the caller has checked shapes,
// dtypes and the rows that an index names.
#pragma once

#include <cstdint>

namespace vlm_fast {

enum class Dtype { kFloat, kBFloat16 };
enum class NormKind { kLayer, kRms, kGemma };

struct Merge {
  int64_t merged, factor, cols;                // tokens to write, patches a side, their channels
  int64_t blocks, blocks_across, width;        // of an image, of its row of blocks, of its grid
  int64_t tokens, batch_stride, token_stride;  // of x
  const int64_t* index;                        // (merged, factor * factor) rows of x, or null
  bool by_channel, after;
};

struct Norm {
  NormKind kind;
  const float* weight;  // of a patch, or of a merged token
  const float* bias;    // or null
  float eps;
};

// y (merged, factor * factor * cols), and one mean and 1 / deviation for all that is normed at
// once, where these are wanted.
void pixel_shuffle_norm(const void* x, Dtype dtype, const Merge& merge, const Norm& norm, void* y,
                        float* mean, float* rstd, int threads);

// Gradients, each where it is wanted: dx, written in the rows of blocks; dweight and dbias,
// added to.
void pixel_shuffle_norm_backward(const void* dy, const void* x, Dtype dtype, const Merge& merge,
                                 const Norm& norm, const float* mean, const float* rstd, void* dx,
                                 float* dweight, float* dbias, int threads);

}  // namespace vlm_fast
