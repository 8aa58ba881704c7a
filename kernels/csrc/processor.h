// What an instruction set provides: matrix products of packed tiles, and the arithmetic on rows of logits.
//
// processor.cpp is compiled once for each instruction set. It and this header include nothing of torch or of the
// standard library that could leave an inline function behind: the linker keeps one copy of such a function, and that
// one must not hold instructions which the processor at hand lacks.
#pragma once
#include <cstdint>

namespace vogue {

enum class Dtype { f32, bf16, f16 };

// Rows of a matrix to be written, `stride` elements apart.
struct Rows {
  void* data;
  Dtype dtype;
  int64_t stride;
};

// A matrix as torch holds it: element (i, j) is data[i * row_stride + j * column_stride].
struct View {
  const void* data;
  Dtype dtype;
  int64_t rows, columns, row_stride, column_stride;
};

// C = A B, or C += A B, in float32 from packed operands: A in panels of `panel` rows, B in tiles of columns, both with
// zeros where they are padded: A to whole panels, B to a multiple of `group` columns, the depth to one of `depth_group`.
struct Products {
  int64_t panel, group, depth_group, element_bytes;
  // Rows first ... first + panel of `a`.
  void (*pack_panel)(const View& a, int64_t first, int64_t depth, void* out);
  // Columns first ... first + columns of `b`.
  void (*pack_tile)(const View& b, int64_t first, int64_t columns, int64_t depth, void* out);
  // A block (panel, columns) of float32, its rows `stride` apart, as part of such panels, `depth` deep. Its rows are
  // those of a panel, from place `first` of the depth on ...
  void (*pack_rows)(const float* block, int64_t columns, int64_t stride, int64_t first, int64_t depth, void* panel);
  // ... or its columns are rows `line` and following of all panels, its own at place `first` of the depth and on.
  void (*pack_columns)(
      const float* block, int64_t columns, int64_t stride, int64_t line, int64_t first, int64_t depth, void* panels);
  // One panel by one tile of `columns` (padded) columns; c: (panel, columns), its rows `stride` apart. short_sums: of
  // few terms at a time, as logits need them; longer ones take less time and lose digits of float32, if few.
  void (*multiply)(
      int64_t depth, int64_t columns, const void* a, const void* b, float* c, int64_t stride, bool add,
      bool short_sums);
  // Called by a thread when it has no product left to do for now.
  void (*release)();
};

constexpr int64_t kMostColumns = 128;  // of a tile of logits

// What the forward pass keeps a logit as, for the backward pass.
enum class Kept { f32, bf16, f16, eight_bits, twenty_bits };

// Bytes of a token's kept logits of a tile.
static constexpr int64_t kept_row_bytes(Kept type, int64_t columns) {
  if (type == Kept::eight_bits) return columns;
  if (type == Kept::twenty_bits) return columns * 2 + (columns + 1) / 2;
  return columns * (type == Kept::f32 ? 4 : 2);
}

// One branch of some tokens, whose logits of one tile of the vocabulary are at hand. Everything after `bias` is the
// running state of these tokens, one number for each, with e = 2^((l − maximum) scale):
struct Running {
  float* logits;      // (rows, stride)
  const float* bias;  // of the tile's columns; null: none
  double* maximum;    // of l = h Wᵀ + bias or, with a softcap, tanh((h Wᵀ + bias) / softcap)
  double* sum;       // Σ e
  double* weighted;  // Σ e (l − maximum)
  double* cross;     // Σ e (l − maximum − the same of the other branch); only with two branches
};

// The numbers of a branch for the gradient of its h Wᵀ + bias, each (tokens,), `stride` apart:
// m, log2 s, c0 ... c4 with p = 2^((l − m) scale − log2 s), q the same of the other branch, and
//   gradient = p (c0 + c1 log2 p + c2 (log2 p − log2 q)) − c3 q + c4 [column is the target]
// With a softcap that is multiplied by the slope of the tanh, 1 − l².
struct Numbers {
  float* logits;  // (rows, logits_stride), overwritten by the gradient if `written`
  int64_t logits_stride;
  const float* bias;  // what the logits still lack; null: nothing
  bool kept;          // they are what the forward pass kept, and so capped already
  const float* numbers;
  int64_t stride;
  bool written;
};

struct Processor {
  const char* name;
  Products f32, bf16;    // of operands in float32, and in pairs of bf16
  Products amx;          // of bf16 as torch's brgemm wants them, which is to take the place of `multiply`
  bool multiplies_bf16;  // it has instructions for products of bf16; else `bf16` is for tests
  // Add the bias to a tile of logits and cap them, in place, and take the tile into the running sums. inverse_softcap:
  // 0 for none, here and below. b: null for one.
  void (*statistics)(
      int64_t rows, int64_t columns, int64_t stride, float scale, float inverse_softcap, const Running& a,
      const Running* b);
  // Write how far a tile's logits are below the maxima: rows of kept_row_bytes(type, columns).
  void (*keep)(
      int64_t rows, int64_t columns, int64_t stride, float scale, const float* logits, const double* maximum, Kept type,
      void* out);
  // The logits again, from what was kept of them and the maxima of then.
  void (*restore)(
      int64_t rows, int64_t columns, int64_t stride, float scale, const void* kept, const float* maximum, Kept type,
      float* logits);
  // Turn a tile of logits into the gradient. `targets` count from the tile's first column. b: null for one.
  void (*gradients)(
      int64_t rows, int64_t columns, const int64_t* targets, int64_t first, float scale, float inverse_softcap,
      const Numbers& a, const Numbers* b);
  // Write rows of float32 in another type.
  void (*round)(int64_t rows, int64_t columns, int64_t stride, const float* in, Rows out);
};

extern const Processor portable, avx2, avx512, avx512_bf16;

}  // namespace vogue
