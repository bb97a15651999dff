// The Python module fused_reg._C: importing it registers the operators. It holds the build information; and the
// operators as functions that call the dispatcher at once, because torch.ops needs microseconds to box their arguments.
// All of it speaks Python's own C interface: pybind11 would take longer to compile than the rest, and longer in a call.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "build_info.h"
#include "operators.h"

namespace fused_reg {

// Read from the bytes of the file where the library cannot be loaded (fused_reg/_library.py).
__attribute__((used)) extern const char kTorchVersionMark[] = "fused_reg built with torch " TORCH_VERSION;

namespace {

// Each load() takes an argument from Python, or refuses it. Tensors whose operators somebody overrides, what is no
// tensor, and all else that is refused is left to torch.ops (fused_reg/_ops.py).
bool load(PyObject* x, bool* out) {
  *out = x == Py_True;
  return PyBool_Check(x);
}

bool load(PyObject* x, double* out) {
  *out = PyFloat_Check(x) ? PyFloat_AS_DOUBLE(x) : 0;
  return PyFloat_Check(x);
}

bool load(PyObject* x, int64_t* out) {
  int overflow = 0;
  *out = PyLong_Check(x) ? PyLong_AsLongLongAndOverflow(x, &overflow) : 0;
  return PyLong_Check(x) && overflow == 0;
}

bool load(PyObject* x, at::Tensor* out) {
  if (!THPVariable_CheckExact(x)) {
    return false;
  }
  *out = THPVariable_Unpack(x);
  return true;
}

bool load(PyObject* x, OptionalTensor* out) { return x == Py_None || load(x, &out->emplace()); }

// A list of tensors. They stay alive because their Python objects do: to hold them as well takes as long as a pass over
// short ones.
class BorrowedTensors {
 public:
  BorrowedTensors() = default;
  BorrowedTensors(const BorrowedTensors&) = delete;
  ~BorrowedTensors() {
    for (at::Tensor& t : tensors_) {
      t.unsafeReleaseTensorImpl();
    }
  }

  bool load(PyObject* xs) {
    if (!PyList_Check(xs) && !PyTuple_Check(xs)) {
      return false;
    }
    items_ = PySequence_Tuple(xs);
    tensors_.reserve(PyTuple_GET_SIZE(items_.get()));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(items_.get()); ++i) {
      PyObject* const item = PyTuple_GET_ITEM(items_.get(), i);
      if (!THPVariable_CheckExact(item)) {
        return false;
      }
      using Impl = c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
      tensors_.emplace_back(Impl::reclaim(THPVariable_Unpack(item).unsafeGetTensorImpl()));
    }
    return true;
  }

  operator at::TensorList() const { return tensors_; }

 private:
  THPObjectPtr items_;
  std::vector<at::Tensor> tensors_;
};

bool load(PyObject* xs, BorrowedTensors* out) { return out->load(xs); }

template <class List>
bool load(PyObject* xs, List* out) {
  if (!PyList_Check(xs) && !PyTuple_Check(xs)) {
    return false;
  }
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(xs);
  out->reserve(size);
  for (Py_ssize_t i = 0; i < size; ++i) {
    typename List::value_type item;
    if (!load(PySequence_Fast_GET_ITEM(xs, i), &item)) {
      return false;
    }
    out->push_back(std::move(item));
  }
  return true;
}

template <class... Holders>
bool load_all(PyObject* const* args, Py_ssize_t count, std::tuple<Holders...>* out) {
  const auto load_each = [&](Holders&... holders) { return (load(*args++, &holders) && ...); };
  return count == static_cast<Py_ssize_t>(sizeof...(Holders)) && std::apply(load_each, *out);
}

PyObject* to_python(at::Tensor&& tensor) { return THPVariable_Wrap(std::move(tensor)); }
PyObject* to_python(std::vector<at::Tensor>&& tensors) { return THPVariable_WrapList(tensors); }
template <class... Items>
PyObject* to_python(std::tuple<Items...>&& items) {
  THPObjectPtr tuple(PyTuple_New(sizeof...(Items)));
  Py_ssize_t i = 0;
  std::apply([&](Items&... item) { (PyTuple_SET_ITEM(tuple.get(), i++, to_python(std::move(item))), ...); }, items);
  return tuple.release();
}

struct WithoutGil {
  PyThreadState* const thread = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(thread); }
};

