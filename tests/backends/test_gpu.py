"""What GPU backends say of a GPU that can't run them, on a machine that need not have one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastattn.backends import gpu
from fastattn.backends.cuda import CUDABackend
from fastattn.ops.attention import op_arguments
from fastattn.ops.pose import problem_of, split_arguments

CAPABILITIES = {None: (9, 0), 0: (9, 0), 1: (7, 5)}


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A new one, which is current, and an old one."""
    gpu.too_old.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", CAPABILITIES.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    yield
    gpu.too_old.cache_clear()


class Built(CUDABackend):
    """With a library that finds its kernels, or that doesn't."""

    def __init__(self, error: str | None = None) -> None:
        self._library = SimpleNamespace(why_not_here=lambda: error)


def test_the_gpu_of_the_tensors_decides() -> None:
    assert Built()._why_not_on(0) is None
    reason = Built()._why_not_on(1)
    assert reason is not None and reason.endswith("GPU 1 has 7.5")


def test_kernels_that_are_not_there_are_a_reason() -> None:
    reason = Built("no kernel image is available for execution on the device").missing()
    assert reason is not None and reason.startswith("its kernels can't run on GPU None (no kernel")
    assert "FASTATTN_CUDA=1" in reason


def test_a_triton_that_cannot_start_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = pytest.importorskip(
        "fastattn.backends.triton.backend", reason="Triton is not installed"
    )

    class Driver:
        def get_current_target(self) -> None:
            raise RuntimeError("Failed to find C compiler")

    runtime = SimpleNamespace(runtime=SimpleNamespace(driver=SimpleNamespace(active=Driver())))
    monkeypatch.setattr(backend, "triton", runtime)
    backend._unsupported_gpu.cache_clear()
    try:
        reasons = [backend._unsupported_gpu("cuda", index) for index in (0, 1)]
    finally:
        backend._unsupported_gpu.cache_clear()
    assert reasons[0] == "Triton can't start: Failed to find C compiler"
    assert reasons[1].endswith("GPU 1 has 7.5")


@pytest.mark.parametrize("capturing", [False, True])
def test_a_first_call_inside_a_capture_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capturing: bool
) -> None:
    launch = pytest.importorskip(
        "fastattn.backends.triton.launch", reason="Triton is not installed"
    )

    def fail(*values: object, **options: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    step = launch.Step(SimpleNamespace(arg_names=[]), (1,), {}, {}, launch.Tile(16, 16, 4, 1))
    step.kernel = {step.grid: fail}  # what kernel[grid] starts
    said = "make this very call once before" if capturing else "operation not permitted"
    with pytest.raises(RuntimeError, match=said):
        step._start([])


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_a_problem_knows_its_device(device: str) -> None:
    with FakeTensorMode():
        x = torch.empty(1, 1, 3, 4, device=device)
        inputs, options, _ = split_arguments(op_arguments(x, x, x))
        problem = problem_of(inputs, *options)
    assert (problem.device_type, problem.device_index) == (x.device.type, x.device.index)
    assert problem.device_index == (1 if device == "cuda:1" else None)
