#include "merge_tokens.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "huge_pages.h"

namespace vlm_fast {
namespace {

// With fewer bytes per thread, starting a thread costs more than it saves.
constexpr int64_t kBytesPerThread = 256 << 10;
constexpr int kLanes = 16;
constexpr float kLowest = -std::numeric_limits<float>::infinity();

using Bfloat16 = uint16_t;

float widened(float x) { return x; }

float widened(Bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

void narrow(float x, float* to) { *to = x; }

void narrow(float x, Bfloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // ties to even
  *to = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}

// Calls work(begin, end) for equal shares of the output's rows, one share per thread. work returns
// whether all of its numbers are in range.
template <typename Work>
void for_row_shares(char* out, int64_t rows, int64_t row_bytes, int threads, const Work& work) {
  const int64_t bytes = rows * row_bytes;
  if (bytes >= kHugePageBytes) advise_huge_pages(out, bytes);
  const int shares = std::clamp<int64_t>(bytes / kBytesPerThread, 1, std::max(threads, 1));
  std::atomic<bool> in_range{true};
#pragma omp parallel for num_threads(shares) schedule(static, 1) if (shares > 1)
  for (int share = 0; share < shares; ++share) {
    if (!work(rows * share / shares, rows * (share + 1) / shares)) in_range = false;
  }
  if (!in_range) throw std::out_of_range("a match has a number that is out of range");
}

template <typename T>
void sum(Tokens x, const float* size, const int32_t* order, const int32_t* start, T* out,
         float* total, int64_t batch, int64_t tokens, int64_t merged, int64_t cols, int threads) {
  const T* data = reinterpret_cast<const T*>(x.data);
  const auto work = [&](int64_t begin, int64_t end) {
    std::vector<float> sums(cols);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / merged;
      const int64_t first = start[row + image], last = start[row + image + 1];
      if (first < 0 || last > tokens) return false;
      const int32_t* members = order + image * tokens;
      const auto at = [&](int64_t i) {
        return data + image * x.batch_stride + members[i] * x.token_stride;
      };
      float whole = 0;
      for (int64_t i = first; i < last; ++i) {
        if (members[i] < 0 || members[i] >= tokens) return false;
        whole += size ? size[image * tokens + members[i]] : 1.0f;
      }
      if (total) total[row] = whole;
      T* to = out + row * cols;
      if (last - first == 1 && (!total || whole / whole == 1.0f)) {
        std::memcpy(to, at(first), cols * sizeof(T));
        continue;
      }
      std::fill(sums.begin(), sums.end(), 0.0f);
      float* const held = sums.data();
      for (int64_t i = first; i < last; ++i) {
        const T* const from = at(i);
        const float own = size ? size[image * tokens + members[i]] : 1.0f;
        const float share = total ? own / whole : 1.0f;
        for (int64_t c = 0; c < cols; ++c) held[c] += share * widened(from[c]);
      }
      for (int64_t c = 0; c < cols; ++c) narrow(held[c], to + c);
    }
    return true;
  };
  for_row_shares(reinterpret_cast<char*>(out), batch * merged, cols * sizeof(T), threads, work);
}

template <typename T>
void spread(Tokens y, const int32_t* destination, const float* size, const float* total, T* out,
            int64_t batch, int64_t tokens, int64_t merged, int64_t cols, int threads) {
  const T* data = reinterpret_cast<const T*>(y.data);
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / tokens, place = destination[row];
      if (place < 0 || place >= merged) return false;
      const T* const from = data + image * y.batch_stride + place * y.token_stride;
      const float own = size ? size[row] : 1.0f;
      const float scale = total ? own / total[image * merged + place] : 1.0f;
      T* const to = out + row * cols;
      if (scale == 1.0f) {
        std::memcpy(to, from, cols * sizeof(T));
      } else {
        for (int64_t c = 0; c < cols; ++c) narrow(scale * widened(from[c]), to + c);
      }
    }
    return true;
  };
  for_row_shares(reinterpret_cast<char*>(out), batch * tokens, cols * sizeof(T), threads, work);
}

