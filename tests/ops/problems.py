"""Random calls of linear attention, how to run them, and how far a result is from the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastattn import LinearAttentionState, feature_maps, linear_attention

LAYOUTS = ("contiguous", "bnhd", "fused", "sliced", "feature_strided", "reversed_axes")
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A call to be drawn; the names are those of ``linear_attention`` and the design."""

    B: int = 2
    H: int = 2
    N: int = 37
    D: int = 16
    Hk: int | None = None
    M: int | None = None
    Dv: int | None = None
    dtype: torch.dtype = torch.float32
    feature_map: str = "elu"
    is_causal: bool = False
    normalize: bool = True
    scale: float | None = None
    masked: bool = False
    lengths: tuple[int, ...] | None = None  # packed sequences: their lengths (B is then 1)
    lengths_k: tuple[int, ...] | None = None
    initial_state: bool = False
    return_state: bool = False
    layout: str = "contiguous"

    @property
    def num_kv_heads(self) -> int:
        return self.Hk or self.H

    @property
    def batch(self) -> int:
        return 1 if self.lengths is not None else self.B

    @property
    def query_length(self) -> int:
        return sum(self.lengths) if self.lengths is not None else self.N

    @property
    def key_length(self) -> int:
        if self.lengths_k is not None:
            return sum(self.lengths_k)
        if self.lengths is not None or self.M is None:
            return self.query_length
        return self.M

    @property
    def value_dim(self) -> int:
        return self.Dv or self.D

    @property
    def state_shape(self) -> tuple[int, ...]:
        features = feature_maps.get(self.feature_map).num_features(self.D)
        sequences = len(self.lengths) if self.lengths is not None else self.B
        return sequences, self.num_kv_heads, features, self.value_dim


@dataclass
class Call:
    """A drawn call: its tensors, its other arguments, and the gradients that come back to it."""

    case: Case
    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    state: LinearAttentionState | None
    grads: Results
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Call:
        """The same numbers in another dtype (states stay in its accumulator dtype)."""
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        state = self.state and LinearAttentionState(self.state.S.to(sums), self.state.z.to(sums))
        return replace(
            self,
            case=replace(self.case, dtype=dtype),
            query=self.query.to(dtype),
            key=self.key.to(dtype),
            value=self.value.to(dtype),
            state=state,
            grads={
                name: grad.to(dtype if name == "out" else sums) for name, grad in self.grads.items()
            },
        )


def draw(case: Case) -> Call:
    """Random tensors for a case, from torch's generator."""
    B, N, M, D, Dv = case.batch, case.query_length, case.key_length, case.D, case.value_dim
    shapes = ((B, case.H, N, D), (B, case.num_kv_heads, M, D), (B, case.num_kv_heads, M, Dv))
    query, key, value = lay_out(case.layout, shapes, case.dtype)
    if case.feature_map == "features":
        query, key = query.abs_(), key.abs_()
    if case.feature_map in ("features", "relu"):
        # Clear of 0: the gradient of a quotient of two tiny features cancels for everybody.
        query, key = (x.add_(x.sign(), alpha=0.1) for x in (query, key))
    mask = torch.rand(B, M) < 0.7 if case.masked else None
    sums = torch.float64 if case.dtype == torch.float64 else torch.float32
    state = None
    if case.initial_state:
        state = LinearAttentionState(
            torch.randn(case.state_shape, dtype=sums),
            torch.rand(case.state_shape[:-1], dtype=sums) * 2 + 1,
        )
        if case.feature_map == "cosine":  # z of real keys: a count, and at most that much direction
            state.z[..., 1:] -= 2
            state.z[..., 0] = state.z[..., 1:].norm(dim=-1) + 1
    grads = {"out": torch.randn(B, N, case.H, Dv, dtype=case.dtype).transpose(1, 2)}
    if case.return_state:
        grads["S"] = torch.randn(case.state_shape, dtype=sums)
        grads["z"] = torch.randn(case.state_shape[:-1], dtype=sums)
    return Call(case, query, key, value, mask, state, grads)


