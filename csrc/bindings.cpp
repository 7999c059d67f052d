// Python's view of the native kernels: a Problem built once, then raw addresses per call. Knows
// nothing of torch; the GIL is released while kernels run.
#include <pybind11/stl.h>

#include <chrono>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/segments.h"
#include "python.h"

namespace py = pybind11;
using namespace fastattn;

namespace {

const Kernels* active = nullptr;

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
  active->forward(problem, args, sequences_of(problem, args));
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
  active->backward(problem, args, sequences_of(problem, args));
}

void step(const Problem& problem, const py::tuple& numbers, int threads) {
  Reader reader(numbers);
  Arguments args;
  read_inputs(reader, args);
  args.out = reader.strided();
  reader.finish();
  args.threads = threads;
  const py::gil_scoped_release release;
  active->step(problem, args, sequences_of(problem, args));
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

double fma_peak_gflops(int threads, bool in_bf16) {
  const py::gil_scoped_release release;
  std::vector<double> operations(static_cast<size_t>(threads));
  const auto start = std::chrono::steady_clock::now();
  parallel_for(threads, threads, [&](int64_t i) {
    operations[static_cast<size_t>(i)] = active->multiply_add(0.2, in_bf16);
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

  bind_problem(m)
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
  m.def("fma_peak_gflops", &fma_peak_gflops, py::arg("threads"), py::arg("in_bf16") = false);
  m.def("copy_bandwidth_gbs", &copy_bandwidth_gbs, py::arg("threads"));
}