// What holds an argument while the operator runs.
template <class Arg>
struct HolderOf {
  using type = std::decay_t<Arg>;
};
template <class Item>
struct HolderOf<at::ArrayRef<Item>> {
  using type = std::conditional_t<std::is_same_v<Item, at::Tensor>, BorrowedTensors, std::vector<Item>>;
};

// NotImplemented where the arguments are not those that the operator takes as they are.
template <class Return, class... Args>
PyObject* call(const c10::TypedOperatorHandle<Return(Args...)>& op, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  std::tuple<typename HolderOf<Args>::type...> held;
  if (at::impl::torch_function_mode_enabled() || !load_all(args, count, &held)) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  const auto run = [&](auto&... holders) {
    const WithoutGil others_may_run;
    return op.call(holders...);
  };
  if constexpr (std::is_void_v<Return>) {
    std::apply(run, held);
    Py_RETURN_NONE;
  } else {
    return to_python(std::apply(run, held));
  }
  END_HANDLE_TH_ERRORS
}

PyObject* build_info_dict(PyObject*, PyObject*) {
  THPObjectPtr info(PyDict_New());
  for (const auto& [name, what] : build_info()) {
    THPObjectPtr text(info ? PyUnicode_FromString(what.c_str()) : nullptr);
    if (!text || PyDict_SetItemString(info.get(), name.c_str(), text.get()) != 0) {
      return nullptr;
    }
  }
  return info.release();
}

struct AnyListPass;  // the signatures are those of every backend

// What is said of a list in `fused_reg/_ops.py`, in the time of one look at each item.
enum Found : long { kHasAttributes = 1, kUnusual = 2, kSeveralDevices = 4, kNegated = 8, kOddGrad = 16 };

// Of a tensor that a backend has kernels for.
bool is_usual(const at::Tensor& t) {
  static const auto penalty = c10::Dispatcher::singleton().findSchemaOrThrow("fused_reg::penalty", "");
  const bool has_kernels = t.is_cpu() || penalty.hasKernelForDispatchKey(c10::legacyExtractDispatchKey(t.key_set()));
  return has_kernels && t.layout() == at::kStrided && !t.is_quantized() && !t.is_nested();
}

bool has_attributes(PyObject* x) {
  THPObjectPtr attributes(PyObject_GenericGetDict(x, nullptr));
  PyErr_Clear();  // of an object without
  return attributes && PyDict_GET_SIZE(attributes.get()) > 0;
}

long found_in(PyObject* list) {
  long found = 0;
  std::optional<at::Device> device;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
    PyObject* const item = PyList_GET_ITEM(list, i);
    found |= has_attributes(item) ? kHasAttributes : 0;
    const bool is_exact = THPVariable_CheckExact(item);
    if (!is_exact && !THPVariable_Check(item)) {
      found |= kUnusual;
      continue;
    }
    const at::Tensor& t = THPVariable_Unpack(item);
    const at::Tensor& grad = t.unsafeGetTensorImpl()->grad();
    found |= (is_exact && is_usual(t) ? 0 : kUnusual) | (t.is_neg() ? kNegated : 0);
    found |= grad.defined() && (grad.is_neg() || grad.layout() != at::kStrided) ? kOddGrad : 0;
    if (is_exact) {  // others may say where they are in Python only
      found |= device.value_or(t.device()) == t.device() ? 0 : kSeveralDevices;
      device = t.device();
    }
  }
  return found;
}

PyObject* survey(PyObject*, PyObject* list) {
  HANDLE_TH_ERRORS
  return PyLong_FromLong(found_in(list));
  END_HANDLE_TH_ERRORS
}

// The penalty of a list for l1 and l2, as fused_penalty finds it in more steps, where a number is all that is wanted
// and nothing is to be said: nothing is recorded, nobody sees the operators, nothing in the list is unusual, the
// strengths are positive numbers. None elsewhere.
PyObject* plain_value(PyObject*, PyObject* const* args, Py_ssize_t) {
  HANDLE_TH_ERRORS
  using Key = c10::DispatchKey;
  static const c10::DispatchKeySet seers{Key::Python, Key::Tracer, Key::FuncTorchDynamicLayerFrontMode,
                                         Key::FuncTorchDynamicLayerBackMode};
  std::vector<double> floats;
  std::array<int64_t, kNumbers> counts{};
  bool is_plain = !at::GradMode::is_enabled() && !at::impl::torch_function_mode_enabled() &&
                  !c10::impl::tls_local_dispatch_key_set().included_.has_any(seers);
  for (const int c : {kL1Strength, kL2Strength}) {
    double strength = 0;
    if (args[1 + c] != Py_None) {
      is_plain = is_plain && load(args[1 + c], &strength) && strength > 0;
      floats.push_back(strength);
      counts[c] = 1;
    }
  }
  BorrowedTensors params;
  if (!is_plain || floats.empty() || found_in(args[0]) != 0 || !params.load(args[0])) {
    Py_RETURN_NONE;
  }
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fused_reg::penalty", "")
                             .typed<decltype(Operators<AnyListPass>::penalty)>();
  try {
    const auto run = [&] {
      const WithoutGil others_may_run;
      return std::get<0>(op.call(params, c10::List<bool>(), floats, {}, counts, 0));
    };
    return to_python(run());
  } catch (const c10::Error&) {
    Py_RETURN_NONE;  // the other steps word it
  }
  END_HANDLE_TH_ERRORS
}

