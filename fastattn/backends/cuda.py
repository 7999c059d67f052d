"""The CUDA C++ backend: hands raw addresses and torch's stream to ``fastattn._cuda``.

Kernels are enqueued on the current stream; outputs and workspace come from torch's allocator and
nothing is waited for, so calls can be captured in a CUDA graph.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastattn.backends import Gradients, Inputs, Outputs, new_out
from fastattn.backends.gpu import current, too_old
from fastattn.backends.native import (
    dense,
    form_of,
    library,
    native_problem,
    numbers_of,
    state_of,
    strided,
)
from fastattn.ops.problem import Problem

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_DIM = 128  # kMaxDim
_SEGMENT_TOKENS = 512  # kSegmentTokens


class CUDABackend:
    """Every problem on CUDA tensors of 32 or 16 bits with head sizes up to 128."""

    name = "cuda"
    device_type = "cuda"

    def __init__(self) -> None:
        self._library = self._load()
        self._native_problem = lru_cache(maxsize=1024)(
            lambda problem: native_problem(self._library, problem, form_of(problem))
        )
        self._workspace_size = lru_cache(maxsize=4096)(self._library.workspace_size)
        self._limits = lru_cache(maxsize=None)(self._library.limits)

    # What differs where the same kernels run without a GPU; see tests/emulation.

    def _load(self) -> Any:
        try:
            return library("_cuda")
        except ModuleNotFoundError:
            note = library("_native").CUDA_NOTE or "they were left out at install"
            raise ImportError(f"{note}; FASTATTN_CUDA=1 pip install . builds them") from None

    def _why_not_on(self, index: int | None) -> str | None:
        """Why that GPU (None: the current one) can't run the kernels, if so."""
        if torch.version.hip is not None:
            return "its kernels are for NVIDIA GPUs, and this is PyTorch for AMD GPUs"
        if not torch.cuda.is_available():
            return "its kernels are built, but PyTorch finds no CUDA device"
        reason = too_old(index)
        if reason is None:
            with torch.cuda.device(index):
                error = self._library.why_not_here()
            if error is not None:
                name = torch.cuda.get_device_name(index)
                reason = (
                    f"its kernels can't run on {name} ({error}); "
                    "FASTATTN_CUDA=1 pip install . builds them for all GPUs that it knows"
                )
        return reason

    def _target(self, device: torch.device) -> tuple[int, int]:
        """Device index and stream."""
        index = torch.cuda.current_device() if device.index is None else device.index
        return index, torch.cuda.current_stream(index).cuda_stream

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def _new_out(self, problem: Problem, device: torch.device) -> Tensor:
        return new_out(problem, device)

    def _empty_like(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor)

    # The protocol of fastattn.backends.Backend.

    def missing(self) -> str | None:
        return self._why_not_on(None)

    def why_not(self, problem: Problem) -> str | None:
        if problem.device_type != self.device_type:
            return (
                f"its kernels run on {self.device_type}; the tensors are on {problem.device_type!r}"
            )
        if problem.dtype not in _DTYPES:
            return f"it has no kernels for {problem.dtype}"
        if max(problem.head_dim, problem.value_dim) > _MAX_DIM:
            return f"head sizes go up to {_MAX_DIM}; got {problem.head_dim}, {problem.value_dim}"
        return self._why_not_on(problem.device_index)

    def kernel(self, problem: Problem) -> str:
        if not problem.is_causal:
            longest = max(problem.query_length, problem.key_length)
            one = problem.num_sequences is None and longest <= _SEGMENT_TOKENS
            return "non-causal one-launch" if one else "non-causal two-pass"
        return f"causal {form_of(problem)}"

    def saved_size(self, problem: Problem) -> int:
        """In arithmetic that torch.compile follows through symbols: as in csrc/cuda/plan.h, causal
        the state at the start of every segment but a sequence's first; non-causal the final state
        of every head, and for "efficient" what its softmax over tokens needs."""
        if not problem.needs_grad:
            return 0
        F, M = problem.feature_dim, problem.key_length
        state_size = F * (problem.value_dim + 1)
        if not problem.is_causal:
            statistics = F if problem.feature_map == "efficient" else 0
            return problem.state_batch * problem.num_kv_heads * (state_size + statistics)
        if problem.num_sequences is not None:
            anchors = M // _SEGMENT_TOKENS
        else:
            anchors = problem.batch * torch.sym_max((M - 1) // _SEGMENT_TOKENS, 0)
        # Two elements too many: a size that may be 0 or 1 is one that torch.export specialises on.
        return anchors * problem.num_kv_heads * state_size + 2

    def forward(self, problem: Problem, inputs: Inputs) -> Outputs:
        inputs = dense(inputs)
        native, device = self._native_problem(problem), inputs.query.device
        out = self._new_out(problem, device)
        S = z = None
        if problem.return_state:
            heads = (problem.state_batch, problem.num_kv_heads, problem.feature_dim)
            S = self._empty((*heads, problem.value_dim), torch.float32, device)
            z = self._empty(heads, torch.float32, device)
        saved = self._empty((self.saved_size(problem),), torch.float32, device)
        if problem.is_causal and problem.needs_grad:
            # Packed sequences may need fewer states than the bound; others leave two numbers over.
            (saved[-2:] if problem.num_sequences is None else saved).zero_()
        target, _workspace = self._prepare(native, device, is_backward=False)
        numbers = (*target, *numbers_of(inputs), *strided(out), *state_of(S, z), saved.data_ptr())
        with current(device):
            self._library.forward(native, numbers)
        return Outputs(out, S, z, saved)

    def backward(
        self,
        problem: Problem,
        inputs: Inputs,
        saved: Tensor,
        grad_out: Tensor,
        grad_S: Tensor | None,
        grad_z: Tensor | None,
    ) -> Gradients:
        inputs = dense(inputs)
        native, device = self._native_problem(problem), inputs.query.device
        if grad_S is not None and grad_z is not None:
            grad_S, grad_z = grad_S.contiguous(), grad_z.contiguous()
        query, key, value = (self._empty_like(tensor) for tensor in inputs[:3])
        S = None if inputs.initial_S is None else self._empty_like(inputs.initial_S)
        z = None if inputs.initial_z is None else self._empty_like(inputs.initial_z)
        target, _workspace = self._prepare(native, device, is_backward=True)
        numbers = (
            *(*target, *numbers_of(inputs), saved.data_ptr()),
            *(*strided(grad_out), *state_of(grad_S, grad_z)),
            *(*strided(query), *strided(key), *strided(value), *state_of(S, z)),
        )
        with current(device):
            self._library.backward(native, numbers)
        return Gradients(query, key, value, S, z)

    def step(self, problem: Problem, inputs: Inputs) -> Tensor:
        device = inputs.query.device
        out = self._new_out(problem, device)
        index, stream = self._target(device)
        numbers = (stream, 0, *self._limits(index), *numbers_of(inputs), *strided(out))
        with current(device):
            self._library.step(self._native_problem(problem), numbers)
        return out

    def _prepare(
        self, native: Any, device: torch.device, is_backward: bool
    ) -> tuple[tuple[int, ...], Tensor | None]:
        """What a call is given besides its tensors: stream, workspace, what the device has.
        The workspace is returned to stay alive until the kernels that use it are enqueued."""
        index, stream = self._target(device)
        limits = self._limits(index)
        floats = self._workspace_size(native, is_backward, *limits)
        if not floats:
            return (stream, 0, *limits), None
        workspace = self._empty((floats,), torch.float32, device)
        return (stream, workspace.data_ptr(), *limits), workspace
