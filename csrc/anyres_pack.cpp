#include "anyres_pack.h"

namespace vlm_fast {
namespace {

struct Table {
  Rows source;
  const int32_t* slots;  // null: the index has rows of the source
  const int32_t* index;
  int64_t limit;
  const char* fill;  // null: zeros

  // Writes `count` rows of the output, from `row` on, for the entries of the index from j on.
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
  // The source's row for entry j, or -1 if the entry is no row.
  int64_t at(int64_t j) const {
    const int64_t row = index[j];
    if (row < 0 || row >= limit) return -1;
    return slots == nullptr ? row : slots[row];
  }
};

struct Float32 {
  using Stored = float;
  static float load(float x) { return x; }
  static float store(float x) { return x; }
};

struct BFloat16 {
  using Stored = uint16_t;
  static float load(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  static uint16_t store(float x) {  // round to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return static_cast<uint16_t>((x != x ? bits | 0x400000 : rounded) >> 16);
  }
};

template <typename Number>
void blend(Rows source, const int32_t* taps, const int32_t* weights, int64_t limit,
           const char* fill, const RowWriter& writer, int64_t begin, int64_t end, int64_t cols) {
  using Stored = typename Number::Stored;
  const auto is_row = [&](int32_t tap) { return tap >= 0 && tap < limit; };
  for (int64_t row = begin; row < end; ++row) {
    const int32_t* tap = taps + 4 * row;
    const int32_t* weight = weights + 4 * row;
    const Stored* from[4];
    float share[4];
    int count = 0;
    for (int k = 0; k < 4; ++k) {
      if (!is_row(tap[k])) continue;
      from[count] = reinterpret_cast<const Stored*>(source.data + tap[k] * source.stride);
      share[count++] = static_cast<float>(weight[k]) * 0x1p-30f;
    }
    auto* to = reinterpret_cast<Stored*>(writer.out + row * writer.row_bytes);
    if (fill != nullptr && !is_row(tap[0])) {
      std::memcpy(to, fill, writer.row_bytes);
    } else if (count == 1 && share[0] == 1) {
      std::memcpy(to, from[0], writer.row_bytes);
    } else if (count == 4) {
      for (int64_t i = 0; i < cols; ++i) {
        float total = Number::load(from[0][i]) * share[0];
        total += Number::load(from[1][i]) * share[1];
        total += Number::load(from[2][i]) * share[2];
        total += Number::load(from[3][i]) * share[3];
        to[i] = Number::store(total);
      }
    } else {
      for (int64_t i = 0; i < cols; ++i) {
        float total = 0;
        for (int k = 0; k < count; ++k) total += Number::load(from[k][i]) * share[k];
        to[i] = Number::store(total);
      }
    }
  }
}

}  // namespace

void blend_rows(Rows source, const int32_t* taps, const int32_t* weights, int64_t limit,
                const char* fill, char* out, int64_t rows, int64_t cols, bool bf16, int threads) {
  const auto write = [&](const RowWriter& writer, int64_t begin, int64_t end) {
    const auto run = bf16 ? blend<BFloat16> : blend<Float32>;
    run(source, taps, weights, limit, fill, writer, begin, end, cols);
  };
  for_row_shares(out, rows, cols * (bf16 ? 2 : 4), threads, write);
}

void pack_rows(Rows source, const int32_t* slots, const int32_t* index, int64_t limit,
               const char* fill, char* out, int64_t rows, int64_t row_bytes, int threads) {
  const Table table{source, slots, index, limit, fill};
  const auto write = [&](const RowWriter& writer, int64_t begin, int64_t end) {
    table.write(writer, begin, begin, end - begin);
  };
  for_row_shares(out, rows, row_bytes, threads, write);
}

int64_t merge_packed_rows(Rows embeds, const uint8_t* mask, Rows source, const int32_t* index,
                          int64_t count, int64_t limit, const char* fill, char* out,
                          int32_t* positions, int64_t rows, int64_t row_bytes, int threads) {
  const Table table{source, nullptr, index, limit, fill};
  const auto write = [&](const RowWriter& writer, int64_t begin, int64_t end) {
    const auto text = [&](int64_t row, int64_t length) { writer.copy(row, embeds, row, length); };
    const auto image = [&](int64_t row, int64_t j, int64_t length) {
      length = std::min(length, count - j);
      table.write(writer, row, j, length);
      if (positions == nullptr) return;
      for (int64_t i = 0; i < length; ++i) positions[j + i] = static_cast<int32_t>(row + i);
    };
    for_runs(mask, begin, end, text, image);
  };
  for_row_shares(out, rows, row_bytes, threads, write);
  return count_true(mask, rows);
}

}  // namespace vlm_fast
