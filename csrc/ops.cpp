// The torch side of linear, ffn, attention and whole layers: schemas, argument checks, allocation.
#include <cmath>

#include "runtime.h"
#include "tensor.h"

namespace fastbert {
namespace {

using TensorList = std::vector<Tensor>;

constexpr size_t kMaxWeights = 4;

struct LinearArguments {
  DType dtype;
  int64_t m, k, total = 0;
  std::vector<int64_t> n;
  std::vector<const void*> weight;
};

LinearArguments check_linear(const char* op, const Tensor& x, const TensorList& weights) {
  LinearArguments a;
  a.dtype = float_dtype(op, "x", x);
  check(op, "x", x, x.scalar_type(), {-1, -1});
  a.m = x.size(0), a.k = x.size(1);
  if (weights.empty() || weights.size() > kMaxWeights)
    fail(op, ": weights has ", weights.size(), " entries; 1 to ", kMaxWeights, " are allowed");
  for (const Tensor& w : weights) {
    check(op, "weights", w, x.scalar_type(), {-1, a.k});
    a.n.push_back(w.size(0));
    a.total += w.size(0);
    a.weight.push_back(w.const_data_ptr());
  }
  return a;
}

Tensor linear_fwd(Tensor x, TensorList weights, TensorList biases) {
  const char* op = "linear_fwd_cpu";
  const LinearArguments a = check_linear(op, x, weights);
  if (!biases.empty() && biases.size() != weights.size())
    fail(op, ": biases has ", biases.size(), " entries; it must have none or one per weight (", weights.size(), ")");
  std::vector<const void*> bias;
  for (size_t i = 0; i < biases.size(); ++i) {
    check(op, "biases", biases[i], x.scalar_type(), {a.n[i]});
    bias.push_back(biases[i].const_data_ptr());
  }
  Tensor y = new_tensor({a.m, a.total}, x.scalar_type());
  if (y.numel() > 0)
    kernels().linear_fwd(executor(), a.dtype, a.m, a.k, x.const_data_ptr(), static_cast<int>(a.n.size()), a.n.data(),
                         a.weight.data(), bias.empty() ? nullptr : bias.data(), y.mutable_data_ptr());
  return y;
}

std::tuple<Tensor, Tensor, Tensor> linear_bwd(Tensor dy, Tensor x, TensorList weights, bool need_dx, bool need_dw,
                                              bool need_db) {
  const char* op = "linear_bwd_cpu";
  const LinearArguments a = check_linear(op, x, weights);
  const ScalarType type = x.scalar_type();
  check(op, "dy", dy, type, {a.m, a.total});
  Tensor dx = need_dx ? new_tensor({a.m, a.k}, type) : none(type);
  Tensor dw = need_dw ? new_tensor({a.total, a.k}, type) : none(type);
  Tensor db = need_db ? new_tensor({a.total}, type) : none(type);
  kernels().linear_bwd(executor(), a.dtype, a.m, a.k, dy.const_data_ptr(), x.const_data_ptr(),
                       static_cast<int>(a.n.size()), a.n.data(), a.weight.data(), data(dx), data(dw),
                       data(db));
  return {dx, dw, db};
}

struct FfnArguments {
  DType dtype;
  int64_t m, k, n1, n2;
};

FfnArguments check_ffn(const char* op, const Tensor& x, const Tensor& w1, const Tensor& w2) {
  FfnArguments a;
  a.dtype = float_dtype(op, "x", x);
  check(op, "x", x, x.scalar_type(), {-1, -1});
  a.m = x.size(0), a.k = x.size(1);
  check(op, "w1", w1, x.scalar_type(), {-1, a.k});
  a.n1 = w1.size(0);
  check(op, "w2", w2, x.scalar_type(), {-1, a.n1});
  a.n2 = w2.size(0);
  return a;
}

std::tuple<Tensor, Tensor> ffn_fwd(Tensor x, Tensor w1, Tensor b1, Tensor w2, bool save) {
  const char* op = "ffn_fwd_cpu";
  const FfnArguments a = check_ffn(op, x, w1, w2);
  const ScalarType type = x.scalar_type();
  check(op, "b1", b1, type, {a.n1});
  Tensor y = new_tensor({a.m, a.n2}, type);
  Tensor pre = save ? new_tensor({a.m, a.n1}, type) : none(type);
  if (y.numel() > 0)
    kernels().ffn_fwd(executor(), a.dtype, a.m, a.k, a.n1, a.n2, x.const_data_ptr(), w1.const_data_ptr(),
                      b1.const_data_ptr(), w2.const_data_ptr(), y.mutable_data_ptr(),
                      save ? pre.mutable_data_ptr() : nullptr);
  else if (pre.numel() > 0)  // w2 has no rows; the backward reads pre all the same
    torch::stable::zero_(pre);
  return {y, pre};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ffn_bwd(Tensor dy, Tensor x, Tensor pre, Tensor w1, Tensor w2, bool need_dx,
                                                   bool need_dw1, bool need_db1, bool need_dw2) {
  const char* op = "ffn_bwd_cpu";
  const FfnArguments a = check_ffn(op, x, w1, w2);
  const ScalarType type = x.scalar_type();
  check(op, "dy", dy, type, {a.m, a.n2});
  check(op, "pre", pre, type, {a.m, a.n1});
  Tensor dx = need_dx ? new_tensor({a.m, a.k}, type) : none(type);
  Tensor dw1 = need_dw1 ? new_tensor({a.n1, a.k}, type) : none(type);
  Tensor db1 = need_db1 ? new_tensor({a.n1}, type) : none(type);
  Tensor dw2 = need_dw2 ? new_tensor({a.n2, a.n1}, type) : none(type);
  Tensor dpre = new_tensor({a.m, a.n1}, ScalarType::Float);
  kernels().ffn_bwd(executor(), a.dtype, a.m, a.k, a.n1, a.n2, dy.const_data_ptr(), x.const_data_ptr(),
                    pre.const_data_ptr(), w1.const_data_ptr(), w2.const_data_ptr(), data(dx), data(dw1),
                    data(db1), data(dw2), static_cast<float*>(dpre.mutable_data_ptr()));
  return {dx, dw1, db1, dw2};
}

// Takes a shape whose total, heads and head_dim are set; `tokens` names the tensor that has `total` of them.
void check_sequences(const char* op, const char* tokens, const Tensor& cu_seqlens, int64_t max_seqlen,
                     const OptionalTensor& bias, AttentionShape* shape) {
  AttentionShape& a = *shape;
  a.max_seqlen = max_seqlen;
  if (a.head_dim <= 0 || a.head_dim % 8 != 0)
    fail(op, ": ", tokens, " has head_dim ", a.head_dim, "; it must be a positive multiple of 8");
  check(op, "cu_seqlens", cu_seqlens, ScalarType::Int, {-1});
  if (cu_seqlens.numel() < 1) fail(op, ": cu_seqlens is empty; it must hold batch + 1 offsets");
  a.batch = cu_seqlens.numel() - 1;
  a.cu_seqlens = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  if (a.cu_seqlens[0] != 0) fail(op, ": cu_seqlens begins with ", a.cu_seqlens[0], "; it must begin with 0");
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t length = static_cast<int64_t>(a.cu_seqlens[b + 1]) - a.cu_seqlens[b];
    if (length < 0) fail(op, ": cu_seqlens falls from ", a.cu_seqlens[b], " to ", a.cu_seqlens[b + 1], " at ", b + 1);
    if (length > max_seqlen)
      fail(op, ": cu_seqlens holds a sequence of ", length, " tokens; max_seqlen is ", max_seqlen);
  }
  if (a.cu_seqlens[a.batch] != a.total)
    fail(op, ": cu_seqlens ends with ", a.cu_seqlens[a.batch], "; ", tokens, " has ", a.total, " tokens");
  if (bias.has_value()) {
    check(op, "bias", *bias, ScalarType::Float, {-1, -1, -1, -1});
    check_bias(op, *bias, a.batch, a.heads, max_seqlen, a.bias_strides);
    a.bias = static_cast<const float*>(bias->const_data_ptr());
  }
}

AttentionShape check_attention(const char* op, const Tensor& qkv, const Tensor& cu_seqlens, int64_t max_seqlen,
                               double scale, double dropout_p, const OptionalTensor& seed, const OptionalTensor& bias) {
  check(op, "qkv", qkv, qkv.scalar_type(), {-1, 3, -1, -1});
  AttentionShape a{};
  a.total = qkv.size(0), a.heads = qkv.size(2), a.head_dim = qkv.size(3);
  if (a.heads <= 0) fail(op, ": qkv has shape ", shape_text(qkv), "; it must have at least one head");
  check_sequences(op, "qkv", cu_seqlens, max_seqlen, bias, &a);
  a.scale = static_cast<float>(scale);
  a.dropout_p = checked_dropout(op, dropout_p, seed);
  a.seed = seed_value(dropout_p, seed);
  return a;
}

std::tuple<Tensor, Tensor> attention_fwd(Tensor qkv, Tensor cu_seqlens, int64_t max_seqlen, double scale,
                                         double dropout_p, OptionalTensor seed, OptionalTensor bias) {
  const char* op = "attention_fwd_cpu";
  const DType dtype = float_dtype(op, "qkv", qkv);
  const AttentionShape a = check_attention(op, qkv, cu_seqlens, max_seqlen, scale, dropout_p, seed, bias);
  Tensor out = new_tensor({a.total, a.heads * a.head_dim}, qkv.scalar_type());
  Tensor lse = new_tensor({a.heads, a.total}, ScalarType::Float);
  kernels().attention_fwd(executor(), dtype, a, qkv.const_data_ptr(), out.mutable_data_ptr(),
                          static_cast<float*>(lse.mutable_data_ptr()));
  return {out, lse};
}

std::tuple<Tensor, Tensor> attention_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens,
                                         int64_t max_seqlen, double scale, double dropout_p, OptionalTensor seed,
                                         OptionalTensor bias, bool need_dbias) {
  const char* op = "attention_bwd_cpu";
  const DType dtype = float_dtype(op, "qkv", qkv);
  const AttentionShape a = check_attention(op, qkv, cu_seqlens, max_seqlen, scale, dropout_p, seed, bias);
  check(op, "dout", dout, qkv.scalar_type(), {a.total, a.heads * a.head_dim});
  check(op, "out", out, qkv.scalar_type(), {a.total, a.heads * a.head_dim});
  check(op, "lse", lse, ScalarType::Float, {a.heads, a.total});
  Tensor dqkv = new_tensor({a.total, 3, a.heads, a.head_dim}, qkv.scalar_type());
  Tensor dbias = none(ScalarType::Float), rest = none(ScalarType::Float);
  if (need_dbias) {
    if (!bias.has_value()) fail(op, ": need_dbias is set but bias is missing");
    const bool shared = bias->size(0) < a.batch || bias->size(1) < a.heads || bias->size(2) < a.max_seqlen;
    const auto zeros = [&] {
      Tensor t = new_tensor({bias->size(0), bias->size(1), bias->size(2), bias->size(3)}, ScalarType::Float);
      return torch::stable::zero_(t);
    };
    dbias = zeros();
    if (shared) rest = zeros();
  }
  float *const dbias_data = floats(dbias), *const rest_data = floats(rest);
  kernels().attention_bwd(executor(), dtype, a, dout.const_data_ptr(), qkv.const_data_ptr(), out.const_data_ptr(),
                          static_cast<const float*>(lse.const_data_ptr()), dqkv.mutable_data_ptr(), dbias_data, rest_data);
  for (int64_t i = 0; i < rest.numel(); ++i)
    if (std::isfinite(rest_data[i])) dbias_data[i] += rest_data[i];  // else dbias is infinite or NaN itself
  return {dqkv, dbias};
}

Tensor layers_fwd(Tensor x, Tensor cu_seqlens, int64_t max_seqlen, int64_t heads, double scale, OptionalTensor bias,
                  TensorList weights, double eps1, double eps2) {
  const char* op = "layers_fwd_cpu";
  constexpr size_t kEach = 16;
  const DType dtype = float_dtype(op, "x", x);
  const ScalarType type = x.scalar_type();
  check(op, "x", x, type, {-1, -1});
  if (weights.empty() || weights.size() % kEach != 0)
    fail(op, ": weights has ", weights.size(), " entries; it must have, for each layer, weight and bias of query, key, "
         "value, attention output, first norm, up, down, second norm");
  if (heads <= 0) fail(op, ": heads is ", heads, "; it must be positive");
  LayerShape shape{};
  shape.hidden = x.size(1), shape.eps1 = eps1, shape.eps2 = eps2;
  if (shape.hidden == 0) fail(op, ": x has shape ", shape_text(x), "; its last dimension must not be 0");
  const auto first_dimension = [&](const char* name, const Tensor& t) {
    check(op, name, t, type, {-1, -1});
    return t.size(0);
  };
  const int64_t hidden = shape.hidden, inner = first_dimension("query.weight", weights[0]);
  if (inner % heads != 0) fail(op, ": query.weight has ", inner, " rows; it must be a multiple of heads = ", heads);
  const int64_t wide = shape.intermediate = first_dimension("up.weight", weights[10]);
  std::vector<LayerWeights> layers(weights.size() / kEach);
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    const auto data_of = [&](int i, const char* name, const std::vector<int64_t>& dimensions) {
      const Tensor& weight = weights[layer * kEach + i];
      check(op, name, weight, type, dimensions);
      return weight.const_data_ptr();
    };
    LayerWeights& w = layers[layer];
    w.qkv[0] = data_of(0, "query.weight", {inner, hidden}), w.qkv_bias[0] = data_of(1, "query.bias", {inner});
    w.qkv[1] = data_of(2, "key.weight", {inner, hidden}), w.qkv_bias[1] = data_of(3, "key.bias", {inner});
    w.qkv[2] = data_of(4, "value.weight", {inner, hidden}), w.qkv_bias[2] = data_of(5, "value.bias", {inner});
    w.out = data_of(6, "attention_out.weight", {hidden, inner}), w.out_bias = data_of(7, "attention_out.bias", {hidden});
    w.norm1 = data_of(8, "attention_norm.weight", {hidden}), w.norm1_bias = data_of(9, "attention_norm.bias", {hidden});
    w.up = data_of(10, "up.weight", {wide, hidden}), w.up_bias = data_of(11, "up.bias", {wide});
    w.down = data_of(12, "down.weight", {hidden, wide}), w.down_bias = data_of(13, "down.bias", {hidden});
    w.norm2 = data_of(14, "norm.weight", {hidden}), w.norm2_bias = data_of(15, "norm.bias", {hidden});
  }
  AttentionShape& attention = shape.attention;
  attention.total = x.size(0), attention.heads = heads, attention.head_dim = inner / heads;
  attention.scale = static_cast<float>(scale);
  check_sequences(op, "x", cu_seqlens, max_seqlen, bias, &attention);
  Tensor y = new_tensor({attention.total, hidden}, type);
  if (y.numel() > 0)
    kernels().layers_fwd(executor(), dtype, shape, static_cast<int>(layers.size()), layers.data(), x.const_data_ptr(),
                         y.mutable_data_ptr());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastbert, m) {
  m.def("linear_fwd_cpu(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor");
  m.def(
      "linear_bwd_cpu(Tensor dy, Tensor x, Tensor[] weights, bool need_dx, bool need_dw, bool need_db) -> "
      "(Tensor, Tensor, Tensor)");
  m.def("ffn_fwd_cpu(Tensor x, Tensor w1, Tensor b1, Tensor w2, bool save) -> (Tensor, Tensor)");
  m.def(
      "ffn_bwd_cpu(Tensor dy, Tensor x, Tensor pre, Tensor w1, Tensor w2, bool need_dx, bool need_dw1, bool need_db1, "
      "bool need_dw2) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "attention_fwd_cpu(Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, float scale, float dropout_p, Tensor? seed, "
      "Tensor? bias) -> (Tensor, Tensor)");
  m.def(
      "attention_bwd_cpu(Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens, SymInt max_seqlen, "
      "float scale, float dropout_p, Tensor? seed, Tensor? bias, bool need_dbias) -> (Tensor, Tensor)");
  m.def(
      "layers_fwd_cpu(Tensor x, Tensor cu_seqlens, SymInt max_seqlen, int heads, float scale, Tensor? bias, "
      "Tensor[] weights, float eps1, float eps2) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastbert, CPU, m) {
  m.impl("linear_fwd_cpu", TORCH_BOX(&linear_fwd));
  m.impl("linear_bwd_cpu", TORCH_BOX(&linear_bwd));
  m.impl("ffn_fwd_cpu", TORCH_BOX(&ffn_fwd));
  m.impl("ffn_bwd_cpu", TORCH_BOX(&ffn_bwd));
  m.impl("attention_fwd_cpu", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd_cpu", TORCH_BOX(&attention_bwd));
  m.impl("layers_fwd_cpu", TORCH_BOX(&layers_fwd));
}

}  // namespace fastbert
