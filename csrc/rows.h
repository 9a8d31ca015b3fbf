// Copies of rows into a new output on a CPU: the output is divided among threads, consecutive rows
// are copied at once, and the kind of store depends on the output's size. Strides and row lengths
// are in bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "huge_pages.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace vlm_fast {

// With fewer bytes per thread, starting a thread costs more than it saves.
inline constexpr int64_t kBytesPerThread = 256 << 10;
// Outputs of this size are evicted from the cache before they are read, so their stores bypass it:
// 1.5x faster at 16 MiB with one thread. At 8 MiB the reader would lose more than the copy gains.
inline constexpr int64_t kStreamBytes = 16 << 20;

#if defined(__SSE2__)
inline void stream(char* out, const char* source, int64_t bytes) {
  const int64_t unaligned = -reinterpret_cast<uintptr_t>(out) & (sizeof(__m128i) - 1);
  int64_t at = std::min(bytes, unaligned);
  std::memcpy(out, source, at);
  for (; at + 64 <= bytes; at += 64) {
    const auto* from = reinterpret_cast<const __m128i*>(source + at);
    auto* to = reinterpret_cast<__m128i*>(out + at);
    const __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1);
    const __m128i c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
    _mm_stream_si128(to, a);
    _mm_stream_si128(to + 1, b);
    _mm_stream_si128(to + 2, c);
    _mm_stream_si128(to + 3, d);
  }
  std::memcpy(out + at, source + at, bytes - at);
}

// Streaming stores are weakly ordered: other threads may read the output only after this fence.
inline void finish_streams() { _mm_sfence(); }
#else
inline void stream(char* out, const char* source, int64_t bytes) { std::memcpy(out, source, bytes); }
inline void finish_streams() {}
#endif

struct Rows {
  const char* data;
  int64_t stride;
};

struct RowWriter {
  char* out;
  int64_t row_bytes;
  bool streaming;

  void copy(int64_t row, Rows source, int64_t source_row, int64_t count) const {
    char* to = out + row * row_bytes;
    const char* from = source.data + source_row * source.stride;
    if (source.stride == row_bytes) return copy_bytes(to, from, count * row_bytes);
    for (int64_t i = 0; i < count; ++i) {
      copy_bytes(to + i * row_bytes, from + i * source.stride, row_bytes);
    }
  }

  void zero(int64_t row, int64_t count) const {
    std::memset(out + row * row_bytes, 0, count * row_bytes);
  }

  void copy_bytes(char* to, const char* from, int64_t bytes) const {
    if (streaming) {
      stream(to, from, bytes);
    } else {
      std::memcpy(to, from, bytes);
    }
  }
};

// Calls write(writer, begin, end) for equal shares of the output's rows, one share per thread.
template <typename Write>
void for_row_shares(char* out, int64_t rows, int64_t row_bytes, int threads, const Write& write) {
  const int64_t bytes = rows * row_bytes;
  const bool huge = bytes >= kHugePageBytes;
  if (huge) advise_huge_pages(out, bytes);
  const RowWriter writer{out, row_bytes, bytes >= kStreamBytes && !huge};
  const int shares = std::clamp<int64_t>(bytes / kBytesPerThread, 1, std::max(threads, 1));
#pragma omp parallel for num_threads(shares) schedule(static, 1) if (shares > 1)
  for (int share = 0; share < shares; ++share) {
    write(writer, rows * share / shares, rows * (share + 1) / shares);
    if (writer.streaming) finish_streams();
  }
}

inline int64_t count_true(const uint8_t* mask, int64_t rows) {
  int64_t found = 0;
  for (int64_t row = 0; row < rows; ++row) found += mask[row] != 0;
  return found;
}

// The end of the run of equal entries that starts at mask[row], within mask[row:end].
inline int64_t run_end(const uint8_t* mask, int64_t row, int64_t end) {
  const bool first = mask[row];
  while (++row < end && (mask[row] != 0) == first) {
  }
  return row;
}

// Covers rows [begin, end) in order. Calls text(row, length) for a run of rows that are no image
// tokens, and image(row, j, length) for a run of image tokens, of which the first is the j-th.
template <typename Text, typename Image>
void for_runs(const uint8_t* mask, int64_t begin, int64_t end, const Text& text,
              const Image& image) {
  int64_t j = count_true(mask, begin);
  for (int64_t row = begin; row < end;) {
    const int64_t length = run_end(mask, row, end) - row;
    if (mask[row]) {
      image(row, j, length);
      j += length;
    } else {
      text(row, length);
    }
    row += length;
  }
}

}  // namespace vlm_fast