def lay_out(
    layout: str, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Random (B, H, N, D) tensors whose memory is arranged in one of the ways callers have it."""

    def one(shape: tuple[int, ...]) -> Tensor:
        B, H, N, D = shape
        if layout == "bnhd":
            return torch.randn(B, N, H, D, dtype=dtype).transpose(1, 2)
        if layout == "sliced":  # every stride is odd, no row is aligned
            return torch.randn(B, H + 1, N + 3, D + 1, dtype=dtype)[:, 1:, 2:-1, 1:]
        if layout == "feature_strided":  # tokens side by side in memory
            return torch.randn(B, H, D, N, dtype=dtype).transpose(2, 3)
        if layout == "reversed_axes":
            return torch.randn(D, N, H, B, dtype=dtype).permute(3, 2, 1, 0)
        return torch.randn(shape, dtype=dtype)

    if layout == "fused" and shapes[0] == shapes[1] == shapes[2]:
        B, H, N, D = shapes[0]
        query, key, value = torch.randn(B, N, 3, H, D, dtype=dtype).unbind(2)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    query, key, value = (one(shape) for shape in shapes)
    return query, key, value


def arguments(call: Call) -> dict[str, Any]:
    """Keyword arguments of ``linear_attention`` for a call."""
    case = call.case
    kwargs: dict[str, Any] = {
        "feature_map": case.feature_map,
        "is_causal": case.is_causal,
        "normalize": case.normalize,
        "scale": case.scale,
        "key_mask": call.key_mask,
        "return_state": case.return_state,
        "enable_gqa": case.num_kv_heads != case.H,
    }
    if case.lengths is not None:
        kwargs["cu_seqlens"] = offsets(case.lengths)
        if case.lengths_k is not None:
            kwargs["cu_seqlens_k"] = offsets(case.lengths_k)
    return kwargs


def offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def run(call: Call, backend: str = "auto", form: str = "auto") -> Results:
    """Forward and backward through the public function; everything that comes out, by name."""

    def function(*tensors: Tensor | None) -> Any:
        query, key, value, S, z = tensors
        state = None if S is None else LinearAttentionState(S, z)
        return linear_attention(
            *(query, key, value),
            **arguments(call),
            initial_state=state,
            backend=backend,
            form=form,
        )

    return differentiate(call, function)


def differentiate(call: Call, function: Callable[..., Any]) -> Results:
    """Outputs of ``function(query, key, value, S, z)`` and gradients, by name."""
    state = call.state or (None, None)
    leaves = {
        name: None if x is None else x.detach().requires_grad_()
        for name, x in zip(
            ("query", "key", "value", "initial_S", "initial_z"),
            (call.query, call.key, call.value, *state),
            strict=True,
        )
    }
    returned = function(*leaves.values())
    outputs = {"out": returned}
    if call.case.return_state:
        outputs = {"out": returned[0], "S": returned[1][0], "z": returned[1][1]}
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    gradients = torch.autograd.grad(
        list(outputs.values()),
        list(wanted.values()),
        [call.grads[name].to(output.dtype) for name, output in outputs.items()],
        allow_unused=True,
    )
    results = {name: output.detach() for name, output in outputs.items()}
    for (name, leaf), gradient in zip(wanted.items(), gradients, strict=True):
        results[f"d {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return results


def truth(call: Call) -> Results:
    """The float64 reference, on the very numbers of the call."""
    return run(call.to(torch.float64), "reference")


def error(x: Tensor, reference: Tensor, floor: float = 0.0) -> float:
    """||x - reference|| / ||reference||, or / (floor times the norm of ones) if that is more."""
    assert x.shape == reference.shape
    x, reference = x.double(), reference.double()
    size = max(reference.norm().item(), floor * reference.numel() ** 0.5)
    distance = (x - reference).norm().item()
    if distance == 0:
        return 0.0
    return distance / size if size else float("inf")


def errors(results: Results, reference: Results, floor: float = 0.01) -> dict[str, float]:
    """Of every result. A gradient can be zero by cancellation (that of a query that sees one key),
    so it is measured against no less than 1 % of the gradients, of size 1, that were sent back."""
    assert results.keys() == reference.keys()
    return {
        name: error(results[name], right, floor if name.startswith("d ") else 0.0)
        for name, right in reference.items()
    }


def assert_accurate(
    results: Results,
    reference: Results,
    forward: float = 1e-5,
    backward: float = 1e-4,
    floor: float = 0.01,
) -> None:
    """The design's bounds for float32, unless told others."""
    measured = errors(results, reference, floor)
    wrong = {
        name: value
        for name, value in measured.items()
        if not value <= (backward if name.startswith("d ") else forward)
    }
    assert not wrong, f"relative errors too large: {wrong}"
