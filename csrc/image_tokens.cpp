#include "image_tokens.h"

#include <algorithm>

namespace vlm_fast {
namespace {

// The row of the true entry with this number, or `rows` if there are fewer.
int64_t nth_true(const uint8_t* mask, int64_t rows, int64_t number) {
  for (int64_t row = 0; row < rows; ++row) {
    if (mask[row] && number-- == 0) return row;
  }
  return rows;
}

}  // namespace

int64_t merge_image_tokens(Rows embeds, const uint8_t* mask, const std::vector<RowBlock>& features,
                           char* out, int64_t rows, int64_t row_bytes, int threads) {
  std::vector<int64_t> ends;
  int64_t count = 0;
  for (const RowBlock& block : features) ends.push_back(count += block.count);

  const auto write = [&](const RowWriter& writer, int64_t begin, int64_t end) {
    const auto text = [&](int64_t row, int64_t length) {
      if (embeds.data != nullptr) return writer.copy(row, embeds, row, length);
      writer.zero(row, length);
    };
    const auto image = [&](int64_t row, int64_t j, int64_t length) {
      int64_t block = std::upper_bound(ends.begin(), ends.end(), j) - ends.begin();
      for (const int64_t last = std::min(j + length, count); j < last; ++block) {
        const int64_t piece = std::min(last, ends[block]) - j;
        const int64_t block_row = j - (ends[block] - features[block].count);
        writer.copy(row, features[block].rows, block_row, piece);
        row += piece;
        j += piece;
      }
    };
    for_runs(mask, begin, end, text, image);
  };
  for_row_shares(out, rows, row_bytes, threads, write);
  return count_true(mask, rows);
}

int64_t split_image_tokens(Rows source, const uint8_t* mask, char* text,
                           const std::vector<OutputBlock>& features, int64_t rows,
                           int64_t row_bytes, int threads) {
  for (const OutputBlock& block : features) {
    const auto write = [&](const RowWriter& writer, int64_t begin, int64_t end) {
      int64_t row = nth_true(mask, rows, block.first + begin);
      for (int64_t j = begin; j < end && row < rows;) {
        const int64_t last = run_end(mask, row, rows);
        const int64_t length = std::min(last - row, end - j);
        writer.copy(j, source, row, length);
        j += length;
        row = last < rows ? run_end(mask, last, rows) : rows;
      }
    };
    for_row_shares(block.out, block.count, row_bytes, threads, write);
  }
  if (text != nullptr) {
    const auto write = [&](const RowWriter& writer, int64_t begin, int64_t end) {
      const auto copy = [&](int64_t row, int64_t length) { writer.copy(row, source, row, length); };
      const auto zero = [&](int64_t row, int64_t, int64_t length) { writer.zero(row, length); };
      for_runs(mask, begin, end, copy, zero);
    };
    for_row_shares(text, rows, row_bytes, threads, write);
  }
  return count_true(mask, rows);
}

}  // namespace vlm_fast
