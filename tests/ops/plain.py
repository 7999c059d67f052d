"""Linear attention as one would write it in PyTorch: what 16-bit results are measured against.

It computes in the dtype of its inputs throughout and is differentiated by autograd. In float64 it
is also a third opinion, fast enough for the long shapes that the reference is too slow for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import LinearAttentionState, feature_maps
from tests.ops import problems
from tests.ops.problems import Call, Results

CHUNK = 64


def run(call: Call) -> Results:
    return problems.differentiate(call, lambda *tensors: _call(call, *tensors))


def _call(
    call: Call, query: Tensor, key: Tensor, value: Tensor, S: Tensor | None, z: Tensor | None
) -> Tensor | tuple[Tensor, LinearAttentionState]:
    case = call.case
    groups = case.H // case.num_kv_heads
    dtype = query.dtype
    if S is None or z is None:
        S = query.new_zeros(case.state_shape)
        z = query.new_zeros(case.state_shape[:-1])
    pieces = [(slice(None), slice(None), slice(None))]
    if case.lengths is not None:
        ends = problems.offsets(case.lengths).tolist()
        ends_k = problems.offsets(case.lengths_k or case.lengths).tolist()
        pieces = [
            (slice(*ends[i : i + 2]), slice(*ends_k[i : i + 2]), slice(i, i + 1))
            for i in range(len(case.lengths))
        ]
    outs, states = [], []
    for tokens, tokens_k, row in pieces:
        out, *state = attend(
            query[:, :, tokens],
            key[:, :, tokens_k].repeat_interleave(groups, 1),
            value[:, :, tokens_k].repeat_interleave(groups, 1),
            S[row].to(dtype).repeat_interleave(groups, 1),
            z[row].to(dtype).repeat_interleave(groups, 1),
            call,
            None if call.key_mask is None else call.key_mask[:, None, tokens_k, None],
        )
        outs.append(out)
        states.append([x[:, ::groups] for x in state])
    out = torch.cat(outs, 2)
    if not case.return_state:
        return out
    return out, LinearAttentionState(*(torch.cat(x) for x in zip(*states, strict=True)))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    S: Tensor,
    z: Tensor,
    call: Call,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    case = call.case
    phi = feature_maps.get(case.feature_map)
    if mask is not None:
        key, value = torch.where(mask, key, 0), torch.where(mask, value, 0)
    phi_q = phi.query(query if case.scale is None else query * case.scale, case.normalize)
    phi_k = phi.key(key, mask)
    if mask is not None:
        phi_k = torch.where(mask, phi_k, 0)
    if case.is_causal:
        num, den = _causal(phi_q, phi_k, value, S, z)
        S, z = S + phi_k.mT @ value, z + phi_k.sum(-2)
    else:
        S, z = S + phi_k.mT @ value, z + phi_k.sum(-2)
        num, den = phi_q @ S, phi_q @ z[..., None]
    if not case.normalize or not phi.is_separable:
        return num, S, z
    return torch.where(den > 0, num / den.clamp(min=1e-6), 0), S, z


def _causal(
    phi_q: Tensor, phi_k: Tensor, value: Tensor, S: Tensor, z: Tensor
) -> tuple[Tensor, Tensor]:
    nums, dens = [phi_q[..., :0, :] @ S], [phi_q[..., :0, :1]]
    chunks = (x.split(CHUNK, -2) for x in (phi_q, phi_k, value))
    for q, k, v in zip(*chunks, strict=True):
        scores = (q @ k.mT).tril()
        nums.append(scores @ v + q @ S)
        dens.append(scores.sum(-1, keepdim=True) + q @ z[..., None])
        S, z = S + k.mT @ v, z + k.sum(-2)
    return torch.cat(nums, -2), torch.cat(dens, -2)
