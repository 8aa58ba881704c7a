// What the operators multiply: torch's tensors as matrices, packed for the processor's products, and the threads.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "processor.h"

namespace vogue {

using at::Tensor;

// ------------------------------------------------------------------------------------------------------ processor

const Processor& processor();                   // the best one that this machine can run
Products products_for(at::ScalarType dtype);  // of matrices of this type
std::string description();                      // of the processor and of how matrices of bfloat16 are multiplied

// ------------------------------------------------------------------------------------------------------ operands

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

inline Dtype dtype_of(const Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  return dtype == at::kFloat ? Dtype::f32 : dtype == at::kBFloat16 ? Dtype::bf16 : Dtype::f16;
}

inline View view(const Tensor& tensor) {
  return {tensor.const_data_ptr(), dtype_of(tensor), tensor.size(0),
          tensor.size(1),          tensor.stride(0), tensor.stride(1)};
}

// Element (row, column) of a matrix with contiguous rows and all that follows it.
inline Rows rows_from(const Tensor& matrix, int64_t row, int64_t column) {
  const int64_t offset = (row * matrix.stride(0) + column) * matrix.element_size();
  return {static_cast<char*>(matrix.data_ptr()) + offset, dtype_of(matrix), matrix.stride(0)};
}

inline View slice_rows(View matrix, int64_t first, int64_t count, int64_t element_bytes) {
  matrix.data = static_cast<const char*>(matrix.data) + first * matrix.row_stride * element_bytes;
  matrix.rows = std::min(count, matrix.rows - first);
  return matrix;
}

inline View transposed(const View& matrix) {
  return {matrix.data, matrix.dtype, matrix.columns, matrix.rows, matrix.column_stride, matrix.row_stride};
}

// Maps the pages of what is about to be written, which takes less time at once than by a page fault for each. Where the
// system can't, they are mapped as they are written.
inline void map_pages(void* data, int64_t bytes) {
#if defined(MADV_POPULATE_WRITE)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + kPage - 1) / kPage * kPage, last = (start + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_POPULATE_WRITE);
#endif
}

class Buffer {
 public:
  explicit Buffer(int64_t bytes) : memory_(at::empty({bytes}, at::kByte)) {}
  char* at_byte(int64_t offset) const { return static_cast<char*>(memory_.mutable_data_ptr()) + offset; }
  float* floats() const { return reinterpret_cast<float*>(at_byte(0)); }
  void clear() const { memory_.zero_(); }

 private:
  Tensor memory_;
};

// The left operand of a product: rows [first, last) of a matrix in panels.
class Panels {
 public:
  Panels(const Products& products, int64_t rows, int64_t depth)
      : products_(products),
        depth_(round_up(depth, products.depth_group)),
        bytes_(products.panel * depth_ * products.element_bytes),
        buffer_(round_up(rows, products.panel) / products.panel * bytes_) {}
  int64_t depth() const { return depth_; }
  // Other panels in the same place, no deeper than the first ones.
  void set_depth(int64_t depth) {
    depth_ = depth;
    bytes_ = products_.panel * depth_ * products_.element_bytes;
  }
  char* operator[](int64_t panel) const { return buffer_.at_byte(panel * bytes_); }
  void pack(const View& matrix, int64_t first, int64_t panel) const {
    products_.pack_panel(matrix, first, depth_, (*this)[panel]);
  }
  void clear() const { buffer_.clear(); }

 private:
  Products products_;
  int64_t depth_, bytes_;
  Buffer buffer_;
};

// The right operand: a matrix in tiles of `width` columns.
class Tiles {
 public:
  Tiles(const Products& products, int64_t columns, int64_t depth, int64_t width)
      : products_(products),
        columns_(columns),
        depth_(round_up(depth, products.depth_group)),
        width_(width),
        bytes_(width * depth_ * products.element_bytes),
        buffer_(count() * bytes_) {}
  int64_t count() const { return (columns_ + width_ - 1) / width_; }
  int64_t width() const { return width_; }
  int64_t depth() const { return depth_; }
  int64_t padded_columns(int64_t tile) const {
    return round_up(std::min(width_, columns_ - tile * width_), products_.group);
  }
  char* operator[](int64_t tile) const { return buffer_.at_byte(tile * bytes_); }
  void pack(const View& matrix, int64_t tile) const {
    const int64_t first = tile * width_;
    products_.pack_tile(matrix, first, std::min(width_, columns_ - first), depth_, (*this)[tile]);
  }

