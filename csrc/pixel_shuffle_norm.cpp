#include "pixel_shuffle_norm.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "huge_pages.h"

// The loops below are compiled for several instruction sets, and the loader picks the CPU's: they
// are several times as fast in wide registers.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EVERY_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_CPU
#endif
#if defined(__GNUC__)
#define INLINE inline __attribute__((always_inline))  // else it is compiled for the baseline CPU
#else
#define INLINE inline
#endif

namespace vlm_fast {
namespace {

constexpr int64_t kElementsPerThread = 64 << 10;
// Gradients of parameters are first summed over this many tokens and then added to the total,
// because a long chain of fp32 additions loses precision.
constexpr int64_t kTokensPerSum = 32;

struct BFloat16 {
  uint16_t bits;
};

INLINE float widened(float x) { return x; }

INLINE float widened(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

INLINE void narrow(float x, float& out) { out = x; }

// Rounds to nearest, ties to even; NaN stays NaN.
INLINE void narrow(float x, BFloat16& out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

template <typename T>
INLINE float rounded(float x) {
  T narrowed;
  narrow(x, narrowed);
  return widened(narrowed);
}

// The offset in x of patch p of a merged token, with these strides of x.
INLINE int64_t offset(const Merge& m, int64_t token, int64_t p, int64_t batch_stride,
                      int64_t token_stride) {
  int64_t image, row;
  if (m.index) {
    const int64_t at = m.index[token * m.factor * m.factor + p];
    image = at / m.tokens, row = at % m.tokens;
  } else {
    const int64_t block = token % m.blocks;
    image = token / m.blocks;
    row = (block / m.blocks_across * m.factor + p / m.factor) * m.width +
          block % m.blocks_across * m.factor + p % m.factor;
  }
  return image * batch_stride + row * token_stride;
}

// Loads the patches of a merged token into wide[:n], in the merged order if they are normed
// together.
template <typename T>
INLINE void load_patches(const T* __restrict x, const Merge& m, int64_t token,
                         float* __restrict wide) {
  const int64_t positions = m.factor * m.factor, cols = m.cols;
  for (int64_t p = 0; p < positions; ++p) {
    const T* __restrict from = x + offset(m, token, p, m.batch_stride, m.token_stride);
    if (m.after && m.by_channel) {
      for (int64_t c = 0; c < cols; ++c) wide[c * positions + p] = widened(from[c]);
    } else {
      float* __restrict to = wide + p * cols;
      for (int64_t c = 0; c < cols; ++c) to[c] = widened(from[c]);
    }
  }
}

// Four independent sums, because one would wait for the latency of each addition.
template <typename Term>
INLINE float sum(int64_t n, const Term& term) {
  const int64_t quarter = n / 4;
  float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t i = 0; i < quarter; ++i) {
    a += term(i);
    b += term(i + quarter);
    c += term(i + 2 * quarter);
    d += term(i + 3 * quarter);
  }
  for (int64_t i = 4 * quarter; i < n; ++i) a += term(i);
  return (a + b) + (c + d);
}

// Writes the norm of x[:n] to y; overwrites x.
template <typename T>
INLINE void norm_row(float* __restrict x, int64_t n, const Norm& norm, T* __restrict y, float* mean,
                     float* rstd) {
  const float* __restrict weight = norm.weight;
  const float* __restrict bias = norm.bias;
  float rest = 0;
  if (norm.kind == NormKind::kLayer) {
    const float level = sum(n, [=](int64_t i) { return x[i]; }) / n;
    // If the mean is far larger than the deviation, its rounding error matters: subtract the mean
    // of what remains too.
    rest = sum(n, [=](int64_t i) { return x[i] -= level; }) / n;
    if (mean) *mean = level + rest;
  }
  const auto squares = [=](int64_t i) { return (x[i] - rest) * (x[i] - rest); };
  const float scale = 1 / std::sqrt(sum(n, squares) / n + norm.eps);
  if (rstd) *rstd = scale;
  if (norm.kind == NormKind::kRms) {
    for (int64_t i = 0; i < n; ++i) narrow(rounded<T>(x[i] * scale) * weight[i], y[i]);
  } else if (norm.kind == NormKind::kGemma) {
    for (int64_t i = 0; i < n; ++i) narrow(x[i] * scale * (1 + weight[i]), y[i]);
  } else if (bias) {
    for (int64_t i = 0; i < n; ++i) narrow((x[i] - rest) * scale * weight[i] + bias[i], y[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) narrow((x[i] - rest) * scale * weight[i], y[i]);
  }
}

// The forward of merged tokens [begin, end).
template <typename T>
INLINE void forward(const T* x, const Merge& m, const Norm& norm, T* y, float* mean, float* rstd,
                    int64_t begin, int64_t end) {
  const int64_t positions = m.factor * m.factor, n = positions * m.cols;
  const int64_t rows = m.after ? 1 : positions, length = n / rows;
  const bool transposed = m.by_channel && !m.after;
  std::vector<float> wide(n);
  std::vector<T> normed(transposed ? n : 0);
  for (int64_t token = begin; token < end; ++token) {
    load_patches(x, m, token, wide.data());
    T* out = y + token * n;
    T* to = transposed ? normed.data() : out;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t group = token * rows + row;
      norm_row(wide.data() + row * length, length, norm, to + row * length,
               mean ? mean + group : nullptr, rstd ? rstd + group : nullptr);
    }
    for (int64_t c = 0; transposed && c < m.cols; ++c) {
      for (int64_t p = 0; p < positions; ++p) out[c * positions + p] = to[p * m.cols + c];
    }
  }
}

struct Gradients {
  float *dweight, *dbias;  // or null
};

// The backward of one normed row: overwrites x[:n] with its gradient, and adds to the parameters'.
INLINE void norm_row_backward(const float* __restrict dy, float* __restrict x, int64_t n,
                              const Norm& norm, float mean, float rstd, Gradients sums) {
  const float* __restrict weight = norm.weight;
  const float shift = norm.kind == NormKind::kGemma ? 1 : 0;
  const auto unit = [=](int64_t i) { return x[i] = (x[i] - mean) * rstd; };
  const auto dunit = [=](int64_t i) { return dy[i] * (weight[i] + shift); };
  const float projection = sum(n, [=](int64_t i) { return dunit(i) * unit(i); }) / n;
  const float mean_dunit = norm.kind == NormKind::kLayer ? sum(n, dunit) / n : 0;
  if (float* __restrict dbias = sums.dbias) {
    for (int64_t i = 0; i < n; ++i) dbias[i] += dy[i];
  }
  if (float* __restrict dweight = sums.dweight) {
    for (int64_t i = 0; i < n; ++i) dweight[i] += dy[i] * x[i];
  }
  for (int64_t i = 0; i < n; ++i) {
    x[i] = (dy[i] * (weight[i] + shift) - x[i] * projection - mean_dunit) * rstd;
  }
}

INLINE void add_and_clear(float* __restrict total, float* __restrict part, int64_t n) {
  for (int64_t i = 0; i < n; ++i) total[i] += part[i];
  std::fill(part, part + n, 0.f);
}

// The backward of merged tokens [begin, end); dx may be null.
template <typename T>
INLINE void backward(const T* dy, const T* x, const Merge& m, const Norm& norm, const float* mean,
                     const float* rstd, T* dx, Gradients totals, int64_t begin, int64_t end) {
  const int64_t positions = m.factor * m.factor, cols = m.cols, n = positions * cols;
  const int64_t rows = m.after ? 1 : positions, length = n / rows;
  const bool transposed = m.by_channel && !m.after;
  std::vector<float> buffer(2 * n), parts(2 * length);
  float *__restrict wide = buffer.data(), *__restrict wide_dy = wide + n;
  const Gradients sums{totals.dweight ? parts.data() : nullptr,
                       totals.dbias ? parts.data() + length : nullptr};
  for (int64_t token = begin; token < end; ++token) {
    load_patches(x, m, token, wide);
    const T* __restrict from = dy + token * n;
    if (transposed) {
      for (int64_t c = 0; c < cols; ++c) {
        for (int64_t p = 0; p < positions; ++p) {
          wide_dy[p * cols + c] = widened(from[c * positions + p]);
        }
      }
    } else {
      for (int64_t i = 0; i < n; ++i) wide_dy[i] = widened(from[i]);
    }
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t group = token * rows + row;
      norm_row_backward(wide_dy + row * length, wide + row * length, length, norm,
                        mean ? mean[group] : 0, rstd[group], sums);
    }
    for (int64_t p = 0; dx && p < positions; ++p) {
      T* __restrict to = dx + offset(m, token, p, m.tokens * cols, cols);
      if (m.after && m.by_channel) {
        for (int64_t c = 0; c < cols; ++c) narrow(wide[c * positions + p], to[c]);
      } else {
        for (int64_t c = 0; c < cols; ++c) narrow(wide[p * cols + c], to[c]);
      }
    }
    if ((token - begin) % kTokensPerSum == kTokensPerSum - 1 || token + 1 == end) {
      if (sums.dweight) add_and_clear(totals.dweight, sums.dweight, length);
      if (sums.dbias) add_and_clear(totals.dbias, sums.dbias, length);
    }
  }
}

FOR_EVERY_CPU void forward_floats(const float* x, const Merge& m, const Norm& norm, float* y,
                                  float* mean, float* rstd, int64_t begin, int64_t end) {
  forward(x, m, norm, y, mean, rstd, begin, end);
}

FOR_EVERY_CPU void forward_halves(const BFloat16* x, const Merge& m, const Norm& norm, BFloat16* y,
                                  float* mean, float* rstd, int64_t begin, int64_t end) {
  forward(x, m, norm, y, mean, rstd, begin, end);
}

FOR_EVERY_CPU void backward_floats(const float* dy, const float* x, const Merge& m,
                                   const Norm& norm, const float* mean, const float* rstd,
                                   float* dx, Gradients totals, int64_t begin, int64_t end) {
  backward(dy, x, m, norm, mean, rstd, dx, totals, begin, end);
}

FOR_EVERY_CPU void backward_halves(const BFloat16* dy, const BFloat16* x, const Merge& m,
                                   const Norm& norm, const float* mean, const float* rstd,
                                   BFloat16* dx, Gradients totals, int64_t begin, int64_t end) {
  backward(dy, x, m, norm, mean, rstd, dx, totals, begin, end);
}

int shares_of(const Merge& m, int threads) {
  const int64_t elements = m.merged * m.factor * m.factor * m.cols;
  return std::clamp<int64_t>(elements / kElementsPerThread, 1, std::max(threads, 1));
}

void advise(void* out, Dtype dtype, int64_t elements) {
  const int64_t bytes = elements * (dtype == Dtype::kFloat ? 4 : 2);
  if (out && bytes >= kHugePageBytes) advise_huge_pages(static_cast<char*>(out), bytes);
}

}  // namespace

void pixel_shuffle_norm(const void* x, Dtype dtype, const Merge& m, const Norm& norm, void* y,
                        float* mean, float* rstd, int threads) {
  advise(y, dtype, m.merged * m.factor * m.factor * m.cols);
  const int shares = shares_of(m, threads);
#pragma omp parallel for num_threads(shares) schedule(static, 1) if (shares > 1)
  for (int share = 0; share < shares; ++share) {
    const int64_t begin = m.merged * share / shares, end = m.merged * (share + 1) / shares;
    if (dtype == Dtype::kFloat) {
      forward_floats(static_cast<const float*>(x), m, norm, static_cast<float*>(y), mean, rstd,
                     begin, end);
    } else {
      forward_halves(static_cast<const BFloat16*>(x), m, norm, static_cast<BFloat16*>(y), mean,
                     rstd, begin, end);
    }
  }
}

void pixel_shuffle_norm_backward(const void* dy, const void* x, Dtype dtype, const Merge& m,
                                 const Norm& norm, const float* mean, const float* rstd, void* dx,
                                 float* dweight, float* dbias, int threads) {
  const int64_t length = m.cols * (m.after ? m.factor * m.factor : 1);
  const int shares = shares_of(m, threads);
  advise(dx, dtype, m.merged * m.factor * m.factor * m.cols);
  // Each share sums in memory of its own; the sums are then added in a fixed order.
  std::vector<float> totals(2 * length * shares);
#pragma omp parallel for num_threads(shares) schedule(static, 1) if (shares > 1)
  for (int share = 0; share < shares; ++share) {
    const int64_t begin = m.merged * share / shares, end = m.merged * (share + 1) / shares;
    float* own = totals.data() + 2 * length * share;
    const Gradients gradients{dweight ? own : nullptr, dbias ? own + length : nullptr};
    if (dtype == Dtype::kFloat) {
      backward_floats(static_cast<const float*>(dy), static_cast<const float*>(x), m, norm, mean,
                      rstd, static_cast<float*>(dx), gradients, begin, end);
    } else {
      backward_halves(static_cast<const BFloat16*>(dy), static_cast<const BFloat16*>(x), m, norm,
                      mean, rstd, static_cast<BFloat16*>(dx), gradients, begin, end);
    }
  }
  for (int share = 0; share < shares; ++share) {
    float* own = totals.data() + 2 * length * share;
    if (dweight) add_and_clear(dweight, own, length);
    if (dbias) add_and_clear(dbias, own + length, length);
  }
}

}  // namespace vlm_fast
