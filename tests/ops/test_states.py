"""The state (S, z) is all that linear attention remembers: any split of a call is the call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastattn import LinearAttentionState, feature_maps, linear_attention, linear_attention_step
from tests.ops.problems import (
    Case,
    arguments,
    assert_accurate,
    differentiate,
    draw,
    error,
    run,
    truth,
)

MAPS = [m for m in feature_maps.names() if feature_maps.get(m).is_separable and m != "identity"]


@pytest.mark.parametrize("split", [(1, 99), (64, 36), (30, 0, 70), (17, 17, 17, 49), (1,) * 100])
def test_any_split_of_a_call_is_the_call(backend: str, split: tuple[int, ...]) -> None:
    call = draw(Case(2, 4, 100, 16, Hk=2, is_causal=True, masked=True, return_state=True))
    kwargs = arguments(call) | {"backend": backend}
    whole, state = linear_attention(call.query, call.key, call.value, **kwargs)
    outs, running, start = [], None, 0
    for length in split:
        tokens = slice(start, start + length)
        start += length
        kwargs["key_mask"] = call.key_mask[:, tokens]
        out, running = linear_attention(
            *(x[:, :, tokens] for x in (call.query, call.key, call.value)),
            **kwargs,
            initial_state=running,
        )
        outs.append(out)
    assert error(torch.cat(outs, 2), whole) < 1e-5
    assert error(running.S, state.S) < 1e-5
    assert error(running.z, state.z) < 1e-5


def test_gradients_flow_through_a_split(backend: str) -> None:
    call = draw(Case(2, 2, 60, 16, is_causal=True, return_state=True))

    def in_two(query, key, value, S, z):  # type: ignore[no-untyped-def]
        kwargs = {"is_causal": True, "return_state": True, "backend": backend}
        head, state = linear_attention(query[:, :, :25], key[:, :, :25], value[:, :, :25], **kwargs)
        tail, state = linear_attention(
            query[:, :, 25:], key[:, :, 25:], value[:, :, 25:], **kwargs, initial_state=state
        )
        return torch.cat([head, tail], 2), state

    assert_accurate(differentiate(call, in_two), run(call, backend))


@pytest.mark.parametrize("returned", ["S", "z", "both"])
def test_a_loss_on_part_of_the_state(backend: str, returned: str) -> None:
    key, value = (torch.randn(1, 2, 20, 8, requires_grad=True) for _ in range(2))
    _, state = linear_attention(key, key, value, return_state=True, backend=backend)
    loss = {"S": state.S.sum(), "z": state.z.sum(), "both": state.S.sum() + state.z.sum()}
    dk, dv = torch.autograd.grad(loss[returned], (key, value), materialize_grads=True)
    phi = feature_maps.get("elu").phi(key)
    S, z = torch.einsum("bhmf,bhmd->bhfd", phi, value), phi.sum(2)
    loss = {"S": S.sum(), "z": z.sum(), "both": S.sum() + z.sum()}
    right = torch.autograd.grad(loss[returned], (key, value), materialize_grads=True)
    torch.testing.assert_close((dk, dv), right)


def test_states_of_two_stretches_add_up(backend: str) -> None:
    call = draw(Case(2, 2, 80, 16))
    states = [
        linear_attention(
            call.query,
            call.key[:, :, tokens],
            call.value[:, :, tokens],
            return_state=True,
            backend=backend,
        )[1]
        for tokens in (slice(0, 33), slice(33, 80), slice(0, 80))
    ]
    merged = states[0] + states[1]
    assert isinstance(merged, LinearAttentionState)
    assert error(merged.S, states[2].S) < 1e-6
    assert error(merged.z, states[2].z) < 1e-6


def test_a_call_leaves_its_initial_state_alone(backend: str) -> None:
    call = draw(Case(is_causal=True, initial_state=True, return_state=True))
    before = call.state.clone()
    results = run(call, backend)
    assert torch.equal(call.state.S, before.S)
    assert torch.equal(call.state.z, before.z)
    assert results["S"].data_ptr() != call.state.S.data_ptr()


def test_initial_state_of_any_strides(backend: str) -> None:
    call = draw(Case(2, 2, 40, 16, Dv=8, is_causal=True, initial_state=True, return_state=True))
    call.state = LinearAttentionState(
        call.state.S.mT.contiguous().mT, call.state.z.repeat_interleave(2, 2)[..., ::2]
    )
    assert_accurate(run(call, backend), truth(call))


def test_a_state_without_a_causal_call_is_added_too(backend: str) -> None:
    call = draw(Case(2, 2, 9, 16, M=40, masked=True, initial_state=True, return_state=True))
    assert_accurate(run(call, backend), truth(call))


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_loop_of_steps_is_the_causal_call(
    backend: str, feature_map: str, dtype: torch.dtype
) -> None:
    case = Case(2, 4, 30, 16, Hk=2, Dv=24, feature_map=feature_map, is_causal=True, scale=0.5)
    call = draw(case).to(dtype)
    right = truth(call)["out"]
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    state = LinearAttentionState.zeros(2, 2, 16, 24, feature_map=feature_map, dtype=sums)
    S = state.S
    outs = [
        linear_attention_step(
            *(x[:, :, i : i + 1] for x in (call.query, call.key, call.value)),
            state,
            feature_map=feature_map,
            scale=0.5,
            enable_gqa=True,
            backend=backend,
        )
        for i in range(30)
    ]
    assert outs[0].dtype == dtype
    assert outs[0].shape == (2, 4, 1, 24)
    assert state.S is S
    assert error(torch.cat(outs, 2), right) < 4 * max(torch.finfo(dtype).eps, 1e-15)


@pytest.mark.parametrize(
    "dims", [(1, 1), (3, 5), (32, 33), (60, 60), (64, 64), (128, 256), (256, 17)]
)
@pytest.mark.parametrize("normalize", [True, False])
def test_step_of_any_size(backend: str, dims: tuple[int, int], normalize: bool) -> None:
    call = draw(
        Case(3, 2, 1, dims[0], Dv=dims[1], is_causal=True, normalize=normalize,
             initial_state=True, return_state=True, layout="bnhd")
    )  # fmt: skip
    state = call.state.clone()
    out = linear_attention_step(
        call.query, call.key, call.value, state, normalize=normalize, backend=backend
    )
    right = truth(call)
    assert_accurate(
        {"out": out, "S": state.S, "z": state.z}, {name: right[name] for name in ("out", "S", "z")}
    )


def test_step_skips_masked_rows(backend: str) -> None:
    call = draw(Case(3, 2, 1, 16, is_causal=True, initial_state=True))
    call.key_mask = torch.tensor([[True], [False], [True]])
    call.key[1], call.value[1] = torch.nan, torch.nan
    state = call.state.clone()
    out = linear_attention_step(
        call.query, call.key, call.value, state, key_mask=call.key_mask, backend=backend
    )
    assert torch.equal(state.S[1], call.state.S[1])
    assert torch.equal(state.z[1], call.state.z[1])
    assert not torch.equal(state.z[0], call.state.z[0])
    assert error(out, truth(call)["out"]) < 1e-5


def test_step_without_keys_gives_zero(backend: str) -> None:
    state = LinearAttentionState.zeros(1, 2, 8, 8)
    query = torch.randn(1, 2, 1, 8)
    mask = torch.zeros(1, 1, dtype=torch.bool)
    out = linear_attention_step(query, query, query, state, key_mask=mask, backend=backend)
    assert not out.any()


def test_state_helpers() -> None:
    state = LinearAttentionState.zeros(2, 3, 4, 5, feature_map="cosine")
    assert state.S.shape == (2, 3, 5, 5)
    assert state.z.shape == (2, 3, 5)
    assert state.S.dtype == torch.float32
    S, z = state
    assert S is state.S
    assert z is state.z
    clone = state.clone()
    clone.S.add_(1)
    assert not state.S.any()
    assert state.detach().S.data_ptr() == state.S.data_ptr()
    assert state.to("meta").z.is_meta
    with pytest.raises(TypeError):
        state + 1


def test_states_are_no_tuples_to_arithmetic() -> None:
    state = LinearAttentionState.zeros(2, 3, 4, 5)
    more_rows = LinearAttentionState.zeros(1, 3, 4, 5)
    with pytest.raises(ValueError, match=r"same shapes and types; got S \(2, 3, 4, 5\)"):
        state + more_rows
    with pytest.raises(ValueError, match="float32 and .* torch.float64"):
        state + LinearAttentionState.zeros(2, 3, 4, 5, dtype=torch.float64)
    with pytest.raises(TypeError, match="only a LinearAttentionState can be added"):
        tuple(state) + state
    for product in (lambda: state * 2, lambda: 2 * state):
        with pytest.raises(TypeError, match="can't be multiplied"):
            product()


def test_a_saved_state_is_loaded(tmp_path: Path) -> None:
    state = LinearAttentionState(torch.randn(2, 3, 4, 5), torch.rand(2, 3, 4))
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert isinstance(loaded, LinearAttentionState)
    assert torch.equal(loaded.S, state.S) and torch.equal(loaded.z, state.z)
