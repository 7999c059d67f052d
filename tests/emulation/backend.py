"""The CUDA backend on CPU tensors: its Python side unchanged, its kernels emulated.

Tells the emulator which memory belongs to the call, element by element: inputs to read, outputs and
workspace to write. Everything else is out of bounds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.backends import Gradients, Inputs, Outputs
from fastattn.backends.cuda import CUDABackend
from fastattn.backends.native import dense
from fastattn.ops.problem import Problem
from tests.emulation import build


class EmulatedBackend(CUDABackend):
    name = "emulated"
    device_type = "cpu"
    limits = (227 << 10, 132)  # bytes of shared memory of a block, multiprocessors: of sm_90

    def _load(self) -> Any:
        library = self._emulated_library()
        self._memory = build.memory(library)
        self._memory.emulation_set_limits(*self.limits)
        return library

    def _emulated_library(self) -> Any:
        return build.library()

    def _why_not_on(self, index: int | None) -> str | None:
        return self._library.why_not_here()

    def _target(self, device: torch.device) -> tuple[int, int]:
        self._memory.emulation_set_limits(*self.limits)  # others may have set theirs
        return 0, 0

    def launches(self) -> int:
        """Kernels launched by the last call."""
        return int(self._memory.emulation_launches())

    def _allow(self, tensor: Tensor | None, writable: bool) -> None:
        if tensor is None or tensor.numel() == 0:
            return
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
        size = (last + 1) * tensor.element_size()
        self._memory.emulation_add_memory(tensor.data_ptr(), size, writable)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor = super()._empty(shape, dtype, device)
        self._allow(tensor, writable=True)
        return tensor

    def _new_out(self, problem: Problem, device: torch.device) -> Tensor:
        out = super()._new_out(problem, device)
        self._allow(out, writable=True)
        return out

    def _empty_like(self, tensor: Tensor) -> Tensor:
        result = super()._empty_like(tensor)
        self._allow(result, writable=True)
        return result

    def forward(self, problem: Problem, inputs: Inputs) -> Outputs:
        self._memory.emulation_clear_memory()
        inputs = dense(inputs)
        for tensor in inputs:
            self._allow(tensor, writable=False)
        return super().forward(problem, inputs)

    def backward(
        self,
        problem: Problem,
        inputs: Inputs,
        saved: Tensor,
        grad_out: Tensor,
        grad_S: Tensor | None,
        grad_z: Tensor | None,
    ) -> Gradients:
        self._memory.emulation_clear_memory()
        inputs = dense(inputs)
        if grad_S is not None and grad_z is not None:
            grad_S, grad_z = grad_S.contiguous(), grad_z.contiguous()
        for tensor in (*inputs, saved, grad_out, grad_S, grad_z):
            self._allow(tensor, writable=False)
        return super().backward(problem, inputs, saved, grad_out, grad_S, grad_z)

    def step(self, problem: Problem, inputs: Inputs) -> Tensor:
        self._memory.emulation_clear_memory()
        for name, tensor in zip(inputs._fields, inputs):
            self._allow(tensor, writable=name in ("initial_S", "initial_z"))
        return super().step(problem, inputs)
