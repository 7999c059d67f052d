"""From a Problem to launches: which kernels, on which grids, compiled with which constants.

A plan is made once per problem and kept. It names its tensors; ``backend.py`` fills them in call by
call. Workspaces are float32 and one allocation, whose pieces a plan lists with their sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from fastattn.backends.triton import causal, noncausal, recurrent, states
from fastattn.backends.triton.launch import Step
from fastattn.backends.triton.sizes import Sizes, Target
from fastattn.backends.triton.table import FOLD_BLOCK, SHORT_TOKENS, sweeps_in_one_program
from fastattn.ops.problem import Problem


@dataclass(eq=False)
class Plan:
    """Launches in order; ``workspace``: names and numbers of float32 elements."""

    name: str
    steps: list[Step] = field(default_factory=list)
    workspace: dict[str, int] = field(default_factory=dict)


class Planner:
    """Collects the steps of one plan."""

    def __init__(self, name: str, problem: Problem, kind: str, target: Target) -> None:
        self.plan = Plan(name)
        self.sizes = Sizes(problem, kind)
        self._constants = self.sizes.constants(target)
        self._numbers = self.sizes.numbers()

    def workspace(self, name: str, elements: int) -> None:
        self.plan.workspace[name] = -(-elements // 4) * 4  # the next piece is aligned, too

    def workspace_states(self, S: str, z: str, count: int) -> None:
        self.workspace(S, count * self.sizes.state_elements)
        self.workspace(z, count * self.sizes.features)

    def step(
        self, kernel: Any, grid: tuple[int, ...], names: dict[str, str] | None = None, **own: Any
    ) -> None:
        """``names``: the plan's tensors that stand for the kernel's parameters, where those have
        other names. ``own``: constants and numbers of this step."""
        constants, numbers = {}, {}
        for parameter in kernel.arg_names:
            if parameter in own and parameter.isupper():
                constants[parameter] = own[parameter]
            elif parameter in own:
                numbers[parameter] = own[parameter]
            elif parameter in self._constants:
                constants[parameter] = self._constants[parameter]
            elif parameter in self._numbers:
                numbers[parameter] = self._numbers[parameter]
        self.plan.steps.append(Step(kernel, grid, constants, numbers, self.sizes.tile, names or {}))

    def fold(self, cu: str, tokens: int, rows: int, names: dict[str, str], **own: Any) -> None:
        s = self.sizes
        blocks = -(-s.state_elements // FOLD_BLOCK) + -(-s.features // FOLD_BLOCK)
        self.step(
            states.fold,
            (s.states, blocks),
            {"cu": cu, **names},
            length=tokens,
            rows=rows,
            num_heads=s.problem.num_kv_heads,
            BLOCK=FOLD_BLOCK,
            **own,
        )


# --- forward ----------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def forward(problem: Problem, target: Target) -> Plan:
    if problem.is_causal and problem.form == "recurrent":
        return _recurrent(problem, target)
    return _causal_forward(problem, target) if problem.is_causal else _full(problem, target)


def _full(p: Problem, target: Target) -> Plan:
    if max(p.query_length, p.key_length) <= SHORT_TOKENS:
        planner = Planner("non-causal, one launch", p, "noncausal forward", target)
        s = planner.sizes
        planner.step(noncausal.forward_of_head, (s.states, s.value_tiles), SAVE=p.needs_grad)
        return planner.plan
    shared = Sizes(p, "noncausal forward").shares_out(p.key_length, target.multiprocessors)
    name = "non-causal, " + ("shared-out sums" if shared else "one sum a head")
    planner = Planner(name, p, "noncausal forward", target)
    s = planner.sizes
    key_rows = s.all_rows(p.key_length)
    if p.feature_map == "efficient":
        planner.workspace("maxima", key_rows * p.num_kv_heads * s.features)
        planner.step(states.key_maxima, (key_rows * p.num_kv_heads,))
        if not p.needs_grad:
            planner.workspace("saved_maximum", s.states * s.features)
    total = {"S": "S", "z": "z"}
    if not p.return_state and p.needs_grad:
        total = {"S": "saved_S", "z": "saved_z"}
    elif not p.return_state:
        total = {"S": "total_S", "z": "total_z"}
        planner.workspace_states("total_S", "total_z", s.states)
    save = p.return_state and p.needs_grad
    names = {"maximum": "saved_maximum"}
    if shared:
        planner.workspace_states("parts_S", "parts_z", key_rows * p.num_kv_heads)
        planner.step(
            states.sum_keys,
            (key_rows * p.num_kv_heads, s.value_tiles),
            names | {"S": "parts_S", "z": "parts_z"},
            SPLIT=True,
            SAVE=False,
        )
        planner.fold(
            *("cu_k", p.key_length, s.key_rows),
            {"start_S": "initial_S", "start_z": "initial_z"}
            | {"end_S": total["S"], "end_z": total["z"]},
            HAS_START=p.has_initial_state, HAS_END=True, SAVE=save, EXCLUSIVE=False, REVERSE=False,
        )  # fmt: skip
    else:
        grid = (s.states, s.value_tiles)
        planner.step(states.sum_keys, grid, names | total, SPLIT=False, SAVE=save)
    grid = (s.all_rows(p.query_length) * p.num_heads, s.value_tiles)
    planner.step(noncausal.emit_queries, grid, total)
    return planner.plan


def _causal_forward(p: Problem, target: Target) -> Plan:
    shared = Sizes(p, "causal forward").shares_out(p.key_length, target.multiprocessors)
    name = "causal, " + ("shared-out segments" if shared else "one launch")
    planner = Planner(name, p, "causal forward", target)
    s = planner.sizes
    initial = {"start_S": "initial_S", "start_z": "initial_z", "end_S": "S", "end_z": "z"}
    if not shared:
        planner.step(
            causal.forward,
            (s.states, s.value_tiles),
            initial,
            HAS_START=p.has_initial_state,
            SPLIT=False,
            SAVE=p.needs_grad,
        )
        return planner.plan
    programs = s.all_rows(p.key_length) * p.num_kv_heads
    parts = {"S": "saved_S", "z": "saved_z"}
    if not p.needs_grad:
        parts = {"S": "parts_S", "z": "parts_z"}
        planner.workspace_states("parts_S", "parts_z", programs)
    planner.step(
        *(states.sum_keys, (programs, s.value_tiles), {"cu_k": "cu", **parts}),
        SPLIT=True,
        SAVE=False,
    )
    planner.fold(
        *("cu", p.key_length, s.key_rows),
        initial | {"parts_S": parts["S"], "parts_z": parts["z"]},
        HAS_START=p.has_initial_state, HAS_END=p.return_state, SAVE=False, EXCLUSIVE=True,
        REVERSE=False,
    )  # fmt: skip
    planner.step(
        *(causal.forward, (programs, s.value_tiles)),
        {"start_S": parts["S"], "start_z": parts["z"], "end_S": "S", "end_z": "z"},
        HAS_START=True,
        SPLIT=True,
        SAVE=False,
    )
    return planner.plan


def _recurrent(p: Problem, target: Target) -> Plan:
    planner = Planner("causal recurrent", p, "recurrent", target)
    planner.step(
        recurrent.recurrent,
        (planner.sizes.states,),
        {"start_S": "initial_S", "start_z": "initial_z", "end_S": "S", "end_z": "z"},
        HAS_START=p.has_initial_state,
        SAVE=p.needs_grad,
    )
    return planner.plan


@lru_cache(maxsize=1024)
def step(problem: Problem, target: Target) -> Plan:
    """One token, the state updated in place."""
    planner = Planner("step", problem, "recurrent", target)
    planner.step(
        recurrent.recurrent,
        (planner.sizes.states,),
        {"start_S": "initial_S", "start_z": "initial_z"}
        | {"end_S": "initial_S", "end_z": "initial_z"},
        HAS_START=True, RETURN_STATE=True, SAVE=False,
    )  # fmt: skip
    return planner.plan


# --- backward ---------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def backward(problem: Problem, target: Target, has_grad_state: bool) -> Plan:
    plan = _causal_backward if problem.is_causal else _full_backward
    return plan(problem, target, has_grad_state)


def _full_backward(p: Problem, target: Target, has_grad_state: bool) -> Plan:
    sizes = Sizes(p, "noncausal backward")
    short = max(p.query_length, p.key_length) <= SHORT_TOKENS and sizes.value_tiles == 1
    name = "one launch" if short else "shared-out sums"
    planner = Planner(f"non-causal backward, {name}", p, "noncausal backward", target)
    s = planner.sizes
    saved = {"S": "saved_S", "z": "saved_z"}
    start = {"start_S": "grad_S", "start_z": "grad_z"}
    total = {"dS": "grad_initial_S", "dz": "grad_initial_z"}
    if not p.has_initial_state:
        total = {"dS": "total_S", "dz": "total_z"}
        if not short:
            planner.workspace_states("total_S", "total_z", s.states)
    if short:
        names = saved | start | total
        planner.step(noncausal.backward_of_head, (s.states,), names, HAS_START=has_grad_state)
        return planner.plan
    _add_sums(planner)
    programs = s.all_rows(p.query_length) * p.num_kv_heads
    planner.workspace_states("parts_S", "parts_z", programs)
    for value_tile in range(s.value_tiles):
        planner.step(
            noncausal.backward_queries,
            (programs,),
            saved | {"dS": "parts_S", "dz": "parts_z", "sums": "sums_of_queries"},
            value_tile=value_tile,
        )
    planner.fold(
        *("cu", p.query_length, s.query_rows),
        start | {"end_S": total["dS"], "end_z": total["dz"]},
        HAS_START=has_grad_state, HAS_END=True, SAVE=False, EXCLUSIVE=False, REVERSE=False,
    )  # fmt: skip
    for value_tile in range(s.value_tiles):
        planner.step(
            noncausal.backward_keys,
            (s.all_rows(p.key_length) * p.num_kv_heads,),
            saved | total | {"sums": "sums_of_keys"},
            value_tile=value_tile,
        )
    return planner.plan


def _causal_backward(p: Problem, target: Target, has_grad_state: bool) -> Plan:
    sizes = Sizes(p, "causal backward")
    whole = (
        sizes.value_tiles == 1
        and sweeps_in_one_program(sizes.block_f, sizes.operand_bytes, p.feature_map)
        and not sizes.shares_out(p.key_length, target.multiprocessors)
    )
    name = "one launch" if whole else "shared-out segments"
    planner = Planner(f"causal backward, {name}", p, "causal backward", target)
    s = planner.sizes
    saved = {"S": "saved_S", "z": "saved_z"}
    factors = 2 * p.batch * p.num_heads * p.query_length if p.normalize else 0
    programs = s.all_rows(p.key_length) * p.num_kv_heads
    parts = {"dS": "parts_S", "dz": "parts_z"}
    planner.workspace_states("parts_S", "parts_z", s.states if whole else programs)
    if whole:
        planner.workspace("factors", factors)
        planner.step(
            causal.backward,
            (s.states,),
            saved
            | parts
            | {"start_S": "grad_S", "start_z": "grad_z"}
            | {"end_S": "grad_initial_S", "end_z": "grad_initial_z"},
            HAS_START=has_grad_state,
        )
        return planner.plan
    _add_sums(planner)
    for value_tile in range(s.value_tiles):
        planner.workspace(f"factors_{value_tile}", factors)
        planner.step(
            causal.backward_segments,
            (programs,),
            saved | parts | {"sums": "sums_of_queries", "factors": f"factors_{value_tile}"},
            value_tile=value_tile,
        )
    planner.fold(
        *("cu", p.key_length, s.key_rows),
        {"start_S": "grad_S", "start_z": "grad_z"}
        | {"end_S": "grad_initial_S", "end_z": "grad_initial_z"},
        HAS_START=has_grad_state, HAS_END=p.has_initial_state, SAVE=False, EXCLUSIVE=True,
        REVERSE=True,
    )  # fmt: skip
    for value_tile in range(s.value_tiles):
        planner.step(
            causal.backward_keys,
            (programs,),
            parts | {"sums": "sums_of_keys", "factors": f"factors_{value_tile}"},
            value_tile=value_tile,
        )
    return planner.plan


def _add_sums(planner: Planner) -> None:
    """Gradients of queries and keys in float32, where value tiles add to them one after another."""
    s = planner.sizes
    p = s.problem
    several = s.value_tiles > 1
    planner.workspace(
        "sums_of_queries", p.batch * p.num_heads * p.query_length * p.head_dim if several else 0
    )
    planner.workspace(
        "sums_of_keys", p.batch * p.num_kv_heads * p.key_length * p.head_dim if several else 0
    )