 private:
  Products products_;
  int64_t columns_, depth_, width_, bytes_;
  Buffer buffer_;
};

// Of the tiles of a right operand as deep as that; at most kMostColumns.
inline int64_t tile_columns(const Products& products, int64_t depth) {
  constexpr int64_t kBytes = 512 << 10;  // of a packed tile: it is to stay in the second-level cache
  const int64_t fitting = kBytes / (round_up(depth, products.depth_group) * products.element_bytes);
  return std::clamp(fitting / products.group * products.group, products.group, kMostColumns);
}

// Runs function(i) for i in [0, count) on torch's threads, each of which takes a share of them in order.
template <class Function>
void parallel(const Products& products, int64_t count, Function function) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) function(i);
    products.release();
  });
}

// A strip of [0, size) for each thread, of whole panels.
template <class Function>
void parallel_strips(const Products& products, int64_t size, Function function) {
  const int64_t strip = round_up((size + at::get_num_threads() - 1) / at::get_num_threads(), products.panel);
  parallel(products, (size + strip - 1) / strip, [&](int64_t i) {
    function(i * strip, std::min(size, (i + 1) * strip));
  });
}

inline std::vector<Panels> pack_hidden_states(const Products& products, at::TensorList hiddens) {
  std::vector<Panels> packed;
  for (const Tensor& hidden : hiddens) {
    const Panels& panels = packed.emplace_back(products, hidden.size(0), hidden.size(1));
    const View matrix = view(hidden);
    parallel(products, (hidden.size(0) + products.panel - 1) / products.panel, [&](int64_t panel) {
      panels.pack(matrix, panel * products.panel, panel);
    });
  }
  return packed;
}

// A branch's logits that the forward pass keeps for the backward pass, of as many tiles of the vocabulary as a buffer
// of bytes has room for, from the first on: each tile's maxima (N,) of when it was computed, then each one's rows.
class KeptLogits {
 public:
  KeptLogits(const Tensor& buffer, Kept type, int64_t n, int64_t vocab, int64_t width)
      : data_(static_cast<char*>(buffer.data_ptr())), type_(type), n_(n), vocab_(vocab), width_(width) {
    int64_t free = buffer.size(0);
    while (tiles_ * width_ < vocab_ && (free -= n_ * (row_bytes(tiles_) + sizeof(float))) >= 0) ++tiles_;
  }
  bool holds(int64_t tile) const { return tile < tiles_; }
  void prepare(int64_t tile) const { map_pages(row(tile, 0), n_ * row_bytes(tile)); }
  // `running`: of tokens from `token` on, whose logits of this tile are at hand, `width` apart.
  void keep(const Running& running, int64_t rows, int64_t tile, int64_t token, float scale) const {
    std::copy_n(running.maximum, rows, maxima(tile) + token);
    processor().keep(rows, columns(tile), width_, scale, running.logits, running.maximum, type_, row(tile, token));
  }
  void restore(int64_t rows, int64_t tile, int64_t token, float scale, float* logits) const {
    processor().restore(
        rows, columns(tile), width_, scale, row(tile, token), maxima(tile) + token, type_, logits);
  }

 private:
  int64_t columns(int64_t tile) const { return std::min(width_, vocab_ - tile * width_); }
  int64_t row_bytes(int64_t tile) const { return kept_row_bytes(type_, columns(tile)); }
  float* maxima(int64_t tile) const { return reinterpret_cast<float*>(data_) + tile * n_; }
  char* row(int64_t tile, int64_t token) const {
    return data_ + n_ * (tiles_ * sizeof(float) + tile * row_bytes(0)) + token * row_bytes(tile);
  }

  char* data_;
  Kept type_;
  int64_t n_, vocab_, width_, tiles_ = 0;
};

// In fewer bits than the dtype has; but a gradient of capped logits has the slope of the cap where p is 0, too.
inline Kept kept_type(const Tensor& weight, double inverse_softcap) {
  const Dtype dtype = dtype_of(weight);
  const bool capped = inverse_softcap > 0;
  if (dtype == Dtype::f32) return capped ? Kept::f32 : Kept::twenty_bits;
  if (dtype == Dtype::f16) return Kept::f16;
  return capped ? Kept::bf16 : Kept::eight_bits;
}

// Of each head, (V,) float32 or none.
typedef c10::List<std::optional<Tensor>> Biases;

inline std::vector<const float*> pointers(const Biases& biases) {
  std::vector<const float*> data;
  for (const std::optional<Tensor> bias : biases) data.push_back(bias ? bias->const_data_ptr<float>() : nullptr);
  return data;
}

// Words of the vocabulary in a tile of logits: it suits the wider of two heads.
inline int64_t logit_columns(const Products& products, at::TensorList weights) {
  int64_t depth = 0;
  for (const Tensor& weight : weights) depth = std::max(depth, weight.size(1));
  return tile_columns(products, depth);
}

}  // namespace vogue
