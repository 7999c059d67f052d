"""The truth: linear attention in plain PyTorch, written to be read beside the paper.

Two forms that share no arithmetic, so that they check each other: quadratic (the N x M matrix
phi(q).phi(k), "chunked" and "auto") and recurrent (one token after another). Any device, any
dtype including float64; 16-bit inputs are computed in float32. Nothing here is made to be fast.

Shapes: G = Hq / Hk query heads share a key head, so queries are (B, Hk, G, N, .) and keys
(B, Hk, M, .); in einsum letters b batch, h key head, g query head in its group, n query,
m key, f feature, d value dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, einsum

from fastattn.backends import Gradients, Inputs, Outputs, new_out
from fastattn.ops import feature_maps
from fastattn.ops.problem import Problem


class Operands(NamedTuple):
    """What is left of a call once phi and the mask have been applied."""

    phi_q: Tensor  # (B, Hk, G, N, F)
    phi_k: Tensor  # (B, Hk, M, F), zero where masked
    v: Tensor  # (B, Hk, M, Dv), zero where masked
    S0: Tensor  # (B, Hk, F, Dv)
    z0: Tensor  # (B, Hk, F)


class Sums(NamedTuple):
    """num_i = phi(q_i)^T S_i, den_i = phi(q_i).z_i, and the final state."""

    num: Tensor  # (B, Hk, G, N, Dv)
    den: Tensor  # (B, Hk, G, N, 1)
    S: Tensor
    z: Tensor


class OperandGradients(NamedTuple):
    phi_q: Tensor
    phi_k: Tensor
    v: Tensor
    S0: Tensor
    z0: Tensor


# --- quadratic form ---------------------------------------------------------------------------


def quadratic(x: Operands, is_causal: bool) -> Sums:
    A = _scores(x, is_causal)
    num = einsum("bhgnm,bhmd->bhgnd", A, x.v) + einsum("bhgnf,bhfd->bhgnd", x.phi_q, x.S0)
    den = A.sum(-1, keepdim=True) + einsum("bhgnf,bhf->bhgn", x.phi_q, x.z0)[..., None]
    S = x.S0 + einsum("bhmf,bhmd->bhfd", x.phi_k, x.v)
    return Sums(num, den, S, x.z0 + x.phi_k.sum(-2))


def quadratic_backward(
    x: Operands, g: Tensor, delta: Tensor, dS: Tensor, dz: Tensor, is_causal: bool
) -> OperandGradients:
    """g (B, Hk, G, N, Dv) and delta (B, Hk, G, N, 1) are the gradients of num and den."""
    A = _scores(x, is_causal)
    dA = einsum("bhgnd,bhmd->bhgnm", g, x.v) + delta
    dA = dA.tril() if is_causal else dA
    return OperandGradients(
        phi_q=einsum("bhgnm,bhmf->bhgnf", dA, x.phi_k)
        + einsum("bhgnd,bhfd->bhgnf", g, x.S0)
        + delta * x.z0[:, :, None, None],
        phi_k=einsum("bhgnm,bhgnf->bhmf", dA, x.phi_q)
        + einsum("bhmd,bhfd->bhmf", x.v, dS)
        + dz[:, :, None],
        v=einsum("bhgnm,bhgnd->bhmd", A, g) + einsum("bhmf,bhfd->bhmd", x.phi_k, dS),
        S0=dS + einsum("bhgnf,bhgnd->bhfd", x.phi_q, g),
        z0=dz + (delta * x.phi_q).sum((2, 3)),
    )


def _scores(x: Operands, is_causal: bool) -> Tensor:
    A = einsum("bhgnf,bhmf->bhgnm", x.phi_q, x.phi_k)
    return A.tril() if is_causal else A


# --- recurrent form ---------------------------------------------------------------------------


def recurrent(x: Operands, is_causal: bool) -> Sums:
    num = x.phi_q.new_empty(*x.phi_q.shape[:-1], x.v.shape[-1])
    den = x.phi_q.new_empty(*x.phi_q.shape[:-1], 1)
    for i, S, z in _states(x, is_causal):
        num[..., i, :] = einsum("bhgf,bhfd->bhgd", x.phi_q[..., i, :], S)
        den[..., i, 0] = einsum("bhgf,bhf->bhg", x.phi_q[..., i, :], z)
    return Sums(num, den, *_final_state(x))


def recurrent_backward(
    x: Operands, g: Tensor, delta: Tensor, dS: Tensor, dz: Tensor, is_causal: bool
) -> OperandGradients:
    """One sweep forwards for the queries, one backwards for the keys."""
    dphi_q, dphi_k, dv = (torch.empty_like(t) for t in (x.phi_q, x.phi_k, x.v))
    for i, S, z in _states(x, is_causal):
        dphi_q[..., i, :] = einsum("bhgd,bhfd->bhgf", g[..., i, :], S)
        dphi_q[..., i, :] += delta[..., i, :] * z[:, :, None]

    dS, dz = dS.clone(), dz.clone()

    def add_query(i: int) -> None:
        dS.add_(einsum("bhgf,bhgd->bhfd", x.phi_q[..., i, :], g[..., i, :]))
        dz.add_((delta[..., i, :] * x.phi_q[..., i, :]).sum(2))

    num_queries, num_keys = x.phi_q.shape[-2], x.phi_k.shape[-2]
    if not is_causal:
        for i in range(num_queries):
            add_query(i)
    for j in reversed(range(num_keys)):
        if is_causal:
            add_query(j)
        dphi_k[..., j, :] = einsum("bhfd,bhd->bhf", dS, x.v[..., j, :]) + dz
        dv[..., j, :] = einsum("bhfd,bhf->bhd", dS, x.phi_k[..., j, :])
    return OperandGradients(dphi_q, dphi_k, dv, dS, dz)


def _states(x: Operands, is_causal: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each query, the state that it reads."""
    S, z = (x.S0.clone(), x.z0.clone()) if is_causal else _final_state(x)
    for i in range(x.phi_q.shape[-2]):
        if is_causal:
            _add_token(S, z, x, i)
        yield i, S, z


