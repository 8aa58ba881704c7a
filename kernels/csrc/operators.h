// The operators of the CPU backend.
#pragma once
#include <ATen/ATen.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace vogue {

std::tuple<at::Tensor, at::Tensor> forward(
    at::TensorList hiddens, at::TensorList weights, const at::Tensor& targets,
    const c10::List<std::optional<at::Tensor>>& biases, double scale, double inverse_softcap,
    at::TensorList buffers);

std::vector<at::Tensor> backward(
    at::TensorList hiddens, at::TensorList numbers, at::IntArrayRef heads, at::TensorList weights,
    const at::Tensor& targets, const c10::List<std::optional<at::Tensor>>& biases, double scale, double inverse_softcap,
    at::TensorList buffers, const c10::List<bool>& written, const c10::List<bool>& needs_hidden,
    const c10::List<bool>& needs_weight, const c10::List<bool>& needs_bias);

std::string description();

}  // namespace vogue
