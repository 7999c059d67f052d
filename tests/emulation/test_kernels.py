"""What the tests of the ops miss: several segments, little shared memory, exact repetition."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastattn import backends, linear_attention
from fastattn.backends import cuda
from fastattn.ops.attention import op_arguments
from fastattn.ops.pose import problem_of, split_arguments
from tests.emulation import build
from tests.emulation.backend import EmulatedBackend
from tests.ops import plain
from tests.ops.problems import Case, arguments, assert_accurate, draw, error, run, truth

causal = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
SEGMENT = 512


class SmallMemory(EmulatedBackend):
    """A block may have 99 KB, as on sm_120, the least of what we compile for."""

    name = "small"
    limits = (99 << 10, 188)


class FewMultiprocessors(EmulatedBackend):
    """So few that a block for every head keeps all of them busy."""

    name = "few"
    limits = (227 << 10, 2)


@pytest.fixture
def few(backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    entry = ("tests.emulation.test_kernels", "FewMultiprocessors")
    monkeypatch.setitem(backends._BACKENDS, "few", entry)
    return "few"


@pytest.fixture
def small(backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(
        backends._BACKENDS, "small", ("tests.emulation.test_kernels", "SmallMemory")
    )
    return "small"


def several_segments(is_causal: bool, **changes: object) -> Case:
    return Case(
        **{"B": 1, "H": 2, "Hk": 1, "N": 2 * SEGMENT + 70, "D": 16, "Dv": 9}  # type: ignore[arg-type]
        | {"masked": True, "initial_state": True, "return_state": True, "is_causal": is_causal}
        | changes,
    )


@causal
def test_several_segments(backend: str, is_causal: bool) -> None:
    call = draw(several_segments(is_causal))
    assert_accurate(run(call, backend, "chunked"), truth(call))


def test_several_segments_of_a_softmax_over_tokens(backend: str) -> None:
    call = draw(Case(1, 2, 600, 16, M=1100, feature_map="efficient", masked=True))
    assert_accurate(run(call, backend), truth(call))


@causal
def test_packed_sequences_across_segments(backend: str, is_causal: bool) -> None:
    """Sequences that end on, before and after the multiples of a segment."""
    lengths = (SEGMENT, 1, 0, SEGMENT + 1, 2 * SEGMENT - 3, 5)
    call = draw(several_segments(is_causal, H=1, lengths=lengths, masked=False))
    assert_accurate(run(call, backend, "chunked"), truth(call))


def test_the_recurrent_form_keeps_what_the_chunked_backward_wants(backend: str) -> None:
    call = draw(several_segments(True, H=1, N=SEGMENT + 9))
    assert_accurate(run(call, backend, "recurrent"), truth(call))


@causal
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_states_in_the_workspace(
    backend: str, small: str, dtype: torch.dtype, is_causal: bool
) -> None:
    """Where shared memory is short, states move to the workspace: the same bits come out."""
    call = draw(Case(1, 2, 70, 128, dtype=dtype, is_causal=is_causal, initial_state=True))
    roomy, tight = run(call, backend), run(call, small)
    assert all(torch.equal(roomy[name], tight[name]) for name in roomy)


@causal
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_every_block_fits_where_shared_memory_is_least(
    small: str, dim: int, dtype: torch.dtype, is_causal: bool
) -> None:
    """The most features: cosine has one more than the head size."""
    call = draw(Case(1, 1, 3, dim, dtype=dtype, is_causal=is_causal, feature_map="cosine"))
    assert all(result.isfinite().all() for result in run(call, small, "chunked").values())


@causal
def test_a_row_alone_and_in_a_batch_has_the_same_bits(backend: str, is_causal: bool) -> None:
    case = several_segments(is_causal, B=2, N=SEGMENT + 40, initial_state=False, return_state=False)
    call = draw(case)
    together = run(call, backend)
    again = run(call, backend)
    assert all(torch.equal(together[name], again[name]) for name in together)
    with torch.no_grad():
        kwargs = arguments(call) | {"key_mask": call.key_mask[1:]}
        alone = linear_attention(
            *(x[1:] for x in (call.query, call.key, call.value)), **kwargs, backend=backend
        )
    assert torch.equal(alone, together["out"][1:])


@pytest.mark.parametrize(
    "case",
    [
        several_segments(True),
        several_segments(True, Hk=2, D=40, Dv=60, dtype=torch.bfloat16, masked=False),
        several_segments(True, Hk=2, N=2 * SEGMENT, initial_state=False, return_state=False),
        several_segments(True, N=SEGMENT + 1, feature_map="identity", normalize=False),
    ],
    ids=["grouped, masked, with states", "bfloat16", "whole segments", "not normalised"],
)
def test_a_block_that_walks_a_sequence_gives_the_bits_of_many(
    backend: str, few: str, case: Case
) -> None:
    """Keys are read once where heads fill the GPU, and the sums are those of segments even so."""
    call = draw(case)
    walked, cut = run(call, few), run(call, backend)
    assert all(torch.equal(walked[name], cut[name]) for name in cut)
    if case.dtype == torch.float32:
        assert_accurate(walked, truth(call))


def launches(backend: EmulatedBackend, case: Case) -> tuple[int, int]:
    """Kernels that forward and backward launch."""
    call = draw(case)
    for x in (call.query, call.key, call.value):
        x.requires_grad_()
    given = op_arguments(call.query, call.key, call.value, **arguments(call))
    inputs, options, _ = split_arguments(given)
    problem = problem_of(inputs, *options)
    detached = inputs._replace(
        **{x: getattr(inputs, x).detach() for x in ("query", "key", "value")}
    )
    outputs = backend.forward(problem, detached)
    forward = backend.launches()
    backend.backward(problem, detached, outputs.saved, torch.randn_like(outputs.out), None, None)
    return forward, backend.launches()


def test_few_launches(backend: str, few: str) -> None:
    """One each way for a BERT's batch; keys are read once where heads fill the GPU."""
    plenty, little = EmulatedBackend(), FewMultiprocessors()
    short, long = Case(1, 2, SEGMENT, 16), Case(1, 2, SEGMENT + 30, 16)
    assert launches(plenty, short) == (1, 1)
    assert launches(plenty, long) == (3, 3)
    causal_short, causal_long = replace(short, is_causal=True), replace(long, is_causal=True)
    assert launches(plenty, causal_short) == (1, 2)
    assert launches(plenty, causal_long) == (3, 4)
    assert launches(little, causal_long) == (1, 4)


