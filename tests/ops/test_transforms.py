"""torch.func, vmap and forward mode: the right derivative or an error, never one of zeros."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import fastattn
from fastattn import LinearAttentionState, feature_maps, linear_attention, linear_attention_step

Function = Callable[[Tensor], Tensor]
TRANSFORMS: dict[str, Callable[[Function], Function]] = {
    "grad": torch.func.grad,
    "vjp": lambda f: lambda x: torch.func.vjp(f, x)[1](torch.ones(()))[0],
    "jacrev": torch.func.jacrev,
    "vmap of grad": lambda f: torch.vmap(torch.func.grad(f)),
    "grad of vmap": lambda f: torch.func.grad(lambda x: torch.vmap(f)(x).sum()),
}


def pair(backend: str, is_causal: bool) -> tuple[Function, Function]:
    """A function of the query through the kernels, and the same in plain PyTorch."""
    key, value = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4)

    def ours(query: Tensor) -> Tensor:
        call = linear_attention(query, key, value, is_causal=is_causal, backend=backend)
        return call.square().sum()

    def plain(query: Tensor) -> Tensor:
        phi_q, phi_k = (torch.nn.functional.elu(x) + 1 for x in (query, key))
        weights = phi_q @ phi_k.mT
        weights = weights.tril() if is_causal else weights
        return (weights @ value / weights.sum(-1, keepdim=True)).square().sum()

    return ours, plain


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(backend: str, name: str, is_causal: bool) -> None:
    ours, plain = pair(backend, is_causal)
    query = torch.randn(*([3] if "vmap" in name else []), 1, 2, 6, 4)
    transform = TRANSFORMS[name]
    torch.testing.assert_close(
        transform(ours)(query), transform(plain)(query), rtol=1e-4, atol=1e-5
    )


def test_backward_through_vmap(backend: str) -> None:
    """Batched tensors don't say that what they wrap wants a gradient."""
    ours, plain = pair(backend, False)
    query = torch.randn(3, 1, 2, 6, 4)
    found, right = (
        torch.autograd.grad(torch.vmap(f)(x).sum(), x)[0]
        for f in (ours, plain)
        for x in [query.clone().requires_grad_()]
    )
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_a_module_with_stacked_parameters() -> None:
    module, x = fastattn.LinearAttention(8, 2, batch_first=True), torch.randn(1, 5, 8)
    parameters, _ = torch.func.stack_module_state([module, module])  # type: ignore[no-untyped-call]
    out = torch.vmap(lambda p: torch.func.functional_call(module, p, (x, x, x))[0])(parameters)
    out.square().sum().backward()
    module(x, x, x)[0].square().sum().backward()
    for name, parameter in module.named_parameters():
        for gradient in parameters[name].grad:
            torch.testing.assert_close(gradient, parameter.grad)


@pytest.mark.parametrize(
    "derive",
    [lambda f, x: torch.func.jvp(f, (x,), (x,)), lambda f, x: torch.func.jacfwd(f)(x),
     lambda f, x: torch.func.hessian(f)(x)],
    ids=["jvp", "jacfwd", "hessian"],
)  # fmt: skip
def test_forward_mode_is_refused(
    backend: str, derive: Callable[[Function, Tensor], object]
) -> None:
    ours, _ = pair(backend, False)
    with pytest.raises(NotImplementedError, match="no derivatives in forward mode"):
        derive(ours, torch.randn(1, 2, 6, 4))


def test_dual_numbers_are_refused(backend: str) -> None:
    x = torch.randn(1, 2, 1, 4)
    state = LinearAttentionState.zeros(1, 2, 4, 4)
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(x, x)
        for call in (
            lambda: linear_attention(x, dual, x, backend=backend),
            lambda: linear_attention_step(dual, x, x, state, backend=backend),
        ):
            with pytest.raises(NotImplementedError, match="no derivatives in forward mode"):
                call()
        linear_attention(x, x, x, backend=backend)


def test_gradients_of_gradients_are_refused(backend: str) -> None:
    ours, _ = pair(backend, False)
    twice = torch.func.grad(lambda x: torch.func.grad(ours)(x).sum())
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        twice(torch.randn(1, 2, 6, 4))


def test_a_step_on_a_state_that_backward_needs_is_noticed(backend: str) -> None:
    x = torch.randn(1, 2, 6, 4, requires_grad=True)
    _, state = linear_attention(x, x, x, is_causal=True, return_state=True, backend=backend)
    loss = state.S.square().sum()
    token = x[:, :, :1].detach()
    with torch.no_grad():
        linear_attention_step(token, token, token, state, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_output_may_be_changed_in_place(backend: str) -> None:
    x = torch.randn(1, 2, 6, 4, requires_grad=True)
    out = linear_attention(x, x, x, backend=backend)
    torch.relu_(out).sum().backward()
    found, x.grad = x.grad, None
    linear_attention(x, x, x, backend=backend).relu().sum().backward()
    assert torch.equal(found, x.grad)


def test_a_map_that_only_looks_like_one_of_the_kernels_is_refused() -> None:
    class Mine(type(feature_maps.get("elu"))):  # type: ignore[misc]
        def phi(self, x: Tensor) -> Tensor:
            return torch.relu(x)

    x = torch.randn(1, 2, 6, 4)
    with pytest.raises(ValueError, match="feature_map is a Mine, which is none of the maps"):
        linear_attention(x, x, x, feature_map=Mine())
