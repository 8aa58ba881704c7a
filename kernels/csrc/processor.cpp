// Packed float32 products and the arithmetic on rows of logits, for the instruction set that the compiler is told to
// use; PROCESSOR is the name of the result (see processor.h).
#include "processor.h"

#if defined(__AVX512F__)
#define LANES 16  // floats in a vector
#define PANEL 12  // rows × 2 vectors of sums, two vectors of B: what the registers hold
#elif defined(__AVX2__)
#define LANES 8
#define PANEL 6
#else
#define LANES 4
#define PANEL 6
#endif

namespace vogue {
namespace {

constexpr int64_t kPanel = PANEL, kGroup = 2 * LANES;
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4)));

// ------------------------------------------------------------------------------------------------------- packing

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

// out[k * width + i] = element k of line i; zeros outside.
template <class T>
void pack(const T* data, int64_t lines, int64_t length, int64_t line_stride, int64_t stride, int64_t width,
          int64_t depth, float* out) {
  const int64_t inside = depth < length ? depth : length;
  if (line_stride == 1) {
    for (int64_t k = 0; k < inside; ++k)
      for (int64_t i = 0; i < lines; ++i) out[k * width + i] = data[k * stride + i];
  } else {
    constexpr int64_t kBlock = 16;  // elements of a line that are read together: a cache line or so
    for (int64_t start = 0; start < inside; start += kBlock)
      for (int64_t i = 0; i < lines; ++i)
        for (int64_t k = start; k < start + kBlock && k < inside; ++k)
          out[k * width + i] = data[i * line_stride + k * stride];
  }
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t i = k < inside ? lines : 0; i < width; ++i) out[k * width + i] = 0;
}

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

void pack_lines(const View& view, int64_t first, int64_t lines, bool rows, int64_t width, int64_t depth, float* out) {
  const Lines from(view, first, lines, rows);
  with_type(view, [&](auto* data) {
    pack(data + from.offset, from.count, from.length, from.line_stride, from.stride, width, depth, out);
  });
}

void pack_panel(const View& a, int64_t first, int64_t depth, void* out) {
  pack_lines(a, first, kPanel, true, kPanel, depth, static_cast<float*>(out));
}

void pack_tile(const View& b, int64_t first, int64_t columns, int64_t depth, void* out) {
  for (int64_t done = 0; done < columns; done += kGroup) {
    const int64_t lines = columns - done < kGroup ? columns - done : kGroup;
    pack_lines(b, first + done, lines, false, kGroup, depth, static_cast<float*>(out) + done * depth);
  }
}

uint16_t round_to_bf16(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  if (value != value) return 0x7fc0;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Element k of line i goes to out[i * line_step + k / 2 * pair_step + k % 2]; zeros outside.
template <class T>
void pack_bf16(const T* data, int64_t lines, int64_t length, int64_t line_stride, int64_t stride, int64_t width,
               int64_t depth, int64_t line_step, int64_t pair_step, uint16_t* out) {
  constexpr int64_t kBlock = 32;
  for (int64_t start = 0; start < depth; start += kBlock)
    for (int64_t i = 0; i < width; ++i)
      for (int64_t k = start; k < start + kBlock && k < depth; ++k)
        out[i * line_step + k / 2 * pair_step + k % 2] =
            i < lines && k < length ? round_to_bf16(data[i * line_stride + k * stride]) : 0;
}

// --------------------------------------------------------------------------------------- packing, products in bf16

constexpr int64_t kPanelBF16 = 32, kGroupBF16 = 16, kDepthBF16 = 32;  // what suits AMX

void pack_lines_bf16(const View& view, int64_t first, int64_t lines, bool rows, int64_t width, int64_t depth,
                     int64_t line_step, int64_t pair_step, void* out) {
  const Lines from(view, first, lines, rows);
  with_type(view, [&](auto* data) {
    pack_bf16(data + from.offset, from.count, from.length, from.line_stride, from.stride, width, depth, line_step,
              pair_step, static_cast<uint16_t*>(out));
  });
}

void pack_panel_bf16(const View& a, int64_t first, int64_t depth, void* out) {
  pack_lines_bf16(a, first, kPanelBF16, true, kPanelBF16, depth, depth, 2, out);
}

void pack_tile_bf16(const View& b, int64_t first, int64_t columns, int64_t depth, void* out) {
  const int64_t width = (columns + kGroupBF16 - 1) / kGroupBF16 * kGroupBF16;
  pack_lines_bf16(b, first, columns, false, width, depth, 2, 2 * width, out);
}

// For a processor without products of bf16, and so for tests of all that surrounds those.
void multiply_bf16(int64_t depth, int64_t columns, const void* a, const void* b, float* c, int64_t stride, bool add) {
  const BF16 *rows = static_cast<const BF16*>(a), *pairs = static_cast<const BF16*>(b);
  for (int64_t i = 0; i < kPanelBF16; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      float sum = 0;
      for (int64_t k = 0; k < depth; ++k) sum += rows[i * depth + k] * pairs[(k / 2 * columns + j) * 2 + k % 2];
      c[i * stride + j] = add ? c[i * stride + j] + sum : sum;
    }
}

// ---------------------------------------------------------------------------------------------- products in float32

// One panel by one group of columns: all sums stay in registers.
void multiply_group(int64_t depth, const float* a, const float* b, float* c, int64_t stride, bool add) {
  for (int i = 0; i < kPanel; ++i) __builtin_prefetch(c + i * stride, 1);
  Vector sums[kPanel][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Vector b0 = *reinterpret_cast<const Vector*>(b), b1 = *reinterpret_cast<const Vector*>(b + LANES);
#pragma GCC unroll 12
    for (int i = 0; i < kPanel; ++i) {
      sums[i][0] += a[i] * b0;
      sums[i][1] += a[i] * b1;
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

void multiply(int64_t depth, int64_t columns, const void* a, const void* b, float* c, int64_t stride, bool add) {
  constexpr int64_t kLongest = 512;  // float32 sums of more terms would lose digits
  for (int64_t j = 0; j < columns; j += kGroup)
    for (int64_t k = 0; k < depth; k += kLongest)
      multiply_group(depth - k < kLongest ? depth - k : kLongest, static_cast<const float*>(a) + k * kPanel,
                     static_cast<const float*>(b) + j * depth + k * kGroup, c + j, stride, add || k > 0);
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
    {kPanel, kGroup, 1, sizeof(float), pack_panel, pack_tile, multiply, release},
    {kPanelBF16, kGroupBF16, kDepthBF16, sizeof(uint16_t), pack_panel_bf16, pack_tile_bf16, multiply_bf16, release},
    statistics,
    gradients,
};

}  // namespace vogue
