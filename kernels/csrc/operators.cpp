// The operators of the CPU backend, called by vogue_kernels/cpu: forward and backward over tiles of the vocabulary.
//
// Forward: the hidden states are packed once; the threads share the vocabulary. A thread packs a tile of the weight,
// multiplies each panel of tokens of both branches by it, and takes the logits, while they are in its first-level
// cache, into running sums. Backward: for a chunk of the vocabulary and a batch of tokens at a time,
//
//   G = gradient of the logits, recomputed by tile      ∂W[chunk] += Gᵀ H      ∂H += G W[chunk]
//
// each shared by the threads over rows of the result. Nothing here is of the size tokens × vocabulary.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <tuple>
#include <vector>

#include "processor.h"

namespace vogue {
namespace {

using at::Tensor;

constexpr int64_t kTileBytes = 512 << 10;  // of a packed tile of the weight: it is to stay in the second-level cache
constexpr int64_t kMostTileColumns = 128;
constexpr int64_t kChunkColumns = 1024;      // of the vocabulary in the backward pass; more if threads would get no tile
constexpr int64_t kChunkElements = 1 << 21;  // of the gradient of a branch's logits: 8 MB
constexpr double kLowest = -1e30;            // below every logit, and far from overflow

// ------------------------------------------------------------------------------------------------------ processor

const Processor& processor() {
#if defined(__x86_64__)
  static const std::string capability = at::get_cpu_capability();  // obeys ATEN_CPU_CAPABILITY
  if (capability == "AVX512") return __builtin_cpu_supports("avx512bf16") ? avx512_bf16 : avx512;
  if (capability == "AVX2") return avx2;
#endif
  return portable;
}

void multiply_brgemm(
    int64_t depth, int64_t columns, const void* a, const void* b, float* c, int64_t stride, bool add) {
  at::native::cpublas::brgemm(
      processor().amx.panel, columns, depth, depth, columns, stride, add, static_cast<const at::BFloat16*>(a),
      static_cast<const at::BFloat16*>(b), c, /*is_vnni=*/true);
}

void release_brgemm() { at::native::cpublas::brgemm_release(); }

bool has_amx() { return at::native::cpublas::could_pack(at::kBFloat16); }

// How matrices of bfloat16 are multiplied: by AMX, by the processor's other products of bf16, or raised to float32.
// VOGUE_CPU_PRODUCTS (amx, bf16 or f32) says otherwise, for tests and comparisons.
std::string products_of_bf16() {
  static const char* said = std::getenv("VOGUE_CPU_PRODUCTS");
  const std::string chosen = said ? said : has_amx() ? "amx" : processor().multiplies_bf16 ? "bf16" : "f32";
  TORCH_CHECK(
      chosen == "amx" || chosen == "bf16" || chosen == "f32", "VOGUE_CPU_PRODUCTS=", chosen, " is none of amx, bf16, f32");
  return chosen;
}

Products products_for(at::ScalarType dtype) {
  const std::string chosen = dtype == at::kBFloat16 ? products_of_bf16() : "f32";
  if (chosen == "f32") return processor().f32;
  if (chosen == "bf16") return processor().bf16;
  Products products = processor().amx;
  if (has_amx()) {
    products.multiply = multiply_brgemm;
    products.release = release_brgemm;
  }
  return products;
}

std::string description() {
  const std::string chosen = products_of_bf16();
  return std::string(processor().name) + (chosen == "f32" ? "" : ", products of bfloat16") +
         (chosen != "amx" ? "" : has_amx() ? " by AMX" : " as by AMX");
}

// ------------------------------------------------------------------------------------------------------ operands

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

View view(const Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  return {tensor.const_data_ptr(),
          dtype == at::kFloat ? Dtype::f32 : dtype == at::kBFloat16 ? Dtype::bf16 : Dtype::f16,
          tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1)};
}

View slice_rows(View matrix, int64_t first, int64_t count, int64_t element_bytes) {
  matrix.data = static_cast<const char*>(matrix.data) + first * matrix.row_stride * element_bytes;
  matrix.rows = std::min(count, matrix.rows - first);
  return matrix;
}

View transposed(const View& matrix) {
  return {matrix.data, matrix.dtype, matrix.columns, matrix.rows, matrix.column_stride, matrix.row_stride};
}

class Buffer {
 public:
  explicit Buffer(int64_t bytes) : memory_(at::empty({bytes}, at::kByte)) {}
  char* at_byte(int64_t offset) const { return static_cast<char*>(memory_.mutable_data_ptr()) + offset; }
  float* floats() const { return reinterpret_cast<float*>(at_byte(0)); }

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
  char* operator[](int64_t panel) const { return buffer_.at_byte(panel * bytes_); }
  void pack(const View& matrix, int64_t first, int64_t panel) const {
    products_.pack_panel(matrix, first, depth_, (*this)[panel]);
  }

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

int64_t tile_columns(const Products& products, int64_t depth) {
  const int64_t fitting = kTileBytes / (round_up(depth, products.depth_group) * products.element_bytes);
  return std::clamp(fitting / products.group * products.group, products.group, kMostTileColumns);
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

std::vector<Panels> pack_hidden_states(const Products& products, at::TensorList hiddens) {
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

const float* bias_of(const std::optional<Tensor>& bias) { return bias ? bias->const_data_ptr<float>() : nullptr; }

// -------------------------------------------------------------------------------------------------------- forward

// hiddens: one or two (N, D); weight: (V, D), float32, bfloat16 or float16; targets: (N,) in [0, V); bias: (V,) float32.
// scale: of differences of h Wᵀ + bias to bits. Returns the running sums of each share of the vocabulary, (branches,
// 3 or 4, shares, N) float64: maximum, sum, weighted and, for two branches, cross; and the target's logit, (branches, N)
// float32.
std::tuple<Tensor, Tensor> forward(
    at::TensorList hiddens, const Tensor& weight, const Tensor& targets, const std::optional<Tensor>& bias,
    double scale) {
  const Products products = products_for(weight.scalar_type());
  const int64_t branches = hiddens.size(), n = targets.size(0), vocab = weight.size(0), depth = weight.size(1);
  const int64_t width = tile_columns(products, depth), tiles = (vocab + width - 1) / width;
  const int64_t shares = std::min<int64_t>(at::get_num_threads(), tiles), fields = branches == 2 ? 4 : 3;
  const std::vector<Panels> panels = pack_hidden_states(products, hiddens);
  const Tensor partial = at::zeros({branches, fields, shares, n}, at::kDouble);
  partial.select(1, 0).fill_(kLowest);
  const Tensor target_logits = at::empty({branches, n}, at::kFloat);
  double* sums = partial.mutable_data_ptr<double>();
  float* found = target_logits.mutable_data_ptr<float>();
  const int64_t* target = targets.const_data_ptr<int64_t>();
  const float* biases = bias_of(bias);
  const View columns = transposed(view(weight));

  parallel(products, shares, [&](int64_t share) {
    const Tiles tile(products, width, depth, width);
    const Buffer logits(branches * products.panel * width * sizeof(float));
    for (int64_t t = tiles * share / shares; t < tiles * (share + 1) / shares; ++t) {
      const int64_t first = t * width, count = std::min(width, vocab - first);
      products.pack_tile(columns, first, count, panels[0].depth(), tile[0]);
      for (int64_t row = 0; row < n; row += products.panel) {
        const int64_t rows = std::min(products.panel, n - row);
        Running running[2];
        for (int64_t branch = 0; branch < branches; ++branch) {
          float* out = logits.floats() + branch * products.panel * width;
          products.multiply(panels[branch].depth(), round_up(count, products.group),
                            panels[branch][row / products.panel], tile[0], out, width, false);
          auto field = [&](int64_t f) { return sums + ((branch * fields + f) * shares + share) * n + row; };
          running[branch] = {out, field(0), field(1), field(2), branches == 2 ? field(3) : nullptr};
        }
        processor().statistics(rows, count, width, biases ? biases + first : nullptr, static_cast<float>(scale),
                               running[0], branches == 2 ? &running[1] : nullptr);
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t column = target[row + i] - first;
          if (column >= 0 && column < count)
            for (int64_t branch = 0; branch < branches; ++branch)
              found[branch * n + row + i] = running[branch].logits[i * width + column];
        }
      }
    }
  });
  partial.narrow(1, 2, fields - 2).mul_(scale);  // to bits
  return {partial, target_logits};
}

// ------------------------------------------------------------------------------------------------------- backward

// C[rows first ... last of A] (+)= A B, with A packed here and B packed before.
void multiply_strip(
    const Products& products, const View& a, const Tiles& b, int64_t first, int64_t last, float* c, int64_t stride,
    bool add) {
  const Panels panels(products, last - first, b.depth());
  for (int64_t row = first; row < last; row += products.panel)
    panels.pack(a, row, (row - first) / products.panel);
  for (int64_t tile = 0; tile < b.count(); ++tile)
    for (int64_t row = first; row < last; row += products.panel)
      products.multiply(panels.depth(), b.padded_columns(tile), panels[(row - first) / products.panel], b[tile],
                        c + row * stride + tile * b.width(), stride, add);
}

// One branch in the backward pass.
struct Side {
  View hidden;
  const float* numbers;
  bool written;                     // its logits have a gradient
  Buffer gradient;                  // G, (batch, chunk)
  Tensor grad_hidden;               // (N, D) float32, both rounded up; or none
  std::vector<Tiles> hidden_tiles;  // of each batch: the right operand of ∂W
};

// A chunk of the vocabulary outside, a batch of tokens inside, so that a chunk of ∂W is complete when it is written.
class Backward {
 public:
  Backward(const Tensor& weight, const Tensor& targets, const std::optional<Tensor>& bias, double scale)
      : weight_(weight),
        products_(products_for(weight.scalar_type())),
        n_(targets.size(0)),
        depth_(weight.size(1)),
        padded_depth_(round_up(depth_, products_.group)),
        width_(tile_columns(products_, depth_)),
        chunk_(round_up(std::max(kChunkColumns, width_ * at::get_num_threads()), width_)),
        batch_(std::clamp(
            kChunkElements / chunk_ / products_.panel * products_.panel, products_.panel,
            round_up(n_, products_.panel))),
        targets_(targets.const_data_ptr<int64_t>()),
        bias_(bias_of(bias)),
        scale_(static_cast<float>(scale)),
        weight_tiles_(products_, depth_, chunk_, tile_columns(products_, chunk_)) {}

  void add_side(const Tensor& hidden, const Tensor& numbers, bool written, bool needs_hidden, bool needs_weight) {
    hiddens_.push_back(hidden);
    Side& side = sides_.emplace_back(
        Side{view(hidden), numbers.const_data_ptr<float>(), written, Buffer(batch_ * chunk_ * sizeof(float)), {}, {}});
    if (needs_hidden)
      side.grad_hidden = at::zeros({round_up(n_, products_.panel), padded_depth_}, at::kFloat);
    for (int64_t row = 0; needs_weight && written && row < n_; row += batch_) {
      const View rows = slice_rows(side.hidden, row, batch_, weight_.element_size());
      const Tiles& tiles =
          side.hidden_tiles.emplace_back(products_, depth_, rows.rows, tile_columns(products_, rows.rows));
      parallel(products_, tiles.count(), [&](int64_t tile) { tiles.pack(rows, tile); });
    }
  }

  std::vector<Tensor> run(bool needs_weight, bool needs_bias) {
    const int64_t vocab = weight_.size(0);
    const std::vector<Panels> panels = pack_hidden_states(products_, hiddens_);
    const Tensor grad_weight = needs_weight ? at::empty_like(weight_, at::MemoryFormat::Contiguous) : Tensor();
    const Tensor grad_bias = needs_bias ? at::zeros({vocab}, at::kFloat) : Tensor();
    // ∂W[chunk], in float32 until it is complete.
    const Tensor complete =
        needs_weight ? at::empty({round_up(chunk_, products_.panel), padded_depth_}, at::kFloat) : Tensor();
    for (int64_t start = 0; start < vocab; start += chunk_) {
      const int64_t size = std::min(chunk_, vocab - start);
      const View rows_of_weight = slice_rows(view(weight_), start, size, weight_.element_size());
      parallel(products_, weight_tiles_.count(), [&](int64_t tile) { weight_tiles_.pack(rows_of_weight, tile); });
      for (int64_t row = 0; row < n_; row += batch_) {
        const int64_t rows = std::min(batch_, n_ - row);
        compute_gradients_of_logits(panels, rows_of_weight, start, row, rows);
        add_to_hidden(row, rows, size);
        if (needs_weight) add_to_weight(complete.mutable_data_ptr<float>(), row, rows, size);
        if (needs_bias) add_to_bias(grad_bias.narrow(0, start, size), rows, size);
      }
      if (needs_weight)
        grad_weight.narrow(0, start, size).copy_(complete.narrow(0, 0, size).narrow(1, 0, depth_));
    }
    std::vector<Tensor> gradients;
    for (const Side& side : sides_)
      if (side.grad_hidden.defined())
        gradients.push_back(
            side.grad_hidden.narrow(0, 0, n_).narrow(1, 0, depth_).to(weight_.scalar_type()).contiguous());
    if (needs_weight) gradients.push_back(grad_weight);
    if (needs_bias) gradients.push_back(grad_bias);
    return gradients;
  }

 private:
  // G of the vocabulary from `start` on and the tokens from `row` on, of every side.
  void compute_gradients_of_logits(
      const std::vector<Panels>& panels, const View& rows_of_weight, int64_t start, int64_t row, int64_t rows) {
    const int64_t size = rows_of_weight.rows;
    const View columns = transposed(rows_of_weight);
    parallel(products_, (size + width_ - 1) / width_, [&](int64_t t) {
      const int64_t first = t * width_, count = std::min(width_, size - first);
      const Tiles tile(products_, width_, depth_, width_);
      products_.pack_tile(columns, first, count, tile.depth(), tile[0]);
      for (int64_t r = 0; r < rows; r += products_.panel) {
        Numbers numbers[2];
        for (size_t i = 0; i < sides_.size(); ++i) {
          float* logits = sides_[i].gradient.floats() + r * chunk_ + first;
          products_.multiply(
              tile.depth(), round_up(count, products_.group), panels[i][(row + r) / products_.panel], tile[0], logits,
              chunk_, false);
          numbers[i] = {logits, chunk_, sides_[i].numbers + row + r, n_, sides_[i].written};
        }
        processor().gradients(
            std::min(products_.panel, rows - r), count, targets_ + row + r, start + first,
            bias_ ? bias_ + start + first : nullptr, scale_, numbers[0], sides_.size() == 2 ? &numbers[1] : nullptr);
      }
    });
  }

  View gradient_of_logits(const Side& side, int64_t rows, int64_t size) const {
    return {side.gradient.floats(), Dtype::f32, rows, size, chunk_, 1};
  }

  // ∂H += G W[chunk]
  void add_to_hidden(int64_t row, int64_t rows, int64_t size) {
    for (const Side& side : sides_)
      if (side.grad_hidden.defined())
        parallel_strips(products_, rows, [&](int64_t first, int64_t last) {
          float* out = side.grad_hidden.mutable_data_ptr<float>() + row * padded_depth_;
          multiply_strip(
              products_, gradient_of_logits(side, rows, size), weight_tiles_, first, last, out, padded_depth_, true);
        });
  }

  // ∂W[chunk] += Gᵀ H, or = of the first batch and side
  void add_to_weight(float* out, int64_t row, int64_t rows, int64_t size) {
    bool add = row > 0;
    for (const Side& side : sides_)
      if (side.written) {
        parallel_strips(products_, size, [&](int64_t first, int64_t last) {
          multiply_strip(
              products_, transposed(gradient_of_logits(side, rows, size)), side.hidden_tiles[row / batch_], first, last,
              out, padded_depth_, add);
        });
        add = true;
      }
  }

  void add_to_bias(const Tensor& out, int64_t rows, int64_t size) {
    for (const Side& side : sides_)
      if (side.written)
        out.add_(at::from_blob(side.gradient.floats(), {rows, size}, {chunk_, 1}, at::kFloat).sum(0, false, at::kDouble));
  }

  const Tensor weight_;
  const Products products_;
  const int64_t n_, depth_, padded_depth_;
  const int64_t width_;  // columns of a tile
  const int64_t chunk_, batch_;
  const int64_t* targets_;
  const float* bias_;
  const float scale_;
  const Tiles weight_tiles_;  // of a chunk: the right operand of ∂H
  std::vector<Tensor> hiddens_;
  std::vector<Side> sides_;
};

// hiddens, weight, targets, bias, scale: as in `forward`. numbers: (7, N) float32 of each branch, see processor.h.
// written: which branches' logits have a gradient. needs_hidden: which hidden states want theirs.
// Returns the gradients asked for, of the hidden states, then weight, in the inputs' dtype, then bias in float32.
std::vector<Tensor> backward(
    at::TensorList hiddens, at::TensorList numbers, const Tensor& weight, const Tensor& targets,
    const std::optional<Tensor>& bias, double scale, const c10::List<bool>& written,
    const c10::List<bool>& needs_hidden, bool needs_weight, bool needs_bias) {
  Backward pass(weight, targets, bias, scale);
  for (size_t i = 0; i < hiddens.size(); ++i)
    pass.add_side(hiddens[i], numbers[i], written[i], needs_hidden[i], needs_weight);
  return pass.run(needs_weight, needs_bias);
}

}  // namespace
}  // namespace vogue

TORCH_LIBRARY(vogue_cpu, library) {
  library.def("forward(Tensor[] hiddens, Tensor weight, Tensor targets, Tensor? bias, float scale) -> (Tensor, Tensor)");
  library.def(
      "backward(Tensor[] hiddens, Tensor[] numbers, Tensor weight, Tensor targets, Tensor? bias, float scale, "
      "bool[] written, bool[] needs_hidden, bool needs_weight, bool needs_bias) -> Tensor[]");
  library.def("description() -> str", vogue::description);
}

TORCH_LIBRARY_IMPL(vogue_cpu, CPU, library) {
  library.impl("forward", vogue::forward);
  library.impl("backward", vogue::backward);
}
