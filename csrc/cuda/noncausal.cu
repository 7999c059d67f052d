#include "call.cuh"
#include "kernels.h"

namespace fastattn::cuda {

template <class T>
void noncausal_forward(const Problem&, const Arguments&, Launcher&) {}
template <class T>
void noncausal_backward(const Problem&, const Arguments&, Launcher&) {}
template void noncausal_forward<FASTATTN_DTYPE>(const Problem&, const Arguments&, Launcher&);
template void noncausal_backward<FASTATTN_DTYPE>(const Problem&, const Arguments&, Launcher&);

}  // namespace fastattn::cuda
