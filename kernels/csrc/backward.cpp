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

// A head in the backward pass, of both branches or of one.
struct Head {
  Tensor weight;
  const float* bias;
  int64_t depth, padded_depth;
  Tiles tiles;             // of a chunk of the weight: the right operand of ∂H
  Tensor grad_weight;      // or none
  Tensor grad_bias;        // float32; or none
  std::optional<Buffer> sums;  // ∂W[chunk], in float32 until it is complete; none where a single product is so at once
  View rows(int64_t first, int64_t count) const {
    return slice_rows(view(weight), first, count, weight.element_size());
  }
};

// One branch in the backward pass.
struct Side {
  int64_t head;
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
  Backward(at::TensorList weights, const Tensor& targets, const Biases& biases, double scale, double inverse_softcap)
      : products_(products_for(weights[0].scalar_type())),
        n_(targets.size(0)),
        vocab_(weights[0].size(0)),
        width_(logit_columns(products_, weights)),
        chunk_(round_up(std::max(kChunkColumns, width_ * at::get_num_threads()), width_)),
        batch_(std::clamp(
            kChunkElements / chunk_ / products_.panel * products_.panel, products_.panel,
            round_up(n_, products_.panel))),
        targets_(targets.const_data_ptr<int64_t>()),
        scale_(static_cast<float>(scale)),
        inverse_softcap_(static_cast<float>(inverse_softcap)) {
    const std::vector<const float*> bias = pointers(biases);
    for (size_t i = 0; i < weights.size(); ++i) {
      const int64_t depth = weights[i].size(1);
      heads_.push_back(
          {weights[i], bias[i], depth, round_up(depth, products_.group),
           Tiles(products_, depth, chunk_, tile_columns(products_, chunk_)), {}, {}, {}});
    }
  }

  void add_side(
      int64_t head, const Tensor& hidden, const Tensor& numbers, const KeptLogits& kept, bool written,
      bool needs_hidden, bool needs_weight) {
    hiddens_.push_back(hidden);
    Side& side = sides_.emplace_back(
        Side{head, view(hidden), numbers.const_data_ptr<float>(), written, kept,
             Buffer(batch_ * chunk_ * sizeof(float)), {}, {}});
    const int64_t depth = heads_[head].depth;
    if (needs_hidden)
      side.grad_hidden = at::zeros({round_up(n_, products_.panel), heads_[head].padded_depth}, at::kFloat);
    for (int64_t row = 0; needs_weight && written && row < n_; row += batch_) {
      const View rows = slice_rows(side.hidden, row, batch_, hidden.element_size());
      const Tiles& tiles =
          side.hidden_tiles.emplace_back(products_, depth, rows.rows, tile_columns(products_, rows.rows));
      parallel(products_, tiles.count(), [&](int64_t tile) { tiles.pack(rows, tile); });
    }
  }

  std::vector<Tensor> run(const c10::List<bool>& needs_weight, const c10::List<bool>& needs_bias) {
    const std::vector<Panels> panels = pack_hidden_states(products_, hiddens_);
    for (size_t i = 0; i < heads_.size(); ++i) prepare(i, needs_weight[i], needs_bias[i]);
    for (int64_t start = 0; start < vocab_; start += chunk_) {
      const int64_t size = std::min(chunk_, vocab_ - start);
      for (const Head& head : heads_) {
        const View rows_of_weight = head.rows(start, size);
        parallel(products_, head.tiles.count(), [&](int64_t tile) { head.tiles.pack(rows_of_weight, tile); });
      }
      for (int64_t row = 0; row < n_; row += batch_) {
        const int64_t rows = std::min(batch_, n_ - row);
        compute_gradients_of_logits(panels, start, size, row, rows);
        add_to_hidden(row, rows, size);
        for (size_t i = 0; i < heads_.size(); ++i) {
          if (heads_[i].grad_weight.defined()) add_to_weight(i, start, size, row, rows);
          if (heads_[i].grad_bias.defined()) add_to_bias(i, start, size, rows);
        }
      }
    }
    std::vector<Tensor> gradients;
    for (const Side& side : sides_)
      if (side.grad_hidden.defined())
        gradients.push_back(side.grad_hidden.narrow(0, 0, n_)
                                .narrow(1, 0, heads_[side.head].depth)
                                .to(heads_[side.head].weight.scalar_type())
                                .contiguous());
    for (const Head& head : heads_) {
      if (head.grad_weight.defined()) gradients.push_back(head.grad_weight);
      if (head.grad_bias.defined()) gradients.push_back(head.grad_bias);
    }
    return gradients;
  }

 private:
  // The gradients of head i. No side may be written that has it: then they are 0.
  void prepare(int64_t i, bool needs_weight, bool needs_bias) {
    Head& head = heads_[i];
    const auto written =
        std::count_if(sides_.begin(), sides_.end(), [&](const Side& side) { return side.written && side.head == i; });
    if (needs_bias) head.grad_bias = at::zeros({vocab_}, at::kFloat);
    if (!needs_weight) return;
    head.grad_weight = written ? at::empty_like(head.weight, at::MemoryFormat::Contiguous)
                               : at::zeros_like(head.weight, at::MemoryFormat::Contiguous);
    if (n_ > batch_ || written > 1)
      head.sums.emplace(round_up(chunk_, products_.panel) * head.padded_depth * sizeof(float));
  }

