"""Peak memory of a forward and backward pass, each measured in a process of its own.

The yardstick is what nobody can do without: inputs, output, and the gradients of all of them.
What the process's resident memory rises by beyond that is the implementation's own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench import peers
from bench.cases import FORWARD, TRAIN, Case, Inputs, make_inputs

LENGTH = 65536
CASES = tuple(Case("long", 1, LENGTH, TRAIN, causal) for causal in (False, True))
CONTESTANTS = (peers.OURS, peers.PYTORCH)


def measure(case: Case, peer: str, backend: str, threads: int) -> dict[str, Any]:
    """Runs this module as a script and returns what it prints, or why it didn't."""
    arguments = [peer, backend, str(threads), str(case.length), "causal" if case.causal else ""]
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory", *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parent.parent,
    )
    described = {"name": case.name, "peer": peer}
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {**described, "status": "failed", "reason": last[:200]}
    return {**described, "status": "measured", **json.loads(done.stdout.splitlines()[-1])}


def _peak() -> int:
    """The most memory that this process has had resident, in bytes.

    Not getrusage: its figure starts from that of the process that started this one.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM, so peak memory can't be measured here")


def _pass(name: str, case: Case, inputs: Inputs, settings: peers.Settings) -> int:
    """One pass that keeps everything that a training step keeps; its tensors' bytes."""
    peer = next(peer for peer in peers.PEERS if peer.name == name)
    assert peer.attend is not None and inputs.grad_out is not None
    # Tuned on few tokens: trying out on all of them would be what is measured.
    small = Case(case.group, case.batch, 1024, FORWARD, case.causal)
    attend = peer.attend(small, make_inputs(small, settings.device), settings)
    leaves = [t.requires_grad_() for t in (inputs.query, inputs.key, inputs.value)]
    out = attend(*leaves)
    gradients = torch.autograd.grad(out, leaves, inputs.grad_out)
    kept = (*leaves, out, inputs.grad_out, *gradients)
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)


def _main() -> None:
    name, backend, threads, length, causal = sys.argv[1:]
    torch.set_num_threads(int(threads))
    settings = peers.Settings(torch.device("cpu"), backend, compile=False)
    warm = Case("long", 1, 1024, TRAIN, bool(causal))
    _pass(name, warm, make_inputs(warm, settings.device), settings)
    before = _peak()
    case = Case("long", 1, int(length), TRAIN, bool(causal))
    needed = _pass(name, case, _drawn_in_place(case), settings)
    print(json.dumps({"needed_bytes": needed, "peak_bytes": _peak() - before}))


def _drawn_in_place(case: Case) -> Inputs:
    """Like ``make_inputs`` without its intermediate copies, which would count as ours."""
    shape = (case.batch, case.length, case.heads, case.head_dim)
    tensors = [torch.empty(shape).normal_().transpose(1, 2) for _ in range(4)]
    return Inputs(*tensors)


if __name__ == "__main__":
    _main()
