"""The backend protocol over the Triton kernels: allocates, names tensors, starts a plan."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton.runtime
from torch import Tensor

from fastattn.backends import Gradients, Inputs, Outputs, new_out
from fastattn.backends.gpu import current, too_old
from fastattn.backends.triton import plan as plans
from fastattn.backends.triton import table
from fastattn.backends.triton.launch import INTERPRETED, are_usual
from fastattn.backends.triton.plan import Plan
from fastattn.backends.triton.sizes import Target
from fastattn.ops.problem import Problem

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DEVICES = ("cuda", "xpu")  # AMD's GPUs are "cuda" to torch
_MAX_DIM = 256
_INTERPRETED_MULTIPROCESSORS = 8
_UNIT = 8  # elements; see tiles.py
_LARGEST_TOKEN_STRIDE = 2**24  # so that offsets within a tile of up to 64 tokens fit 32 bits


@cache
def _multiprocessors(device_type: str, index: int) -> int:
    if device_type == "cuda":
        return int(torch.cuda.get_device_properties(index).multi_processor_count)
    if device_type == "xpu":
        return int(torch.xpu.get_device_properties(index).gpu_subslice_count)
    return _INTERPRETED_MULTIPROCESSORS


@cache
def _unsupported_gpu(device_type: str, index: int | None) -> str | None:
    """Why that GPU (None: the current one) can't run the kernels, if so."""
    if device_type == "xpu":
        return None if torch.xpu.is_available() else "torch finds no usable Intel GPU"
    if not torch.cuda.is_available():
        return "torch finds no usable GPU"
    if torch.version.hip is None and (reason := too_old(index)) is not None:
        return reason
    try:  # Triton compiles a little C for its launcher
        triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return f"Triton can't start: {error}"
    return None


@cache
def _has_tf32(device_type: str, index: int) -> bool:
    """Whether Triton multiplies in TF32 there."""
    if device_type != "cuda" or torch.version.hip is None:
        return True
    architecture: str = torch.cuda.get_device_properties(index).gcnArchName
    return architecture.startswith("gfx942")


