// Asking for the next tile's memory while the present one is multiplied.
#pragma once

#include "matmul.h"
#include "tile.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Asks for memory ahead of its use, a line at a time between the steps of a product, so that
// fetching and multiplying go on at the same time. (Rows of (B, N, H, D) memory lie kilobytes apart,
// which the processor's own prefetching does not follow. It can wait for some sixteen lines at a
// time: one that asks for more stands still meanwhile.) Lines past the end of a tensor are never
// touched, only asked for.
class Lookahead {
  static constexpr int64_t kLine = 64;

 public:
  // The next lines of one run of rows; a copy, for the registers of a loop.
  class Lines {
   public:
    Lines(const char* line, int64_t count, int64_t per_row, int64_t skip)
        : line_(line), count_(count), per_row_(per_row), left_(per_row), skip_(skip) {}

    int64_t count() const { return count_; }

    FASTATTN_INLINE void operator()() {
      __builtin_prefetch(line_, 0, 2);
      line_ += kLine;
      if (--left_ == 0) {
        left_ = per_row_;
        line_ += skip_;
      }
    }

   private:
    const char* line_;
    int64_t count_, per_row_, left_, skip_;
  };

  // `rows` rows of n numbers of one head; of an absent tensor nothing. Last in, first asked for.
  void add(const Strided& source, int64_t batch, int64_t head, int64_t token, int64_t rows,
           DType dtype, int64_t n) {
    if (!source || source.feature != 1) return;
    const int64_t size = element_size(dtype), per_row = (n * size + kLine - 1) / kLine;
    runs_[count_++] = {static_cast<const char*>(source.data) +
                           source.offset(batch, head, token) * size,
                       source.token * size, per_row, rows};
  }

  // Whole rows of together about so many lines. Where nothing is left, none: whoever asks gets a
  // line that is at hand.
  FASTATTN_INLINE Lines take(int64_t lines) {
    if (count_ == 0) return {reinterpret_cast<const char*>(this), 0, 1, -kLine};
    Run& run = runs_[count_ - 1];
    const int64_t rows = std::min(run.rows, std::max<int64_t>(1, lines / run.per_row));
    const Lines taken(run.row, rows * run.per_row, run.per_row, run.stride - run.per_row * kLine);
    run.row += rows * run.stride;
    run.rows -= rows;
    if (run.rows <= 0) --count_;
    return taken;
  }

 private:
  struct Run {
    const char* row;
    int64_t stride, per_row, rows;
  };
  static constexpr int kMost = 4;
  Run runs_[kMost];
  int count_ = 0;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
