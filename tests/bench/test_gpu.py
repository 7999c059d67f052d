"""The benchmark of GPUs, run on the CPU: its grid, what it does with peers, its tables."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="rich, which bench/ prints with, is not installed")
pytest.importorskip("matplotlib", reason="matplotlib, which bench/ draws with, is not installed")

from rich.console import Console

import fastattn
from bench import gpu, gpu_peers, peers
from bench.cases import FORWARD, STEP, TRAIN, Case

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
CASES = [
    Case("decode", 2, 1, STEP, True, "float32", 2, 8),
    Case("bert", 2, 64, TRAIN, False, "float32", 2, 8),
    Case("long", 1, 128, FORWARD, True, "float32", 2, 8),
]


class FakeMeter(gpu.Meter):
    """A GPU on which everything takes two milliseconds, one of them in the kernels."""

    name = "a fake"

    def eager(self, run) -> float:  # type: ignore[no-untyped-def]
        run()
        return 2e-3

    def graph(self, run) -> float:  # type: ignore[no-untyped-def]
        return 1e-3

    def peak(self, run) -> int:  # type: ignore[no-untyped-def]
        return 2**20


def in_place_of_triton() -> tuple[peers.Peer, ...]:
    """The real peers, the Triton backend's place taken by the CPU's."""
    ours = replace(gpu_peers._ours("cpu"), name="triton")
    return (ours, *gpu_peers.PEERS[1:])


def contest(meter: gpu.Meter) -> gpu.Contest:
    return gpu.Contest(meter, peers.Settings(CPU, compile=False), 1e9, in_place_of_triton())


def shown(table) -> str:  # type: ignore[no-untyped-def]
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.group)
def test_right_peers_are_timed(case: Case) -> None:
    found = gpu.measure(case, contest(FakeMeter(CPU)))["contestants"]
    for name in ("triton", "pytorch"):
        assert found[name]["status"] == "timed", found[name]
        assert found[name]["eager_seconds"] == 2e-3
        assert found[name]["gbs"] == pytest.approx(case.bytes / 1e-3 * 1e-9)
        assert found[name]["share_of_copy"] == pytest.approx(case.bytes / 1e-3 / 1e9)
        assert found[name]["error"] < 1e-5
    assert found["cuda"]["status"] == "left out"  # no GPU, perhaps not even built
    assert found["cuda"]["reason"]
    assert ("fla" in found) == (case.causal and case.pass_ != STEP)
    assert ("flash-bla" in found) == (not case.causal)


def test_wrong_peers_are_not_timed() -> None:
    def attend(case, inputs, settings):  # type: ignore[no-untyped-def]
        return lambda q, k, v: fastattn.linear_attention(q, k, v) * 1.01

    wrong = peers.Peer("triton", "wrong", "linear", lambda *_: None, attend)
    fair = contest(FakeMeter(CPU))
    found = gpu.measure(CASES[1], replace(fair, peers=(wrong,)))["contestants"]["triton"]
    assert found["status"] == "wrong"
    assert "eager_seconds" not in found


def test_a_broken_peer_does_not_end_the_run() -> None:
    def attend(case, inputs, settings):  # type: ignore[no-untyped-def]
        raise RuntimeError("no kernel image is available")

    broken = peers.Peer("triton", "broken", "linear", lambda *_: None, attend)
    fair = contest(FakeMeter(CPU))
    case = gpu.measure(CASES[1], replace(fair, peers=(broken, *fair.peers[2:])))
    assert "no kernel image" in case["contestants"]["triton"]["reason"]
    assert case["contestants"]["pytorch"]["status"] == "timed"
    assert "no kernel image" in shown(gpu.case_table(case))
    assert case["name"] in shown(gpu.summary([case]))


def test_a_gpu_that_breaks_down_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_inputs(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu, "make_inputs", no_inputs)
    case = gpu.measure(CASES[1], contest(FakeMeter(CPU)))
    reasons = {found["reason"] for found in case["contestants"].values()}
    assert reasons == {"RuntimeError: CUDA error: an illegal memory access was encountered"}
    assert "illegal memory access" in shown(gpu.case_table(case))


def test_without_graphs_the_real_meter_takes_eager_times() -> None:
    found = gpu.measure(CASES[2], contest(gpu.Meter(CPU, 1e-3)))["contestants"]["pytorch"]
    assert found["eager_seconds"] > 0
    assert found["graph_seconds"] is None
    assert found["gbs"] == pytest.approx(CASES[2].bytes / found["eager_seconds"] * 1e-9)


def test_tables_name_the_fastest_of_each_family() -> None:
    case = gpu.measure(CASES[2], contest(FakeMeter(CPU)))
    case["contestants"]["pytorch"]["graph_seconds"] = 4e-3
    case["contestants"]["sdpa-flash"] = {**case["contestants"]["triton"], "graph_seconds": 5e-4}
    line = shown(gpu.summary([case])).splitlines()[-2]
    assert "pytorch" in line and "4x" in line
    assert "sdpa-flash" in line and "0.5x" in line


def test_a_wrong_kernel_of_ours_is_no_success() -> None:
    case = gpu.measure(CASES[1], contest(FakeMeter(CPU)))
    assert gpu.is_sound([case])
    for name, status in (("cuda", "wrong"), ("cuda", "failed"), ("triton", "left out")):
        contestants = case["contestants"] | {name: {"status": status, "reason": ""}}
        assert not gpu.is_sound([case, {**case, "contestants": contestants}])
    assert not gpu.is_sound([])


def test_the_grid_ends_on_time() -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    assert not list(gpu.run_grid(CASES, contest(FakeMeter(CPU)), -1, console))
    assert "3 cases left out" in console.export_text()


def test_the_grid_holds_what_the_goals_are_about() -> None:
    cases = list(gpu.full())
    assert len({case.name for case in cases}) == len(cases)
    assert {c.batch for c in cases if c.pass_ == STEP} == {1, 8, 32, 64, 128, 256}
    large = [c for c in cases if c.batch * c.heads * c.length >= 2**20]
    kinds = {(c.causal, c.pass_) for c in large}
    assert kinds == {(c, p) for c in (False, True) for p in (FORWARD, TRAIN)}
    assert {case.name for case in gpu.quick()} & {case.name for case in cases}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_error_says_so() -> None:
    command = [sys.executable, "-m", "bench", "--device", "cuda"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--device cuda needs a GPU that PyTorch can use" in done.stderr
    assert "Traceback" not in done.stderr
