#include "image_tokens.h"

#include <algorithm>

namespace vlm_fast {
namespace {

int64_t count_true(const uint8_t* mask, int64_t rows) {
  int64_t found = 0;
  for (int64_t row = 0; row < rows; ++row) found += mask[row] != 0;
  return found;
}

// The end of the run of equal entries that starts at mask[row], within mask[row:end].
int64_t run_end(const uint8_t* mask, int64_t row, int64_t end) {
  const bool first = mask[row];
  while (++row < end && (mask[row] != 0) == first) {
  }
  return row;
}

// The row of the true entry with this number, or `rows` if there are fewer.
int64_t nth_true(const uint8_t* mask, int64_t rows, int64_t number) {
  for (int64_t row = 0; row < rows; ++row) {
    if (mask[row] && number-- == 0) return row;
  }
  return rows;
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

int64_t merge_image_tokens(Rows embeds, const uint8_t* mask, const std::vector<RowBlock>& features,
                           char* out, int64_t rows, int64_t row_bytes, int threads) {
  std::vector<int64_t> ends;
  int64_t count = 0;
  for (const RowBlock& block : features) ends.push_back(count += block.count);

  const auto write = [&](const RowWriter& writer, int64_t begin, int64_t end) {
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
    int64_t j = count_true(mask, begin);
    for (int64_t row = begin; row < end;) {
      const int64_t length = run_end(mask, row, end) - row;
      if (mask[row]) {
        image(row, j, length);
        j += length;
      } else if (embeds.data != nullptr) {
        writer.copy(row, embeds, row, length);
      } else {
        writer.zero(row, length);
      }
      row += length;
    }
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
      for (int64_t row = begin; row < end;) {
        const int64_t length = run_end(mask, row, end) - row;
        if (mask[row]) {
          writer.zero(row, length);
        } else {
          writer.copy(row, source, row, length);
        }
        row += length;
      }
    };
    for_row_shares(text, rows, row_bytes, threads, write);
  }
  return count_true(mask, rows);
}

}  // namespace vlm_fast
