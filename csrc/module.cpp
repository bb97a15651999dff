// The Python module fused_reg._C: importing it registers the operators. It holds the build information.
#include <pybind11/pybind11.h>

#include "build_info.h"

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
}
