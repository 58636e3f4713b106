// _retrieval: exact retrieval on NumPy arrays. Threads inside, GIL released, no torch.
#include <pybind11/pybind11.h>

namespace py = pybind11;

// One per family, in its own <family>_bindings.cpp.
namespace fastreid_vi::retrieval {
void bind_ranking(py::module_& module);
void bind_rerank(py::module_& module);
void bind_search(py::module_& module);
void bind_streaming(py::module_& module);
}  // namespace fastreid_vi::retrieval

PYBIND11_MODULE(_retrieval, module) {
  module.doc() = "Exact retrieval on NumPy arrays; see fastreid_vi.evaluation.";
  fastreid_vi::retrieval::bind_ranking(module);
  fastreid_vi::retrieval::bind_rerank(module);
  fastreid_vi::retrieval::bind_search(module);
  fastreid_vi::retrieval::bind_streaming(module);
}
