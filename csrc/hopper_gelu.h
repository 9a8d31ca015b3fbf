// The exact (erf) GELU and its derivative, for the epilogues of the Hopper GEMMs. The file compiles
// without CUTLASS and CUDA too, for the test that compares the functions with float64.
//
// CUTLASS's own functions do not match: its GELU is the erf form, but its dGELU is the derivative
// of the tanh form.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define VLM_FAST_INLINE __host__ __device__ __forceinline__
#else
#define VLM_FAST_INLINE inline
#endif

namespace vlm_fast {

inline constexpr float kSqrtHalf = 0.7071067811865476f;
inline constexpr float kInvSqrtTau = 0.3989422804014327f;

// NaN and infinities give what ATen's formulas give.
VLM_FAST_INLINE float normal_cdf(float z) { return 0.5f * (1.0f + erff(z * kSqrtHalf)); }

VLM_FAST_INLINE float gelu(float z, float cdf) { return z * cdf; }

VLM_FAST_INLINE float gelu_slope(float z, float cdf) {
  return cdf + z * kInvSqrtTau * expf(-0.5f * z * z);
}

}  // namespace vlm_fast
