// Which processor and which of its products are in use.
#include <ATen/Version.h>
#include <ATen/native/CPUBlas.h>

#include <cstdlib>

#include "operands.h"

namespace vogue {

const Processor& processor() {
#if defined(__x86_64__)
  static const std::string capability = at::get_cpu_capability();  // obeys ATEN_CPU_CAPABILITY
  if (capability == "AVX512") return __builtin_cpu_supports("avx512bf16") ? avx512_bf16 : avx512;
  if (capability == "AVX2") return avx2;
#endif
  return portable;
}

namespace {

void multiply_brgemm(
    int64_t depth, int64_t columns, const void* a, const void* b, float* c, int64_t stride, bool add, bool) {
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

}  // namespace

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

}  // namespace vogue
