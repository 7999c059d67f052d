"""Problems drawn by hypothesis: every switch of the call against every other."""

from __future__ import annotations

import os
import random

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fastattn import feature_maps
from tests.conftest import DEVICE
from tests.ops import plain
from tests.ops.problems import LAYOUTS, Case, assert_accurate, draw, error, run, truth

lengths = st.one_of(st.integers(1, 5), st.integers(1, 140))

# With one feature or one key a query's gradient is zero by cancellation, and what it is measured
# against must not be that zero; see ``problems.error``.
FLOOR = 0.1


@st.composite
def cases(draw_: st.DrawFn) -> Case:
    feature_map = draw_(st.sampled_from(feature_maps.names()))
    phi = feature_maps.get(feature_map)
    is_causal = phi.is_separable and draw_(st.booleans())
    # In few dimensions a cosine close to -1 is likely, and 1 + cos then cancels for everybody.
    dim = draw_(st.integers(16 if feature_map == "cosine" else 2, 48))
    packed = draw_(st.booleans())
    packing = tuple(draw_(st.lists(st.integers(0, 70), min_size=1, max_size=5))) if packed else None
    packing_k = None
    if packing and not is_causal and draw_(st.booleans()):
        packing_k = tuple(draw_(st.integers(0, 70)) for _ in packing)
    kv_heads = draw_(st.integers(1, 3))
    length = draw_(lengths)
    return Case(
        B=draw_(st.integers(0, 3)),
        H=kv_heads * draw_(st.integers(1, 3)),
        N=length,
        D=dim,
        Hk=kv_heads,
        M=length if is_causal or draw_(st.booleans()) else draw_(lengths),
        Dv=draw_(st.integers(1, 48)),
        feature_map=feature_map,
        is_causal=is_causal,
        normalize=phi.is_nonnegative and draw_(st.booleans()),
        scale=draw_(st.sampled_from([None, 0.25, 1.5, -1.0]))
        if feature_map != "features"
        else None,
        masked=draw_(st.booleans()),
        lengths=packing,
        lengths_k=packing_k,
        initial_state=phi.is_separable and draw_(st.booleans()),
        return_state=phi.is_separable and draw_(st.booleans()),
        layout=draw_(st.sampled_from(LAYOUTS)),
    )


def example(function):  # type: ignore[no-untyped-def]
    """Settings of all tests here: the fixtures only set things up, so they need no resetting."""
    checked = settings(
        max_examples=int(os.environ.get("FASTATTN_TEST_EXAMPLES", 120)),
        deadline=None,
        # On a GPU every smaller example compiles kernels of its own: minutes for one failure.
        phases=list(Phase) if DEVICE == "cpu" else [Phase.explicit, Phase.generate],
        derandomize=False,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    return checked(given(case=cases(), numbers=st.integers(0, 2**31))(function))


@example
def test_float32(backend: str, case: Case, numbers: int) -> None:
    torch.manual_seed(numbers)
    call = draw(case)
    assert_accurate(run(call, backend), truth(call), floor=FLOOR)


@example
def test_float64_forms(backend: str, case: Case, numbers: int) -> None:
    torch.manual_seed(numbers)
    call = draw(case).to(torch.float64)
    form = random.Random(numbers).choice(["chunked", "recurrent"])
    assert_accurate(run(call, backend, form), truth(call), 1e-11, 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@example
def test_16_bit(backend: str, dtype: torch.dtype, case: Case, numbers: int) -> None:
    """At most twice as wrong as plain PyTorch; where a few numbers make that a matter of luck, as
    wrong as some roundings of each number that goes in."""
    torch.manual_seed(numbers)
    call = draw(case).to(dtype)
    reference, results, plainly = truth(call), run(call, backend), plain.run(call)
    precision = torch.finfo(dtype).eps
    for name, right in reference.items():
        ours, theirs = (
            error(x[name], right, floor=FLOOR if name.startswith("d ") else 0)
            for x in (results, plainly)
        )
        assert ours <= max(2 * theirs, 4 * precision), f"{name}: error {ours}, plain {theirs}"
