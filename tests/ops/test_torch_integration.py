"""What PyTorch expects of an op: opcheck, gradcheck, compile, export, autocast, checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import (
    LinearAttentionState,
    feature_maps,
    linear_attention,
    linear_attention_step,
)
from fastattn.ops.attention import op_arguments
from fastattn.ops.library import backward_op, forward_op, step_op
from tests.ops.problems import Case, arguments, assert_accurate, differentiate, draw, offsets, run

CASES = {
    "full": Case(2, 2, 9, 6),
    "masked cross attention": Case(2, 4, 5, 6, Hk=2, M=9, Dv=3, masked=True),
    "causal with states": Case(
        2, 2, 9, 6, is_causal=True, initial_state=True, return_state=True, layout="bnhd"
    ),
    "packed": Case(1, 2, 0, 6, is_causal=True, lengths=(4, 0, 7), return_state=True),
    "efficient": Case(2, 2, 9, 6, feature_map="efficient", masked=True),
    "not normalised": Case(2, 2, 9, 6, feature_map="identity", normalize=False, scale=0.5),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def of_op(case: Case, backend: str, requires_grad: bool) -> tuple[Any, ...]:
    call = draw(case)
    for x in (call.query, call.key, call.value, *(call.state or ())):
        x.requires_grad_(requires_grad)
    return op_arguments(
        *(call.query, call.key, call.value),
        **arguments(call),
        initial_state=call.state,
        backend=backend,
    )


@each_case
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_opcheck_forward(backend: str, case: Case, requires_grad: bool) -> None:
    torch.library.opcheck(forward_op, of_op(case, backend, requires_grad))


@each_case
def test_opcheck_backward(backend: str, case: Case) -> None:
    args = of_op(case, backend, requires_grad=True)
    args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
    out, S, z, saved = forward_op(*args)
    grads = (torch.randn_like(S), torch.randn_like(z)) if case.return_state else (None, None)
    torch.library.opcheck(backward_op, (saved, torch.randn_like(out), *grads, *args))


def test_opcheck_backward_of_a_transposed_state(backend: str) -> None:
    """Its gradients come contiguous, and what compiles has to be told so."""
    call = draw(Case(2, 2, 9, 4, is_causal=True, initial_state=True))
    S, z = call.state
    call.state = LinearAttentionState(S.mT.contiguous().mT, z)
    tensors = (call.query.requires_grad_(), call.key, call.value)
    args = op_arguments(*tensors, **arguments(call), initial_state=call.state, backend=backend)
    args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
    out, _, _, saved = forward_op(*args)
    torch.library.opcheck(backward_op, (saved, torch.randn_like(out), None, None, *args))


def test_opcheck_step(backend: str) -> None:
    x, state = torch.randn(2, 3, 1, 8), LinearAttentionState.zeros(2, 3, 8, 8)
    mask = torch.tensor([[True], [False]])
    for key_mask in (None, mask):
        torch.library.opcheck(step_op, (x, x, x, key_mask, *state, "elu", True, 1.0, 1e-6, backend))


@each_case
def test_gradcheck(backend: str, case: Case) -> None:
    call = draw(case).to(torch.float64)
    tensors = [call.query, call.key, call.value, *(call.state or ())]

    def function(*tensors: Tensor) -> Any:
        state = LinearAttentionState(*tensors[3:]) if tensors[3:] else None
        returned = linear_attention(
            *tensors[:3], **arguments(call), initial_state=state, backend=backend
        )
        return (returned[0], *returned[1]) if case.return_state else returned

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in tensors])


@pytest.mark.parametrize("feature_map", feature_maps.names())
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_gradcheck_of_feature_maps(backend: str, feature_map: str, is_causal: bool) -> None:
    phi = feature_maps.get(feature_map)
    case = Case(
        *(1, 2, 7, 5),
        feature_map=feature_map,
        is_causal=is_causal and phi.is_separable,
        normalize=phi.is_nonnegative,
        scale=0.8,
    )
    call = draw(case).to(torch.float64)
    tensors = [x.requires_grad_() for x in (call.query, call.key, call.value)]
    assert torch.autograd.gradcheck(
        lambda *x: linear_attention(*x, **arguments(call), backend=backend), tensors
    )


def test_second_derivatives_are_refused_when_they_are_taken(backend: str) -> None:
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        linear_attention(x, x, x, backend=backend).sum(), x, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        gradient.sum().backward()


def test_only_what_needs_a_gradient_gets_one(backend: str) -> None:
    query, key, value = (torch.randn(1, 2, 5, 4) for _ in range(3))
    value.requires_grad_()
    linear_attention(query, key, value, backend=backend).sum().backward()
    assert value.grad is not None
    assert query.grad is None
    assert not linear_attention(query, key, key, backend=backend).requires_grad
    with torch.no_grad():
        assert not linear_attention(query, key, value, backend=backend).requires_grad
    with torch.inference_mode():
        assert linear_attention(query, key, value, backend=backend).is_inference()


def test_inputs_changed_before_backward_are_noticed(backend: str) -> None:
    query, key = torch.randn(1, 2, 5, 4, requires_grad=True), torch.randn(1, 2, 5, 4)
    out = linear_attention(query, key, key, backend=backend)
    key.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# --- torch.compile ------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@each_case
def test_compile_fullgraph(fresh_compiler: None, backend: str, case: Case) -> None:
    call = draw(case)

    def function(*tensors: Tensor | None) -> Any:
        query, key, value, S, z = tensors
        state = None if S is None else LinearAttentionState(S, z)
        return linear_attention(
            query * 1.0, key, value, **kwargs, initial_state=state, backend=backend
        )

    kwargs = arguments(call)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_accurate(differentiate(call, compiled), run(call, backend), 1e-6, 1e-6)


class Layer(nn.Module):
    """What a user writes around the op."""

    def __init__(self, is_causal: bool = True) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        options = {"feature_map": F.softplus, "is_causal": self.is_causal}
        y = linear_attention(q, k, v, key_mask=mask, **options)
        return self.out(y.transpose(1, 2).flatten(2))


def test_inductor_trains_a_module(fresh_compiler: None) -> None:
    layer, x = Layer(), torch.randn(2, 12, 32)
    mask = torch.rand(2, 12) < 0.8
    compiled = torch.compile(layer, fullgraph=True)
    for module in (layer, compiled):
        layer.zero_grad()
        module(x, mask).square().sum().backward()
        if module is layer:
            right = [p.grad.clone() for p in layer.parameters()]
    for parameter, gradient in zip(layer.parameters(), right, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, mask), layer(x, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_one_graph_serves_every_length(fresh_compiler: None, backend: str, is_causal: bool) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return linear_attention(query, key, value, is_causal=is_causal, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for length in (7, 64, 100, 1025, 1500):
        call = draw(Case(2, 2, length, 8, is_causal=is_causal))
        for x in (call.query, call.key, call.value):
            torch._dynamo.mark_dynamic(x, 2)

        def marked(*tensors: Tensor | None) -> Tensor:
            for x in tensors[:3]:
                torch._dynamo.mark_dynamic(x, 2)
            return compiled(*tensors[:3])

        assert_accurate(differentiate(call, marked), run(call, backend), 1e-6, 1e-6)
        assert counter.frame_count == 1


def test_lengths_that_are_not_announced_compile_twice(fresh_compiler: None) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x: linear_attention(x, x, x, is_causal=True), fullgraph=True, backend=counter
    )
    for length in (9, 30, 70, 2000):
        compiled(torch.randn(1, 2, length, 8))
    assert counter.frame_count == 2


def test_compiled_steps_update_the_state(fresh_compiler: None, backend: str) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: Tensor, state: LinearAttentionState) -> Tensor:
        return linear_attention_step(x, x, x, state, backend=backend) + 1

    state, right = LinearAttentionState.zeros(2, 2, 8, 8), LinearAttentionState.zeros(2, 2, 8, 8)
    for _ in range(4):
        x = torch.randn(2, 2, 1, 8)
        out = step(x, state)
        assert torch.equal(out, linear_attention_step(x, x, x, right, backend=backend) + 1)
        assert torch.equal(state.S, right.S)


def test_compiled_packed_sequences_are_still_checked(fresh_compiler: None) -> None:
    compiled = torch.compile(
        lambda x, cu: linear_attention(x, x, x, cu_seqlens=cu), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(1, 2, 9, 8)
    assert torch.equal(
        compiled(x, offsets((4, 5))), linear_attention(x, x, x, cu_seqlens=offsets((4, 5)))
    )
    with pytest.raises(ValueError, match="cu_seqlens must start at 0 and end at"):
        compiled(x, offsets((4, 6)))


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_length(fresh_compiler: None, strict: bool) -> None:
    layer = Layer().eval()
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(
        layer, (torch.randn(2, 12, 32),), dynamic_shapes={"x": {1: length}}, strict=strict
    )  # fmt: skip
    targets = [str(node.target) for node in program.graph.nodes]
    assert "fastattn.forward.default" in targets
    for tokens in (3, 1500):
        x = torch.randn(2, tokens, 32)
        torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("graph", ["export", "trace"])
def test_a_graph_of_inference_can_be_trained(
    fresh_compiler: None, graph: str, is_causal: bool
) -> None:
    """It says that no gradients are needed, which was true when it was made."""
    layer, x = Layer(is_causal=is_causal).eval(), torch.randn(1, 1200, 32)
    with torch.no_grad():
        if graph == "export":
            traced = torch.export.export(layer, (x,)).module()
        else:
            traced = torch.jit.trace(layer, (x,))
    gradients = {}
    for name, model in (("own", layer), ("traced", traced)):
        inputs = x.clone().requires_grad_()
        model(inputs).square().sum().backward()
        gradients[name] = inputs.grad
    assert gradients["own"].abs().max() > 0
    torch.testing.assert_close(gradients["traced"], gradients["own"])


class Rotated(nn.Module):
    """Buffers in float32 make query and key float32 where autocast makes the value bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96)
        self.register_buffer("cos", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], 3, 4, 8)
        query, key, value = self.project(x).view(shape).permute(2, 0, 3, 1, 4)
        return linear_attention(query * self.cos, key * self.cos, value, is_causal=True)


