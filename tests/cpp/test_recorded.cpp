// Calls of the operators that tests/recorded.py wrote down on another machine: the same bits here.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <filesystem>
#include <fstream>

#include "build_info.h"
#include "expect.h"
#include "random_lists.h"

namespace {

// What Python wrote, as the operators take it: their lists have types.
c10::IValue argument(const c10::IValue& given, const c10::Argument& formal) {
  const auto type = formal.type()->cast<c10::ListType>();
  if (!type) {
    return given;
  }
  c10::impl::GenericList list(type->getElementType());
  for (const c10::IValue& item : given.toListRef()) {
    list.push_back(item);
  }
  return list;
}

void collect(const c10::IValue& value, std::vector<at::Tensor>* tensors) {
  if (value.isTensor()) {
    tensors->push_back(value.toTensor());
  } else if (value.isList() || value.isTuple()) {
    for (const c10::IValue& item : value.isList() ? value.toListRef() : value.toTupleRef().elements().vec()) {
      collect(item, tensors);
    }
  }
}

void expect_same(const std::string& name, const c10::IValue& before, const c10::IValue& after) {
  const c10::OperatorHandle op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
  torch::jit::Stack stack;
  std::vector<at::Tensor> found, expected;
  for (const c10::IValue& given : before.toTupleRef().elements()) {
    const c10::Argument& formal = op.schema().arguments()[stack.size()];
    stack.push_back(argument(given, formal));
    if (formal.alias_info() != nullptr && formal.alias_info()->isWrite()) {
      collect(stack.back(), &found);
    }
  }
  op.callBoxed(stack);
  for (const c10::IValue& result : stack) {
    collect(result, &found);
  }
  collect(after, &expected);
  EXPECT(found.size() == expected.size(), name);
  for (size_t i = 0; i < found.size() && i < expected.size(); ++i) {
    EXPECT(fused_reg::same_bits(found[i], expected[i]), name, i, found[i].sizes(), found[i].scalar_type());
  }
}

}  // namespace

int main(int, char** argv) {
  EXPECT(!fused_reg::build_info()["cpu_capability"].empty());  // a linker leaves out a library that nothing refers to
  std::vector<char> bytes(std::filesystem::file_size(argv[1]));
  std::ifstream(argv[1], std::ios::binary).read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  const c10::IValue calls = torch::jit::pickle_load(bytes);
  for (const c10::IValue& call : calls.toListRef()) {
    const auto& elements = call.toTupleRef().elements();
    expect_same(elements[0].toStringRef(), elements[1], elements[2]);
  }
  return fused_reg::testing::report();
}
