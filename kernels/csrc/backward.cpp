// Backward: for a chunk of the vocabulary and a batch of tokens at a time,
//
//   G = gradient of the logits, kept or recomputed by tile      ∂W[chunk] += Gᵀ H      ∂H += G W[chunk]
//
// each shared by the threads over rows of the result. G is packed for both while it is in the first-level cache.
#include "operands.h"
#include "operators.h"

namespace vogue {
namespace {

constexpr int64_t kChunkColumns = 1024;      // of the vocabulary; more if threads would get no tile
constexpr int64_t kChunkElements = 1 << 21;  // of the gradient of a branch's logits, of which there are two copies

// C (+)= A B for rows [first, last) of A and one tile of B; c: those rows of the tile's padded columns, `stride` apart.
void multiply_tile(
    const Products& products, const Panels& a, int64_t first, int64_t last, const Tiles& b, int64_t tile, float* c,
    int64_t stride, bool add) {
  for (int64_t row = first; row < last; row += products.panel)
    products.multiply(
        a.depth(), b.padded_columns(tile), a[row / products.panel], b[tile], c + (row - first) * stride, stride, add,
        /*short_sums=*/false);
}

// A head in the backward pass, of both branches or of one.
struct Head {
  Tensor weight;
  const float* bias;
  int64_t depth;
  int64_t stride;  // of rows of sums, padded: at a power of two those of a panel would push each other out of a cache
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
  Panels rows, columns;             // G of a batch and a chunk, the left operand of ∂H; and Gᵀ, that of ∂W
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
      heads_.push_back({weights[i], bias[i], depth, round_up(depth, products_.group) + products_.group, {}, {}, {}});
    }
  }

