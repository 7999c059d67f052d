"""torch's machinery around the interpreted kernels: compile, export, one graph for all lengths."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton is not installed")

from fastattn import linear_attention
from fastattn.backends.triton import launch
from tests.ops.problems import Case, assert_accurate, differentiate, draw, run

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="needs TRITON_INTERPRET=1")
causal = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@causal
def test_one_compiled_graph_takes_all_lengths(is_causal: bool) -> None:
    """Forward and backward, with lengths on both sides of a segment's end."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda *x: linear_attention(*x, is_causal=is_causal, backend="triton"),
        fullgraph=True,
        backend=counter,
    )

    def marked(*tensors: Tensor | None) -> Tensor:
        for x in tensors[:3]:
            torch._dynamo.mark_dynamic(x, 2)
        return compiled(*tensors[:3])

    for length in (7, 64, 520):
        call = draw(Case(1, 2, length, 8, is_causal=is_causal))
        assert_accurate(differentiate(call, marked), run(call, "triton"), 1e-6, 1e-6)
    assert counter.frame_count == 1


class Layer(nn.Module):
    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.is_causal = is_causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        out = linear_attention(q, k, v, is_causal=self.is_causal, backend="triton")
        return out.transpose(1, 2).flatten(2)


@causal
@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
def test_export_with_a_dynamic_length(is_causal: bool, trains: bool) -> None:
    layer = Layer(is_causal).requires_grad_(trains)
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(
        layer, (torch.randn(2, 12, 16),), dynamic_shapes={"x": {1: length}}
    )
    assert "fastattn.forward.default" in [str(node.target) for node in program.graph.nodes]
    for tokens in (3, 530):
        x = torch.randn(2, tokens, 16)
        torch.testing.assert_close(program.module()(x), layer(x))


@causal
def test_inductor_trains_a_module(is_causal: bool) -> None:
    layer, x = Layer(is_causal), torch.randn(2, 20, 16)
    compiled = torch.compile(layer, fullgraph=True)
    gradients = []
    for module in (layer, compiled):
        layer.zero_grad()
        module(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
