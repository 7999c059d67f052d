// What the Python modules of the native libraries share: Problems, and addresses read from tuples.
#pragma once

#include <pybind11/pybind11.h>

#include <map>
#include <string>

#include "problem.h"

namespace fastattn {

namespace py = pybind11;

// What the Python side and a library have to agree on: the arguments of Problem, the order of the
// numbers of a call, the functions of a module, the constants by which both compute sizes (tokens of
// a segment). A change of any of them raises this number, here and in fastattn/backends/native.py, so
// that a library that was built before it is refused.
constexpr int kInterface = 4;

// Why the CUDA kernels were not built along; from setup.py.
#if !defined(FASTATTN_CUDA_NOTE)
#define FASTATTN_CUDA_NOTE ""
#endif

template <class Value>
Value lookup(const std::map<std::string, Value>& names, const std::string& name, const char* what) {
  const auto found = names.find(name);
  if (found == names.end())
    throw py::value_error(std::string("the native kernels know no ") + what + " '" + name + "'");
  return found->second;
}

inline Problem make_problem(int64_t batch, int64_t num_heads, int64_t num_kv_heads, int64_t query_length,
                     int64_t key_length, int64_t head_dim, int64_t value_dim, int64_t num_sequences,
                     const std::string& dtype, const std::string& feature_map,
                     const std::string& form, bool is_causal, bool normalize, bool return_state,
                     bool needs_grad, double scale, double eps) {
  static const std::map<std::string, DType> dtypes{{"float32", DType::f32},
                                                   {"bfloat16", DType::bf16},
                                                   {"float16", DType::f16},
                                                   {"float64", DType::f64}};
  static const std::map<std::string, FeatureMap> maps{
      {"elu", FeatureMap::elu},           {"relu", FeatureMap::relu},
      {"identity", FeatureMap::identity}, {"features", FeatureMap::identity},
      {"exp", FeatureMap::exp},           {"softmax", FeatureMap::softmax},
      {"cosine", FeatureMap::cosine},     {"efficient", FeatureMap::efficient}};
  static const std::map<std::string, Form> forms{{"auto", Form::automatic},
                                                 {"chunked", Form::chunked},
                                                 {"recurrent", Form::recurrent}};
  Problem p;
  p.batch = batch;
  p.num_heads = num_heads;
  p.num_kv_heads = num_kv_heads;
  p.query_length = query_length;
  p.key_length = key_length;
  p.head_dim = head_dim;
  p.value_dim = value_dim;
  p.num_sequences = num_sequences;
  p.dtype = lookup(dtypes, dtype, "dtype");
  p.feature_map = lookup(maps, feature_map, "feature map");
  p.form = lookup(forms, form, "form");
  p.is_causal = is_causal;
  p.normalize = normalize;
  p.return_state = return_state;
  p.needs_grad = needs_grad;
  p.scale = scale;
  p.eps = eps;
  return p;
}

// Reads a flat tuple of integers in the order that the backends in Python write it.
class Reader {
 public:
  explicit Reader(const py::tuple& numbers) : tuple_(numbers.ptr()), size_(PyTuple_GET_SIZE(tuple_)) {}

  int64_t integer() {
    if (next_ >= size_) throw py::value_error("native call: too few numbers");
    const int64_t value = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple_, next_++));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }
  template <class T>
  T* address() {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(integer()));
  }
  Strided strided() {
    Strided s;
    s.data = address<void>();
    s.batch = integer();
    s.head = integer();
    s.token = integer();
    s.feature = integer();
    return s;
  }
  State state() {
    State s;
    s.S = address<void>();
    s.z = address<void>();
    return s;
  }
  void finish() const {
    if (next_ != size_) throw py::value_error("native call: too many numbers");
  }

 private:
  PyObject* tuple_;
  Py_ssize_t size_, next_ = 0;
};

// query, key, value | key_mask and its strides | cu_seqlens, cu_seqlens_k | initial S, z
inline void read_inputs(Reader& reader, Arguments& args) {
  args.query = reader.strided();
  args.key = reader.strided();
  args.value = reader.strided();
  args.key_mask = reader.address<const uint8_t>();
  args.key_mask_batch = reader.integer();
  args.key_mask_token = reader.integer();
  args.cu_seqlens = reader.address<const int32_t>();
  args.cu_seqlens_k = reader.address<const int32_t>();
  args.initial = reader.state();
}

// Each library has a type of its own, so that both can be loaded.
inline py::class_<Problem> bind_problem(py::module_& m) {
  m.attr("INTERFACE") = kInterface;
  m.attr("CUDA_NOTE") = FASTATTN_CUDA_NOTE;
  return py::class_<Problem>(m, "Problem", py::module_local())
      .def(py::init(&make_problem), py::kw_only(), py::arg("batch"), py::arg("num_heads"),
           py::arg("num_kv_heads"), py::arg("query_length"), py::arg("key_length"),
           py::arg("head_dim"), py::arg("value_dim"), py::arg("num_sequences"), py::arg("dtype"),
           py::arg("feature_map"), py::arg("form"), py::arg("is_causal"), py::arg("normalize"),
           py::arg("return_state"), py::arg("needs_grad"), py::arg("scale"), py::arg("eps"));
}

}  // namespace fastattn