  void add_side(
      int64_t head, const Tensor& hidden, const Tensor& numbers, const Tensor& buffer, bool written, bool needs_hidden,
      bool needs_weight) {
    hiddens_.push_back(hidden);
    const KeptLogits kept(buffer, kept_type(heads_[head].weight, inverse_softcap_), n_, vocab_, width_);
    const bool needs_columns = needs_weight && written;
    Side& side = sides_.emplace_back(
        Side{head, view(hidden), numbers.const_data_ptr<float>(), written, kept,
             Panels(products_, needs_hidden ? batch_ : 0, chunk_), Panels(products_, needs_columns ? chunk_ : 0, batch_),
             {}, {}});
    const int64_t depth = heads_[head].depth;
    side.rows.clear();  // where the depth is padded nothing is ever written
    if (needs_hidden)
      side.grad_hidden = at::zeros({round_up(n_, products_.panel), heads_[head].stride}, at::kFloat);
    for (int64_t row = 0; needs_columns && row < n_; row += batch_) {
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
      for (int64_t row = 0; row < n_; row += batch_) {
        const int64_t rows = std::min(batch_, n_ - row);
        compute_gradients_of_logits(panels, start, size, row, rows);
        for (size_t i = 0; i < heads_.size(); ++i) {
          if (needs_hidden(i)) add_to_hidden(i, start, size, row, rows);
          if (heads_[i].grad_weight.defined()) add_to_weight(i, start, size, row, rows);
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
  bool needs_hidden(int64_t head) const {
    return std::any_of(
        sides_.begin(), sides_.end(), [&](const Side& side) { return side.head == head && side.grad_hidden.defined(); });
  }

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
      head.sums.emplace(round_up(chunk_, products_.panel) * head.stride * sizeof(float));
  }

  // G of the `size` words of the vocabulary from `start` on and the tokens from `row` on, of every side.
  void compute_gradients_of_logits(
      const std::vector<Panels>& panels, int64_t start, int64_t size, int64_t row, int64_t rows) {
    for (Side& side : sides_) {
      if (size < chunk_) side.rows.clear();
      if (!side.hidden_tiles.empty()) side.columns.set_depth(side.hidden_tiles[row / batch_].depth());
    }
    parallel(products_, (size + width_ - 1) / width_, [&](int64_t tile) {
      const int64_t first = tile * width_, count = std::min(width_, size - first);
      const std::vector<Tiles> weights = pack_weights(start + first, count);
      const int64_t block = products_.panel * width_;
      const Buffer logits(sides_.size() * block * sizeof(float));
      std::vector<double> sums(sides_.size() * width_);  // of the columns of G
      for (int64_t r = 0; r < rows; r += products_.panel) {
        const int64_t tokens = std::min(products_.panel, rows - r), token = row + r;
        Numbers numbers[2];
        for (size_t i = 0; i < sides_.size(); ++i) {
          float* out = logits.floats() + i * block;
          const char* panel = panels[i][token / products_.panel];
          numbers[i] = find_logits(sides_[i], panel, weights[sides_[i].head], start + first, count, token, tokens, out);
        }
        processor().gradients(
            tokens, count, targets_ + token, start + first, scale_, inverse_softcap_, numbers[0],
            sides_.size() == 2 ? &numbers[1] : nullptr);
        for (size_t i = 0; i < sides_.size(); ++i) {
          std::fill(numbers[i].logits + tokens * width_, numbers[i].logits + block, 0.0f);
          pack(sides_[i], numbers[i].logits, first, count, r, &sums[i * width_]);
        }
      }
      for (size_t i = 0; i < sides_.size(); ++i) add_to_bias(sides_[i], start + first, count, &sums[i * width_]);
    });
  }

  bool kept(const Side& side, int64_t column) const { return side.kept.holds(column / width_); }

  // A tile of each head's weight, from `column` on, for logits that are computed again.
  std::vector<Tiles> pack_weights(int64_t column, int64_t count) const {
    std::vector<Tiles> weights;
    for (int64_t i = 0; i < static_cast<int64_t>(heads_.size()); ++i) {
      const Tiles& tile = weights.emplace_back(products_, width_, heads_[i].depth, width_);
      auto computes = [&](const Side& side) { return side.head == i && !kept(side, column); };
      if (std::any_of(sides_.begin(), sides_.end(), computes))
        products_.pack_tile(transposed(heads_[i].rows(column, count)), 0, count, tile.depth(), tile[0]);
    }
    return weights;
  }

  // A side's logits of a block, (panel, width), and what is to be known of them.
  Numbers find_logits(
      const Side& side, const char* panel, const Tiles& weight, int64_t column, int64_t count, int64_t token,
      int64_t tokens, float* out) const {
    const float* bias = heads_[side.head].bias ? heads_[side.head].bias + column : nullptr;
    const bool known = kept(side, column);
    if (known)
      side.kept.restore(tokens, column / width_, token, scale_, out);
    else
      products_.multiply(weight.depth(), round_up(count, products_.group), panel, weight[0], out, width_,
                         /*add=*/false, /*short_sums=*/true);
    return {out, width_, known ? nullptr : bias, known, side.numbers + token, n_, side.written};
  }

  // What ∂H, ∂W and ∂bias need of a block of G.
  void pack(const Side& side, const float* block, int64_t first, int64_t count, int64_t r, double* sums) const {
    if (side.grad_hidden.defined())
      products_.pack_rows(block, count, width_, first, side.rows.depth(), side.rows[r / products_.panel]);
    if (!side.hidden_tiles.empty())
      products_.pack_columns(block, count, width_, first, r, side.columns.depth(), side.columns[0]);
    if (heads_[side.head].grad_bias.defined() && side.written)
      for (int64_t i = 0; i < products_.panel; ++i)
        for (int64_t j = 0; j < count; ++j) sums[j] += block[i * width_ + j];
  }

  // ∂H += G W[chunk]: the threads share the columns, and each packs those of W for itself.
  void add_to_hidden(int64_t head_index, int64_t start, int64_t size, int64_t row, int64_t rows) {
    const Head& head = heads_[head_index];
    const View weight = head.rows(start, size);
    const int64_t width = tile_columns(products_, chunk_), tiles = (head.depth + width - 1) / width;
    const int64_t strips = (at::get_num_threads() + tiles - 1) / tiles;  // of the rows, for more threads than tiles
    const int64_t strip = round_up((rows + strips - 1) / strips, products_.panel);
    parallel(products_, tiles * strips, [&](int64_t i) {
      const int64_t column = i / strips * width, columns = std::min(width, head.depth - column);
      const int64_t first = i % strips * strip, last = std::min(rows, first + strip);
      const Tiles tile(products_, columns, chunk_, width);
      products_.pack_tile(weight, column, columns, tile.depth(), tile[0]);
      for (const Side& side : sides_) {
        if (side.head != head_index || !side.grad_hidden.defined()) continue;
        float* out = side.grad_hidden.mutable_data_ptr<float>() + (row + first) * head.stride + column;
        multiply_tile(products_, side.rows, first, last, tile, 0, out, head.stride, true);
      }
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
        if (complete) map_pages(rows_from(out, first, 0).data, (last - first) * head.depth * out.element_size());
        const Tiles& tiles = side.hidden_tiles[row / batch_];
        const Buffer single(head.sums ? 0 : round_up(last - first, products_.panel) * tiles.width() * sizeof(float));
        for (int64_t tile = 0; tile < tiles.count(); ++tile) {
          const int64_t column = tile * tiles.width(), stride = head.sums ? head.stride : tiles.width();
          float* sum = head.sums ? head.sums->floats() + first * head.stride + column : single.floats();
          multiply_tile(products_, side.columns, first, last, tiles, tile, sum, stride, add);
          if (complete)
            processor().round(
                last - first, std::min(tiles.width(), head.depth - column), stride, sum, rows_from(out, first, column));
        }
      });
      add = true;
    }
  }

  void add_to_bias(const Side& side, int64_t column, int64_t count, const double* sums) const {
    if (!heads_[side.head].grad_bias.defined()) return;
    float* out = heads_[side.head].grad_bias.mutable_data_ptr<float>() + column;
    for (int64_t j = 0; j < count; ++j) out[j] += sums[j];
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
// see processor.h. heads: which one each branch has. buffers: of each branch, as `forward` left them. written: which
// branches' logits have a gradient. needs_hidden: which hidden states want theirs; needs_weight and needs_bias: of
// which heads. Returns the gradients asked for, of the hidden states, then of each head its weight, in the inputs'
// dtype, and bias in float32.
std::vector<Tensor> backward(
    at::TensorList hiddens, at::TensorList numbers, at::IntArrayRef heads, at::TensorList weights,
    const Tensor& targets, const Biases& biases, double scale, double inverse_softcap, at::TensorList buffers,
    const c10::List<bool>& written, const c10::List<bool>& needs_hidden, const c10::List<bool>& needs_weight,
    const c10::List<bool>& needs_bias) {
  Backward pass(weights, targets, biases, scale, inverse_softcap);
  for (size_t i = 0; i < hiddens.size(); ++i)
    pass.add_side(
        heads[i], hiddens[i], numbers[i], buffers[i], written[i], needs_hidden[i], needs_weight[heads[i]]);
  return pass.run(needs_weight, needs_bias);
}

}  // namespace vogue
