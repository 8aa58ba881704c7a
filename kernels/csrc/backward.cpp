// Backward: for a chunk of the vocabulary and a batch of tokens at a time,
//
//   G = gradient of the logits, kept or recomputed by tile      ∂W[chunk] += Gᵀ H      ∂H += G W[chunk]
//
// each shared by the threads over rows of the result.
#include "operands.h"
#include "operators.h"

namespace vogue {
namespace {

constexpr int64_t kChunkColumns = 1024;      // of the vocabulary; more if threads would get no tile
constexpr int64_t kChunkElements = 1 << 21;  // of the gradient of a branch's logits: 8 MB

// Rows [first, last) of a left operand.
Panels pack_strip(const Products& products, const View& a, int64_t first, int64_t last, int64_t depth) {
  const Panels panels(products, last - first, depth);
  for (int64_t row = first; row < last; row += products.panel) panels.pack(a, row, (row - first) / products.panel);
  return panels;
}

// C (+)= A B for one tile of B; c: (rows, padded columns of the tile), its rows `stride` apart.
void multiply_tile(
    const Products& products, const Panels& a, int64_t rows, const Tiles& b, int64_t tile, float* c, int64_t stride,
    bool add) {
  for (int64_t row = 0; row < rows; row += products.panel)
    products.multiply(
        a.depth(), b.padded_columns(tile), a[row / products.panel], b[tile], c + row * stride, stride, add);
}

// One branch in the backward pass.
struct Side {
  View hidden;
  const float* numbers;
  bool written;                     // its logits have a gradient
  KeptLogits kept;
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

  void add_side(
      const Tensor& hidden, const Tensor& numbers, const KeptLogits& kept, bool written, bool needs_hidden,
      bool needs_weight) {
    hiddens_.push_back(hidden);
    Side& side = sides_.emplace_back(Side{
        view(hidden), numbers.const_data_ptr<float>(), written, kept, Buffer(batch_ * chunk_ * sizeof(float)), {}, {}});
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
    // ∂W[chunk], in float32 until it is complete; a single product is so at once.
    const bool adds_up = needs_weight && (n_ > batch_ || (sides_.size() == 2 && sides_[0].written && sides_[1].written));
    const Buffer sums(adds_up ? round_up(chunk_, products_.panel) * padded_depth_ * sizeof(float) : 0);
    for (int64_t start = 0; start < vocab; start += chunk_) {
      const int64_t size = std::min(chunk_, vocab - start);
      const View rows_of_weight = slice_rows(view(weight_), start, size, weight_.element_size());
      parallel(products_, weight_tiles_.count(), [&](int64_t tile) { weight_tiles_.pack(rows_of_weight, tile); });
      for (int64_t row = 0; row < n_; row += batch_) {
        const int64_t rows = std::min(batch_, n_ - row);
        compute_gradients_of_logits(panels, rows_of_weight, start, row, rows);
        add_to_hidden(row, rows, size);
        if (needs_weight)
          add_to_weight(adds_up ? sums.floats() : nullptr, grad_weight.narrow(0, start, size), row, rows);
        if (needs_bias) add_to_bias(grad_bias.narrow(0, start, size), rows, size);
      }
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
      const int64_t first = t * width_, count = std::min(width_, size - first), column = start + first;
      auto kept = [&](const Side& side) { return side.kept.holds(column + count); };
      const Tiles tile(products_, width_, depth_, width_);
      if (!std::all_of(sides_.begin(), sides_.end(), kept))
        products_.pack_tile(columns, first, count, tile.depth(), tile[0]);
      for (int64_t r = 0; r < rows; r += products_.panel) {
        const int64_t tokens = std::min(products_.panel, rows - r);
        Numbers numbers[2];
        for (size_t i = 0; i < sides_.size(); ++i) {
          const Side& side = sides_[i];
          float* logits = side.gradient.floats() + r * chunk_ + first;
          const float* bias = bias_ ? bias_ + column : nullptr;
          if (kept(side)) {
            const float* reference = side.kept.reference[column / width_].const_data_ptr<float>() + row + r;
            processor().restore(
                tokens, count, chunk_, rows_from(side.kept.logits, row + r, column), reference, logits);
            bias = nullptr;
          } else {
            products_.multiply(
                tile.depth(), round_up(count, products_.group), panels[i][(row + r) / products_.panel], tile[0], logits,
                chunk_, false);
          }
          numbers[i] = {logits, chunk_, bias, side.numbers + row + r, n_, side.written};
        }
        processor().gradients(
            tokens, count, targets_ + row + r, column, scale_, numbers[0], sides_.size() == 2 ? &numbers[1] : nullptr);
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
          const View gradient = gradient_of_logits(side, rows, size);
          const Panels strip = pack_strip(products_, gradient, first, last, weight_tiles_.depth());
          float* out = side.grad_hidden.mutable_data_ptr<float>() + (row + first) * padded_depth_;
          for (int64_t tile = 0; tile < weight_tiles_.count(); ++tile)
            multiply_tile(
                products_, strip, last - first, weight_tiles_, tile, out + tile * weight_tiles_.width(), padded_depth_,
                true);
        });
  }

  // ∂W[chunk] += Gᵀ H in `sums` (null: there is nothing to add to), which the last batch and side round to `out`.
  void add_to_weight(float* sums, const Tensor& out, int64_t row, int64_t rows) {
    bool add = row > 0;
    for (size_t i = 0; i < sides_.size(); ++i) {
      const Side& side = sides_[i];
      if (!side.written) continue;
      const bool complete = row + rows == n_ && (i + 1 == sides_.size() || !sides_[i + 1].written);
      parallel_strips(products_, out.size(0), [&](int64_t first, int64_t last) {
        const View gradient = transposed(gradient_of_logits(side, rows, out.size(0)));
        const Tiles& tiles = side.hidden_tiles[row / batch_];
        const Panels strip = pack_strip(products_, gradient, first, last, tiles.depth());
        const Buffer single(sums ? 0 : round_up(last - first, products_.panel) * tiles.width() * sizeof(float));
        for (int64_t tile = 0; tile < tiles.count(); ++tile) {
          const int64_t column = tile * tiles.width(), stride = sums ? padded_depth_ : tiles.width();
          float* sum = sums ? sums + first * padded_depth_ + column : single.floats();
          multiply_tile(products_, strip, last - first, tiles, tile, sum, stride, add);
          if (complete)
            processor().round(
                last - first, std::min(tiles.width(), depth_ - column), stride, sum, rows_from(out, first, column));
        }
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

}  // namespace

// hiddens, weight, targets, bias, scale: as in `forward`. numbers: (7, N) float32 of each branch, see processor.h.
// kept_logits, references: of each branch, as `forward` left them. written: which branches' logits have a gradient.
// needs_hidden: which hidden states want theirs.
// Returns the gradients asked for, of the hidden states, then weight, in the inputs' dtype, then bias in float32.
std::vector<Tensor> backward(
    at::TensorList hiddens, at::TensorList numbers, const Tensor& weight, const Tensor& targets,
    const std::optional<Tensor>& bias, double scale, at::TensorList kept_logits, at::TensorList references,
    const c10::List<bool>& written, const c10::List<bool>& needs_hidden, bool needs_weight, bool needs_bias) {
  Backward pass(weight, targets, bias, scale);
  for (size_t i = 0; i < hiddens.size(); ++i)
    pass.add_side(
        hiddens[i], numbers[i], {kept_logits[i], references[i]}, written[i], needs_hidden[i], needs_weight);
  return pass.run(needs_weight, needs_bias);
}

}  // namespace vogue
