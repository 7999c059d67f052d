#include "kernels.h"

namespace fastattn {

// Defined by kernels.cpp, once per instruction set.
namespace baseline {
extern const Kernels kernels;
}
#if defined(FASTATTN_X86)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif

std::vector<const Kernels*> runnable_kernels() {
  std::vector<const Kernels*> list{&baseline::kernels};
#if defined(FASTATTN_X86)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx2) list.push_back(&avx2::kernels);
  if (has_avx512) list.push_back(&avx512::kernels);
  if (has_avx512 && __builtin_cpu_supports("avx512bf16")) list.push_back(&avx512_bf16::kernels);
#endif
  return list;
}

}  // namespace fastattn
