// SPDX-License-Identifier: Apache-2.0
//
// npu_fused_infer_attention_score and _v2. Torch hands over a stack, from which the arguments are read by name, so that both operators share
// everything and an argument that is not simulated cannot be passed over.
#include <ATen/core/dispatch/Dispatcher.h>

#include <set>

#include "attention_arguments.h"

namespace ascend_sim {
namespace attention {
namespace {

using torch::jit::Stack;

// Of the logarithms of the sums; empty where they are not wanted.
std::vector<int64_t> sums_shape(const Layout& layout, const Sizes& query, int64_t heads, bool wanted) {
  if (!wanted) return {0};
  if (layout.packed) return {query.tokens, heads, 1};
  return {query.batch, heads, query.tokens, 1};
}

class AttentionKernel final : public c10::OperatorKernel {
 public:
  AttentionKernel(const c10::FunctionSchema& schema, Names names)
      : op_(schema.name().substr(5)), names_(std::move(names)), tally_(tally(schema.name())) {
    const std::set<std::string> read = {"query",
                                        "key",
                                        "value",
                                        "query_rope",
                                        "key_rope",
                                        "atten_mask",
                                        "block_table",
                                        "learnable_sink",
                                        "num_key_value_heads",
                                        "pre_tokens",
                                        "next_tokens",
                                        "input_layout",
                                        "sparse_mode",
                                        "inner_precise",
                                        "block_size",
                                        "workspace",
                                        "out",
                                        names_.query_lengths,
                                        names_.kv_lengths,
                                        names_.heads,
                                        names_.scale,
                                        names_.lse};
    for (const auto& argument : schema.arguments()) {
      index_[argument.name()] = static_cast<int>(index_.size());
      if (!read.count(argument.name())) others_.emplace_back(argument.name(), argument.default_value().value_or(IValue()));
    }
  }

  void operator()(const c10::OperatorHandle&, c10::DispatchKeySet, Stack* stack) {
    const size_t base = stack->size() - index_.size();
    const Arguments args(op_.c_str(), names_, index_, stack->data() + base);
    for (const auto& [name, value] : others_) {
      const IValue& given = args[name];
      const bool unset = given.isNone() || (given.isTensor() && !given.toTensor().defined()) ||
                         (given.isInt() && value.isInt() && given.toInt() == value.toInt());
      TORCH_CHECK(unset, op_, ": argument ", name, " is not simulated");
    }
    auto [out, lse] = run(args, given_results(args));
    stack->resize(base);
    stack->emplace_back(std::move(out));
    stack->emplace_back(std::move(lse));
  }

 private:
  // torch_npu/_op_plugin_docs.py: npu_fused_infer_attention_score: softmax(scale * query @ key^T + atten_mask) @ value; lse =
  // log(sum(exp(scores)))
  std::pair<at::Tensor, at::Tensor> run(const Arguments& args, const std::vector<at::Tensor>& results) const {
    const at::Tensor given = args.tensor("query");
    const Layout layout = layout_of(args);
    Call call;
    call.type = given.scalar_type();
    call.scale = static_cast<float>(args[names_.scale].toDouble());
    call.heads = args.integer(names_.heads);
    TORCH_CHECK(call.heads > 0, op_, ": ", names_.heads, " must be greater than 0, got ", call.heads);
    call.kv_heads = args.integer("num_key_value_heads") ? args.integer("num_key_value_heads") : call.heads;
    RULE(".head-multiple", call.kv_heads > 0 && call.heads % call.kv_heads == 0, op_, ": ", names_.heads,
         " must be a multiple of num_key_value_heads, got ", call.heads, " and ", call.kv_heads);
    const int64_t precise = args.integer("inner_precise");
    RULE(".inner-precise", precise >= 0 && precise <= 3, op_, ": inner_precise must be 0, 1, 2 or 3, got ", precise);
    const bool paged = !args["block_table"].isNone(), wants_lse = args[names_.lse].toBool();
    Sizes query, kv;
    read_operands(args, call, layout, query, kv, paged);
    read_requests(args, call, layout, query, kv, paged);
    read_window(args, call, layout, query, kv);
    read_sink(args, call, layout);
    check_limits(args, call, layout, query, paged);

    Sizes result = query;
    result.size = call.value.size;
    const auto wanted = [&](size_t i, at::IntArrayRef shape, at::ScalarType type) {
      if (results.empty()) return at::empty(shape, given.options().dtype(type));
      TORCH_CHECK(results[i].sizes() == shape && results[i].scalar_type() == type && results[i].is_contiguous(), op_, ": out[", i, "] must be contiguous, ",
                  type, " and of shape ", shape, ", got ", results[i].scalar_type(), " of shape ", results[i].sizes());
      return results[i];
    };
    at::Tensor out = wanted(0, shape_of(layout.out, result), call.type);
    call.out = {out, out.data_ptr(), result.size, axes_of(layout.out, result)};
    at::Tensor lse = wanted(1, sums_shape(layout, query, query.heads, wants_lse), at::kFloat);
    if (wants_lse) {
      call.lse = static_cast<float*>(lse.data_ptr());
      call.lse_axes = axes_of(layout.packed ? "TND" : "BNSD", {query.batch, query.tokens, query.heads, 1});
    }
    blank_padding(call, query, out, lse);
    count_call(tally_, attend(call));
    return {out, lse};
  }

