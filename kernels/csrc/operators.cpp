// The operators of the CPU backend, called by vogue_kernels/cpu: forward.cpp and backward.cpp over tiles of the
// vocabulary, on operands packed for the processor's products (operands.h, products.cpp, processor.cpp). Unless its
// logits are to be kept, nothing is of the size tokens × vocabulary.
#include "operators.h"

#include <torch/library.h>

#include "operands.h"

TORCH_LIBRARY(vogue_cpu, library) {
  library.def(
      "forward(Tensor[] hiddens, Tensor[] weights, Tensor targets, Tensor?[] biases, float scale, "
      "float inverse_softcap, Tensor(a!)[] buffers) -> (Tensor, Tensor)");
  library.def(
      "backward(Tensor[] hiddens, Tensor[] numbers, int[] heads, Tensor[] weights, Tensor targets, Tensor?[] biases, "
      "float scale, float inverse_softcap, Tensor[] buffers, bool[] written, bool[] needs_hidden, bool[] needs_weight, "
      "bool[] needs_bias) -> Tensor[]");
  library.def("description() -> str", vogue::description);
}

TORCH_LIBRARY_IMPL(vogue_cpu, CPU, library) {
  library.impl("forward", vogue::forward);
  library.impl("backward", vogue::backward);
}
