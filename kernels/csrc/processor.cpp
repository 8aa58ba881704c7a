// Packed products and the arithmetic on rows of logits, for the instruction set that the compiler is told to use;
// PROCESSOR is the name of the result (see processor.h).
#include "packing.h"
#include "rows.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
constexpr bool kMultipliesBF16 = true;
#else
constexpr bool kMultipliesBF16 = false;
#endif

namespace vogue {
namespace {

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// -------------------------------------------------------------------------------------- what torch's brgemm is given

constexpr int64_t kPanelAMX = 32, kGroupAMX = 16, kDepthAMX = 32;  // what suits AMX

void pack_panel_amx(const View& a, int64_t first, int64_t depth, void* out) {
  const Lines from(a, first, kPanelAMX, true);
  with_type(a.dtype, [&](auto element) {
    const auto* data = static_cast<const decltype(element)*>(a.data);
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

void pack_rows_amx(const float* block, int64_t columns, int64_t stride, int64_t first, int64_t depth, void* panel) {
  for (int64_t i = 0; i < kPanelAMX; ++i) {
    BF16* out = static_cast<BF16*>(panel) + i * depth + first;
    for (int64_t j = 0; j < columns; ++j) out[j] = block[i * stride + j];
  }
}

void pack_columns_amx(
    const float* block, int64_t columns, int64_t stride, int64_t line, int64_t first, int64_t depth, void* panels) {
  for (int64_t j = 0; j < columns; ++j) {
    BF16* out = static_cast<BF16*>(panels) + (line + j) * depth + first;
    for (int64_t i = 0; i < kPanelAMX; ++i) out[i] = block[i * stride + j];
  }
}

// What brgemm does, for a processor without AMX, and so for tests of all that surrounds it.
void multiply_as_amx(
    int64_t depth, int64_t columns, const void* a, const void* b, float* c, int64_t stride, bool add, bool) {
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
    // The processor's own prefetching stops at the end of a page, 85 steps of a panel or 32 of a group.
    __builtin_prefetch(a + 8 * kPanel);
    __builtin_prefetch(b + 8 * kGroup);
    __builtin_prefetch(b + 8 * kGroup + LANES);
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
void multiply(
    int64_t depth, int64_t columns, const void* a, const void* b, float* c, int64_t stride, bool add, bool short_sums) {
  const int64_t words = depth / kElements<Word>, longest = kElements<Word> == 1 && short_sums ? 48 : 256;
  for (int64_t j = 0; j < columns; j += kGroup)
    for (int64_t k = 0; k < words; k += longest)
      multiply_group(words - k < longest ? words - k : longest, static_cast<const Word*>(a) + k * kPanel,
                     static_cast<const Word*>(b) + j * words + k * kGroup, c + j, stride, add || k > 0);
}

void release() {}

}  // namespace

#define TEXT(x) #x
#define NAME(x) TEXT(x)
extern const Processor PROCESSOR = {
    NAME(PROCESSOR),
    {kPanel, kGroup, 1, sizeof(float), pack_panel<float>, pack_tile<float>, pack_rows<float>, pack_columns<float>,
     multiply<float>, release},
    {kPanel, kGroup, 2, sizeof(uint16_t), pack_panel<Pair>, pack_tile<Pair>, pack_rows<Pair>, pack_columns<Pair>,
     multiply<Pair>, release},
    {kPanelAMX, kGroupAMX, kDepthAMX, sizeof(uint16_t), pack_panel_amx, pack_tile_amx, pack_rows_amx, pack_columns_amx,
     multiply_as_amx, release},
    kMultipliesBF16,
    statistics,
    keep,
    restore,
    gradients,
    round,
};

}  // namespace vogue
