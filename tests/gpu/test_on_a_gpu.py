"""What no interpreter and no emulator shows: graphs, streams, memory, compilation, long inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import gpu_check, plain
from fastattn import (
    LinearAttentionState,
    backends,
    feature_maps,
    linear_attention,
    linear_attention_step,
)

causal = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])


def draw(B: int, H: int, N: int, D: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """query, key, value and the gradient of the output, as a model's projections lay them out."""
    shape = (B, N, H, D)
    return [torch.randn(shape, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(4)]


def train(tensors: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    *leaves, grad_out = tensors
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = linear_attention(*leaves, **options)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad_out))


def captured(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


@pytest.mark.parametrize("dtype", gpu_check.BOUNDS, ids=str)
@pytest.mark.parametrize("feature_map", feature_maps.names())
def test_agrees_with_the_reference(gpu_backend: str, feature_map: str, dtype: torch.dtype) -> None:
    """Both forms, forward and backward."""
    assert not gpu_check.check(gpu_backend, "cuda", feature_map, dtype)


@causal
@pytest.mark.parametrize("length", [300, 5000])
def test_a_cuda_graph_computes_what_a_call_does(
    gpu_backend: str, length: int, is_causal: bool
) -> None:
    tensors, others = draw(2, 3, length, 64), draw(2, 3, length, 64)
    options = {"is_causal": is_causal, "backend": gpu_backend}
    graph, results = captured(lambda: train(tensors, **options))
    for tensor, other in zip(tensors, others, strict=True):
        tensor.copy_(other)
    graph.replay()
    for replayed, right in zip(results, train(others, **options), strict=True):
        assert torch.equal(replayed, right)


def test_a_cuda_graph_steps_the_state(gpu_backend: str) -> None:
    q, k, v, _ = draw(4, 3, 1, 64)
    state = LinearAttentionState.zeros(4, 3, 64, 64, device="cuda")
    right = LinearAttentionState.zeros(4, 3, 64, 64, device="cuda")
    graph, out = captured(lambda: linear_attention_step(q, k, v, state, backend=gpu_backend))
    state.S.zero_()
    state.z.zero_()
    for _ in range(3):
        graph.replay()
        wanted = linear_attention_step(q, k, v, right, backend=gpu_backend)
    assert torch.equal(out, wanted)
    assert torch.equal(state.S, right.S)


@causal
def test_another_length_compiles_nothing(is_causal: bool) -> None:
    pytest.importorskip("triton")
    import triton

    options = {"is_causal": is_causal, "backend": "triton"}
    train(draw(1, 2, 3000, 64), **options)
    compiled = []
    before = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda **named: compiled.append(named)
    try:
        for length in (2999, 4096, 5001, 8192):
            train(draw(1, 2, length, 64), **options)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before
    assert not compiled


@causal
def test_few_and_many_heads_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, is_causal: bool
) -> None:
    """Who computes a segment does not change it, and neither does what else is in the batch."""
    pytest.importorskip("triton")
    from fastattn.backends.triton import backend

    tensors = draw(2, 4, 4100, 64)
    results = []
    for multiprocessors in (1, 10**6):
        monkeypatch.setattr(backend, "_multiprocessors", lambda *_, n=multiprocessors: n)
        results.append(train(tensors, is_causal=is_causal, backend="triton"))
    alone = train([x[1:] for x in tensors], is_causal=is_causal, backend="triton")
    for one, other, single in zip(*results, alone, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one[1:], single)


@causal
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_few_and_many_multiprocessors_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, is_causal: bool
) -> None:
    """On one multiprocessor a block walks a whole causal sequence, which takes 132 heads here."""
    cuda = backends.load("cuda")
    if isinstance(cuda, str):
        pytest.skip(cuda)
    tensors = draw(2, 4, 4100, 64, dtype)
    shared_bytes, _ = cuda._limits(torch.cuda.current_device())
    results = []
    for limits in ((shared_bytes, 1), (shared_bytes, 10**6), (99 << 10, 10**6)):
        monkeypatch.setattr(cuda, "_limits", lambda index, limits=limits: limits)
        results.append(train(tensors, is_causal=is_causal, backend="cuda"))
    for walked, cut, spilled in zip(*results, strict=True):
        assert torch.equal(walked, cut)
        assert torch.equal(spilled, cut)


@causal
def test_again_gives_the_same_bits(gpu_backend: str, is_causal: bool) -> None:
    tensors = draw(2, 4, 4100, 64)
    options = {"is_causal": is_causal, "backend": gpu_backend}
    first = train(tensors, **options)
    for _ in range(5):
        for one, other in zip(first, train(tensors, **options), strict=True):
            assert torch.equal(one, other)


@causal
def test_memory(gpu_backend: str, is_causal: bool) -> None:
    """A training step takes no more than inputs, output, their gradients, and a tenth (an eighth
    where a block has so little shared memory that our CUDA kernels keep states elsewhere)."""
    tensors = draw(2, 12, 65536, 64)
    train(tensors, is_causal=is_causal, backend=gpu_backend)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    train(tensors, is_causal=is_causal, backend=gpu_backend)
    size = tensors[0].numel() * tensors[0].element_size()
    room = getattr(torch.cuda.get_device_properties(0), "shared_memory_per_block_optin", 0)
    allowed = 0.1 if room > 128 << 10 else 0.125
    assert torch.cuda.max_memory_allocated() - held <= (4 + allowed * 8) * size


@causal
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_long_sequences(gpu_backend: str, dtype: torch.dtype, is_causal: bool) -> None:
    tensors = draw(1, 2, 131072, 64, dtype)
    results = train(tensors, is_causal=is_causal, backend=gpu_backend)
    *leaves, grad_out = (x.double() for x in tensors)
    leaves = [x.requires_grad_() for x in leaves]
    out = plain.causal(*leaves, chunk=128) if is_causal else plain.noncausal(*leaves)
    right = (out.detach(), *torch.autograd.grad(out, leaves, grad_out))
    for result, wanted in zip(results, right, strict=True):
        error = (result.double() - wanted).norm() / wanted.norm()
        assert error <= (1e-4 if dtype == torch.float32 else 3e-2)


def test_another_stream(gpu_backend: str) -> None:
    tensors = draw(2, 4, 2000, 64)
    wanted = train(tensors, is_causal=True, backend=gpu_backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = train(tensors, is_causal=True, backend=gpu_backend)
    stream.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(results, wanted, strict=True))


def test_offsets_beyond_32_bits(gpu_backend: str) -> None:
    """Rows so far apart that the last ones lie beyond 2^31 elements."""
    apart = 2**31 // 500
    apart -= apart % 8
    memory = torch.zeros(600 * apart, device="cuda", dtype=torch.bfloat16)
    rows = memory.as_strided((1, 1, 600, 64), (0, 0, apart, 1))
    q, k, v, _ = draw(1, 1, 600, 64)
    rows.copy_(v)
    out = linear_attention(q, k, rows, is_causal=True, backend=gpu_backend)
    assert torch.equal(out, linear_attention(q, k, v, is_causal=True, backend=gpu_backend))
