"""Time and peak memory of models against input length.

Each point is measured in a process of its own, forked from a server that has imported everything
but computed nothing: memory that one length has touched would otherwise count for the next. Peak
memory is what the process's resident memory rose by at its highest while the model ran, so the
weights and the libraries are not in it.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModel

from fastattn.models.marks import is_linear
from fastattn.models.positions import position_limit
from fastattn.recipes.errors import ModelError
from fastattn.recipes.models import is_fine_tuned, load_config, load_model
from fastattn.recipes.progress import progress

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
SECONDS_PER_POINT = 2.0
MIN_RUNS, MAX_RUNS = 3, 50


@dataclass(frozen=True)
class Point:
    """One forward pass over ``batch`` texts of ``length`` tokens: median seconds, peak bytes
    beyond the loaded model (None where the platform can't say)."""

    name: str
    length: int
    batch: int
    seconds: float
    peak_bytes: int | None


def measure(
    models: dict[str, Path],
    lengths: Sequence[int] = LENGTHS,
    *,
    batch: int = 1,
    bf16: bool = False,
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """Measure each checkpoint at each length; positions are extended where a model has too few.

    Returns ``Point`` fields as dicts, in the order of ``models`` and then of ``lengths``.

    Raises:
        ModelError: a measuring process ran out of memory.
    """
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(["fastattn.recipes.measure", "fastattn.models"])
    points = []
    threads = threads or torch.get_num_threads()
    with progress("Measuring", len(models) * len(lengths)) as advance:
        for name, path in models.items():
            for length in lengths:
                arguments = (name, path, length, max(lengths), batch, bf16, threads)
                try:
                    with ProcessPoolExecutor(1, context, _end_with_parent) as process:
                        point = process.submit(_measure_point, *arguments).result()
                except (BrokenProcessPool, MemoryError, torch.OutOfMemoryError) as error:
                    raise ModelError(
                        f"measuring {name} at {length} tokens failed, most likely for want of "
                        f"memory ({error}): give shorter --lengths; what is trained is kept"
                    ) from error
                points.append(asdict(point))
                advance(1, f"{name} {length}: {point.seconds:.3g} s")
    return points


def _end_with_parent() -> None:
    """A process that waits for work doesn't notice when the one that would give it is killed."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _measure_point(
    name: str, path: Path, length: int, longest: int, batch: int, bf16: bool, threads: int
) -> Point:
    torch.set_num_threads(threads)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    model = _load(path).eval()
    limit = position_limit(model.config)
    if limit is not None and limit < longest:
        import fastattn

        fastattn.extend_positions(model, longest, method="repeat")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary // 2, vocabulary, (batch, length), generator=generator)
    ids = ids.to(device)
    mask = torch.ones_like(ids)

    def forward() -> float:
        start = time.perf_counter()
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            model(input_ids=ids, attention_mask=mask)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    before = _reset_peak(device)
    forward()  # also the warm-up
    peak = None if before is None else max(0, _peak(device) - before)
    seconds: list[float] = []
    while len(seconds) < MIN_RUNS or (sum(seconds) < SECONDS_PER_POINT and len(seconds) < MAX_RUNS):
        seconds.append(forward())
    return Point(name, length, batch, statistics.median(seconds), peak)


def _load(path: Path) -> Any:
    """The classifier in ``path``; of another model its encoder alone."""
    import fastattn

    config = load_config(path)
    if is_fine_tuned(config):
        return load_model(path)
    model = fastattn.load(path) if is_linear(config) else AutoModel.from_pretrained(path)
    return model.base_model


def _reset_peak(device: torch.device) -> int | None:
    """Forget the peak so far; bytes in use now, or None where peaks can't be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5: set VmHWM back to VmRSS
        return _status("VmRSS")
    except OSError:
        return None


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