def test_32k_tokens_of_small_heads_do_not_drift(backend: str) -> None:
    """64 segments, forwards and backwards; the worst tokens, not only the norm."""
    call = draw(Case(1, 1, 64 * SEGMENT, 16, is_causal=True, return_state=True))
    results, right = run(call, backend), plain.run(call.to(torch.float64))
    assert_accurate(results, right)
    for name in ("out", "d query"):
        assert error(results[name][:, :, -SEGMENT:], right[name][:, :, -SEGMENT:]) < 1e-5
    for name in ("d key", "d value"):
        assert error(results[name][:, :, :SEGMENT], right[name][:, :, :SEGMENT]) < 1e-5


@causal
@pytest.mark.parametrize("strides", [(2**31 + 64, 16), (16, 2**31 + 64)], ids=["heads", "tokens"])
def test_gradients_of_tensors_past_32_bits(
    backend: str, tmp_path: Path, strides: tuple[int, int], is_causal: bool
) -> None:
    """Inputs and the gradient that comes back, 2^31 elements from row to row. The memory is a file
    with a hole, of which only the pages of a few rows ever exist."""
    shape = (1, 2, 3, 16)
    size = 2 * (3 * max(strides) + 1024)
    case = Case(1, 2, 3, 16, is_causal=is_causal, dtype=torch.bfloat16)
    near, far = draw(case), draw(case)
    for name in ("query", "key", "value", "out"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
        memory = torch.UntypedStorage.from_file(str(tmp_path / name), False, size)
        flat = torch.tensor([], dtype=torch.bfloat16).set_(memory)
        view = flat.as_strided(shape, (0, *strides, 1))
        view.copy_(near.grads["out"] if name == "out" else getattr(near, name))
        if name == "out":
            far.grads["out"] = view
        else:
            setattr(far, name, view)
    right, results = run(near, backend, "chunked"), run(far, backend, "chunked")
    assert all(torch.equal(results[name], right[name]) for name in right)


def test_offsets_that_are_wrong_stay_inside_the_tensors(backend: str) -> None:
    """On a GPU nobody reads cu_seqlens on the host, so the kernels clamp what they are given."""
    emulated = EmulatedBackend()
    call = draw(Case(1, 1, 0, 16, lengths=(30, 40), is_causal=True))
    inputs, options, _ = split_arguments(
        op_arguments(call.query, call.key, call.value, **arguments(call))
    )
    wrong = torch.tensor([-5, 90, 33], dtype=torch.int32)
    emulated.forward(
        problem_of(inputs, *options), inputs._replace(cu_seqlens=wrong, cu_seqlens_k=wrong)
    )


def test_python_and_the_kernels_agree_on_their_constants(backend: str) -> None:
    library = build.library()
    assert library.SEGMENT_TOKENS == cuda._SEGMENT_TOKENS == SEGMENT
    assert library.MAX_DIM == cuda._MAX_DIM
