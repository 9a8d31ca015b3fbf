#include "anyres_pack.h"

namespace vlm_fast {
namespace {

struct Table {
  Rows source;
  const int32_t* slots;  // or null
  const int32_t* index;
  int64_t limit;
  const char* fill;  // or null

  // Writes `count` rows of the output from `row` on, those of the table from its j-th entry on.
  void write(const RowWriter& writer, int64_t row, int64_t j, int64_t count) const {
    for (const int64_t end = j + count; j < end;) {
      int64_t length = 1;
      const int64_t from = at(j);
      if (from >= 0) {
        while (j + length < end && at(j + length) == from + length) ++length;
        writer.copy(row, source, from, length);
      } else if (fill != nullptr) {
        writer.copy(row, {fill, 0}, 0, 1);
      } else {
        while (j + length < end && at(j + length) < 0) ++length;
        writer.zero(row, length);
      }
      row += length;
      j += length;
    }
  }

 private:
  // The source's row of the j-th entry, or -1.
  int64_t at(int64_t j) const {
    const int64_t row = index[j];
    if (row < 0 || row >= limit) return -1;
    return slots == nullptr ? row : slots[row];
  }
};

}  // namespace

void pack_rows(Rows source, const int32_t* slots, const int32_t* index, int64_t limit,
               const char* fill, char* out, int64_t rows, int64_t row_bytes, int threads) {
  const Table table{source, slots, index, limit, fill};
  const auto write = [&](const RowWriter& writer, int64_t begin, int64_t end) {
    table.write(writer, begin, begin, end - begin);
  };
  for_row_shares(out, rows, row_bytes, threads, write);
}

void merge_packed_rows(Rows embeds, const int32_t* slots, Rows source, const int32_t* index,
                       int64_t count, int64_t limit, const char* fill, char* out, int64_t rows,
                       int64_t row_bytes, int threads) {
  const Table table{source, nullptr, index, limit, fill};
  const auto write = [&](const RowWriter& writer, int64_t begin, int64_t end) {
    const auto text = [&](int64_t row, int64_t length) { writer.copy(row, embeds, row, length); };
    const auto image = [&](int64_t row, int64_t j, int64_t length) {
      table.write(writer, row, j, length);
    };
    for_runs(slots, count, begin, end, text, image);
  };
  for_row_shares(out, rows, row_bytes, threads, write);
}

}  // namespace vlm_fast
