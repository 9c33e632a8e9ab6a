// The torch side of the CUDA ops: schemas, argument checks, allocation, the stream. No library of CUDA is linked: what
// is needed of PyTorch's CUDA side is looked up when an op runs, so that a PyTorch without CUDA can load this too.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/kernels.h"
#include "philox.h"
#include "tensor.h"

// The tests compile this file a second time, with the kernels running on the host.
#ifdef FASTBERT_EMULATED
#define FASTBERT_OP(name) name "_emulated"
#define FASTBERT_KEY CPU
#else
#define FASTBERT_OP(name) name "_cuda"
#define FASTBERT_KEY CUDA
#endif
#define FASTBERT_IMPL(key, m) STABLE_TORCH_LIBRARY_IMPL(fastbert, key, m)

namespace fastbert::cuda {
namespace {

constexpr int64_t kMaxColumns = 1 << 29;  // of layernorm, whose backward counts three sums a column in an int

#ifdef FASTBERT_EMULATED

struct Current {
  explicit Current(Device) {}
  Queue queue{0, nullptr};
};

#else

// PyTorch's current stream on a device.
void* current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr
                              : reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  if (function == nullptr) fail("the PyTorch that is loaded has no CUDA: libtorch_cuda.so is not there");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

// PyTorch's current device while it lives, and that device's current stream.
struct Current {
  explicit Current(Device device) : guard(device.index), queue{device.index, current_stream(device.index)} {}
  torch::stable::accelerator::DeviceGuard guard;
  Queue queue;
};

#endif

Device device_of(const Tensor& t) {
  Device device{};
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device.type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device.index));
  return device;
}

// The checks of one call: everything lies on the device of its first tensor.
struct Call {
  const char* op;
  Device device;

  Call(const char* op_, const Tensor& first) : op(op_), device(device_of(first)) {}

  void check_layout(const char* name, const Tensor& t) const {
    const Device other = device_of(t);
    if (other.type != device.type || other.index != device.index)
      fail(op, ": ", name, " is not on the device of the first argument");
    if (!t.is_contiguous()) fail(op, ": ", name, " of shape ", shape_text(t), " is not contiguous");
  }
  void check(const char* name, const Tensor& t, ScalarType type, const std::vector<int64_t>& shape) const {
    check_layout(name, t);
    check_shape(op, name, t, type, shape);
  }
  Format format(const char* name, const Tensor& t) const {
    switch (t.scalar_type()) {
      case ScalarType::Float: return Format::kFloat32;
      case ScalarType::BFloat16: return Format::kBFloat16;
      case ScalarType::Half: return Format::kFloat16;
      default: break;
    }
    fail(op, ": ", name, " is ", dtype_text(t.scalar_type()),
         "; the CUDA kernel takes float32, bfloat16 and float16");
  }
  // A vector [columns] in any format.
  Parameter parameter(const char* name, const Tensor& t, int64_t columns) const {
    const Format found = format(name, t);
    check(name, t, t.scalar_type(), {columns});
    return {t.const_data_ptr(), found};
  }
  Dropout dropout(double p, const OptionalTensor& seed) const {
    check_dropout(op, p, seed);
    if (seed.has_value()) check_layout("seed", *seed);
    const bool active = p > 0.0;
    return {active ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr, dropout_threshold(p),
            dropout_scale(p), active};
  }
  LayerNormShape rows(const char* name, const Tensor& t, double dropout_p, const OptionalTensor& seed) const {
    check(name, t, t.scalar_type(), {-1, -1});
    const int64_t columns = t.size(1);
    if (columns < 1 || columns > kMaxColumns)
      fail(op, ": ", name, " has shape ", shape_text(t), "; its last dimension must be 1 to ", kMaxColumns);
    return {t.size(0), static_cast<int>(columns), dropout(dropout_p, seed)};
  }
  Tensor make(const std::vector<int64_t>& shape, ScalarType type) const { return new_tensor(shape, type, device); }
};

