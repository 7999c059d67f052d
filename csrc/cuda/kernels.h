// What each .cu file offers, per dtype T of the tensors. All take a Launcher that either launches
// or only adds up the workspace.
#pragma once

#include "launch.h"

namespace fastattn::cuda {

template <class T>
void noncausal_forward(const Problem& problem, const Arguments& args, Launcher& launch);
template <class T>
void noncausal_backward(const Problem& problem, const Arguments& args, Launcher& launch);

template <class T>
void causal_forward(const Problem& problem, const Arguments& args, Launcher& launch);
template <class T>
void causal_backward(const Problem& problem, const Arguments& args, Launcher& launch);

// The causal form one token after another, and the decode step, which updates args.initial.
template <class T>
void recurrent_forward(const Problem& problem, const Arguments& args, Launcher& launch);
template <class T>
void step(const Problem& problem, const Arguments& args, Launcher& launch);

}  // namespace fastattn::cuda
