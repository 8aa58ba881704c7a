// The arithmetic on rows of logits. Part of processor.cpp.
#pragma once
#include "types.h"

namespace vogue {
namespace {

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

// What a softcap makes of a logit, and the slope of it there.
struct Capped {
  float l, slope;  // tanh x and 1 − tanh² x
};

// Both to some ulp of their own size: l near 0 too, where what is capped is as exact as what isn't, and the slope near
// ±1, where 1 − l² would have lost its digits.
inline Capped capped(float x) {
  const float size = __builtin_fabsf(x), square = x * x;
  const float e = exp2_of_negative(-2.88539008f * size);  // e^(−2|x|)
  const float rest = 2.0f * e / (1.0f + e);               // 1 − |tanh x|
  // (tanh x / x − 1) / x² up to 0.625, minimax; relative error of tanh 4.4e-9.
  float p = -0.00570498677f;
  p = p * square + 0.020639087f;
  p = p * square - 0.053739715f;
  p = p * square + 0.133314422f;
  p = p * square - 0.333332819f;
  return {size < 0.625f ? x + x * square * p : __builtin_copysignf(1.0f - rest, x), rest * (2.0f - rest)};
}

void cap(float* logits, int64_t columns, float inverse_softcap) {
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) logits[j] = capped(logits[j] * inverse_softcap).l;
}

void cap(float* logits, int64_t columns, float inverse_softcap, float* slope) {
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) {
    const Capped found = capped(logits[j] * inverse_softcap);
    logits[j] = found.l;
    slope[j] = found.slope;
  }
}

// The slope where the capped logits are what was kept.
void find_slope(const float* logits, int64_t columns, float* slope) {
  for (int64_t j = 0; j < columns; ++j) slope[j] = (1.0f - logits[j]) * (1.0f + logits[j]);
}

float finish_and_find_maximum(float* logits, int64_t columns, const float* bias, float inverse_softcap) {
  if (bias)
    for (int64_t j = 0; j < columns; ++j) logits[j] += bias[j];
  if (inverse_softcap > 0) cap(logits, columns, inverse_softcap);
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

void statistics_of_one(
    const Running& a, int64_t i, float* logits, int64_t columns, float scale, float inverse_softcap) {
  const double shift = move_maximum(a, i, finish_and_find_maximum(logits, columns, a.bias, inverse_softcap));
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
    float scale, float inverse_softcap) {
  const double shift_a = move_maximum(a, i, finish_and_find_maximum(logits_a, columns, a.bias, inverse_softcap));
  const double shift_b = move_maximum(b, i, finish_and_find_maximum(logits_b, columns, b.bias, inverse_softcap));
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
    int64_t rows, int64_t columns, int64_t stride, float scale, float inverse_softcap, const Running& a,
    const Running* b) {
  for (int64_t i = 0; i < rows; ++i)
    if (b)
      statistics_of_both(a, *b, i, a.logits + i * stride, b->logits + i * stride, columns, scale, inverse_softcap);
    else
      statistics_of_one(a, i, a.logits + i * stride, columns, scale, inverse_softcap);
}

// What is kept of a logit is x, how far it is below the largest one met so far: rounded as it is, a logit of 30 would
// be off by 0.06 in bfloat16, and its p with it.
template <class T>
void keep_row(const float* logits, int64_t columns, float maximum, float, T* out) {
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) {
    const float x = maximum - logits[j];
    out[j] = x < kFarthest<T> ? x : kFarthest<T>;
  }
}

template <class T>
void restore_row(const T* kept, int64_t columns, float maximum, float, float* logits) {
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) logits[j] = maximum - kept[j];
}

// Or a code for √x, x in bits. Eight bits, in the place of bfloat16's x: in nats it is off by at most 0.020 √x, where
// bfloat16's logits from 8 on are by up to 0.03, and p by at most 0.0084 of the row's largest one, some two units in its
// last place. Twenty bits, in the place of float32's: x is off by at most 5.5e-6 √x and p by 2.4e-6 of the largest, where
// float32's products of some units are off by as much.
constexpr float kNowhere = 1e6f;  // x scale of p = 0, in bits

void store(const int32_t* codes, int64_t columns, EightBits* out) {
  uint8_t* bytes = reinterpret_cast<uint8_t*>(out);
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) bytes[j] = codes[j];
}

void load(const EightBits* kept, int64_t columns, int32_t* codes) {
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(kept);
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) codes[j] = bytes[j];
}

// The low byte of each, the middle ones, then the high four bits, those of two in a byte.
void store(const int32_t* codes, int64_t columns, TwentyBits* out) {
  uint8_t *low = reinterpret_cast<uint8_t*>(out), *middle = low + columns, *high = middle + columns;
  const int64_t half = (columns + 1) / 2;  // the codes go on to two of them
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) {
    low[j] = codes[j];
    middle[j] = codes[j] >> 8;
  }
#pragma omp simd
  for (int64_t j = 0; j < half; ++j) high[j] = codes[j] >> 16 | codes[j + half] >> 16 << 4;
}