// Moves the r largest of `count` values to the front of `ranked`; of equal values the first.
void rank(const float* best, int64_t count, int64_t r, std::vector<int32_t>& ranked) {
  std::iota(ranked.begin(), ranked.end(), 0);
  const auto closer = [&](int32_t i, int32_t j) {
    return best[i] > best[j] || (best[i] == best[j] && i < j);
  };
  std::nth_element(ranked.begin(), ranked.begin() + r, ranked.begin() + count, closer);
}

}  // namespace

void nearest(const float* scores, int64_t rows, int64_t cols, const float* inverse_a,
             const float* inverse_b, float* best, int32_t* nearest) {
  std::vector<float> row(cols);
  for (int64_t a = 0; a < rows; ++a) {
    const float* const raw = scores + a * cols;
    float* const scaled = row.data();
    for (int64_t b = 0; b < cols; ++b) scaled[b] = raw[b] * inverse_b[b];
    float lanes[kLanes];
    std::fill(lanes, lanes + kLanes, kLowest);
    int64_t b = 0;
    for (; b + kLanes <= cols; b += kLanes) {
      for (int k = 0; k < kLanes; ++k) {
        lanes[k] = scaled[b + k] > lanes[k] ? scaled[b + k] : lanes[k];  // false for NaN
      }
    }
    float largest = kLowest;
    for (const float lane : lanes) largest = std::max(largest, lane);
    for (; b < cols; ++b) largest = scaled[b] > largest ? scaled[b] : largest;
    const float value = largest * inverse_a[a];
    const bool usual = largest > kLowest && !std::isnan(value);
    best[a] = usual ? value : kLowest;
    nearest[a] = usual ? std::find(scaled, scaled + cols, largest) - scaled : 0;
  }
}

void merged_order(const float* best, const int32_t* nearest, int64_t batch, int64_t count,
                  int64_t tokens, int64_t r, int64_t protected_a, int64_t protected_b,
                  int32_t* destination, int32_t* order, int32_t* start, int threads) {
  const int64_t half_a = (tokens + 1) / 2, half_b = tokens / 2, left = half_a - r;
#pragma omp parallel for num_threads(std::max(threads, 1)) if (threads > 1 && batch > 1)
  for (int64_t image = 0; image < batch; ++image) {
    std::vector<int32_t> ranked(count), partner(half_a, -1);
    if (r > 0) rank(best + image * count, count, r, ranked);
    for (int64_t i = 0; i < r; ++i) {
      partner[protected_a + ranked[i]] = protected_b + nearest[image * count + ranked[i]];
    }
    int32_t* const to = destination + image * tokens;
    int32_t* const starts = start + image * (tokens - r + 1);
    std::fill(starts, starts + tokens - r + 1, 0);
    for (int64_t a = 0, unmerged = 0; a < half_a; ++a) {
      to[2 * a] = partner[a] < 0 ? unmerged++ : left + partner[a];
      ++starts[to[2 * a] + 1];
    }
    for (int64_t b = 0; b < half_b; ++b) {
      to[2 * b + 1] = left + b;
      ++starts[left + b + 1];
    }
    std::partial_sum(starts, starts + tokens - r + 1, starts);
    std::vector<int32_t> next(starts, starts + tokens - r);
    const auto place = [&](int64_t token) { order[image * tokens + next[to[token]]++] = token; };
    for (int64_t b = 0; b < half_b; ++b) place(2 * b + 1);
    for (int64_t a = 0; a < half_a; ++a) place(2 * a);
  }
}

void sum_tokens(Element element, Tokens x, const float* size, const int32_t* order,
                const int32_t* start, char* out, float* total, int64_t batch, int64_t tokens,
                int64_t merged, int64_t cols, int threads) {
  const auto run = [&](auto* typed) {
    sum(x, size, order, start, typed, total, batch, tokens, merged, cols, threads);
  };
  element == Element::kFloat32 ? run(reinterpret_cast<float*>(out))
                               : run(reinterpret_cast<Bfloat16*>(out));
}

void spread_tokens(Element element, Tokens y, const int32_t* destination, const float* size,
                   const float* total, char* out, int64_t batch, int64_t tokens, int64_t merged,
                   int64_t cols, int threads) {
  const auto run = [&](auto* typed) {
    spread(y, destination, size, total, typed, batch, tokens, merged, cols, threads);
  };
  element == Element::kFloat32 ? run(reinterpret_cast<float*>(out))
                               : run(reinterpret_cast<Bfloat16*>(out));
}

}  // namespace vlm_fast
