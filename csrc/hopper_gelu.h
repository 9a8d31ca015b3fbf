// GELU in its exact erf form and its slope, for the epilogues of the Hopper GEMMs and, without
// CUTLASS or CUDA, for the test that compares them with float64.
//
// CUTLASS's own pair must not be used: its GELU is the erf form, its dGELU the slope of tanh's.
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

// Where NaN and the infinities go is where ATen's formulas send them.
VLM_FAST_INLINE float normal_cdf(float z) { return 0.5f * (1.0f + erff(z * kSqrtHalf)); }

VLM_FAST_INLINE float gelu(float z, float cdf) { return z * cdf; }

VLM_FAST_INLINE float gelu_slope(float z, float cdf) {
  return cdf + z * kInvSqrtTau * expf(-0.5f * z * z);
}

}  // namespace vlm_fast
