"""What the two sides of the CPU backend must agree on."""

from __future__ import annotations

import pytest
import torch

from fastattn import backends
from fastattn.backends import cpu
from fastattn.ops.problem import Problem

LENGTHS = (1, 95, 576, 577, 4096, 36_863, 36_864, 36_865, 100_000, 1_000_000)


@pytest.mark.parametrize("packed", [None, 3], ids=["batch", "packed"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("feature_map", ["elu", "cosine", "efficient"])
def test_what_is_saved_has_room(feature_map: str, is_causal: bool, packed: int | None) -> None:
    """The library writes as much as it says, into what Python has made: two elements more, so that
    sizes of 0 and 1 never occur."""
    if is_causal and feature_map == "efficient":
        pytest.skip("efficient is non-causal by nature")
    for length in LENGTHS:
        problem = Problem(
            batch=1 if packed else 2, num_heads=6, num_kv_heads=2, query_length=length,
            key_length=length, head_dim=20, value_dim=12, dtype=torch.float32, device_type="cpu",
            feature_map=feature_map, is_causal=is_causal, normalize=True, scale=1.0, eps=1e-6,
            num_sequences=packed, needs_grad=True,
        )  # fmt: skip
        spare = 2 if is_causal else 0
        made = backends.load("cpu").saved_size(problem)
        assert made - spare == cpu._native_problem(problem).saved_size()
