// Packing the operands of products into panels and tiles. Part of processor.cpp.
#pragma once
#include "types.h"

namespace vogue {
namespace {

// Rows × 2 vectors of sums and two vectors of B are what the registers hold.
constexpr int64_t kPanel = LANES == 16 ? 12 : 6, kGroup = 2 * LANES;

// What is packed comes from memory, in more streams than the processor follows by itself: each is asked for so far ahead,
// into the second-level cache, as the rows of a matrix are often 4 KB apart, in the same few places of the first.
constexpr int64_t kBytesAhead = 384, kWordsAhead = 32, kLineBytes = 64;
constexpr int kSecondLevel = 2;

// -------------------------------------------------------------------------------------------------------------- lines

// Lines first ... first + lines of a matrix, as far as there are so many: its rows, or its columns.
struct Lines {
  int64_t offset, count, length, line_stride, stride;
  Lines(const View& view, int64_t first, int64_t lines, bool rows) {
    const int64_t available = (rows ? view.rows : view.columns) - first;
    line_stride = rows ? view.row_stride : view.column_stride;
    stride = rows ? view.column_stride : view.row_stride;
    length = rows ? view.columns : view.rows;
    count = lines < available ? lines : available;
    offset = first * line_stride;
  }
};

// ------------------------------------------------------------------------------------------------------------- words

// What a product takes of each operand at a time: a float, or two bf16 with the first one in the low half.
typedef uint32_t Pair;
template <class Word>
constexpr int64_t kElements = sizeof(Word) / sizeof(uint16_t);
template <>
constexpr int64_t kElements<float> = 1;
template <class Word>
struct ElementOf {
  typedef BF16 Type;
};
template <>
struct ElementOf<float> {
  typedef F32 Type;
};

template <class T>
void set(float& word, T first, T) {
  word = first;
}
template <class T>
void set(Pair& word, T first, T second) {
  word = round_to_bf16(first) | round_to_bf16(second) << 16;
}
void set(Pair& word, BF16 first, BF16 second) { word = first.bits | Pair(second.bits) << 16; }

// Whether a word is in memory what it is in a line of T.
template <class Word, class T>
constexpr bool kSame = false;
template <>
constexpr bool kSame<float, F32> = true;
template <>
constexpr bool kSame<Pair, BF16> = true;

// ------------------------------------------------------------------------------------------------------- transposing

typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint32_t UnalignedBits __attribute__((vector_size(4 * LANES), aligned(1), may_alias));

// Elements `from` of a and b, one after the other.
inline Bits shuffle(Bits a, Bits b, Bits from) {
#if defined(__clang__)
  Bits out;
#pragma clang loop unroll(full)
  for (int j = 0; j < LANES; ++j) out[j] = from[j] < LANES ? a[from[j]] : b[from[j] - LANES];
  return out;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// In the square of words, swaps the two off-diagonal blocks of step × step in each diagonal block of twice their size.
template <uint32_t step>
__attribute__((always_inline)) inline void swap_blocks(Bits* rows) {
  Bits upper, lower;
  for (uint32_t j = 0; j < LANES; ++j) {
    upper[j] = j & step ? LANES + j - step : j;
    lower[j] = j & step ? LANES + j : j + step;
  }
#pragma GCC unroll 16
  for (uint32_t i = 0; i < LANES; ++i)
    if (!(i & step)) {
      const Bits a = rows[i], b = rows[i + step];
      rows[i] = shuffle(a, b, upper);
      rows[i + step] = shuffle(a, b, lower);
    }
}

template <uint32_t step>
__attribute__((always_inline)) inline void transpose_square(Bits* rows) {
  if constexpr (step < LANES) {
    swap_blocks<step>(rows);
    transpose_square<2 * step>(rows);
  }
}

// out[k * width + i] = word k of line i, of whole vectors of lines and words. Returns how many words of each line.
int64_t transpose(const void* data, int64_t lines, int64_t words, int64_t line_bytes, int64_t width, void* out) {
  const char* lines_of = static_cast<const char*>(data);
  const int64_t whole = lines % LANES ? 0 : words / LANES * LANES;
  for (int64_t k = 0; k < whole; k += LANES)
    for (int64_t i = 0; i < lines; i += LANES) {
      Bits rows[LANES];
#pragma GCC unroll 16
      for (int64_t j = 0; j < LANES; ++j) {
        const char* line = lines_of + (i + j) * line_bytes + 4 * k;
        __builtin_prefetch(line + kBytesAhead, 0, kSecondLevel);
        rows[j] = *reinterpret_cast<const UnalignedBits*>(line);
      }
      transpose_square<1>(rows);
#pragma GCC unroll 16
      for (int64_t j = 0; j < LANES; ++j)
        *reinterpret_cast<UnalignedBits*>(static_cast<uint32_t*>(out) + (k + j) * width + i) = rows[j];
    }
  return whole;
}

// ------------------------------------------------------------------------------------------------------------ packing

// out[k * width + i] = word k of line i; zeros outside.
template <class Word, class T>
void pack(const T* data, const Lines& from, int64_t width, int64_t depth, Word* out) {
  constexpr int64_t kWord = kElements<Word>, kBlock = 16;  // words of a line that are read together
  const int64_t inside = depth < from.length ? depth : from.length, whole = inside / kWord;
  data += from.offset;
  auto put = [&](int64_t i, int64_t k, int64_t line_stride) {
    const T* element = data + i * line_stride + kWord * k * from.stride;
    set(out[k * width + i], element[0], element[kWord == 2 ? from.stride : 0]);
  };
  int64_t start = 0;
  if (kSame<Word, T> && from.stride == 1)
    start = transpose(data, from.count, whole, from.line_stride * sizeof(T), width, out);
  if (from.line_stride == 1) {
    for (int64_t k = start; k < whole; ++k) {
      for (int64_t j = kWord * (k + kWordsAhead); j < kWord * (k + kWordsAhead + 1); ++j)
        for (int64_t i = 0; i < from.count; i += kLineBytes / sizeof(T))
          __builtin_prefetch(data + j * from.stride + i, 0, kSecondLevel);
      for (int64_t i = 0; i < from.count; ++i) put(i, k, 1);
    }
  } else {
    for (; start < whole; start += kBlock)
      for (int64_t i = 0; i < from.count; ++i)
        for (int64_t k = start; k < start + kBlock && k < whole; ++k) put(i, k, from.line_stride);
  }
  for (int64_t i = 0; whole * kWord < inside && i < from.count; ++i)  // an odd element at the end
    set(out[whole * width + i], data[i * from.line_stride + whole * kWord * from.stride], T{});
  const int64_t there = (inside + kWord - 1) / kWord;
  for (int64_t k = 0; k < depth / kWord; ++k)
    for (int64_t i = k < there ? from.count : 0; i < width; ++i) out[k * width + i] = 0;
}

template <class Word>
void pack_lines(const View& view, int64_t first, int64_t lines, bool rows, int64_t width, int64_t depth, void* out) {
  const Lines from(view, first, lines, rows);
  with_type(view.dtype, [&](auto element) {
    pack(static_cast<const decltype(element)*>(view.data), from, width, depth, static_cast<Word*>(out));
  });
}

template <class Word>
void pack_panel(const View& a, int64_t first, int64_t depth, void* out) {
  pack_lines<Word>(a, first, kPanel, true, kPanel, depth, out);
}

template <class Word>
void pack_tile(const View& b, int64_t first, int64_t columns, int64_t depth, void* out) {
  for (int64_t done = 0; done < columns; done += kGroup) {
    const int64_t lines = columns - done < kGroup ? columns - done : kGroup;
    Word* group = static_cast<Word*>(out) + done * depth / kElements<Word>;
    pack_lines<Word>(b, first + done, lines, false, kGroup, depth, group);
  }
}

// ------------------------------------------------------------------------------------- packing what is in the cache

template <class Word>
void pack_rows(const float* block, int64_t columns, int64_t stride, int64_t first, int64_t depth, void* panel) {
  constexpr int64_t kLines = (kPanel + LANES - 1) / LANES * LANES, kWord = kElements<Word>;
  typename ElementOf<Word>::Type lines[kLines][kMostColumns] = {};
  const int64_t words = (columns + kWord - 1) / kWord;
  for (int64_t i = 0; i < kPanel; ++i) {
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) lines[i][j] = block[i * stride + j];
    for (int64_t j = columns; j < words * kWord; ++j) lines[i][j] = 0.0f;
  }
  Word turned[kMostColumns / kWord * kLines];
  const int64_t there = transpose(lines, kLines, words, sizeof(lines[0]), kLines, turned);
  for (int64_t k = there; k < words; ++k)
    for (int64_t i = 0; i < kPanel; ++i)
      __builtin_memcpy(turned + k * kLines + i, &lines[i][k * kWord], sizeof(Word));
  Word* out = static_cast<Word*>(panel) + first / kWord * kPanel;
  for (int64_t k = 0; k < words; ++k)
    __builtin_memcpy(out + k * kPanel, turned + k * kLines, kPanel * sizeof(Word));
}

template <class Word>
void pack_columns(
    const float* block, int64_t columns, int64_t stride, int64_t line, int64_t first, int64_t depth, void* panels) {
  constexpr int64_t kWord = kElements<Word>;
  static_assert(kPanel % kWord == 0);
  const int64_t panel = depth / kWord * kPanel;  // words
  Word words[kMostColumns + kPanel];
  for (int64_t k = 0; k < kPanel / kWord && first + k * kWord < depth; ++k) {
    const float *above = block + k * kWord * stride, *below = above + (kWord - 1) * stride;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) set(words[j], above[j], below[j]);
    Word* out = static_cast<Word*>(panels) + (first / kWord + k) * kPanel;
    for (int64_t j = 0, count; j < columns; j += count) {
      const int64_t slot = (line + j) % kPanel;
      count = kPanel - slot < columns - j ? kPanel - slot : columns - j;
      Word* to = out + (line + j) / kPanel * panel + slot;
      if (count == kPanel)
        __builtin_memcpy(to, words + j, kPanel * sizeof(Word));
      else
        __builtin_memcpy(to, words + j, count * sizeof(Word));
    }
  }
}

}  // namespace
}  // namespace vogue
