// __half for g++: the conversions that the kernels use, rounding to nearest even.
#pragma once

#include <cstdint>

struct __half {
  _Float16 value;
};

inline __half __float2half(float x) { return {static_cast<_Float16>(x)}; }
inline float __half2float(__half x) { return static_cast<float>(x.value); }
