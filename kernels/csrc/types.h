// The elements of a matrix, their conversion, and the width of a vector. Part of processor.cpp.
#pragma once
#include "processor.h"

#if defined(__AVX512F__)
#define LANES 16  // floats in a vector
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

namespace vogue {
namespace {

uint32_t round_to_bf16(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  return nan ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

struct F32 {
  float value;
  void operator=(float from) { value = from; }
  operator float() const { return value; }
};
struct BF16 {
  uint16_t bits;
  void operator=(float from) { bits = round_to_bf16(from); }
  operator float() const { return __builtin_bit_cast(float, uint32_t(bits) << 16); }
};
struct F16 {
  _Float16 value;
  void operator=(float from) { value = from; }
  operator float() const { return value; }
};

// Codes for √x, see rows.h. The last one says p = 0; it stands for p < 2^−below of the row's largest one.
template <int bits, int below>
struct RootCode {
  static constexpr int32_t kLast = (1 << bits) - 1;
  static constexpr float kPerRoot2 = (kLast - 1.0f) * (kLast - 1.0f) / below;  // squared: √below is the code before
};
typedef RootCode<8, 36> EightBits;
typedef RootCode<20, 48> TwentyBits;

// Calls function(T{}), T being the type of such elements.
template <class Function>
void with_type(Dtype dtype, Function function) {
  if (dtype == Dtype::f32) function(F32{});
  if (dtype == Dtype::bf16) function(BF16{});
  if (dtype == Dtype::f16) function(F16{});
}

template <class Function>
void with_type(Kept type, Function function) {
  if (type == Kept::f32) function(F32{});
  if (type == Kept::bf16) function(BF16{});
  if (type == Kept::f16) function(F16{});
  if (type == Kept::eight_bits) function(EightBits{});
  if (type == Kept::twenty_bits) function(TwentyBits{});
}

// Where float16 has an infinity, what is kept of a logit mustn't: p log p would be 0 · ∞.
template <class T>
constexpr float kFarthest = 3e38f;
template <>
constexpr float kFarthest<F16> = 65504.0f;

}  // namespace
}  // namespace vogue
