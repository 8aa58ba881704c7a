// Packed products and the arithmetic on rows of logits, for the instruction set that the compiler is told to use;
// PROCESSOR is the name of the result (see processor.h).
#include "processor.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
constexpr bool kMultipliesBF16 = true;
#else
constexpr bool kMultipliesBF16 = false;
#endif

#if defined(__AVX512F__)
#define LANES 16  // floats in a vector
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

namespace vogue {
namespace {

// Rows × 2 vectors of sums and two vectors of B are what the registers hold.
constexpr int64_t kPanel = LANES == 16 ? 12 : 6, kGroup = 2 * LANES;
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// -------------------------------------------------------------------------------------------------- types and views

struct F32 {
  float value;
  operator float() const { return value; }
};
struct BF16 {
  uint16_t bits;
  operator float() const { return __builtin_bit_cast(float, uint32_t(bits) << 16); }
};
struct F16 {
  _Float16 value;
  operator float() const { return value; }
};

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

template <class Function>
void with_type(const View& view, Function function) {
  if (view.dtype == Dtype::f32) function(static_cast<const F32*>(view.data));
  if (view.dtype == Dtype::bf16) function(static_cast<const BF16*>(view.data));
  if (view.dtype == Dtype::f16) function(static_cast<const F16*>(view.data));
}

// ------------------------------------------------------------------------------------------------------------- words

// What a product takes of each operand at a time: a float, or two bf16 with the first one in the low half.
typedef uint32_t Pair;
template <class Word>
constexpr int64_t kElements = sizeof(Word) / sizeof(uint16_t);
template <>
constexpr int64_t kElements<float> = 1;

Pair round_to_bf16(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  return value != value ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

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
void swap_blocks(Bits* rows) {
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
void transpose_square(Bits* rows) {
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
      for (int64_t j = 0; j < LANES; ++j)
        rows[j] = *reinterpret_cast<const UnalignedBits*>(lines_of + (i + j) * line_bytes + 4 * k);
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
    for (int64_t k = start; k < whole; ++k)
      for (int64_t i = 0; i < from.count; ++i) put(i, k, 1);
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
  with_type(view, [&](auto* data) { pack(data, from, width, depth, static_cast<Word*>(out)); });
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

// -------------------------------------------------------------------------------------- what torch's brgemm is given

constexpr int64_t kPanelAMX = 32, kGroupAMX = 16, kDepthAMX = 32;  // what suits AMX

void pack_panel_amx(const View& a, int64_t first, int64_t depth, void* out) {
  const Lines from(a, first, kPanelAMX, true);
  with_type(a, [&](auto* data) {
    for (int64_t i = 0; i < kPanelAMX; ++i)
      for (int64_t k = 0; k < depth; ++k)
        static_cast<uint16_t*>(out)[i * depth + k] =
            i < from.count && k < from.length
                ? round_to_bf16(data[from.offset + i * from.line_stride + k * from.stride]) : 0;
  });
}

void pack_tile_amx(const View& b, int64_t first, int64_t columns, int64_t depth, void* out) {
  pack_lines<Pair>(b, first, columns, false, (columns + kGroupAMX - 1) / kGroupAMX * kGroupAMX, depth, out);
}

// What brgemm does, for a processor without AMX, and so for tests of all that surrounds it.
void multiply_as_amx(int64_t depth, int64_t columns, const void* a, const void* b, float* c, int64_t stride, bool add) {
  const BF16 *rows = static_cast<const BF16*>(a), *pairs = static_cast<const BF16*>(b);
  for (int64_t i = 0; i < kPanelAMX; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      float sum = 0;
      for (int64_t k = 0; k < depth; ++k) sum += rows[i * depth + k] * pairs[(k / 2 * columns + j) * 2 + k % 2];
      c[i * stride + j] = add ? c[i * stride + j] + sum : sum;
    }
}

// --------------------------------------------------------------------------------------------------------- products

Vector add_product(Vector sum, float a, Vector b) { return sum + a * b; }

Vector add_product(Vector sum, Pair a, Bits b) {
#if defined(__AVX512BF16__)
  return Vector(_mm512_dpbf16_ps(__m512(sum), __m512bh(_mm512_set1_epi32(a)), __m512bh(b)));
#else
  const float low = __builtin_bit_cast(float, a << 16), high = __builtin_bit_cast(float, a & 0xffff0000u);
  return sum + low * Vector(b << 16) + high * Vector(b & 0xffff0000u);
#endif
}

// One panel by one group of columns: all sums stay in registers. A word is a float or a pair of bf16.
template <class Word>
void multiply_group(int64_t words, const Word* a, const Word* b, float* c, int64_t stride, bool add) {
  typedef Word Words __attribute__((vector_size(4 * LANES), may_alias));
  for (int i = 0; i < kPanel; ++i) __builtin_prefetch(c + i * stride, 1);
  Vector sums[kPanel][2] = {};
  for (int64_t k = 0; k < words; ++k) {
    const Words b0 = *reinterpret_cast<const Words*>(b), b1 = *reinterpret_cast<const Words*>(b + LANES);
#pragma GCC unroll 12
    for (int i = 0; i < kPanel; ++i) {
      sums[i][0] = add_product(sums[i][0], a[i], b0);
      sums[i][1] = add_product(sums[i][1], a[i], b1);
    }
    a += kPanel;
    b += kGroup;
  }
#pragma GCC unroll 12
  for (int i = 0; i < kPanel; ++i)
    for (int j = 0; j < 2; ++j) {
      Unaligned* out = reinterpret_cast<Unaligned*>(c + i * stride + j * LANES);
      *out = add ? *out + sums[i][j] : Vector(sums[i][j]);
    }
}

template <class Word>
void multiply(int64_t depth, int64_t columns, const void* a, const void* b, float* c, int64_t stride, bool add) {
  constexpr int64_t kLongest = kElements<Word> == 1 ? 32 : 256;  // longer sums lose digits, most of float32
  const int64_t words = depth / kElements<Word>;
  for (int64_t j = 0; j < columns; j += kGroup)
    for (int64_t k = 0; k < words; k += kLongest)
      multiply_group(words - k < kLongest ? words - k : kLongest, static_cast<const Word*>(a) + k * kPanel,
                     static_cast<const Word*>(b) + j * words + k * kGroup, c + j, stride, add || k > 0);
}

void release() {}

// ---------------------------------------------------------------------------------------------------------- rows

// 2^x for x ≤ 0 (and a little above), to 1 ulp; 0 below 2^-126.
inline float exp2_of_negative(float x) {
  const float clamped = x < -126.0f ? -126.0f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 · 2^23: adding it leaves an integer in the low bits
  const float whole = (clamped + kRound) - kRound;
  const float f = clamped - whole;
  // 2^f on [−½, ½], minimax, relative error 1.9e-9.
  float p = 0.000153458118f;
  p = p * f + 0.00133999312f;
  p = p * f + 0.00961848896f;
  p = p * f + 0.0555032878f;
  p = p * f + 0.240226469f;
  p = p * f + 0.693147206f;
  p = p * f + 1.0f;
  p *= __builtin_bit_cast(float, (int32_t(whole) + 127) << 23);
  return x < -126.0f ? 0.0f : p;
}

float add_bias_and_find_maximum(float* logits, int64_t columns, const float* bias) {
  if (bias)
    for (int64_t j = 0; j < columns; ++j) logits[j] += bias[j];
  float maximum = logits[0];
#pragma omp simd reduction(max : maximum)
  for (int64_t j = 0; j < columns; ++j) maximum = logits[j] > maximum ? logits[j] : maximum;
  return maximum;
}

// Moves the maximum of row i to cover this tile; returns how far it moved (≤ 0).
double move_maximum(const Running& running, int64_t i, float maximum) {
  const double old = running.maximum[i];
  if (maximum > old) running.maximum[i] = maximum;
  return old - running.maximum[i];
}

// Moves the sums of row i to the new maximum and adds those of the tile.
void accumulate(const Running& running, int64_t i, double shift, double factor, float sum, float weighted) {
  running.weighted[i] = factor * (running.weighted[i] + running.sum[i] * shift) + weighted;
  running.sum[i] = factor * running.sum[i] + sum;
}

void statistics_of_one(const Running& a, int64_t i, float* logits, int64_t columns, const float* bias, float scale) {
  const double shift = move_maximum(a, i, add_bias_and_find_maximum(logits, columns, bias));
  const float maximum = a.maximum[i];
  float sum = 0, weighted = 0;
#pragma omp simd reduction(+ : sum, weighted)
  for (int64_t j = 0; j < columns; ++j) {
    const float below = logits[j] - maximum, e = exp2_of_negative(below * scale);
    sum += e;
    weighted += e * below;
  }
  accumulate(a, i, shift, __builtin_exp2(shift * scale), sum, weighted);
}

void statistics_of_both(
    const Running& a, const Running& b, int64_t i, float* logits_a, float* logits_b, int64_t columns,
    const float* bias, float scale) {
  const double shift_a = move_maximum(a, i, add_bias_and_find_maximum(logits_a, columns, bias));
  const double shift_b = move_maximum(b, i, add_bias_and_find_maximum(logits_b, columns, bias));
  const float maximum_a = a.maximum[i], maximum_b = b.maximum[i];
  float sum_a = 0, weighted_a = 0, cross_a = 0, sum_b = 0, weighted_b = 0, cross_b = 0;
#pragma omp simd reduction(+ : sum_a, weighted_a, cross_a, sum_b, weighted_b, cross_b)
  for (int64_t j = 0; j < columns; ++j) {
    const float below_a = logits_a[j] - maximum_a, e_a = exp2_of_negative(below_a * scale);
    const float below_b = logits_b[j] - maximum_b, e_b = exp2_of_negative(below_b * scale);
    const float difference = below_a - below_b;
    sum_a += e_a;
    sum_b += e_b;
    weighted_a += e_a * below_a;
    weighted_b += e_b * below_b;
    cross_a += e_a * difference;
    cross_b += e_b * difference;
  }
  const double factor_a = __builtin_exp2(shift_a * scale), factor_b = __builtin_exp2(shift_b * scale);
  const double moved = shift_a - shift_b;
  a.cross[i] = factor_a * (a.cross[i] + a.sum[i] * moved) + cross_a;
  b.cross[i] = factor_b * (b.cross[i] + b.sum[i] * moved) + cross_b;
  accumulate(a, i, shift_a, factor_a, sum_a, weighted_a);
  accumulate(b, i, shift_b, factor_b, sum_b, weighted_b);
}

void statistics(
    int64_t rows, int64_t columns, int64_t stride, const float* bias, float scale, const Running& a, const Running* b) {
  for (int64_t i = 0; i < rows; ++i)
    if (b)
      statistics_of_both(a, *b, i, a.logits + i * stride, b->logits + i * stride, columns, bias, scale);
    else
      statistics_of_one(a, i, a.logits + i * stride, columns, bias, scale);
}

// The numbers of one row (see Numbers) and its log2 p, which replaces the logits.
struct Row {
  float* logp;
  float c0, c1, c2, c3, c4;
};

Row log2_softmax(const Numbers& side, int64_t i, int64_t columns, const float* bias, float scale) {
  auto number = [&](int k) { return side.numbers[k * side.stride + i]; };
  float* logits = side.logits + i * side.logits_stride;
  const float maximum = number(0), logsum = number(1);
  if (bias)
    for (int64_t j = 0; j < columns; ++j) logits[j] += bias[j];
  for (int64_t j = 0; j < columns; ++j) logits[j] = (logits[j] - maximum) * scale - logsum;
  return {logits, number(2), number(3), number(4), number(5), number(6)};
}

void gradient_of_one(const Row& row, int64_t columns) {
  float* logp = row.logp;
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) logp[j] = exp2_of_negative(logp[j]) * (row.c0 + row.c1 * logp[j]);
}

// p is of `row`, q of `other`; columns from `start` on, to `out`, which may be where either stands.
void gradient_of_crossing(const Row& row, const Row& other, int64_t start, int64_t columns, float* out) {
  const float *logp = row.logp + start, *logq = other.logp + start;
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) {
    const float inner = row.c0 + row.c1 * logp[j] + row.c2 * (logp[j] - logq[j]);
    out[j] = exp2_of_negative(logp[j]) * inner - row.c3 * exp2_of_negative(logq[j]);
  }
}

void gradients_of_both(const Row& a, const Row& b, int64_t columns, bool written_a, bool written_b) {
  constexpr int64_t kPiece = 64;  // columns at a time: the gradient of a waits while that of b is computed
  float waiting[kPiece];
  for (int64_t start = 0; start < columns; start += kPiece) {
    const int64_t count = columns - start < kPiece ? columns - start : kPiece;
    if (written_a) gradient_of_crossing(a, b, start, count, waiting);
    if (written_b) gradient_of_crossing(b, a, start, count, b.logp + start);
    if (written_a) __builtin_memcpy(a.logp + start, waiting, count * sizeof(float));
  }
}

void gradients(
    int64_t rows, int64_t columns, const int64_t* targets, int64_t first, const float* bias, float scale, Numbers a,
    Numbers* b) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t target = targets[i] - first;
    const bool here = target >= 0 && target < columns;
    const Row row = log2_softmax(a, i, columns, bias, scale);
    if (b) {
      const Row other = log2_softmax(*b, i, columns, bias, scale);
      gradients_of_both(row, other, columns, a.written, b->written);
      if (here && b->written) other.logp[target] += other.c4;
    } else {
      gradient_of_one(row, columns);
    }
    if (here && a.written) row.logp[target] += row.c4;
  }
}

}  // namespace

#define TEXT(x) #x
#define NAME(x) TEXT(x)
extern const Processor PROCESSOR = {
    NAME(PROCESSOR),
    {kPanel, kGroup, 1, sizeof(float), pack_panel<float>, pack_tile<float>, multiply<float>, release},
    {kPanel, kGroup, 2, sizeof(uint16_t), pack_panel<Pair>, pack_tile<Pair>, multiply<Pair>, release},
    {kPanelAMX, kGroupAMX, kDepthAMX, sizeof(uint16_t), pack_panel_amx, pack_tile_amx, multiply_as_amx, release},
    kMultipliesBF16,
    statistics,
    gradients,
};

}  // namespace vogue
