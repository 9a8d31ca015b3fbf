#include "image_tokens.h"

#include <algorithm>

namespace vlm_fast {

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
