#include "kernels.h"

#if defined(FASTATTN_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
#if defined(FASTATTN_AMX)
namespace amx_bf16 {
extern const Kernels kernels;
}

namespace {

// Whether there are tile registers and Linux lets this process use them (that has to be asked for).
bool may_use_tiles() {
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;  // leaf 7, edx
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d & (kBf16 | kTiles)) != (kBf16 | kTiles)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace
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
  const bool has_pairs = has_avx512 && __builtin_cpu_supports("avx512bf16");
  // Intel's cores multiply pairs of bf16 at half the rate of float32.
  const bool slow_pairs = __builtin_cpu_is("intel");
  if (has_pairs && slow_pairs) list.push_back(&avx512_bf16::kernels);
  if (has_avx512) list.push_back(&avx512::kernels);
  if (has_pairs && !slow_pairs) list.push_back(&avx512_bf16::kernels);
#endif
#if defined(FASTATTN_AMX)
  if (has_pairs && may_use_tiles()) list.push_back(&amx_bf16::kernels);
#endif
  return list;
}

}  // namespace fastattn
