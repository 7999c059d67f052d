"""Says which backend and kernel a call takes, and why the others don't: nobody should guess."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from fastattn import backends
from fastattn.backends import rules
from fastattn.ops.attention import op_arguments
from fastattn.ops.check import check_backend
from fastattn.ops.pose import check_contents, problem_of, split_arguments
from fastattn.ops.problem import Problem


@dataclass(frozen=True)
class Candidate:
    """One backend's answer to a problem: the kernel it would run, or why it can't."""

    backend: str
    kernel: str | None
    why_not: str | None


@dataclass(frozen=True)
class Explanation:
    """Prints as a table. ``backend`` and ``kernel`` are None if no backend can compute the call."""

    problem: Problem
    backend: str | None
    kernel: str | None
    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        rows = [("backend", "kernel", "")]
        for candidate in self.candidates:
            if candidate.backend == self.backend:
                note = "<- chosen"
            else:
                note = candidate.why_not or "could compute it too"
            rows.append((candidate.backend, candidate.kernel or "-", note))
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {note}".rstrip() for a, b, note in rows]
        return "\n".join([_describe(self.problem), *lines])


def explain(*args: Any, **kwargs: Any) -> Explanation:
    """What a call does, without doing it.

    Takes the arguments of ``linear_attention``, or one ``Problem`` (with ``backend=``). Arguments
    that the call would refuse are refused here with the same errors, except for a named backend
    that can't compute it: that is an answer here.
    """
    if args and isinstance(args[0], Problem):
        return _explain(*args, **kwargs)
    try:
        call = inspect.signature(op_arguments).bind(*args, **kwargs)
    except TypeError as error:
        message = f"explain takes what linear_attention takes, or a Problem: {error}"
        raise TypeError(message) from None
    inputs, options, backend = split_arguments(op_arguments(*call.args, **call.kwargs))
    problem = problem_of(inputs, *options)
    check_contents(problem, inputs)
    return _explain(problem, backend)


def _explain(problem: Problem, backend: str = "auto") -> Explanation:
    check_backend(backend)
    candidates = []
    for name in backends.names():
        reason = backends.why_not(name, problem)
        loaded = backends.load(name)
        kernel = None if reason or isinstance(loaded, str) else loaded.kernel(problem)
        candidates.append(Candidate(name, kernel, reason))
    able = {candidate.backend: candidate for candidate in candidates if not candidate.why_not}
    wanted = rules.order(problem) if backend == "auto" else (backend,)
    chosen = next((able[name] for name in wanted if name in able), None)
    return Explanation(
        problem,
        chosen.backend if chosen else None,
        chosen.kernel if chosen else None,
        tuple(candidates),
    )


def _describe(p: Problem) -> str:
    heads = f"{p.num_heads}" if p.num_heads == p.num_kv_heads else f"{p.num_heads}/{p.num_kv_heads}"
    length = f"{p.query_length}" if p.is_causal else f"{p.query_length} x {p.key_length}"
    kind = "causal" if p.is_causal else "non-causal"
    extras = [
        name
        for name, given in (
            ("not normalised", not p.normalize),
            ("key_mask", p.has_key_mask),
            (f"{p.num_sequences} packed sequences", p.num_sequences is not None),
            ("initial_state", p.has_initial_state),
            ("return_state", p.return_state),
            ("gradients", p.needs_grad),
        )
        if given
    ]
    return (
        f"linear_attention, {kind}, {p.feature_map}, {str(p.dtype).removeprefix('torch.')} on "
        f"{p.device_type}: batch {p.batch}, heads {heads}, tokens {length}, "
        f"sizes {p.head_dim} and {p.value_dim}" + "".join(f", {extra}" for extra in extras)
    )
