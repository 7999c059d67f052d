// Python's view of the CUDA kernels: as csrc/bindings.cpp, with a stream and workspace.
// Kernels are enqueued and nothing waits for them. Links the CUDA runtime statically, so the module
// imports where there is no driver.
#include "../python.h"
#include "kernels.h"
#include "plan.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>
#include <utility>

namespace fastattn::cuda {

std::string describe(const Problem& p) {
  static const char* const maps[] = {"elu", "relu", "identity", "exp", "softmax", "cosine", "efficient"};
  static const char* const dtypes[] = {"float32", "bfloat16", "float16", "float64"};
  std::string text = p.is_causal ? "causal " : "non-causal ";
  text += std::string(maps[static_cast<int>(p.feature_map)]) + " " +
          dtypes[static_cast<int>(p.dtype)] + " problem: batch " + std::to_string(p.batch) +
          ", heads " + std::to_string(p.num_heads) + "/" + std::to_string(p.num_kv_heads) +
          ", tokens " + std::to_string(p.query_length) + " x " + std::to_string(p.key_length) +
          ", sizes " + std::to_string(p.head_dim) + " and " + std::to_string(p.value_dim);
  if (p.num_sequences) text += ", packed sequences " + std::to_string(p.num_sequences);
  return text;
}

namespace {

// body(width) with the width as a constant, if kernels of T are compiled for it, else with 0.
template <class T, class Body>
void for_width(int width, const Body& body) {
  if (width == 32 && is_compiled<T>(32)) return body(std::integral_constant<int, 32 * is_compiled<T>(32)>{});
  if (width == 64 && is_compiled<T>(64)) return body(std::integral_constant<int, 64 * is_compiled<T>(64)>{});
  if (width == 128 && is_compiled<T>(128)) return body(std::integral_constant<int, 128 * is_compiled<T>(128)>{});
  body(std::integral_constant<int, 0>{});
}

template <class T>
void forward_as(const Problem& problem, const Arguments& args, Launcher& launch) {
  if (problem.is_causal && problem.form == Form::recurrent)
    return recurrent_forward<T>(problem, args, launch);
  for_width<T>(compiled_width(problem), [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    if (problem.is_causal)
      causal_forward<T, kWidth>(problem, args, launch);
    else
      noncausal_forward<T, kWidth>(problem, args, launch);
  });
}

template <class T>
void backward_as(const Problem& problem, const Arguments& args, Launcher& launch) {
  for_width<T>(compiled_width(problem), [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    if (problem.is_causal)
      causal_backward<T, kWidth>(problem, args, launch);
    else
      noncausal_backward<T, kWidth>(problem, args, launch);
  });
}

template <class Body>
void for_dtype(DType dtype, const Body& body) {
  if (dtype == DType::f32) return body(float{});
  if (dtype == DType::bf16) return body(__nv_bfloat16{});
  if (dtype == DType::f16) return body(__half{});
  throw py::value_error("the CUDA kernels know float32, bfloat16 and float16");
}

void run_forward(const Problem& problem, const Arguments& args, Launcher& launch) {
  for_dtype(problem.dtype, [&](auto x) { forward_as<decltype(x)>(problem, args, launch); });
}

void run_backward(const Problem& problem, const Arguments& args, Launcher& launch) {
  for_dtype(problem.dtype, [&](auto x) { backward_as<decltype(x)>(problem, args, launch); });
}

// stream, workspace, limits | the call. The stream's device is the current one.
struct Target {
  explicit Target(Reader& reader)
      : stream(reader.address<CUstream_st>()),
        workspace(reader.address<float>()),
        limits(read_limits(reader)) {}

  static Limits read_limits(Reader& reader) {
    const auto shared_bytes = static_cast<int>(reader.integer());
    return {shared_bytes, static_cast<int>(reader.integer())};
  }

  cudaStream_t stream;
  float* workspace;
  Limits limits;
};

template <class Run>
void enqueue(const Problem& problem, const Target& target, const Arguments& args, const Run& run) {
  const py::gil_scoped_release release;
  Launcher launch(problem, target.stream, target.workspace, target.limits);
  run(problem, args, launch);
}

void forward(const Problem& problem, const py::tuple& numbers) {
  Reader reader(numbers);
  const Target target(reader);
  Arguments args;
  read_inputs(reader, args);
  args.out = reader.strided();
  args.final = reader.state();
  args.saved = reader.address<void>();
  reader.finish();
  enqueue(problem, target, args, run_forward);
}

void backward(const Problem& problem, const py::tuple& numbers) {
  Reader reader(numbers);
  const Target target(reader);
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
  enqueue(problem, target, args, run_backward);
}

void run_step(const Problem& problem, const py::tuple& numbers) {
  Reader reader(numbers);
  const Target target(reader);
  Arguments args;
  read_inputs(reader, args);
  args.out = reader.strided();
  reader.finish();
  enqueue(problem, target, args, [](const Problem& p, const Arguments& a, Launcher& launch) {
    for_dtype(p.dtype, [&](auto x) { step<decltype(x)>(p, a, launch); });
  });
}

// Floats of scratch that a call needs on a device with these limits.
int64_t workspace_size(const Problem& problem, bool is_backward, int shared_bytes,
                       int multiprocessors) {
  Launcher launch = Launcher::planning(problem, {shared_bytes, multiprocessors});
  (is_backward ? run_backward : run_forward)(problem, Arguments{}, launch);
  return launch.workspace_floats();
}

std::pair<int, int> limits(int device) {
  Limits found{};
  check(cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "set-up", Problem{});
  check(cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "set-up", Problem{});
  return {found.shared_bytes, found.multiprocessors};
}

}  // namespace

void bind(py::module_& m) {
  m.doc() = "CUDA kernels of fastattn: raw addresses, a stream and workspace in, nothing else.";
  bind_problem(m);
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("step", &run_step);
  m.def("workspace_size", &workspace_size, py::arg("problem"), py::arg("is_backward"),
        py::arg("shared_bytes"), py::arg("multiprocessors"));
  m.def("limits", &limits, py::arg("device"));
  m.def("why_not_here", []() -> py::object {
    const cudaError_t error = why_not_here<float>();
    cudaGetLastError();
    if (error == cudaSuccess) return py::none();
    return py::str(cudaGetErrorString(error));
  });
  m.attr("SEGMENT_TOKENS") = kSegmentTokens;
  m.attr("MAX_DIM") = kMaxDim;
}

}  // namespace fastattn::cuda

#if defined(FASTATTN_EMULATION)
PYBIND11_MODULE(_cuda_emulated, m) { fastattn::cuda::bind(m); }
#else
PYBIND11_MODULE(_cuda, m) { fastattn::cuda::bind(m); }
#endif