// Where kernels copy 16 bytes at a time, a tensor that begins elsewhere, a part of a larger one, is copied first.
const void* aligned(Tensor& t) {
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 != 0) t = torch::stable::clone(t);
  return t.const_data_ptr();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layernorm_fwd_op(Tensor x, OptionalTensor x_bias, OptionalTensor residual,
                                                         Tensor weight, Tensor bias, double eps, double dropout_p,
                                                         OptionalTensor seed, bool save) {
  const Call call(FASTBERT_OP("layernorm_fwd"), x);
  const Parameter x_data{x.const_data_ptr(), call.format("x", x)};
  const LayerNormShape shape = call.rows("x", x, dropout_p, seed);
  ScalarType type = x.scalar_type();
  Parameter x_bias_data{}, residual_data{};
  if (x_bias.has_value()) x_bias_data = call.parameter("x_bias", *x_bias, shape.columns);
  if (residual.has_value()) {
    residual_data = {residual->const_data_ptr(), call.format("residual", *residual)};
    call.check("residual", *residual, residual->scalar_type(), {shape.rows, shape.columns});
    if (residual_data.format == Format::kFloat32) type = ScalarType::Float;
  }
  const Parameter weight_data = call.parameter("weight", weight, shape.columns);
  const Parameter bias_data = call.parameter("bias", bias, shape.columns);
  const bool changed = x_bias.has_value() || residual.has_value() || dropout_p > 0.0;
  const Current current(call.device);
  Tensor y = call.make({shape.rows, shape.columns}, type);
  Tensor z = save && changed ? call.make({shape.rows, shape.columns}, type) : call.make({0}, type);
  Tensor mean = call.make({save ? shape.rows : 0}, ScalarType::Float);
  Tensor rstd = call.make({save ? shape.rows : 0}, ScalarType::Float);
  layernorm_fwd(current.queue, shape, static_cast<float>(eps), x_data, x_bias_data, residual_data, weight_data, bias_data,
                data(y), data(z), floats(mean), floats(rstd));
  return {y, z, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layernorm_bwd_op(Tensor dy, Tensor z, Tensor weight, Tensor mean,
                                                                 Tensor rstd, double dropout_p, OptionalTensor seed,
                                                                 bool need_x_bias) {
  const Call call(FASTBERT_OP("layernorm_bwd"), dy);
  const Format format = call.format("z", z);
  const LayerNormShape shape = call.rows("z", z, dropout_p, seed);
  const ScalarType type = z.scalar_type();
  call.check("dy", dy, type, {shape.rows, shape.columns});
  const Parameter weight_data = call.parameter("weight", weight, shape.columns);
  call.check("mean", mean, ScalarType::Float, {shape.rows});
  call.check("rstd", rstd, ScalarType::Float, {shape.rows});
  const Current current(call.device);
  Tensor dz = call.make({shape.rows, shape.columns}, type);
  Tensor dx = dropout_p > 0.0 ? call.make({shape.rows, shape.columns}, type) : call.make({0}, type);
  Tensor dweight = call.make({shape.columns}, weight.scalar_type());
  Tensor dbias = call.make({shape.columns}, weight.scalar_type());
  Tensor dx_bias = call.make({need_x_bias ? shape.columns : 0}, ScalarType::Float);
  Tensor workspace = call.make({layernorm_bwd_sets(current.queue, shape), 3, shape.columns}, ScalarType::Float);
  layernorm_bwd(current.queue, shape, format, dy.const_data_ptr(), z.const_data_ptr(), weight_data,
                static_cast<const float*>(mean.const_data_ptr()), static_cast<const float*>(rstd.const_data_ptr()),
                data(dz), data(dx), data(dweight), data(dbias), floats(dx_bias), floats(workspace));
  return {dz, dx, dweight, dbias, dx_bias};
}

// The lengths themselves lie in device memory and are not looked at: that would wait for the device.
AttentionShape check_attention(const Call& call, const Tensor& qkv, const Tensor& cu_seqlens, int64_t max_seqlen,
                               double scale, double dropout_p, const OptionalTensor& seed, const OptionalTensor& bias) {
  if (qkv.scalar_type() != ScalarType::BFloat16 && qkv.scalar_type() != ScalarType::Half)
    fail(call.op, ": qkv is ", dtype_text(qkv.scalar_type()), "; the CUDA kernel takes bfloat16 and float16");
  call.check("qkv", qkv, qkv.scalar_type(), {-1, 3, -1, -1});
  call.check("cu_seqlens", cu_seqlens, ScalarType::Int, {-1});
  const int64_t head_dim = qkv.size(3);
  if (qkv.size(2) < 1) fail(call.op, ": qkv has shape ", shape_text(qkv), "; it must have at least one head");
  if (head_dim != 32 && head_dim != 64 && head_dim != 128)
    fail(call.op, ": qkv has head_dim ", head_dim, "; it must be 32, 64 or 128");
  if (cu_seqlens.numel() < 1) fail(call.op, ": cu_seqlens is empty; it must hold batch + 1 offsets");
  if (max_seqlen < 0) fail(call.op, ": max_seqlen is ", max_seqlen, "; it must not be negative");
  if (qkv.size(0) > 0 && (cu_seqlens.numel() < 2 || max_seqlen == 0))
    fail(call.op, ": cu_seqlens has ", cu_seqlens.numel(), " offsets and max_seqlen is ", max_seqlen,
         ", which leaves no room for the ", qkv.size(0), " tokens of qkv");
  AttentionShape shape{};
  shape.total = qkv.size(0);
  shape.batch = static_cast<int>(cu_seqlens.numel() - 1);
  shape.heads = static_cast<int>(qkv.size(2));
  shape.head_dim = static_cast<int>(head_dim);
  shape.max_seqlen = static_cast<int>(max_seqlen < shape.total ? max_seqlen : shape.total);
  shape.cu_seqlens = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  shape.scale = static_cast<float>(scale);
  shape.dropout = call.dropout(dropout_p, seed);
  if (bias.has_value()) {
    call.check("bias", *bias, ScalarType::Float, {-1, -1, -1, -1});
    check_bias(call.op, *bias, shape.batch, shape.heads, max_seqlen, shape.bias_strides);
    shape.bias = static_cast<const float*>(bias->const_data_ptr());
  }
  return shape;
}

// deterministic: for the backward alone.
std::tuple<Tensor, Tensor> attention_fwd_op(Tensor qkv, Tensor cu_seqlens, int64_t max_seqlen, double scale,
                                            double dropout_p, OptionalTensor seed, OptionalTensor bias,
                                            bool /*deterministic*/) {
  const Call call(FASTBERT_OP("attention_fwd"), qkv);
  const AttentionShape shape = check_attention(call, qkv, cu_seqlens, max_seqlen, scale, dropout_p, seed, bias);
  const void* qkv_data = aligned(qkv);
  const Current current(call.device);
  Tensor out = call.make({shape.total, shape.heads * shape.head_dim}, qkv.scalar_type());
  Tensor lse = call.make({shape.heads, shape.total}, ScalarType::Float);
  attention_fwd(current.queue, shape, call.format("qkv", qkv), qkv_data, data(out), floats(lse));
  return {out, lse};
}

std::tuple<Tensor, Tensor> attention_bwd_op(Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens,
                                            int64_t max_seqlen, double scale, double dropout_p, OptionalTensor seed,
                                            OptionalTensor bias, bool need_dbias, bool deterministic) {
  const Call call(FASTBERT_OP("attention_bwd"), qkv);
  const AttentionShape shape = check_attention(call, qkv, cu_seqlens, max_seqlen, scale, dropout_p, seed, bias);
  call.check("dout", dout, qkv.scalar_type(), {shape.total, shape.heads * shape.head_dim});
  call.check("out", out, qkv.scalar_type(), {shape.total, shape.heads * shape.head_dim});
  call.check("lse", lse, ScalarType::Float, {shape.heads, shape.total});
  if (need_dbias && !bias.has_value()) fail(call.op, ": need_dbias is set but bias is missing");
  const void *qkv_data = aligned(qkv), *dout_data = aligned(dout), *out_data = aligned(out);
  const Current current(call.device);
  Tensor dqkv = call.make({shape.total, 3, shape.heads, shape.head_dim}, qkv.scalar_type());
  Tensor delta = call.make({shape.heads, shape.total}, ScalarType::Float);
  std::vector<int64_t> sizes{0}, square{0};
  if (need_dbias) {
    sizes = {bias->size(0), bias->size(1), bias->size(2), bias->size(3)};
    square = {shape.batch, shape.heads, shape.max_seqlen, shape.max_seqlen};
  }
  Tensor dbias = call.make(sizes, ScalarType::Float), dscores = call.make(square, ScalarType::Float);
  Tensor dq = call.make({attention_bwd_workspace(current.queue, shape, deterministic)}, ScalarType::Float);
  attention_bwd(current.queue, shape, call.format("qkv", qkv), dout_data, qkv_data, out_data,
                static_cast<const float*>(lse.const_data_ptr()), data(dqkv), floats(delta), floats(dbias),
                sizes.data(), floats(dscores), floats(dq));
  return {dqkv, dbias};
}

#ifdef FASTBERT_CUTLASS

// Of the product with the activation in its epilogue: the last dimension of `rows` goes over to `inner`.
FfnShape check_ffn(const Call& call, const char* name, const Tensor& rows, int64_t inner) {
  const int64_t depth = rows.size(1);
  if (depth == 0 || depth % 8 != 0 || inner % 8 != 0)
    fail(call.op, ": ", name, " has shape ", shape_text(rows), " and w1 has ", inner,
         " rows; the CUDA kernel takes multiples of 8 for the last dimension and for the rows of w1");
  constexpr int64_t kMost = 1 << 30;
  if (rows.size(0) > kMost || depth > kMost || inner > kMost)
    fail(call.op, ": ", name, " has shape ", shape_text(rows), " and w1 has ", inner, " rows, at most ", kMost,
         " are allowed");
  return {static_cast<int>(rows.size(0)), static_cast<int>(depth), static_cast<int>(inner)};
}

Format check_ffn_weights(const Call& call, const Tensor& x, const Tensor& w1, const Tensor& w2) {
  const ScalarType type = x.scalar_type();
  if (type != ScalarType::BFloat16 && type != ScalarType::Half)
    fail(call.op, ": x is ", dtype_text(type), "; the CUDA kernel takes bfloat16 and float16");
  call.check("x", x, type, {-1, -1});
  call.check("w1", w1, type, {-1, x.size(1)});
  call.check("w2", w2, type, {-1, w1.size(0)});
  return call.format("x", x);
}

// The products without an epilogue of their own belong to the vendor's library.
Tensor multiply(const Tensor& a, const Tensor& b) { return torch::stable::matmul(a, b); }
Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

std::tuple<Tensor, Tensor> ffn_fwd_op(Tensor x, Tensor w1, Tensor b1, Tensor w2, bool save) {
  const Call call(FASTBERT_OP("ffn_fwd"), x);
  const Format format = check_ffn_weights(call, x, w1, w2);
  const FfnShape shape = check_ffn(call, "x", x, w1.size(0));
  call.check("b1", b1, x.scalar_type(), {shape.inner});
  const void *x_data = aligned(x), *w1_data = aligned(w1), *b1_data = aligned(b1);
  const Current current(call.device);
  Tensor act = call.make({shape.rows, shape.inner}, x.scalar_type());
  Tensor pre = save ? call.make({shape.rows, shape.inner}, x.scalar_type()) : call.make({0}, x.scalar_type());
  ffn_fwd(current.queue, shape, format, x_data, w1_data, b1_data, data(pre), data(act));
  return {multiply(act, transposed(w2)), pre};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ffn_bwd_op(Tensor dy, Tensor x, Tensor pre, Tensor w1, Tensor w2,
                                                      bool need_dx, bool need_dw1, bool need_db1, bool need_dw2) {
  const Call call(FASTBERT_OP("ffn_bwd"), x);
  const Format format = check_ffn_weights(call, x, w1, w2);
  const ScalarType type = x.scalar_type();
  call.check("dy", dy, type, {x.size(0), w2.size(0)});
  const FfnShape shape = check_ffn(call, "dy", dy, w1.size(0));
  call.check("pre", pre, type, {shape.rows, shape.inner});
  const void *dy_data = aligned(dy), *w2_data = aligned(w2), *pre_data = aligned(pre);
  const Current current(call.device);
  Tensor dpre = call.make({shape.rows, shape.inner}, type), act = call.make({shape.rows, shape.inner}, type);
  const auto none = [&] { return call.make({0}, type); };
  Tensor db1 = need_db1 ? call.make({shape.inner}, type) : none();
  Tensor workspace = call.make({ffn_bwd_workspace(shape)}, ScalarType::Float);
  ffn_bwd(current.queue, shape, format, dy_data, w2_data, pre_data, data(dpre), data(act), data(db1),
          floats(workspace));
  return {need_dx ? multiply(dpre, w1) : none(), need_dw1 ? multiply(transposed(dpre), x) : none(), db1,
          need_dw2 ? multiply(transposed(dy), act) : none()};
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastbert, m) {
  m.def(FASTBERT_OP("layernorm_fwd")
        "(Tensor x, Tensor? x_bias, Tensor? residual, Tensor weight, Tensor bias, float eps, float dropout_p, "
        "Tensor? seed, bool save) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(FASTBERT_OP("layernorm_bwd")
        "(Tensor dy, Tensor z, Tensor weight, Tensor mean, Tensor rstd, float dropout_p, Tensor? seed, "
        "bool need_x_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(FASTBERT_OP("attention_fwd")
        "(Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, float scale, float dropout_p, Tensor? seed, Tensor? bias, "
        "bool deterministic) -> (Tensor, Tensor)");
  m.def(FASTBERT_OP("attention_bwd")
        "(Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens, SymInt max_seqlen, float scale, "
        "float dropout_p, Tensor? seed, Tensor? bias, bool need_dbias, bool deterministic) -> (Tensor, Tensor)");
#ifdef FASTBERT_CUTLASS
  m.def(FASTBERT_OP("ffn_fwd") "(Tensor x, Tensor w1, Tensor b1, Tensor w2, bool save) -> (Tensor, Tensor)");
  m.def(FASTBERT_OP("ffn_bwd")
        "(Tensor dy, Tensor x, Tensor pre, Tensor w1, Tensor w2, bool need_dx, bool need_dw1, bool need_db1, "
        "bool need_dw2) -> (Tensor, Tensor, Tensor, Tensor)");
#endif
}

FASTBERT_IMPL(FASTBERT_KEY, m) {
  m.impl(FASTBERT_OP("layernorm_fwd"), TORCH_BOX(&layernorm_fwd_op));
  m.impl(FASTBERT_OP("layernorm_bwd"), TORCH_BOX(&layernorm_bwd_op));
  m.impl(FASTBERT_OP("attention_fwd"), TORCH_BOX(&attention_fwd_op));
  m.impl(FASTBERT_OP("attention_bwd"), TORCH_BOX(&attention_bwd_op));
#ifdef FASTBERT_CUTLASS
  m.impl(FASTBERT_OP("ffn_fwd"), TORCH_BOX(&ffn_fwd_op));
  m.impl(FASTBERT_OP("ffn_bwd"), TORCH_BOX(&ffn_bwd_op));
#endif
}

}  // namespace fastbert::cuda