void load(const TwentyBits* kept, int64_t columns, int32_t* codes) {
  const uint8_t *low = reinterpret_cast<const uint8_t*>(kept), *middle = low + columns, *high = middle + columns;
  const int64_t half = (columns + 1) / 2;
#pragma omp simd
  for (int64_t j = 0; j < half; ++j) {
    codes[j] = (high[j] & 15) << 16;
    codes[j + half] = high[j] >> 4 << 16;
  }
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) codes[j] |= low[j] | middle[j] << 8;
}

template <int bits, int below>
void keep_row(const float* logits, int64_t columns, float maximum, float scale, RootCode<bits, below>* out) {
  typedef RootCode<bits, below> Code;
  int32_t codes[kMostColumns + 1];
  codes[columns] = 0;  // where an odd number of them is stored by twos
  const float factor = scale * Code::kPerRoot2;
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) {
    const float code = __builtin_sqrtf((maximum - logits[j]) * factor) + 0.5f;
    codes[j] = static_cast<int32_t>(code < Code::kLast ? code : Code::kLast);
  }
  store(codes, columns, out);
}

template <int bits, int below>
void restore_row(
    const RootCode<bits, below>* kept, int64_t columns, float maximum, float scale, float* logits) {
  typedef RootCode<bits, below> Code;
  int32_t codes[kMostColumns + 1];
  load(kept, columns, codes);
  const float unit = 1.0f / (scale * Code::kPerRoot2), nowhere = kNowhere / scale;
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) {
    const float root = codes[j];
    logits[j] = maximum - (codes[j] < Code::kLast ? root * root * unit : nowhere);
  }
}

void keep(
    int64_t rows, int64_t columns, int64_t stride, float scale, const float* logits, const double* maximum, Kept type,
    void* out) {
  with_type(type, [&](auto element) {
    for (int64_t i = 0; i < rows; ++i) {
      char* row = static_cast<char*>(out) + i * kept_row_bytes(type, columns);
      keep_row(logits + i * stride, columns, maximum[i], scale, reinterpret_cast<decltype(element)*>(row));
    }
  });
}

void restore(
    int64_t rows, int64_t columns, int64_t stride, float scale, const void* kept, const float* maximum, Kept type,
    float* logits) {
  with_type(type, [&](auto element) {
    for (int64_t i = 0; i < rows; ++i) {
      const char* row = static_cast<const char*>(kept) + i * kept_row_bytes(type, columns);
      restore_row(
          reinterpret_cast<const decltype(element)*>(row), columns, maximum[i], scale, logits + i * stride);
    }
  });
}

void round(int64_t rows, int64_t columns, int64_t stride, const float* in, Rows out) {
  with_type(out.dtype, [&](auto element) {
    typedef decltype(element) T;
    for (int64_t i = 0; i < rows; ++i) {
      const float* from = in + i * stride;
      T* to = static_cast<T*>(out.data) + i * out.stride;
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) to[j] = from[j];
    }
  });
}

// The numbers of one row (see Numbers) and its log2 p, which replaces the logits.
struct Row {
  float* logp;
  float c0, c1, c2, c3, c4;
};

// slope: of the cap, filled if there is one.
Row log2_softmax(const Numbers& side, int64_t i, int64_t columns, float scale, float inverse_softcap, float* slope) {
  auto number = [&](int k) { return side.numbers[k * side.stride + i]; };
  float* logits = side.logits + i * side.logits_stride;
  const float maximum = number(0), logsum = number(1);
  if (side.bias)
    for (int64_t j = 0; j < columns; ++j) logits[j] += side.bias[j];
  if (inverse_softcap > 0) {
    if (side.kept)
      find_slope(logits, columns, slope);
    else
      cap(logits, columns, inverse_softcap, slope);
  }
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

// The gradient of a row's logits, times the slope of their cap.
void apply_slope(float* gradient, int64_t columns, const float* slope) {
  for (int64_t j = 0; j < columns; ++j) gradient[j] *= slope[j];
}

void gradients(
    int64_t rows, int64_t columns, const int64_t* targets, int64_t first, float scale, float inverse_softcap,
    const Numbers& a, const Numbers* b) {
  float slope_a[kMostColumns], slope_b[kMostColumns];
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t target = targets[i] - first;
    const bool here = target >= 0 && target < columns;
    const Row row = log2_softmax(a, i, columns, scale, inverse_softcap, slope_a);
    if (b) {
      const Row other = log2_softmax(*b, i, columns, scale, inverse_softcap, slope_b);
      gradients_of_both(row, other, columns, a.written, b->written);
      if (here && b->written) other.logp[target] += other.c4;
      if (inverse_softcap > 0 && b->written) apply_slope(other.logp, columns, slope_b);
    } else {
      gradient_of_one(row, columns);
    }
    if (here && a.written) row.logp[target] += row.c4;
    if (inverse_softcap > 0 && a.written) apply_slope(row.logp, columns, slope_a);
  }
}

}  // namespace
}  // namespace vogue
