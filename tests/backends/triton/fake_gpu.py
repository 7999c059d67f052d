"""A driver that lets Triton compile and launch for a GPU that is not there: it loads nothing, and
writes down what it is asked to start. Everything before that, which the interpreter leaves out, is
Triton's own: what it looks at of the arguments, what it compiles, what it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Launch(NamedTuple):
    """``arguments``: numbers and addresses, in the order of the kernel's parameters."""

    kernel: str
    function: int  # of the compiled kernel: each has its own
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


class FakeGPU:
    """What ``triton.runtime.driver`` is asked for, as an H100 would answer."""

    target = GPUTarget("cuda", 90, 32)

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.loaded = 0
        self.utils = self

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "max_num_regs": 65536}

    def load_binary(self, name: str, *_: Any) -> tuple[int, int, int, int, int]:
        self.loaded += 1
        return (self.loaded, self.loaded, 100, 0, 1024)  # module, function, registers, ...

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            # The hooks and what they are told come before the arguments.
            given = rest[-len(source.signature) :]
            values = (a.data_ptr() if isinstance(a, torch.Tensor) else a for a in given)
            launch_ = Launch(source.fn.__name__, function, (x, y, z), tuple(values))
            self.launches.append(launch_)

        return launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


_THE_ONE = FakeGPU()  # Triton's functions keep what was compiled, and how it is started


@contextmanager
def fake_gpu() -> Iterator[FakeGPU]:
    before = driver._active
    driver.set_active(_THE_ONE)
    try:
        yield _THE_ONE
    finally:
        driver.set_active(before)
