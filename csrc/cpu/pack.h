// Groups that are neither runs of memory nor side by side, as the rows of a slice or short ones: a visit packs what it
// reads, and unpacks what it wrote; in between that stays in the cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace fused_reg {

constexpr int64_t kLineBytes = 64;
constexpr int64_t kPrefetchRows = 16;
constexpr int64_t kLeastRun = 256;

// Where the elements of groups lie, from the first of them on. Strides are in elements.
struct Strides {
  struct Dim {
    int64_t size, stride;
  };
  int64_t group = 0;      // from one to the next
  std::vector<Dim> dims;  // of a group, in the order of its elements; one or more

  static Strides of_runs(int64_t size) { return {size, {{size, 1}}}; }

  bool is_run() const { return dims.size() == 1 && dims[0].stride == 1 && group == dims[0].size; }

  // Where element i of a group lies, and how many from there on lie as it does to the next.
  std::pair<int64_t, int64_t> piece(int64_t i) const {
    const int64_t left = dims.back().size - i % dims.back().size;
    int64_t offset = 0;
    for (auto dim = dims.rbegin(); dim != dims.rend(); ++dim) {
      offset += i % dim->size * dim->stride;
      i /= dim->size;
    }
    return {offset, left};
  }

  // Whether its elements lie in runs that are worth a task each.
  bool has_runs() const { return dims.back().stride == 1 && dims.back().size >= kLeastRun; }

  // Each element is beside that of the next group. Those of an expanded tensor are no distance apart.
  bool is_across() const { return dims.size() == 1 && dims[0].stride != 0 && group == 1; }
};

template <class T>
struct Matrix {
  T* at;
  int64_t row, column;  // strides

  Matrix transposed() const { return {at, column, row}; }
};

// A square of elements that vectors of 16 bytes transpose: every x86-64 and aarch64 has them.
template <class T>
struct Tile {
  static constexpr int kSide = 16 / sizeof(T);
  typedef T Vector __attribute__((vector_size(16)));
  using Places = decltype(Vector{} < Vector{});

  // An element of a, one of b, the next of a, and so on.
  template <int first, int... i>
  static Vector interleaved(Vector a, Vector b, std::integer_sequence<int, i...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (first + i / 2 + i % 2 * kSide)...);
#else
    return __builtin_shuffle(a, b, Places{(first + i / 2 + i % 2 * kSide)...});
#endif
  }

  // From rows that are `row` apart to columns that are `column` apart.
  static void transpose(const T* from, int64_t row, T* to, int64_t column) {
    constexpr std::make_integer_sequence<int, kSide> all;
    Vector rows[kSide], next[kSide];
    for (int i = 0; i < kSide; ++i) {
      std::memcpy(&rows[i], from + i * row, sizeof(Vector));
    }
    for (int apart = 1; apart < kSide; apart *= 2) {
      for (int i = 0; i < kSide / 2; ++i) {
        next[2 * i] = interleaved<0>(rows[i], rows[i + kSide / 2], all);
        next[2 * i + 1] = interleaved<kSide / 2>(rows[i], rows[i + kSide / 2], all);
      }
      std::copy(next, next + kSide, rows);
    }
    for (int i = 0; i < kSide; ++i) {
      std::memcpy(to + i * column, &rows[i], sizeof(Vector));
    }
  }
};

// In any strides: a line of each row at a time, so that what lies beside an element is still in the cache.
template <class T>
void copy_scalars(Matrix<T> from, Matrix<T> to, int64_t rows, int64_t columns) {
  constexpr int64_t kLine = kLineBytes / sizeof(T);
  for (int64_t line = 0; line < columns; line += kLine) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = line; c < std::min(line + kLine, columns); ++c) {
        to.at[r * to.row + c * to.column] = from.at[r * from.row + c * from.column];
      }
    }
  }
}