  // `out` of the form that writes into given tensors; none of the other form.
  std::vector<at::Tensor> given_results(const Arguments& args) const {
    if (!args.knows("out")) return {};
    const auto out = args["out"].toTensorVector();
    TORCH_CHECK(out.size() == 2, op_, ": out must be the result and the logarithms of the sums, got ", out.size(), " tensors");
    for (const at::Tensor& t : out) on_device(op_.c_str(), "out", t);
    const IValue& workspace = args["workspace"];
    if (workspace.isTensor() && workspace.toTensor().defined()) on_device(op_.c_str(), "workspace", workspace.toTensor());
    return out;
  }

  // Tokens after a request's length are computed by no request: zeros.
  static void blank_padding(const Call& call, const Sizes& query, const at::Tensor& out, const at::Tensor& lse) {
    int64_t tokens = 0;
    for (const Request& r : call.requests) tokens += r.query_length;
    if (tokens == query.batch * query.tokens) return;
    std::memset(out.data_ptr(), 0, out.nbytes());
    float* numbers = static_cast<float*>(lse.data_ptr());
    std::fill(numbers, numbers + lse.numel(), std::numeric_limits<float>::infinity());
  }

  std::string op_;
  Names names_;
  Tally& tally_;
  std::unordered_map<std::string, int> index_;
  std::vector<std::pair<std::string, IValue>> others_;
};

// The shapes of an operator's results, before it is called: what torch_npu's graphs reserve.
class InferOutput final : public c10::OperatorKernel {
 public:
  InferOutput(const c10::FunctionSchema& schema, std::string op, Names names) : op_(std::move(op)), names_(std::move(names)) {
    for (const auto& argument : schema.arguments()) index_[argument.name()] = static_cast<int>(index_.size());
  }

  void operator()(const c10::OperatorHandle&, c10::DispatchKeySet, Stack* stack) {
    const size_t base = stack->size() - index_.size();
    const Arguments args(op_.c_str(), names_, index_, stack->data() + base);
    const at::Tensor query = args.tensor("query"), value = args.tensor("value");
    const Layout layout = layout_of(args);
    const int64_t heads = args.integer(names_.heads), kv_heads = args.integer("num_key_value_heads") ? args.integer("num_key_value_heads") : heads;
    Sizes result = sizes_of(args, "query", query, layout.in, heads);
    if (args["block_table"].isNone()) result.size = sizes_of(args, "value", value, layout.in, kv_heads).size;
    else result.size = value.dim() == 3 ? value.size(2) / kv_heads : value.size(3);
    at::Tensor out = at::empty(shape_of(layout.out, result), query.options());
    at::Tensor sums = at::empty(sums_shape(layout, result, heads, args[names_.lse].toBool()), query.options().dtype(at::kFloat));
    stack->resize(base);
    stack->emplace_back(std::move(out));
    stack->emplace_back(std::move(sums));
  }

 private:
  std::string op_;
  Names names_;
  std::unordered_map<std::string, int> index_;
};

// Memory for the intermediate results of the largest call. Here there are none, so it is the smallest block of the device.
void max_workspace(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const size_t base = stack->size() - op.schema().arguments().size();
  const at::Tensor query = (*stack)[base].toTensor();
  on_device(op.schema().name().c_str() + 5, "query", query);
  at::Tensor out = at::empty({512}, query.options().dtype(at::kByte));
  stack->resize(base);
  stack->emplace_back(std::move(out));
}

c10::OperatorHandle found(const std::string& name, const char* overload) {
  auto op = c10::Dispatcher::singleton().findSchema({"npu::" + name, overload});
  TORCH_CHECK(op, "torch_npu has no operator npu::", name);
  return *op;
}

void add(torch::Library& npu, const std::string& name, const Names& names) {
  for (const char* overload : {"", "out"}) {
    const std::string full = *overload ? name + "." + overload : name;
    npu.impl(full.c_str(), torch::CppFunction::makeFromBoxedFunctor(std::make_unique<AttentionKernel>(found(name, overload).schema(), names)));
  }
  const std::string infer = "_" + name + "_infer_output", workspace = "_" + name + "_get_max_workspace";
  npu.impl(infer.c_str(), torch::CppFunction::makeFromBoxedFunctor(std::make_unique<InferOutput>(found(infer, "").schema(), name, names)));
  npu.impl(workspace.c_str(), torch::CppFunction::makeFromBoxedFunction<&max_workspace>());
}

}  // namespace
}  // namespace attention

void install_attention(torch::Library& npu) {
  attention::add(npu, "npu_fused_infer_attention_score",
                 {"actual_seq_lengths", "actual_seq_lengths_kv", "num_heads", "scale", "softmax_lse_flag"});
  attention::add(npu, "npu_fused_infer_attention_score_v2",
                 {"actual_seq_qlen", "actual_seq_kvlen", "num_query_heads", "softmax_scale", "return_softmax_lse"});
}

}  // namespace ascend_sim
