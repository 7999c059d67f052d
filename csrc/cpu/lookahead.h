// Asking for the next tile's memory while the present one is multiplied.
#pragma once

#include "matmul.h"
#include "tile.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Asks for memory ahead of its use, some lines at each call: between the blocks of a product, so
// that fetching and multiplying go on at the same time. (Rows of (B, N, H, D) memory lie kilobytes
// apart, which the processor's own prefetching does not follow; asking for a whole tile at once
// fills its queue and waits.) Lines past the end of a tensor are never touched, only asked for.
class Lookahead {
  // A line for every eight numbers of a product is enough for all that the next tile touches, and
  // spreads it over the product.
  static constexpr int64_t kLine = 64, kNumbersPerLine = 8;

 public:
  // `rows` rows of n numbers of one head; of an absent tensor nothing. Last in, first asked for.
  void add(const Strided& source, int64_t batch, int64_t head, int64_t token, int64_t rows,
           DType dtype, int64_t n) {
    if (!source || source.feature != 1) return;
    const int64_t size = element_size(dtype);
    runs_[count_++] = {static_cast<const char*>(source.data) +
                           source.offset(batch, head, token) * size,
                       source.token * size, n * size, rows};
  }

  // Before a block of so many numbers.
  void operator()(int64_t numbers) {
    int64_t left = numbers / kNumbersPerLine;
    while (left > 0 && count_ > 0) {
      Run& run = runs_[count_ - 1];
      for (; run.rows > 0 && left > 0; --run.rows, run.row += run.stride)
        for (int64_t i = 0; i < run.bytes; i += kLine, --left)
          __builtin_prefetch(run.row + i, 0, 2);
      if (run.rows <= 0) --count_;
    }
  }

 private:
  struct Run {
    const char* row;
    int64_t stride, bytes, rows;
  };
  static constexpr int kMost = 4;
  Run runs_[kMost];
  int count_ = 0;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