def test_a_graph_under_autocast(fresh_compiler: None) -> None:
    module, x = Rotated(), torch.randn(2, 700, 32)
    graph = torch.export.export(module, (x,)).module()
    results = {}
    for name, model in (("own", module), ("graph", graph)):
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(inputs)
        out.square().sum().backward()
        results[name] = out, inputs.grad
    assert results["graph"][0].dtype == torch.bfloat16
    for ours, right in zip(results["graph"], results["own"], strict=True):
        assert torch.equal(ours, right)


class Step(nn.Module):
    def forward(self, x: Tensor, S: Tensor, z: Tensor) -> Tensor:
        return linear_attention_step(x, x, x, (S, z))


def test_a_graph_of_a_step_under_autocast(fresh_compiler: None) -> None:
    x, state = torch.randn(2, 3, 1, 8), LinearAttentionState.zeros(2, 3, 8, 8)
    graph = torch.export.export(Step(), (x, *state)).module()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        ours = graph(x, *state)
        state = LinearAttentionState.zeros(2, 3, 8, 8)
        assert torch.equal(ours, Step()(x, *state))
        assert ours.dtype == torch.bfloat16


def test_ops_refuse_tensors_that_do_not_agree(backend: str) -> None:
    """Graphs call them without the public function's checks, and kernels trust what they get."""
    case = Case(2, 2, 9, 8, is_causal=True, initial_state=True, masked=True, return_state=True)
    right = of_op(case, backend, requires_grad=False)
    forward_op(*right)
    query, key, value, mask, *_, S, z = right[:8]
    for place, wrong, message in (
        (1, key[:1], "key must have query's batch size B = 2"),
        (1, key[:, :, :5], "value must have key's heads and tokens"),
        (2, value.double(), "value must have query's dtype"),
        (3, mask[:, :4], "key_mask must be bool of shape"),
        (3, mask.int(), "key_mask must be bool of shape"),
        (6, S[:1], r"initial_state.S must have shape \(B, Hk, F, Dv\)"),
        (7, z.double(), "initial_state.z must be torch.float32"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            forward_op(*right[:place], wrong, *right[place + 1 :])
    token = (query[:, :, :1], key[:, :, :1], value[:, :, :1])
    options = ("elu", True, 1.0, 1e-6, backend)
    step_op(*token, None, S.contiguous(), z.contiguous(), *options)
    with pytest.raises(TypeError, match="value must have query's dtype"):
        step_op(*token[:2], token[2].double(), None, S, z, *options)
    with pytest.raises(ValueError, match="initial_state.S must have shape"):
        step_op(*token, None, S[:1].contiguous(), z, *options)
    with pytest.raises(ValueError, match="state must be contiguous"):
        step_op(*token, None, S.mT.contiguous().mT, z, *options)
    *_, saved = forward_op(*right[:-2], True, backend)
    with pytest.raises(ValueError, match="saved must be what fastattn::forward gave"):
        backward_op(
            torch.cat([saved, saved.new_zeros(1)]), query, None, None, *right[:-2], True, backend
        )


# --- autocast, checkpointing, sharing -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.float64])
def test_autocast_gives_the_dtype_of_sdpa(
    backend: str, dtype: torch.dtype, given: torch.dtype
) -> None:
    query, key, value = (torch.randn(1, 2, 6, 8, dtype=given, requires_grad=True) for _ in range(3))
    with torch.autocast(query.device.type, dtype):
        out, state = linear_attention(query, key, value, return_state=True, backend=backend)
        assert out.dtype == F.scaled_dot_product_attention(query, key, value).dtype
        sums = torch.float64 if given == torch.float64 else torch.float32
        assert state.S.dtype == state.z.dtype == sums
        again, _ = linear_attention(
            query, key, value, initial_state=state, return_state=True, backend=backend
        )
        step = linear_attention_step(
            *(x[:, :, :1].detach() for x in (query, key, value)),
            LinearAttentionState(*state).detach(),
            backend=backend,
        )
        assert again.dtype == step.dtype == out.dtype
    out.sum().backward()
    assert query.grad.dtype == given


def test_checkpointing(backend: str) -> None:
    call = draw(Case(2, 2, 20, 8))

    def function(query, key, value, S, z):  # type: ignore[no-untyped-def]
        return torch.utils.checkpoint.checkpoint(
            lambda *x: linear_attention(*x, backend=backend), query, key, value, use_reentrant=False
        )

    results, right = differentiate(call, function), run(call, backend)
    assert all(torch.equal(results[name], right[name]) for name in right)


def test_one_tensor_as_query_key_and_value(backend: str) -> None:
    x = torch.randn(1, 2, 9, 8, requires_grad=True)
    linear_attention(x, x, x, backend=backend).square().sum().backward()
    parts = [x.detach().clone().requires_grad_() for _ in range(3)]
    linear_attention(*parts, backend=backend).square().sum().backward()
    torch.testing.assert_close(x.grad, parts[0].grad + parts[1].grad + parts[2].grad)
