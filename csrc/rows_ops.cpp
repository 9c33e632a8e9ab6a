// The torch side of layernorm, embedding and mlm_loss: schemas, argument checks, allocation.
#include "runtime.h"
#include "tensor.h"

namespace fastbert {
namespace {

// A row of `columns` values in fp32 or bf16.
Vector check_vector(const char* op, const char* name, const Tensor& t, int64_t columns) {
  const DType dtype = float_dtype(op, name, t);
  check(op, name, t, t.scalar_type(), {columns});
  return {t.const_data_ptr(), dtype};
}

RowsShape check_rows(const char* op, const char* name, const Tensor& t, double eps, double dropout_p,
                     const OptionalTensor& seed) {
  check(op, name, t, t.scalar_type(), {-1, -1});
  if (t.size(1) == 0) fail(op, ": ", name, " has shape ", shape_text(t), "; its last dimension must not be 0");
  return {t.size(0), t.size(1), eps, checked_dropout(op, dropout_p, seed), seed_value(dropout_p, seed)};
}

const int64_t* check_ids(const char* op, const char* name, const Tensor& ids, int64_t count, const char* table,
                         int64_t rows) {
  check(op, name, ids, ScalarType::Long, {count});
  const int64_t* id = static_cast<const int64_t*>(ids.const_data_ptr());
  for (int64_t i = 0; i < count; ++i)
    if (id[i] < 0 || id[i] >= rows)
      fail(op, ": ", name, " holds ", id[i], " at place ", i, ", which is out of range: ", table, " has ", rows,
           " rows");
  return id;
}

// The same for ids of which the first ones, whose number divides count, stand for all: they are repeated into `room`.
const int64_t* check_repeated_ids(const char* op, const char* name, const Tensor& ids, int64_t count, const char* table,
                                  int64_t rows, std::vector<int64_t>* room) {
  const int64_t period = ids.numel();
  if (period == 0 || period == count || count % period != 0) return check_ids(op, name, ids, count, table, rows);
  const int64_t* id = check_ids(op, name, ids, period, table, rows);
  room->resize(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) (*room)[i] = id[i % period];
  return room->data();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layernorm_fwd(Tensor x, OptionalTensor x_bias, OptionalTensor residual,
                                                         Tensor weight, Tensor bias, double eps, double dropout_p,
                                                         OptionalTensor seed, bool save) {
  const char* op = "layernorm_fwd_cpu";
  const Vector x_data{x.const_data_ptr(), float_dtype(op, "x", x)};
  const RowsShape shape = check_rows(op, "x", x, eps, dropout_p, seed);
  ScalarType type = x.scalar_type();
  Vector x_bias_data{}, residual_data{};
  if (x_bias.has_value()) x_bias_data = check_vector(op, "x_bias", *x_bias, shape.columns);
  if (residual.has_value()) {
    residual_data = {residual->const_data_ptr(), float_dtype(op, "residual", *residual)};
    check(op, "residual", *residual, residual->scalar_type(), {shape.rows, shape.columns});
    if (residual_data.dtype == DType::kFloat32) type = ScalarType::Float;
  }
  const Vector weight_data = check_vector(op, "weight", weight, shape.columns);
  const Vector bias_data = check_vector(op, "bias", bias, shape.columns);
  const bool changed = x_bias.has_value() || residual.has_value() || dropout_p > 0.0;
  Tensor y = new_tensor({shape.rows, shape.columns}, type);
  Tensor z = save && changed ? new_tensor({shape.rows, shape.columns}, type) : none(type);
  Tensor mean = new_tensor({save ? shape.rows : 0}, ScalarType::Float);
  Tensor rstd = new_tensor({save ? shape.rows : 0}, ScalarType::Float);
  kernels().layernorm_fwd(executor(), shape, x_data, x_bias_data, residual_data, weight_data, bias_data, data(y),
                          data(z), floats(mean), floats(rstd));
  return {y, z, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layernorm_bwd(Tensor dy, Tensor z, Tensor weight, Tensor mean,
                                                                 Tensor rstd, double dropout_p, OptionalTensor seed,
                                                                 bool need_x_bias) {
  const char* op = "layernorm_bwd_cpu";
  const DType dtype = float_dtype(op, "z", z);
  const RowsShape shape = check_rows(op, "z", z, 0.0, dropout_p, seed);
  const ScalarType type = z.scalar_type();
  check(op, "dy", dy, type, {shape.rows, shape.columns});
  const Vector weight_data = check_vector(op, "weight", weight, shape.columns);
  check(op, "mean", mean, ScalarType::Float, {shape.rows});
  check(op, "rstd", rstd, ScalarType::Float, {shape.rows});
  Tensor dz = new_tensor({shape.rows, shape.columns}, type);
  Tensor dx = dropout_p > 0.0 ? new_tensor({shape.rows, shape.columns}, type) : none(type);
  Tensor dweight = new_tensor({shape.columns}, weight.scalar_type());
  Tensor dbias = new_tensor({shape.columns}, weight.scalar_type());
  Tensor dx_bias = new_tensor({need_x_bias ? shape.columns : 0}, ScalarType::Float);
  kernels().layernorm_bwd(executor(), dtype, shape, dy.const_data_ptr(), z.const_data_ptr(), weight_data,
                          static_cast<const float*>(mean.const_data_ptr()),
                          static_cast<const float*>(rstd.const_data_ptr()), data(dz), data(dx), data(dweight),
                          data(dbias), floats(dx_bias));
  return {dz, dx, dweight, dbias, dx_bias};
}

// padding_idx matters to the backward alone, which learns of it from the arguments of the forward.
std::tuple<Tensor, Tensor, Tensor> embedding_fwd(Tensor input_ids, Tensor position_ids, Tensor token_type_ids,
                                                 Tensor word, Tensor position, Tensor token_type, Tensor weight,
                                                 Tensor bias, int64_t /*padding_idx*/, double eps, double dropout_p,
                                                 OptionalTensor seed, bool save) {
  const char* op = "embedding_fwd_cpu";
  const DType dtype = float_dtype(op, "word", word);
  RowsShape shape = check_rows(op, "word", word, eps, dropout_p, seed);
  shape.rows = input_ids.numel();
  const ScalarType type = word.scalar_type();
  check(op, "position", position, type, {-1, shape.columns});
  check(op, "token_type", token_type, type, {-1, shape.columns});
  const Vector weight_data = check_vector(op, "weight", weight, shape.columns);
  const Vector bias_data = check_vector(op, "bias", bias, shape.columns);
  std::vector<int64_t> positions, types;
  const int64_t* const ids[] = {
      check_ids(op, "input_ids", input_ids, shape.rows, "word", word.size(0)),
      check_repeated_ids(op, "position_ids", position_ids, shape.rows, "position", position.size(0), &positions),
      check_repeated_ids(op, "token_type_ids", token_type_ids, shape.rows, "token_type", token_type.size(0), &types),
  };
  const void* const tables[] = {word.const_data_ptr(), position.const_data_ptr(), token_type.const_data_ptr()};
  Tensor y = new_tensor({shape.rows, shape.columns}, type);
  Tensor xhat = save ? new_tensor({shape.rows, shape.columns}, type) : none(type);
  Tensor rstd = new_tensor({save ? shape.rows : 0}, ScalarType::Float);
  kernels().embedding_fwd(executor(), dtype, shape, ids, tables, weight_data, bias_data, data(y), data(xhat),
                          floats(rstd));
  return {y, xhat, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> embedding_bwd(Tensor dy, Tensor xhat, Tensor rstd, Tensor input_ids,
                                                                 Tensor position_ids, Tensor token_type_ids,
                                                                 Tensor weight, int64_t num_words,
                                                                 int64_t num_positions, int64_t num_types,
                                                                 int64_t padding_idx, double dropout_p,
                                                                 OptionalTensor seed) {
  const char* op = "embedding_bwd_cpu";
  const DType dtype = float_dtype(op, "dy", dy);
  const RowsShape shape = check_rows(op, "dy", dy, 0.0, dropout_p, seed);
  const ScalarType type = dy.scalar_type();
  check(op, "xhat", xhat, type, {shape.rows, shape.columns});
  check(op, "rstd", rstd, ScalarType::Float, {shape.rows});
  const Vector weight_data = check_vector(op, "weight", weight, shape.columns);
  const int64_t sizes[] = {num_words, num_positions, num_types};
  const char* const size_names[] = {"num_words", "num_positions", "num_types"};
  for (int i = 0; i < 3; ++i)
    if (sizes[i] < 0) fail(op, ": ", size_names[i], " is ", sizes[i], "; it must not be negative");
  const int64_t* const ids[] = {
      check_ids(op, "input_ids", input_ids, shape.rows, "word", num_words),
      check_ids(op, "position_ids", position_ids, shape.rows, "position", num_positions),
      check_ids(op, "token_type_ids", token_type_ids, shape.rows, "token_type", num_types),
  };
  Tensor dword = new_tensor({num_words, shape.columns}, type);
  Tensor dposition = new_tensor({num_positions, shape.columns}, type);
  Tensor dtoken_type = new_tensor({num_types, shape.columns}, type);
  Tensor dweight = new_tensor({shape.columns}, weight.scalar_type());
  Tensor dbias = new_tensor({shape.columns}, weight.scalar_type());
  Tensor workspace = new_tensor({shape.rows, shape.columns}, ScalarType::Float);
  void* const tables[] = {data(dword), data(dposition), data(dtoken_type)};
  kernels().embedding_bwd(executor(), dtype, shape, dy.const_data_ptr(), xhat.const_data_ptr(),
                          static_cast<const float*>(rstd.const_data_ptr()), ids, weight_data, sizes, padding_idx,
                          tables, data(dweight), data(dbias), floats(workspace));
  return {dword, dposition, dtoken_type, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mlm_loss_fwd(Tensor h, Tensor labels, Tensor weight, OptionalTensor bias,
                                                        int64_t ignore_index, double label_smoothing, bool need_dh,
                                                        bool need_dweight, bool need_dbias) {
  const char* op = "mlm_loss_fwd_cpu";
  const DType dtype = float_dtype(op, "h", h);
  const ScalarType type = h.scalar_type();
  check(op, "h", h, type, {-1, -1});
  check(op, "weight", weight, type, {-1, h.size(1)});
  MlmLossShape shape{h.size(0), h.size(1), weight.size(0), ignore_index, label_smoothing, 0};
  if (shape.columns == 0 || shape.vocabulary == 0)
    fail(op, ": weight has shape ", shape_text(weight), "; neither dimension may be 0");
  if (bias.has_value()) check(op, "bias", *bias, type, {shape.vocabulary});
  if (!(label_smoothing >= 0.0 && label_smoothing <= 1.0))
    fail(op, ": label_smoothing is ", label_smoothing, "; it must be between 0 and 1");
  check(op, "labels", labels, ScalarType::Long, {shape.rows});
  const int64_t* label = static_cast<const int64_t*>(labels.const_data_ptr());
  for (int64_t i = 0; i < shape.rows; ++i) {
    if (label[i] == ignore_index) continue;
    if (label[i] < 0 || label[i] >= shape.vocabulary)
      fail(op, ": labels holds ", label[i], " at place ", i, ", which is out of range: weight has ", shape.vocabulary,
           " rows, and ignore_index is ", ignore_index);
    ++shape.labelled;
  }
  Tensor loss = new_tensor({}, ScalarType::Float);
  if (need_dbias && !bias.has_value()) fail(op, ": need_dbias is set but bias is missing");
  Tensor dh = need_dh ? new_tensor({shape.rows, shape.columns}, type) : none(type);
  Tensor dweight = need_dweight ? new_tensor({shape.vocabulary, shape.columns}, type) : none(type);
  Tensor dbias = need_dbias ? new_tensor({shape.vocabulary}, type) : none(type);
  const int64_t chunk = mlm_loss_chunk(shape.labelled, shape.vocabulary);
  const bool sums_apart = need_dweight && dtype == DType::kBFloat16 && shape.labelled > chunk;
  Tensor sums = new_tensor({sums_apart ? dweight.numel() : 0}, ScalarType::Float);
  *floats(loss) = static_cast<float>(kernels().mlm_loss(
      executor(), dtype, shape, h.const_data_ptr(), label, weight.const_data_ptr(),
      bias.has_value() ? bias->const_data_ptr() : nullptr, data(dh), data(dweight), data(dbias), floats(sums)));
  return {loss, dh, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastbert, m) {
  m.def(
      "layernorm_fwd_cpu(Tensor x, Tensor? x_bias, Tensor? residual, Tensor weight, Tensor bias, float eps, "
      "float dropout_p, Tensor? seed, bool save) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "layernorm_bwd_cpu(Tensor dy, Tensor z, Tensor weight, Tensor mean, Tensor rstd, float dropout_p, Tensor? seed, "
      "bool need_x_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "embedding_fwd_cpu(Tensor input_ids, Tensor position_ids, Tensor token_type_ids, Tensor word, Tensor position, "
      "Tensor token_type, Tensor weight, Tensor bias, int padding_idx, float eps, float dropout_p, Tensor? seed, "
      "bool save) -> (Tensor, Tensor, Tensor)");
  m.def(
      "embedding_bwd_cpu(Tensor dy, Tensor xhat, Tensor rstd, Tensor input_ids, Tensor position_ids, "
      "Tensor token_type_ids, Tensor weight, int num_words, int num_positions, int num_types, int padding_idx, "
      "float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "mlm_loss_fwd_cpu(Tensor h, Tensor labels, Tensor weight, Tensor? bias, int ignore_index, float label_smoothing, "
      "bool need_dh, bool need_dweight, bool need_dbias) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastbert, CPU, m) {
  m.impl("layernorm_fwd_cpu", TORCH_BOX(&layernorm_fwd));
  m.impl("layernorm_bwd_cpu", TORCH_BOX(&layernorm_bwd));
  m.impl("embedding_fwd_cpu", TORCH_BOX(&embedding_fwd));
  m.impl("embedding_bwd_cpu", TORCH_BOX(&embedding_bwd));
  m.impl("mlm_loss_fwd_cpu", TORCH_BOX(&mlm_loss_fwd));
}

}  // namespace fastbert
