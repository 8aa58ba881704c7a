// The operators of the CPU backend.
#pragma once
#include <ATen/ATen.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace vogue {

std::tuple<at::Tensor, at::Tensor> forward(
    at::TensorList hiddens, const at::Tensor& weight, const at::Tensor& targets, const std::optional<at::Tensor>& bias,
    double scale, at::TensorList kept_logits, at::TensorList references);

std::vector<at::Tensor> backward(
    at::TensorList hiddens, at::TensorList numbers, const at::Tensor& weight, const at::Tensor& targets,
    const std::optional<at::Tensor>& bias, double scale, at::TensorList kept_logits, at::TensorList references,
    const c10::List<bool>& written, const c10::List<bool>& needs_hidden, bool needs_weight, bool needs_bias);

int64_t tile_columns(const at::Tensor& weight);

std::string description();

}  // namespace vogue
