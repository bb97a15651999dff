// The Python module fused_reg._C: importing it registers the operators. It holds the build information; and the
// operators as functions that call the dispatcher at once, because torch.ops needs microseconds to box their arguments.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <vector>

#include "build_info.h"
#include "operators.h"

namespace fused_reg {

namespace {

// Tensors whose operators nobody overrides. Everything else, not a tensor too, is left to torch.ops.
struct PlainTensor {
  at::Tensor tensor;

  bool load(pybind11::handle x) {
    if (!THPVariable_CheckExact(x.ptr())) {
      return false;
    }
    tensor = THPVariable_Unpack(x.ptr());
    return true;
  }
  operator const at::Tensor&() const { return tensor; }
};

struct PlainOptionalTensor {
  OptionalTensor tensor;

  bool load(pybind11::handle x) {
    PlainTensor given;
    if (x.is_none() || !given.load(x)) {
      return x.is_none();
    }
    tensor = std::move(given.tensor);
    return true;
  }
  operator const OptionalTensor&() const { return tensor; }
};

// add(item) for those of a list or tuple, until it refuses one.
template <class Add>
bool load_items(pybind11::handle xs, const Add& add) {
  if (!PyList_Check(xs.ptr()) && !PyTuple_Check(xs.ptr())) {
    return false;
  }
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(xs.ptr()); ++i) {
    if (!add(PySequence_Fast_GET_ITEM(xs.ptr(), i))) {
      return false;
    }
  }
  return true;
}

struct PlainTensorList {
  std::vector<at::Tensor> tensors;

  bool load(pybind11::handle xs) {
    return !at::impl::torch_function_mode_enabled() && load_items(xs, [&](PyObject* x) {
      PlainTensor item;
      return item.load(x) && (tensors.push_back(std::move(item.tensor)), true);
    });
  }
  operator at::TensorList() const { return tensors; }
};

// A list of bools, as the dispatcher takes it.
struct BoolList {
  c10::List<bool> bools;

  bool load(pybind11::handle xs) {
    return load_items(xs, [&](PyObject* x) { return PyBool_Check(x) && (bools.push_back(x == Py_True), true); });
  }
  operator const c10::List<bool>&() const { return bools; }
};

}  // namespace

}  // namespace fused_reg

// All of them are loaded by their own member.
#define FUSED_REG_CASTER(Type)                                    \
  template <>                                                     \
  struct pybind11::detail::type_caster<Type> {                    \
    PYBIND11_TYPE_CASTER(Type, const_name(#Type));                \
    bool load(pybind11::handle x, bool) { return value.load(x); } \
  };
FUSED_REG_CASTER(fused_reg::PlainTensor)
FUSED_REG_CASTER(fused_reg::PlainOptionalTensor)
FUSED_REG_CASTER(fused_reg::PlainTensorList)
FUSED_REG_CASTER(fused_reg::BoolList)

namespace fused_reg {

namespace {

// What holds an argument from Python while the operator runs.
template <class Arg>
struct HolderOf {
  using type = Arg;
};
template <>
struct HolderOf<const at::Tensor&> {
  using type = PlainTensor;
};
template <>
struct HolderOf<const OptionalTensor&> {
  using type = PlainOptionalTensor;
};
template <>
struct HolderOf<at::TensorList> {
  using type = PlainTensorList;
};
template <>
struct HolderOf<const c10::List<bool>&> {
  using type = BoolList;
};
template <>
struct HolderOf<Floats> {
  using type = std::vector<double>;
};
template <>
struct HolderOf<at::IntArrayRef> {
  using type = std::vector<int64_t>;
};
template <class Arg>
using Holder = typename HolderOf<Arg>::type;

// The operator as a function; where that cannot take the arguments, torch.ops does.
template <class Return, class... Args>
void define(pybind11::module_& m, const pybind11::object& operators, const char* name, Return (*)(Args...)) {
  const auto op = c10::Dispatcher::singleton()
                      .findSchemaOrThrow(("fused_reg::" + std::string(name)).c_str(), "")
                      .typed<Return(Args...)>();
  m.def(name, torch::wrap_pybind_function_no_gil(
                  [op](const Holder<Args>&... args) -> Return { return op.call(static_cast<Args>(args)...); }));
  m.def(name, [general = operators.attr(name).attr("default")](const pybind11::args& args) { return general(*args); });
}

void define_operators(pybind11::module_& m) {
  const pybind11::object operators = pybind11::module_::import("torch").attr("ops").attr("fused_reg");
  struct AnyListPass;  // the signatures are those of every backend
#define FUSED_REG_DEFINE(name) \
  define(m, operators, #name, static_cast<decltype(Operators<AnyListPass>::name)*>(nullptr));
  FUSED_REG_OPERATORS(FUSED_REG_DEFINE)
#undef FUSED_REG_DEFINE
}

}  // namespace

}  // namespace fused_reg

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of fused_reg.";
  m.def(
      "build_info",
      [] {
        const fused_reg::BuildInfo info = fused_reg::build_info();
        pybind11::dict out;
        out["torch"] = info.torch;
        out["compiler"] = info.compiler;
        out["cuda_architectures"] = info.cuda_architectures;
        out["cpu_capability"] = info.cpu_capability;
        return out;
      },
      "Versions of torch and the compiler that this library was built with, and the CPU capability in use.");
  fused_reg::define_operators(m);
}
