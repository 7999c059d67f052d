"""The tests of the ops, run against the CUDA sources emulated on the CPU.

Every test of tests/ops that takes a backend, but for the ones named below. What the kernels do not
offer (float64, head sizes past 128) is left out by conftest.py.
"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ops import (
    test_accuracy,
    test_layouts,
    test_masks,
    test_random_problems,
    test_states,
    test_torch_integration,
    test_values,
)

MODULES = (
    test_accuracy,
    test_layouts,
    test_masks,
    test_random_problems,
    test_states,
    test_torch_integration,
    test_values,
)
LEFT_OUT = {
    "test_64k_tokens_do_not_drift": "minutes of emulation; test_kernels.py has smaller heads",
    "test_float64": "no float64",
    "test_float64_forms": "no float64",
    "test_gradcheck": "no float64",
    "test_gradcheck_of_feature_maps": "no float64",
}
fresh_compiler = test_torch_integration.fresh_compiler


def fewer_examples(function: Any) -> Any:
    """A test of random problems, other ones on every run, with fewer of them."""
    test = given(case=test_random_problems.cases(), numbers=st.integers(0, 2**31))(
        function.hypothesis.inner_test
    )
    test.pytestmark = getattr(function, "pytestmark", [])
    return settings(
        max_examples=40,
        deadline=None,
        derandomize=False,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )(test)


def backend_tests(module: ModuleType) -> dict[str, object]:
    """Test functions that take a backend."""
    return {
        name: fewer_examples(function) if hasattr(function, "hypothesis") else function
        for name, function in vars(module).items()
        if name.startswith("test_")
        and inspect.isfunction(function)
        and "backend" in inspect.signature(function).parameters
        and name not in LEFT_OUT
    }


for _module in MODULES:
    _found = backend_tests(_module)
    assert not _found.keys() & globals().keys(), "two tests of one name"
    globals().update(_found)
