#include "image_tokens.h"

#include <algorithm>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "pages.h"

namespace vlm_fast {
namespace {

// Below this a thread costs more than it copies.
constexpr int64_t kBytesPerThread = 256 << 10;
// Outputs from here on do not survive in the cache until they are read again, so stores bypass it:
// 1.5x at 16 MiB, one thread; at 8 MiB the reader loses more than the copy gains.
constexpr int64_t kStreamBytes = 16 << 20;
// Not into huge pages: one that the kernel has just zeroed is still cached, so plain stores win.

#if defined(__SSE2__)
void stream(char* out, const char* source, int64_t bytes) {
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

// Streamed stores are weakly ordered: another thread may read the output only after this.
void finish_streams() { _mm_sfence(); }
#else
void stream(char* out, const char* source, int64_t bytes) { std::memcpy(out, source, bytes); }
void finish_streams() {}
#endif

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

// Calls write(writer, begin, end) for equal shares of the output's rows, one share a thread.
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

// The end of the run of consecutive rows slots[j], slots[j] + 1, ... within slots[j:count].
int64_t run_end(const int32_t* slots, int64_t j, int64_t count) {
  int64_t end = j + 1;
  while (end < count && slots[end] == slots[end - 1] + 1) ++end;
  return end;
}

// Covers rows [begin, end) in order: text(row, count) for the rows between the image tokens and
// image(row, j, count) where `count` consecutive rows take the features from the j-th on.
template <typename Text, typename Image>
void for_runs(const int32_t* slots, int64_t count, int64_t begin, int64_t end, const Text& text,
              const Image& image) {
  int64_t j = std::lower_bound(slots, slots + count, begin) - slots;
  const int64_t j_end = std::lower_bound(slots + j, slots + count, end) - slots;
  int64_t row = begin;
  while (row < end) {
    const int64_t next = j < j_end ? slots[j] : end;
    if (next > row) text(row, next - row);
    row = next;
    if (j == j_end) continue;
    const int64_t last = run_end(slots, j, j_end);
    image(row, j, last - j);
    row += last - j;
    j = last;
  }
}

}  // namespace

int64_t image_token_slots(const uint8_t* mask, int64_t rows, int32_t* slots, int64_t capacity) {
  int64_t found = 0;
  for (int64_t row = 0; row < rows; ++row) {
    if (!mask[row]) continue;
    if (found < capacity) slots[found] = static_cast<int32_t>(row);
    ++found;
  }
  return found;
}

void merge_image_tokens(Rows embeds, const int32_t* slots, const std::vector<RowBlock>& features,
                        char* out, int64_t rows, int64_t row_bytes, int threads) {
  std::vector<int64_t> ends;
  int64_t count = 0;
  for (const RowBlock& block : features) ends.push_back(count += block.count);

  const auto write = [&](const RowWriter& writer, int64_t begin, int64_t end) {
    const auto text = [&](int64_t row, int64_t length) { writer.copy(row, embeds, row, length); };
    const auto image = [&](int64_t row, int64_t j, int64_t length) {
      int64_t block = std::upper_bound(ends.begin(), ends.end(), j) - ends.begin();
      for (const int64_t last = j + length; j < last; ++block) {
        const int64_t piece = std::min(last, ends[block]) - j;
        const int64_t block_row = j - (ends[block] - features[block].count);
        writer.copy(row, features[block].rows, block_row, piece);
        row += piece;
        j += piece;
      }
    };
    for_runs(slots, count, begin, end, text, image);
  };
  for_row_shares(out, rows, row_bytes, threads, write);
}

void gather_image_tokens(Rows source, const int32_t* slots, char* out, int64_t rows,
                         int64_t row_bytes, int threads) {
  const auto write = [&](const RowWriter& writer, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end;) {
      const int64_t last = run_end(slots, j, end);
      writer.copy(j, source, slots[j], last - j);
      j = last;
    }
  };
  for_row_shares(out, rows, row_bytes, threads, write);
}

void clear_image_tokens(Rows source, const int32_t* slots, int64_t count, char* out, int64_t rows,
                        int64_t row_bytes, int threads) {
  const auto write = [&](const RowWriter& writer, int64_t begin, int64_t end) {
    const auto text = [&](int64_t row, int64_t length) { writer.copy(row, source, row, length); };
    const auto image = [&](int64_t row, int64_t, int64_t length) { writer.zero(row, length); };
    for_runs(slots, count, begin, end, text, image);
  };
  for_row_shares(out, rows, row_bytes, threads, write);
}

}  // namespace vlm_fast
