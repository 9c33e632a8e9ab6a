// Checks and allocation shared by the torch side of every op. Errors name the op, the argument, what was given and what is
// allowed.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "fail.h"
#include "huge_pages.h"

namespace fastbert {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline std::string dtype_text(ScalarType type) {
  std::ostringstream text;
  text << type;
  return text.str();
}

inline DType float_dtype(const char* op, const char* name, const Tensor& t) {
  if (t.scalar_type() == ScalarType::Float) return DType::kFloat32;
  if (t.scalar_type() == ScalarType::BFloat16) return DType::kBFloat16;
  fail(op, ": ", name, " is ", dtype_text(t.scalar_type()), "; the CPU kernel takes float32 and bfloat16");
}

inline void check_layout(const char* op, const char* name, const Tensor& t) {
  if (!t.is_cpu()) fail(op, ": ", name, " is not on the CPU");
  if (!t.is_contiguous()) fail(op, ": ", name, " of shape ", shape_text(t), " is not contiguous");
}

// Of this type and shape (-1 stands for any size).
inline void check_shape(const char* op, const char* name, const Tensor& t, ScalarType type,
                        const std::vector<int64_t>& shape) {
  if (t.scalar_type() != type)
    fail(op, ": ", name, " is ", dtype_text(t.scalar_type()), "; it must be ", dtype_text(type));
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = shape[i] < 0 || shape[i] == t.size(i);
  if (same) return;
  std::string wanted = "[";
  for (size_t i = 0; i < shape.size(); ++i) wanted += (i ? ", " : "") + (shape[i] < 0 ? "any" : std::to_string(shape[i]));
  fail(op, ": ", name, " has shape ", shape_text(t), "; it must be ", wanted, "]");
}

// A CPU tensor, contiguous, of this type and shape.
inline void check(const char* op, const char* name, const Tensor& t, ScalarType type, const std::vector<int64_t>& shape) {
  check_layout(op, name, t);
  check_shape(op, name, t, type, shape);
}

struct Device {
  int32_t type, index;
};

// Not torch::stable::empty, which looks the operator up by its name at every call: 0.6 us, four times in a layernorm.
inline Tensor new_tensor(const std::vector<int64_t>& shape, ScalarType type,
                         Device device = {aoti_torch_device_type_cpu(), 0}) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * (shape[i] > 1 ? shape[i] : 1);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                  static_cast<int32_t>(type), device.type, device.index, &handle));
  Tensor tensor(handle);
  if (device.type == aoti_torch_device_type_cpu()) {
    int64_t bytes = type == ScalarType::BFloat16 ? 2 : type == ScalarType::Long ? 8 : 4;
    for (int64_t extent : shape) bytes *= extent;
    if (bytes > 0) prefer_huge_pages(tensor.mutable_data_ptr(), bytes);
  }
  return tensor;
}

// Stands for an output that was not asked for.
inline Tensor none(ScalarType type) { return new_tensor({0}, type); }

// Where a kernel writes an output; null if it is empty.
inline void* data(Tensor& t) { return t.numel() > 0 ? t.mutable_data_ptr() : nullptr; }
inline float* floats(Tensor& t) { return static_cast<float*>(data(t)); }

// A probability and a seed, wherever that lies.
inline void check_dropout(const char* op, double p, const OptionalTensor& seed) {
  if (!(p >= 0.0 && p <= 1.0)) fail(op, ": dropout_p is ", p, "; it must be between 0 and 1");
  if (p > 0.0 && !seed.has_value()) fail(op, ": dropout_p is ", p, " but seed is missing");
  if (seed.has_value() && (seed->scalar_type() != ScalarType::Long || seed->numel() != 1))
    fail(op, ": seed must be one int64, not ", dtype_text(seed->scalar_type()), " of shape ", shape_text(*seed));
}

// A seed on the CPU.
inline double checked_dropout(const char* op, double p, const OptionalTensor& seed) {
  check_dropout(op, p, seed);
  if (seed.has_value()) check_layout(op, "seed", *seed);
  return p;
}

inline uint64_t seed_value(double p, const OptionalTensor& seed) {
  return p > 0.0 ? static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr())) : 0;
}

// An additive bias of attention; gives its strides, 0 where it is broadcast.
inline void check_bias(const char* op, const Tensor& bias, int64_t batch, int64_t heads, int64_t max_seqlen,
                       int64_t (&strides)[3]) {
  const auto fits = [&](int64_t dim, int64_t full) { return bias.size(dim) == 1 || bias.size(dim) == full; };
  if (!fits(0, batch) || !fits(1, heads) || !(bias.size(2) == 1 || bias.size(2) >= max_seqlen) ||
      bias.size(3) < max_seqlen)
    fail(op, ": bias has shape ", shape_text(bias), "; it must be [", batch, " or 1, ", heads, " or 1, ", max_seqlen,
         " or more or 1, ", max_seqlen, " or more]");
  for (int dim = 0; dim < 3; ++dim) strides[dim] = bias.size(dim) == 1 ? 0 : bias.stride(dim);
}

}  // namespace fastbert
