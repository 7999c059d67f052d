// Python's view of the native kernels: a Problem built once, then raw addresses per call. Knows
// nothing of torch; the GIL is released while kernels run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstring>
#include <map>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/segments.h"

namespace py = pybind11;
using namespace fastattn;

namespace {

const Kernels* active = nullptr;

template <class Value>
Value lookup(const std::map<std::string, Value>& names, const std::string& name, const char* what) {
  const auto found = names.find(name);
  if (found == names.end())
    throw py::value_error(std::string("the native kernels know no ") + what + " '" + name + "'");
  return found->second;
}

Problem make_problem(int64_t batch, int64_t num_heads, int64_t num_kv_heads, int64_t query_length,
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
  static const std::map<std::string, Form> forms{{"chunked", Form::chunked},
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

// Reads a flat tuple of integers in the order that fastattn/backends/cpu.py writes it.
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
void read_inputs(Reader& reader, Arguments& args) {
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

void forward(const Problem& problem, const py::tuple& numbers, int threads) {
  Reader reader(numbers);
  Arguments args;
  read_inputs(reader, args);
  args.out = reader.strided();
  args.final = reader.state();
  args.saved = reader.address<void>();
  reader.finish();
  args.threads = threads;
  const py::gil_scoped_release release;
  active->forward(problem, args);
}

void backward(const Problem& problem, const py::tuple& numbers, int threads) {
  Reader reader(numbers);
  Arguments args;
  read_inputs(reader, args);
  args.saved = reader.address<void>();
  args.grad_out = reader.strided();
  args.grad_final = reader.state();
  args.grad_query = reader.strided();
  args.grad_key = reader.strided();
  args.grad_value = reader.strided();
  args.grad_initial = reader.state();
  reader.finish();
  args.threads = threads;
  const py::gil_scoped_release release;
  active->backward(problem, args);
}

void step(const Problem& problem, const py::tuple& numbers, int threads) {
  Reader reader(numbers);
  Arguments args;
  read_inputs(reader, args);
  args.out = reader.strided();
  reader.finish();
  args.threads = threads;
  const py::gil_scoped_release release;
  active->step(problem, args);
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : runnable_kernels()) names.push_back(kernels->name);
  return names;
}

void select_isa(const std::string& name) {
  for (const Kernels* kernels : runnable_kernels())
    if (name == kernels->name) {
      active = kernels;
      return;
    }
  throw py::value_error("instruction set '" + name + "' cannot run here");
}

double fma_peak_gflops(int threads) {
  const py::gil_scoped_release release;
  std::vector<double> operations(static_cast<size_t>(threads));
  const auto start = std::chrono::steady_clock::now();
  parallel_for(threads, threads, [&](int64_t i) {
    operations[static_cast<size_t>(i)] = active->multiply_add(0.2);
  });
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  double total = 0;
  for (double count : operations) total += count;
  return total / seconds * 1e-9;
}

// Bytes read plus bytes written per second by a copy far larger than the caches; best of several.
double copy_bandwidth_gbs(int threads) {
  const py::gil_scoped_release release;
  constexpr size_t bytes = size_t{128} << 20;
  std::vector<char> source(bytes, 1), target(bytes, 2);
  const size_t share = bytes / static_cast<size_t>(threads);
  double best = 0;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    parallel_for(threads, threads, [&](int64_t i) {
      const size_t begin = static_cast<size_t>(i) * share;
      std::memcpy(target.data() + begin, source.data() + begin, share);
    });
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const double rate = 2.0 * static_cast<double>(share) * threads / seconds * 1e-9;
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of fastattn: raw addresses in, nothing else.";
  active = runnable_kernels().back();

  py::class_<Problem>(m, "Problem")
      .def(py::init(&make_problem), py::kw_only(), py::arg("batch"), py::arg("num_heads"),
           py::arg("num_kv_heads"), py::arg("query_length"), py::arg("key_length"),
           py::arg("head_dim"), py::arg("value_dim"), py::arg("num_sequences"), py::arg("dtype"),
           py::arg("feature_map"), py::arg("form"), py::arg("is_causal"), py::arg("normalize"),
           py::arg("return_state"), py::arg("needs_grad"), py::arg("scale"), py::arg("eps"))
      .def("saved_size", [](const Problem& p) { return saved_size(p); });

  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("step", &step);
  m.def("isas", &isas, "Instruction sets that are compiled in and can run here, weakest first.");
  m.def("select_isa", &select_isa);
  m.def("active_isa", [] { return std::string(active->name); });
  m.def("join_openmp", &join_openmp,
        "Run on the threads of the OpenMP runtime already loaded from this path.");
  m.def("openmp_path", &openmp_path);
  m.def("fma_peak_gflops", &fma_peak_gflops, py::arg("threads"));
  m.def("copy_bandwidth_gbs", &copy_bandwidth_gbs, py::arg("threads"));
}