// Of a tensor, or a gradient, that an optimizer's step takes as it is.
bool is_taken(const at::Tensor& t) { return is_usual(t) && !t.is_neg() && !t.is_complex(); }

// What an optimizer's step depends on, but for values, as bytes: the parameters, how they are and whether they have a
// gradient, and the states of all with their sizes; the options of each group. As long as somebody keeps the objects,
// equal bytes are equal objects. None where a parameter or a gradient is not taken as it is.
PyObject* fingerprint(PyObject*, PyObject* const* args, Py_ssize_t) {
  HANDLE_TH_ERRORS
  static PyObject* const params_key = PyUnicode_InternFromString("params");
  std::vector<uintptr_t> tensors, options;
  tensors.reserve(64);
  options.reserve(64);
  const auto number = [](PyObject* x) { return reinterpret_cast<uintptr_t>(x); };
  PyObject *key, *value;
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(args[0]); ++g) {
    PyObject* const group = PyList_GET_ITEM(args[0], g);
    PyObject* const params = PyDict_GetItem(group, params_key);
    if (params == nullptr || !PyList_Check(params)) {
      Py_RETURN_NONE;
    }
    for (Py_ssize_t at = 0; PyDict_Next(group, &at, &key, &value);) {
      options.insert(options.end(), {number(key), number(value)});
    }
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
      PyObject* const param = PyList_GET_ITEM(params, i);
      if (!THPVariable_CheckExact(param)) {
        Py_RETURN_NONE;
      }
      const at::Tensor& t = THPVariable_Unpack(param);
      const at::Tensor& grad = t.unsafeGetTensorImpl()->grad();
      if (!is_taken(t) || (grad.defined() && !is_taken(grad))) {
        Py_RETURN_NONE;
      }
      const auto type = static_cast<uintptr_t>(t.device().type()),
                 index = static_cast<uintptr_t>(t.device().index() + 1);
      const auto dtype = static_cast<uintptr_t>(t.scalar_type());
      const uintptr_t how = grad.defined() + 2 * t.requires_grad() + 4 * t.is_leaf() + 8 * has_attributes(param) +
                            (dtype << 8) + (type << 16) + (index << 24);
      tensors.insert(tensors.end(), {number(param), how});
    }
    tensors.push_back(0);
  }
  for (Py_ssize_t at = 0; PyDict_Next(args[1], &at, &key, &value);) {
    const Py_ssize_t size = PyDict_Check(value) ? PyDict_GET_SIZE(value) : 0;
    tensors.insert(tensors.end(), {number(value), static_cast<uintptr_t>(size)});
  }
  const auto bytes = [](const std::vector<uintptr_t>& x) {
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(x.data()), x.size() * sizeof x[0]);
  };
  THPObjectPtr both(PyTuple_New(2));
  PyTuple_SET_ITEM(both.get(), 0, bytes(tensors));
  PyTuple_SET_ITEM(both.get(), 1, bytes(options));
  return both.release();
  END_HANDLE_TH_ERRORS
}