def _precision(dtype: torch.dtype) -> str:
    """What the user allows products of float32 matrices to be rounded to, on a GPU."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    setting = getattr(matmul, "fp32_precision", None)
    if setting is None:  # torch < 2.9
        return "tf32" if matmul.allow_tf32 else "ieee"
    if setting == "none":
        setting = getattr(torch.backends, "fp32_precision", "ieee")
    return "tf32" if setting == "tf32" else "ieee"


def _strides(values: dict[str, Any], name: str, tensor: Tensor, unit: int) -> None:
    b, h, n, d = tensor.stride()
    if unit > 1:
        b, h, n = b // unit, h // unit, n // unit
    values[name] = tensor
    values[name + "_b"], values[name + "_h"] = b, h
    values[name + "_n"], values[name + "_d"] = n, d


def _unit_of(*tensors: Tensor) -> int:
    """How strides are counted, see tiles.py: the same way for all tensors of a call."""
    unit = _UNIT
    for tensor in tensors:
        b, h, n, d = tensor.stride()
        if (d != 1 and tensor.shape[3] > 1) or n > _LARGEST_TOKEN_STRIDE:
            return 0
        if (b | h | n) % _UNIT:
            unit = 1
    return unit


class TritonBackend:
    """Problems on GPU tensors; on CPU tensors only through Triton's interpreter, for tests."""

    name = "triton"

    def missing(self) -> str | None:
        if INTERPRETED:
            return None
        reasons = [_unsupported_gpu(device, None) for device in _DEVICES]
        return None if None in reasons else f"Triton is installed, but {reasons[0]}"

    def why_not(self, problem: Problem) -> str | None:
        if problem.device_type == "cpu":
            if not INTERPRETED:
                return (
                    "its kernels run on GPUs; the tensors are on 'cpu' (for tests, set "
                    "TRITON_INTERPRET=1 before the first import of triton)"
                )
        elif problem.device_type not in _DEVICES:
            return f"its kernels run on GPUs; the tensors are on {problem.device_type!r}"
        if problem.dtype not in _DTYPES:
            return f"it has no kernels for {problem.dtype}"
        if max(problem.head_dim, problem.value_dim) > _MAX_DIM:
            return f"head sizes go up to {_MAX_DIM}; got {problem.head_dim}, {problem.value_dim}"
        if problem.device_type != "cpu":
            return _unsupported_gpu(problem.device_type, problem.device_index)
        return None

    def kernel(self, problem: Problem) -> str:
        index = problem.device_index
        if index is None:
            index = torch.cuda.current_device() if problem.device_type == "cuda" else 0
        target = Target(_multiprocessors(problem.device_type, index), _UNIT, "ieee")
        return plans.forward(problem, target).name

    def saved_size(self, problem: Problem) -> int:
        """Causal: the state at the start of every segment. Non-causal: the final state of every
        head, and for `efficient` the maximum of every feature."""
        if not problem.needs_grad:
            return 0
        states, statistics = self._saved_states(problem)
        F = problem.feature_dim
        return problem.num_kv_heads * states * (F * (problem.value_dim + 1) + statistics)

    @staticmethod
    def _saved_states(problem: Problem) -> tuple[int, int]:
        """Saved states per kv head, and numbers kept beside each; symbols pass through."""
        if not problem.is_causal:
            efficient = problem.feature_map == "efficient"
            return problem.state_batch, problem.feature_dim if efficient else 0
        segment = table.segment_tokens(problem.feature_dim, problem.value_dim)
        if problem.num_sequences is not None:
            return problem.key_length // segment + problem.num_sequences, 0
        return problem.batch * torch.sym_max(1, (problem.key_length + segment - 1) // segment), 0

    def forward(self, problem: Problem, inputs: Inputs) -> Outputs:
        query, sums = inputs.query, torch.float32
        out = new_out(problem, query.device)
        S = z = None
        if problem.return_state:
            heads = (problem.state_batch, problem.num_kv_heads, problem.feature_dim)
            S = query.new_empty((*heads, problem.value_dim), dtype=sums)
            z = query.new_empty(heads, dtype=sums)
        # Of packed sequences some rows stay idle: zeros, so that the same call saves the same.
        new = query.new_empty if problem.num_sequences is None else query.new_zeros
        saved = new(self.saved_size(problem), dtype=sums)
        target = self._target(query, _unit_of(*inputs[:3], out), problem.dtype)
        plan = plans.forward(problem, target)
        values = self._values(problem, inputs, saved, target.unit)
        _strides(values, "out", out, target.unit)
        values["S"], values["z"] = saved if S is None else S, saved if z is None else z
        self._run(plan, values, query)
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
        gradients = [torch.empty_like(tensor) for tensor in inputs[:3]]
        S = z = None
        if inputs.initial_S is not None and inputs.initial_z is not None:
            S = torch.empty_like(inputs.initial_S, memory_format=torch.contiguous_format)
            z = torch.empty_like(inputs.initial_z, memory_format=torch.contiguous_format)
        unit = _unit_of(*inputs[:3], grad_out, *gradients)
        target = self._target(saved, unit, problem.dtype)
        plan = plans.backward(problem, target, grad_S is not None)
        values = self._values(problem, inputs, saved, target.unit)
        _strides(values, "grad_out", grad_out, target.unit)
        for name, gradient in zip(("grad_query", "grad_key", "grad_value"), gradients):
            _strides(values, name, gradient, target.unit)
        values["grad_S"] = saved if grad_S is None else grad_S.contiguous()
        values["grad_z"] = saved if grad_z is None else grad_z.contiguous()
        values["grad_initial_S"] = values["total_S"] = saved if S is None else S
        values["grad_initial_z"] = values["total_z"] = saved if z is None else z
        self._run(plan, values, saved)
        query, key, value = gradients
        return Gradients(query, key, value, S, z)

    def step(self, problem: Problem, inputs: Inputs) -> Tensor:
        query = inputs.query
        out = new_out(problem, query.device)
        target = self._target(query, _unit_of(*inputs[:3], out), problem.dtype)
        state = inputs.initial_S
        assert state is not None
        values = self._values(problem, inputs, state, target.unit)
        _strides(values, "out", out, target.unit)
        self._run(plans.step(problem, target), values, query)
        return out

    @staticmethod
    def _target(tensor: Tensor, unit: int, dtype: torch.dtype) -> Target:
        gpu = tensor.device.type, tensor.device.index or 0
        return Target(_multiprocessors(*gpu), unit, _precision(dtype), _has_tf32(*gpu))

    @staticmethod
    def _values(problem: Problem, inputs: Inputs, saved: Tensor, unit: int) -> dict[str, Any]:
        """Tensors and strides by the names of the kernels' parameters. What a call lacks is there
        as some other tensor: its kernels are compiled not to touch it."""
        absent = saved
        values: dict[str, Any] = {}
        _strides(values, "query", inputs.query, unit)
        _strides(values, "key", inputs.key, unit)
        _strides(values, "value", inputs.value, unit)
        mask, cu, cu_k = inputs.key_mask, inputs.cu_seqlens, inputs.cu_seqlens_k
        values["mask"], values["mask_b"], values["mask_n"] = absent, 0, 0
        if mask is not None:
            values["mask"], (values["mask_b"], values["mask_n"]) = mask, mask.stride()
        values["cu"] = absent if cu is None else cu.contiguous()
        values["cu_k"] = absent if cu_k is None else cu_k.contiguous()
        S, z = inputs.initial_S, inputs.initial_z
        values["initial_S"] = absent if S is None else S.contiguous()
        values["initial_z"] = absent if z is None else z.contiguous()
        values["saved_S"] = values["saved_z"] = values["saved_maximum"] = absent
        values["maxima"] = values["maximum"] = absent
        if problem.needs_grad:
            states, statistics = TritonBackend._saved_states(problem)
            heads = states * problem.num_kv_heads
            F = problem.feature_dim
            values["saved_z"] = saved[heads * F * problem.value_dim :]
            if statistics:
                values["saved_maximum"] = values["saved_z"][heads * F :]
        for name in ("parts_S", "parts_z", "total_S", "total_z", "factors"):
            values[name] = absent
        return values

    @staticmethod
    def _run(plan: Plan, values: dict[str, Any], like: Tensor) -> None:
        if plan.workspace:
            memory = like.new_empty(sum(plan.workspace.values()), dtype=torch.float32)
            values.update(zip(plan.workspace, memory.split(list(plan.workspace.values()))))
        different = {id(x): x for x in values.values() if isinstance(x, Tensor)}
        usual = are_usual(different.values())
        device = like.device
        with current(device):
            for step in plan.steps:
                step.launch(values, device.index or 0, usual)
