// Forward: the hidden states are packed once; the threads share the vocabulary. A thread packs a tile of the weight,
// multiplies each panel of tokens of both branches by it, and takes the logits, while they are in its first-level
// cache, into running sums, and keeps them for the backward pass where it is told to.
#include "operands.h"
#include "operators.h"

namespace vogue {

constexpr double kLowest = -1e30;  // below every logit, and far from overflow

// hiddens: one or two (N, D); weights: (V, D) of each head, float32, bfloat16 or float16, of both branches or of one
// each; targets: (N,) in [0, V); biases: (V,) float32, of each head. With z = h Wᵀ + bias, l is z, or tanh(z / softcap)
// where inverse_softcap isn't 0; scale: of differences of l to bits. Returns the running sums of each share of the
// vocabulary, (branches, 3 or 4, shares, N) float64: maximum, sum, weighted and, for two branches, cross; and the
// target's l, (branches, N) float32. buffers: bytes for each branch's kept logits, see KeptLogits.
std::tuple<Tensor, Tensor> forward(
    at::TensorList hiddens, at::TensorList weights, const Tensor& targets, const Biases& biases, double scale,
    double inverse_softcap, at::TensorList buffers) {
  const Products products = products_for(weights[0].scalar_type());
  const int64_t branches = hiddens.size(), heads = weights.size(), n = targets.size(0), vocab = weights[0].size(0);
  const int64_t width = logit_columns(products, weights), tiles = (vocab + width - 1) / width;
  const int64_t shares = std::min<int64_t>(at::get_num_threads(), tiles), fields = branches == 2 ? 4 : 3;
  const std::vector<Panels> panels = pack_hidden_states(products, hiddens);
  const Tensor partial = at::zeros({branches, fields, shares, n}, at::kDouble);
  partial.select(1, 0).fill_(kLowest);
  const Tensor target_logits = at::empty({branches, n}, at::kFloat);
  double* sums = partial.mutable_data_ptr<double>();
  float* found = target_logits.mutable_data_ptr<float>();
  const int64_t* target = targets.const_data_ptr<int64_t>();
  const std::vector<const float*> bias = pointers(biases);
  std::vector<KeptLogits> kept;
  for (const Tensor& buffer : buffers)
    kept.emplace_back(buffer, kept_type(weights[0], inverse_softcap), n, vocab, width);
  auto head_of = [&](int64_t branch) { return std::min(branch, heads - 1); };

  parallel(products, shares, [&](int64_t share) {
    std::vector<Tiles> tile;  // of each head
    for (const Tensor& weight : weights) tile.emplace_back(products, width, weight.size(1), width);
    const Buffer logits(branches * products.panel * width * sizeof(float));
    for (int64_t t = tiles * share / shares; t < tiles * (share + 1) / shares; ++t) {
      const int64_t first = t * width, count = std::min(width, vocab - first);
      for (int64_t head = 0; head < heads; ++head)
        products.pack_tile(transposed(view(weights[head])), first, count, tile[head].depth(), tile[head][0]);
      for (const KeptLogits& logits : kept)
        if (logits.holds(t)) logits.prepare(t);
      for (int64_t row = 0; row < n; row += products.panel) {
        const int64_t rows = std::min(products.panel, n - row);
        Running running[2];
        for (int64_t branch = 0; branch < branches; ++branch) {
          float* out = logits.floats() + branch * products.panel * width;
          products.multiply(panels[branch].depth(), round_up(count, products.group),
                            panels[branch][row / products.panel], tile[head_of(branch)][0], out, width, /*add=*/false,
                            /*short_sums=*/true);
          auto field = [&](int64_t f) { return sums + ((branch * fields + f) * shares + share) * n + row; };
          const float* added = bias[head_of(branch)];
          running[branch] = {out,      added ? added + first : nullptr,      field(0), field(1),
                             field(2), branches == 2 ? field(3) : nullptr};
        }
        processor().statistics(rows, count, width, static_cast<float>(scale), static_cast<float>(inverse_softcap),
                               running[0], branches == 2 ? &running[1] : nullptr);
        for (int64_t branch = 0; branch < branches; ++branch)
          if (kept[branch].holds(t)) kept[branch].keep(running[branch], rows, t, row, static_cast<float>(scale));
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

}  // namespace vogue