def _final_state(x: Operands) -> tuple[Tensor, Tensor]:
    S, z = x.S0.clone(), x.z0.clone()
    for j in range(x.phi_k.shape[-2]):
        _add_token(S, z, x, j)
    return S, z


def _add_token(S: Tensor, z: Tensor, x: Operands, j: int) -> None:
    S.add_(einsum("bhf,bhd->bhfd", x.phi_k[..., j, :], x.v[..., j, :]))
    z.add_(x.phi_k[..., j, :])


# --- the normaliser ---------------------------------------------------------------------------


def divide(num: Tensor, den: Tensor, eps: float) -> Tensor:
    return num / den.clamp(min=eps)


def divide_backward(do: Tensor, num: Tensor, den: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients (g, delta) of num and den. A clamped den is a constant; a den of 0 belongs to a
    query with nothing to attend to, whose output is the constant 0."""
    g = torch.where(den > 0, do / den.clamp(min=eps), 0)
    delta = -(num * g).sum(-1, keepdim=True) / den.clamp(min=eps)
    return g, torch.where(den >= eps, delta, 0)


# --- from a call to operands and back ---------------------------------------------------------


class Piece(NamedTuple):
    """Part of a call whose queries and keys see each other: a packed sequence, or a batch."""

    query_tokens: slice
    key_tokens: slice
    states: slice


def pieces(problem: Problem, inputs: Inputs) -> list[Piece]:
    everything = slice(None)
    if inputs.cu_seqlens is None or inputs.cu_seqlens_k is None:
        return [Piece(everything, everything, everything)]
    ends_q, ends_k = inputs.cu_seqlens.tolist(), inputs.cu_seqlens_k.tolist()
    return [
        Piece(slice(*ends_q[i : i + 2]), slice(*ends_k[i : i + 2]), slice(i, i + 1))
        for i in range(len(ends_q) - 1)
    ]


class Call:
    """One piece of a call: its inputs in the accumulator dtype, masked, and phi of them."""

    def __init__(self, problem: Problem, inputs: Inputs, piece: Piece):
        self.problem = problem
        self.phi = feature_maps.get(problem.feature_map)
        self.normalize = problem.normalize and self.phi.is_separable
        self.mask: Tensor | None = None
        dtype = problem.accumulator_dtype
        q = problem.scale * inputs.query[:, :, piece.query_tokens].to(dtype)
        k = inputs.key[:, :, piece.key_tokens].to(dtype)
        v = inputs.value[:, :, piece.key_tokens].to(dtype)
        if inputs.key_mask is not None:
            self.mask = inputs.key_mask[:, None, piece.key_tokens, None]
            k, v = self.zero_masked(k), self.zero_masked(v)
        self.q = q.unflatten(1, (problem.num_kv_heads, -1))
        self.k = k
        phi_k = self.zero_masked(self.phi.key(k, self.mask))
        if inputs.initial_S is not None and inputs.initial_z is not None:
            S0, z0 = inputs.initial_S[piece.states], inputs.initial_z[piece.states]
        else:
            z0 = torch.zeros_like(phi_k[:, :, 0] if k.shape[2] else phi_k.sum(2))
            S0 = z0[..., None].expand(*z0.shape, problem.value_dim)
        phi_q = self.phi.query(self.q, problem.normalize)
        self.operands = Operands(phi_q, phi_k, v, S0, z0)

    def zero_masked(self, x: Tensor) -> Tensor:
        """Selects, never multiplies: a NaN in a masked key must not pass."""
        return x if self.mask is None else torch.where(self.mask, x, 0)

    def sums(self) -> Sums:
        form = recurrent if self.problem.form == "recurrent" else quadratic
        return form(self.operands, self.problem.is_causal)

    def out(self, sums: Sums) -> Tensor:
        out = divide(sums.num, sums.den, self.problem.eps) if self.normalize else sums.num
        return out.flatten(1, 2)

    def backward(self, grad_out: Tensor, dS: Tensor | None, dz: Tensor | None) -> Gradients:
        problem, x = self.problem, self.operands
        do = grad_out.to(x.v.dtype).unflatten(1, (problem.num_kv_heads, -1))
        if self.normalize:
            sums = self.sums()
            g, delta = divide_backward(do, sums.num, sums.den, problem.eps)
        else:
            g, delta = do, torch.zeros_like(do[..., :1])
        form = recurrent_backward if problem.form == "recurrent" else quadratic_backward
        dS = torch.zeros_like(x.S0) if dS is None else dS
        dz = torch.zeros_like(x.z0) if dz is None else dz
        d = form(x, g, delta, dS, dz, problem.is_causal)
        dq = self.phi.query_backward(self.q, d.phi_q, problem.normalize) * problem.scale
        dk = self.phi.key_backward(self.k, self.zero_masked(d.phi_k), self.mask)
        return Gradients(dq.flatten(1, 2), self.zero_masked(dk), self.zero_masked(d.v), d.S0, d.z0)


class ReferenceBackend:
    """The backend protocol over the functions above."""

    name = "reference"

    def missing(self) -> str | None:
        return None

    def why_not(self, problem: Problem) -> str | None:
        return None

    def kernel(self, problem: Problem) -> str:
        return "recurrent" if problem.form == "recurrent" else "quadratic"

    def saved_size(self, problem: Problem) -> int:
        return 0

    def forward(self, problem: Problem, inputs: Inputs) -> Outputs:
        q, accumulator = inputs.query, problem.accumulator_dtype
        out = new_out(problem, q.device).zero_()
        S = z = None
        if problem.return_state:
            leading = (problem.state_batch, problem.num_kv_heads, problem.feature_dim)
            S = q.new_zeros(*leading, problem.value_dim, dtype=accumulator)
            z = q.new_zeros(leading, dtype=accumulator)
        for piece in pieces(problem, inputs):
            call = Call(problem, inputs, piece)
            sums = call.sums()
            out[:, :, piece.query_tokens] = call.out(sums).to(out.dtype)
            if S is not None and z is not None:
                S[piece.states], z[piece.states] = sums.S, sums.z
        return Outputs(out, S, z, q.new_empty(0, dtype=accumulator))

    def backward(
        self,
        problem: Problem,
        inputs: Inputs,
        saved: Tensor,
        grad_out: Tensor,
        grad_S: Tensor | None,
        grad_z: Tensor | None,
    ) -> Gradients:
        dq, dk, dv = (torch.zeros_like(t) for t in (inputs.query, inputs.key, inputs.value))
        dS0, dz0 = (
            None if x is None else torch.zeros_like(x, memory_format=torch.contiguous_format)
            for x in (inputs.initial_S, inputs.initial_z)
        )
        for piece in pieces(problem, inputs):
            gradients = Call(problem, inputs, piece).backward(
                grad_out[:, :, piece.query_tokens],
                None if grad_S is None else grad_S[piece.states],
                None if grad_z is None else grad_z[piece.states],
            )
            dq[:, :, piece.query_tokens] = gradients.query.to(dq.dtype)
            dk[:, :, piece.key_tokens] = gradients.key.to(dk.dtype)
            dv[:, :, piece.key_tokens] = gradients.value.to(dv.dtype)
            if dS0 is not None and dz0 is not None:
                assert gradients.initial_S is not None and gradients.initial_z is not None
                dS0[piece.states], dz0[piece.states] = gradients.initial_S, gradients.initial_z
        return Gradients(dq, dk, dv, dS0, dz0)

    def step(self, problem: Problem, inputs: Inputs) -> Tensor:
        S, z = inputs.initial_S, inputs.initial_z
        assert S is not None and z is not None
        call = Call(problem, inputs, pieces(problem, inputs)[0])
        sums = call.sums()
        S.copy_(sums.S)
        z.copy_(sums.z)
        return new_out(problem, S.device).copy_(call.out(sums))
