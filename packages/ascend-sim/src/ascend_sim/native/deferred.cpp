// SPDX-License-Identifier: Apache-2.0
#include "deferred.h"

extern "C" {  // of the Python that has loaded this library
int Py_IsInitialized(void) __attribute__((weak));
int PyGILState_Check(void) __attribute__((weak));
void* PyEval_SaveThread(void) __attribute__((weak));
void PyEval_RestoreThread(void*) __attribute__((weak));
}

namespace ascend_sim {

WithoutPython::WithoutPython() : thread_(nullptr) {
  if (Py_IsInitialized && Py_IsInitialized() && PyGILState_Check()) thread_ = PyEval_SaveThread();
}

WithoutPython::~WithoutPython() {
  if (thread_) PyEval_RestoreThread(thread_);
}

std::vector<int> arguments_of_results(const c10::FunctionSchema& schema) {
  std::vector<int> out;
  for (const auto& ret : schema.returns()) {
    int argument = -1;
    if (ret.alias_info() && ret.alias_info()->isWrite())
      for (size_t i = 0; i < schema.arguments().size(); ++i) {
        const auto* info = schema.arguments()[i].alias_info();
        if (info && info->isWrite() && info->beforeSets() == ret.alias_info()->beforeSets()) argument = static_cast<int>(i);
      }
    out.push_back(argument);
  }
  return out;
}

bool draws_without_generator(const std::string& name) {
  static const std::set<std::string> names = {"aten::native_dropout", "aten::dropout", "aten::dropout_", "aten::scaled_dot_product_attention"};
  return names.count(name) > 0;
}

void replace_kernels(const std::set<std::string>& but, const MakeKernel& make) {
  static std::vector<std::unique_ptr<torch::Library>> kept;
  std::map<std::string, torch::Library*> libraries;
  for (const char* space : {"aten", "npu", "c10d"}) {
    kept.push_back(std::make_unique<torch::Library>(torch::Library::IMPL, space, c10::DispatchKey::PrivateUse1, __FILE__, __LINE__));
    libraries[space] = kept.back().get();
  }
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    const auto library = libraries.find(name.name.substr(0, name.name.find("::")));
    const std::string full = name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
    if (library == libraries.end() || but.count(full)) continue;
    const auto op = dispatcher.findSchema(name);
    if (!op || !op->hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1) || op->hasTag(at::Tag::inplace_view)) continue;
    library->second->impl(full.c_str(), make(library->first, *op));
  }
}

}  // namespace ascend_sim
