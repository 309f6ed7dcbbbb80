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
    auto [out, lse] = run(args);
    stack->resize(base);
    stack->emplace_back(std::move(out));
    stack->emplace_back(std::move(lse));
  }

 private:
  // torch_npu/_op_plugin_docs.py: npu_fused_infer_attention_score: softmax(scale * query @ key^T + atten_mask) @ value; lse =
  // log(sum(exp(scores)))
  std::pair<at::Tensor, at::Tensor> run(const Arguments& args) const {
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
    at::Tensor out = at::empty(shape_of(layout.out, result), given.options());
    call.out = {out, out.data_ptr(), result.size, axes_of(layout.out, result)};
    const std::vector<int64_t> lse_shape =
        layout.packed ? std::vector<int64_t>{query.tokens, query.heads, 1} : std::vector<int64_t>{query.batch, query.heads, query.tokens, 1};
    at::Tensor lse = at::empty(wants_lse ? lse_shape : std::vector<int64_t>{0}, given.options().dtype(at::kFloat));
    if (wants_lse) {
      call.lse = static_cast<float*>(lse.data_ptr());
      call.lse_axes = axes_of(layout.packed ? "TND" : "BNSD", {query.batch, query.tokens, query.heads, 1});
    }
    blank_padding(call, query, out, lse);
    count_call(tally_, attend(call));
    return {out, lse};
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

void add(torch::Library& npu, const char* name, Names names) {
  auto op = c10::Dispatcher::singleton().findSchema({std::string("npu::") + name, ""});
  TORCH_CHECK(op, "torch_npu has no operator npu::", name);
  npu.impl(name, torch::CppFunction::makeFromBoxedFunctor(std::make_unique<AttentionKernel>(op->schema(), std::move(names))));
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
