"""``python -m bench.gpu_check``: small calls on the GPU against the float64 reference.

Short enough for compute-sanitizer; the first thing to run on a GPU that has not seen the kernels.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from fastattn import LinearAttentionState, feature_maps, linear_attention, linear_attention_step

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def results(
    tensors: list[Tensor], do: Tensor, backend: str, options: dict[str, Any]
) -> list[Tensor]:
    """Output, final state where there is one, and gradients."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    query, key, value, S, z = leaves
    given: dict[str, Any] = {}
    if options["return_state"]:
        given["initial_state"] = LinearAttentionState(S, z)
    returned = linear_attention(
        query, key, value, backend=backend, enable_gqa=True, **given, **options
    )
    out, state = returned if options["return_state"] else (returned, ())
    wanted = leaves if options["return_state"] else leaves[:3]
    loss = (out * do.to(out)).sum() + sum(x.sum() for x in state)
    return [x.detach() for x in (out, *state, *torch.autograd.grad(loss, wanted))]


def check(backend: str, device: str, name: str, dtype: torch.dtype) -> list[str]:
    """What is wrong with a feature map's calls: nothing, or a line for each that is."""
    wrong = []
    phi = feature_maps.get(name)
    for is_causal in (False, True) if phi.is_separable else (False,):
        for length, dim in ((70, 64), (600, 24), (90, 128)):
            options: dict[str, Any] = {
                "feature_map": name,
                "is_causal": is_causal,
                "normalize": phi.is_nonnegative,
                "return_state": phi.is_separable,
            }
            q, k, v = (torch.randn(2, heads, length, dim) for heads in (4, 2, 2))
            if name in ("features", "relu"):
                q, k = q.abs() + 0.1, k.abs() + 0.1
            z = torch.zeros(2, 2, phi.num_features(dim))
            tensors = [*(x.to(dtype) for x in (q, k, v)), torch.zeros(*z.shape, dim), z]
            do = torch.randn(2, 4, length, dim).to(dtype)
            ours = results([x.to(device) for x in tensors], do.to(device), backend, options)
            right = results([x.double() for x in tensors], do.double(), "reference", options)
            errors = [
                float((a.to(b) - b).norm() / (b.norm() + 0.01 * b.numel() ** 0.5))
                for a, b in zip(ours, right, strict=True)
            ]
            if not max(errors) <= BOUNDS[dtype]:
                kind = "causal" if is_causal else "full"
                wrong.append(f"{backend} {dtype} {name} {kind} N={length} D={dim}: {errors}")
    return wrong


def check_tokens(backend: str, device: str, dtype: torch.dtype) -> list[str]:
    """The kernels that take one token after another: the recurrent form, and steps of a state."""
    q, k, v = (torch.randn(2, heads, 40, 60).to(dtype) for heads in (4, 2, 2))
    ours, right = (
        _tokens([x.to(place).to(kind) for x in (q, k, v)], name)
        for place, kind, name in ((device, dtype, backend), ("cpu", torch.float64, "reference"))
    )
    errors = [float((a.to(b) - b).norm() / b.norm()) for a, b in zip(ours, right, strict=True)]
    return [] if max(errors) <= BOUNDS[dtype] else [f"{backend} {dtype} tokens: {errors}"]


def _tokens(tensors: list[Tensor], backend: str) -> list[Tensor]:
    mask = torch.ones(2, 40, dtype=torch.bool, device=tensors[0].device)
    mask[1, 3::4] = False
    options: dict[str, Any] = {"enable_gqa": True, "backend": backend}
    query, key, value = tensors
    out, state = linear_attention(
        query, key, value, is_causal=True, key_mask=mask, return_state=True, form="recurrent",
        **options,
    )  # fmt: skip
    steps = []
    for i in range(3):
        q, k, v = (x[:, :, i : i + 1] for x in tensors)
        steps.append(linear_attention_step(q, k, v, state, **options))
    return [out, *steps, state.S, state.z]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="cuda")
    args = parser.parse_args()
    torch.manual_seed(0)
    wrong = [
        line
        for dtype in BOUNDS
        for name in feature_maps.names()
        for line in check(args.backend, args.device, name, dtype)
    ]
    wrong += [line for dtype in BOUNDS for line in check_tokens(args.backend, args.device, dtype)]
    print(*wrong, sep="\n")
    print(f"{len(wrong)} calls are wrong" if wrong else "every call agrees with the reference")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
