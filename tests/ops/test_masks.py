"""What takes part and what doesn't: key masks, packed sequences, rows with nothing to attend to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastattn import LinearAttentionState, feature_maps, linear_attention
from tests.ops.problems import Case, assert_accurate, draw, offsets, run, truth

MAPS = [name for name in feature_maps.names() if name != "identity"]
causal = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])


@pytest.mark.parametrize("feature_map", MAPS)
def test_masked_keys_are_as_if_absent(backend: str, feature_map: str) -> None:
    call = draw(Case(2, 2, 50, 16, M=90, feature_map=feature_map, masked=True))
    keep = call.key_mask[0]
    call.key_mask = keep.expand(2, -1)
    masked = run(call, backend)
    short = replace(call, key=call.key[:, :, keep], value=call.value[:, :, keep], key_mask=None)
    removed = run(short, backend)
    assert_accurate(
        {"out": masked["out"], "d query": masked["d query"]},
        {"out": removed["out"], "d query": removed["d query"]},
    )
    for name in ("d key", "d value"):
        assert not masked[name][:, :, ~keep].any()
        assert_accurate({name: masked[name][:, :, keep]}, {name: removed[name]})


@causal
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_a_masked_key_holds_leaks_nowhere(
    backend: str, feature_map: str, is_causal: bool, bad: float
) -> None:
    separable = feature_maps.get(feature_map).is_separable
    if is_causal and not separable:
        pytest.skip("non-causal by nature")
    case = Case(
        *(2, 2, 70, 16),
        feature_map=feature_map,
        is_causal=is_causal,
        masked=True,
        return_state=separable,
    )
    call = draw(case)
    clean = run(call, backend)
    hidden = ~call.key_mask[:, None, :, None]
    call.key, call.value = (x.masked_fill(hidden, bad) for x in (call.key, call.value))
    dirty = run(call, backend)
    for name in clean:
        assert dirty[name].isfinite().all(), name
        assert torch.equal(dirty[name], clean[name]), name


@causal
@pytest.mark.parametrize("feature_map", MAPS)
def test_rows_with_every_key_masked_give_zero_and_zero_gradients(
    backend: str, feature_map: str, is_causal: bool
) -> None:
    if is_causal and not feature_maps.get(feature_map).is_separable:
        pytest.skip("non-causal by nature")
    call = draw(Case(3, 2, 66, 16, feature_map=feature_map, is_causal=is_causal, masked=True))
    call.key_mask[1] = False
    results = run(call, backend)
    for name, result in results.items():
        assert result.isfinite().all(), name
        assert not result[1].any(), name
        assert result[0].any(), name


def test_causal_rows_before_the_first_key_give_zero(backend: str) -> None:
    call = draw(Case(1, 2, 150, 16, is_causal=True, masked=True))
    call.key_mask[:, :100], call.key_mask[:, 100:] = False, True
    results = run(call, backend)
    for name, result in results.items():
        assert not result[:, :, :100].any(), name
    assert_accurate(results, truth(call))


@causal
def test_mask_of_any_strides(backend: str, is_causal: bool) -> None:
    call = draw(Case(3, 1, 40, 8, is_causal=is_causal, masked=True))
    mask, right = call.key_mask, run(call, backend)
    for strided in (mask.t().contiguous().t(), mask.repeat_interleave(3, 1)[:, ::3]):
        call.key_mask = strided
        results = run(call, backend)
        assert all(torch.equal(results[name], right[name]) for name in right)
    call.key_mask = mask[:1].expand(3, -1)
    assert_accurate(run(call, backend), truth(call))


@causal
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_packed_sequences_are_separate_calls(backend: str, is_causal: bool, masked: bool) -> None:
    lengths = (5, 0, 64, 1, 130)
    case = Case(
        *(1, 2, 0, 16),
        lengths=lengths,
        is_causal=is_causal,
        masked=masked,
        initial_state=True,
        return_state=True,
    )
    call = draw(case)
    packed = run(call, backend, "chunked")
    assert_accurate(packed, truth(call))
    ends = offsets(lengths).tolist()
    for i in range(len(lengths)):
        tokens = slice(*ends[i : i + 2])
        alone = linear_attention(
            *(x[:, :, tokens] for x in (call.query, call.key, call.value)),
            is_causal=is_causal,
            key_mask=None if call.key_mask is None else call.key_mask[:, tokens],
            initial_state=LinearAttentionState(*(x[i : i + 1] for x in call.state)),
            backend=backend,
            form="chunked",
        )
        assert torch.equal(packed["out"][:, :, tokens], alone)


def test_packed_cross_attention(backend: str) -> None:
    call = draw(Case(1, 2, 0, 16, lengths=(3, 70, 0, 9), lengths_k=(80, 0, 4, 9), masked=True))
    assert_accurate(run(call, backend), truth(call))


@causal
@pytest.mark.parametrize("sizes", [(0, 5), (2, 0)], ids=["no rows", "no tokens"])
def test_empty_calls(backend: str, sizes: tuple[int, int], is_causal: bool) -> None:
    case = Case(
        *(sizes[0], 2, sizes[1], 16), is_causal=is_causal, initial_state=True, return_state=True
    )
    call = draw(case)
    results = run(call, backend)
    assert results["out"].shape == (sizes[0], 2, sizes[1], 16)
    assert torch.equal(results["S"], call.state.S)
    assert torch.equal(results["d initial_S"], call.grads["S"])


def test_no_keys_give_zero(backend: str) -> None:
    results = run(draw(Case(2, 2, 5, 16, M=0, return_state=True)), backend)
    assert not any(result.any() for result in results.values())