// The gradients of parameters, and what their states have under each of these keys, one list of all parameters after
// the other. None where one is missing.
PyObject* gather(PyObject*, PyObject* const* args, Py_ssize_t) {
  HANDLE_TH_ERRORS
  const Py_ssize_t n = PyList_GET_SIZE(args[0]), keys = PyTuple_GET_SIZE(args[2]);
  THPObjectPtr lists(PyTuple_New(1 + keys));
  for (Py_ssize_t k = 0; k <= keys; ++k) {
    PyObject* const list = PyList_New(n);
    PyTuple_SET_ITEM(lists.get(), k, list);
    for (Py_ssize_t i = 0; i < n; ++i) {
      PyObject* const from = PyList_GET_ITEM(args[k > 0], i);
      PyObject* const item = k == 0 ? THPVariable_Wrap(THPVariable_Unpack(from).unsafeGetTensorImpl()->grad())
                                    : Py_XNewRef(PyDict_GetItem(from, PyTuple_GET_ITEM(args[2], k - 1)));
      if (item == nullptr || item == Py_None) {
        Py_XDECREF(item);
        Py_RETURN_NONE;
      }
      PyList_SET_ITEM(list, i, item);
    }
  }
  return lists.release();
  END_HANDLE_TH_ERRORS
}

// Whether these dictionaries have these values, in their order, and no others.
PyObject* has_values(PyObject*, PyObject* const* args, Py_ssize_t) {
  Py_ssize_t next = 0;
  PyObject *key, *value;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(args[0]); ++i) {
    PyObject* const table = PyList_GET_ITEM(args[0], i);
    if (!PyDict_Check(table)) {
      Py_RETURN_FALSE;
    }
    for (Py_ssize_t at = 0; PyDict_Next(table, &at, &key, &value); ++next) {
      if (next == PyList_GET_SIZE(args[1]) || value != PyList_GET_ITEM(args[1], next)) {
        Py_RETURN_FALSE;
      }
    }
  }
  return PyBool_FromLong(next == PyList_GET_SIZE(args[1]));
}

PyObject* check_dtypes_of(PyObject*, PyObject* list) {
  HANDLE_TH_ERRORS
  std::vector<at::Tensor> params;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
    params.push_back(THPVariable_Unpack(PyList_GET_ITEM(list, i)));
  }
  check_dtypes(params);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// The errors that accumulate_grad_ would raise, or without modes prox_, for lists that they are given in parts.
PyObject* check_writable(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<int64_t>> lists;
  if (!load_all(args, count, &lists)) {
    return PyErr_Format(PyExc_TypeError, "params must be tensors");
  }
  const auto& [params, grads, modes] = lists;
  check_dtypes(params);
  if (modes.empty()) {
    check_not_in_graph(params);
    fused_reg::check_writable(params);
  } else {
    check_accumulation(params, grads, modes);
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

#define FUSED_REG_FUNCTION(name)                                                                     \
  {#name, reinterpret_cast<PyCFunction>(+[](PyObject*, PyObject* const* args, Py_ssize_t count) {    \
     using Signature = decltype(Operators<AnyListPass>::name);                                       \
     static const auto op =                                                                          \
         c10::Dispatcher::singleton().findSchemaOrThrow("fused_reg::" #name, "").typed<Signature>(); \
     return call(op, args, count);                                                                   \
   }),                                                                                               \
   METH_FASTCALL, nullptr},

PyMethodDef functions[] = {
    {"build_info", build_info_dict, METH_NOARGS,
     "Versions of torch and the compiler that this library was built with, and what its backends say of themselves."},
    {"check_writable", reinterpret_cast<PyCFunction>(check_writable), METH_FASTCALL,
     "Raises what accumulate_grad_ or prox_ would of (params, grads, modes)."},
    {"check_dtypes", check_dtypes_of, METH_O, "Raises what the operators would of the dtypes of a list of tensors."},
    {"fingerprint", reinterpret_cast<PyCFunction>(fingerprint), METH_FASTCALL,
     "What a step of an optimizer of these groups and states depends on, as bytes; None where that is unusual."},
    {"gather", reinterpret_cast<PyCFunction>(gather), METH_FASTCALL,
     "A list of the gradients of parameters, and of what is in their states for each key; None where one is missing."},
    {"has_values", reinterpret_cast<PyCFunction>(has_values), METH_FASTCALL,
     "Whether dictionaries have these values, in their order, and no others."},
    {"plain_value", reinterpret_cast<PyCFunction>(plain_value), METH_FASTCALL,
     "The penalty of (params, l1, l2) where a number is all that is wanted; None where more is to be done."},
    {"survey", survey, METH_O,
     "Bits of what is in a list: attributes, what is no usual tensor, several devices, negated views, odd gradients."},
    FUSED_REG_OPERATORS(FUSED_REG_FUNCTION){}};

PyModuleDef definition{PyModuleDef_HEAD_INIT, "_C", "The compiled part of fused_reg.", -1, functions};

}  // namespace

}  // namespace fused_reg

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&fused_reg::definition); }