  // G of the `size` words of the vocabulary from `start` on and the tokens from `row` on, of every side.
  void compute_gradients_of_logits(
      const std::vector<Panels>& panels, int64_t start, int64_t size, int64_t row, int64_t rows) {
    parallel(products_, (size + width_ - 1) / width_, [&](int64_t t) {
      const int64_t first = t * width_, count = std::min(width_, size - first), column = start + first;
      auto kept = [&](const Side& side) { return side.kept.holds(column + count); };
      std::vector<Tiles> tiles;  // of each head
      for (int64_t i = 0; i < static_cast<int64_t>(heads_.size()); ++i) {
        const Tiles& tile = tiles.emplace_back(products_, width_, heads_[i].depth, width_);
        auto computes = [&](const Side& side) { return side.head == i && !kept(side); };
        if (std::any_of(sides_.begin(), sides_.end(), computes))
          products_.pack_tile(transposed(heads_[i].rows(start, size)), first, count, tile.depth(), tile[0]);
      }
      for (int64_t r = 0; r < rows; r += products_.panel) {
        const int64_t tokens = std::min(products_.panel, rows - r);
        Numbers numbers[2];
        for (size_t i = 0; i < sides_.size(); ++i) {
          const Side& side = sides_[i];
          const Tiles& tile = tiles[side.head];
          float* logits = side.gradient.floats() + r * chunk_ + first;
          const float* bias = heads_[side.head].bias ? heads_[side.head].bias + column : nullptr;
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
          numbers[i] = {logits, chunk_, bias, kept(side), side.numbers + row + r, n_, side.written};
        }
        processor().gradients(
            tokens, count, targets_ + row + r, column, scale_, inverse_softcap_, numbers[0],
            sides_.size() == 2 ? &numbers[1] : nullptr);
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
          const Tiles& tiles = heads_[side.head].tiles;
          const int64_t stride = heads_[side.head].padded_depth;
          const View gradient = gradient_of_logits(side, rows, size);
          const Panels strip = pack_strip(products_, gradient, first, last, tiles.depth());
          float* out = side.grad_hidden.mutable_data_ptr<float>() + (row + first) * stride;
          for (int64_t tile = 0; tile < tiles.count(); ++tile)
            multiply_tile(products_, strip, last - first, tiles, tile, out + tile * tiles.width(), stride, true);
        });
  }

  // ∂W[chunk] += Gᵀ H in the head's sums (none: there is nothing to add to), which the last batch and side round.
  void add_to_weight(int64_t head_index, int64_t start, int64_t size, int64_t row, int64_t rows) {
    const Head& head = heads_[head_index];
    const Tensor out = head.grad_weight.narrow(0, start, size);
    bool add = row > 0;
    for (size_t i = 0; i < sides_.size(); ++i) {
      const Side& side = sides_[i];
      auto counts = [&](const Side& other) { return other.written && other.head == head_index; };
      if (!counts(side)) continue;
      const bool complete = row + rows == n_ && std::none_of(sides_.begin() + i + 1, sides_.end(), counts);
      parallel_strips(products_, size, [&](int64_t first, int64_t last) {
        const View gradient = transposed(gradient_of_logits(side, rows, size));
        const Tiles& tiles = side.hidden_tiles[row / batch_];
        const Panels strip = pack_strip(products_, gradient, first, last, tiles.depth());
        const Buffer single(head.sums ? 0 : round_up(last - first, products_.panel) * tiles.width() * sizeof(float));
        for (int64_t tile = 0; tile < tiles.count(); ++tile) {
          const int64_t column = tile * tiles.width(), stride = head.sums ? head.padded_depth : tiles.width();
          float* sum = head.sums ? head.sums->floats() + first * head.padded_depth + column : single.floats();
          multiply_tile(products_, strip, last - first, tiles, tile, sum, stride, add);
          if (complete)
            processor().round(
                last - first, std::min(tiles.width(), head.depth - column), stride, sum, rows_from(out, first, column));
        }
      });
      add = true;
    }
  }

  void add_to_bias(int64_t head, int64_t start, int64_t size, int64_t rows) {
    const Tensor out = heads_[head].grad_bias.narrow(0, start, size);
    for (const Side& side : sides_)
      if (side.written && side.head == head)
        out.add_(at::from_blob(side.gradient.floats(), {rows, size}, {chunk_, 1}, at::kFloat).sum(0, false, at::kDouble));
  }

  const Products products_;
  const int64_t n_, vocab_;
  const int64_t width_;  // columns of a tile
  const int64_t chunk_, batch_;
  const int64_t* targets_;
  const float scale_, inverse_softcap_;
  std::vector<Head> heads_;
  std::vector<Tensor> hiddens_;
  std::vector<Side> sides_;
};

}  // namespace

// hiddens, weights, targets, biases, scale, inverse_softcap: as in `forward`. numbers: (7, N) float32 of each branch,
// see processor.h. heads: which one each branch has. kept_logits, references: of each branch, as `forward` left them.
// written: which branches' logits have a gradient. needs_hidden: which hidden states want theirs; needs_weight and
// needs_bias: of which heads. Returns the gradients asked for, of the hidden states, then of each head its weight, in
// the inputs' dtype, and bias in float32.
std::vector<Tensor> backward(
    at::TensorList hiddens, at::TensorList numbers, at::IntArrayRef heads, at::TensorList weights,
    const Tensor& targets, const Biases& biases, double scale, double inverse_softcap, at::TensorList kept_logits,
    at::TensorList references, const c10::List<bool>& written, const c10::List<bool>& needs_hidden,
    const c10::List<bool>& needs_weight, const c10::List<bool>& needs_bias) {
  Backward pass(weights, targets, biases, scale, inverse_softcap);
  for (size_t i = 0; i < hiddens.size(); ++i)
    pass.add_side(
        heads[i], hiddens[i], numbers[i], {kept_logits[i], references[i]}, written[i], needs_hidden[i],
        needs_weight[heads[i]]);
  return pass.run(needs_weight, needs_bias);
}

}  // namespace vogue