// Columns that are contiguous to rows that are. A line of each row is filled at a time; where the rows are far apart,
// no hardware fetches ahead what is written.
template <class T>
void copy_transposed(Matrix<T> from, Matrix<T> to, int64_t rows, int64_t columns) {
  constexpr int64_t kSide = Tile<T>::kSide, kLine = kLineBytes / sizeof(T);
  for (int64_t line = 0; line < columns; line += kLine) {
    const int64_t end = std::min(line + kLine, columns);
    for (int64_t r = 0; r < rows; r += kSide) {
      for (int64_t ahead = r + kPrefetchRows; ahead < std::min(r + kPrefetchRows + kSide, rows); ++ahead) {
        __builtin_prefetch(to.at + ahead * to.row + line, 1);
      }
      for (int64_t c = line; c < end; c += kSide) {
        const Matrix<T> tile{from.at + r + c * from.column, 1, from.column};
        const Matrix<T> copy{to.at + r * to.row + c, to.row, 1};
        if (r + kSide <= rows && c + kSide <= end) {
          Tile<T>::transpose(tile.at, tile.column, copy.at, copy.row);
        } else {
          copy_scalars(tile, copy, std::min(kSide, rows - r), std::min(kSide, end - c));
        }
      }
    }
  }
}

// Rows that are runs in both. A call for a few bytes takes longer than these.
template <class T>
void copy_runs(Matrix<T> from, Matrix<T> to, int64_t rows, int64_t columns) {
  const auto copy_each = [&](auto bytes) {
    for (int64_t r = 0; r < rows; ++r) {
      std::memcpy(to.at + r * to.row, from.at + r * from.row, bytes);
    }
  };
  const size_t bytes = columns * sizeof(T);
  switch (bytes) {
    case 8:
      return copy_each(std::integral_constant<size_t, 8>());
    case 16:
      return copy_each(std::integral_constant<size_t, 16>());
    case 32:
      return copy_each(std::integral_constant<size_t, 32>());
    case 64:
      return copy_each(std::integral_constant<size_t, 64>());
    default:
      return copy_each(bytes);
  }
}

template <class T>
void copy(Matrix<T> from, Matrix<T> to, int64_t rows, int64_t columns) {
  if (from.column == 1 && to.column == 1) {
    copy_runs(from, to, rows, columns);
  } else if (from.row == 1 && to.row == 1) {
    copy_runs(from.transposed(), to.transposed(), columns, rows);
  } else if (from.row == 1 && to.column == 1) {
    copy_transposed(from, to, rows, columns);
  } else if (from.column == 1 && to.row == 1) {
    copy_transposed(from.transposed(), to.transposed(), columns, rows);
  } else {
    copy_scalars(from, to, rows, columns);
  }
}

// Elements [begin, begin + size) of so many groups, the first of which starts at `memory`, and a copy of them.
template <bool unpacks, class T>
void pack_elements(const Strides& strides, T* memory, Matrix<T> packed, int64_t groups, int64_t begin, int64_t size) {
  for (int64_t i = 0, count; i < size; i += count) {
    const auto [offset, left] = strides.piece(begin + i);
    count = std::min(left, size - i);
    const Matrix<T> strided{memory + offset, strides.group, strides.dims.back().stride};
    const Matrix<T> run{packed.at + i * packed.column, packed.row, packed.column};
    unpacks ? copy(run, strided, groups, count) : copy(strided, run, groups, count);
  }
}

// In the copy groups are `group` apart, and their elements `element`.
template <bool unpacks>
void pack(const Strides& strides, size_t element_size, void* memory, void* packed, int64_t group, int64_t element,
          int64_t groups, int64_t begin, int64_t size) {
  const auto elements = [&](auto type) {
    using T = decltype(type);
    pack_elements<unpacks>(strides, static_cast<T*>(memory), Matrix<T>{static_cast<T*>(packed), group, element}, groups,
                           begin, size);
  };
  element_size == 2 ? elements(uint16_t{}) : element_size == 4 ? elements(float{}) : elements(double{});
}

}  // namespace fused_reg
