"""The torch.library ops: where torch's dispatcher, compiler and autograd meet the backends.

``fastattn::forward``, ``fastattn::backward`` and ``fastattn::step`` each have a kernel (builds the
Problem, calls the backend), a fake kernel (shapes only, for torch.compile and export) and an
autograd kernel. The ops are defined by schema: ``torch.library.custom_op`` and
``register_autograd`` do the same with twice the time per call (measured: 8 us against 15 us).

An op can't return None, so an absent state or gradient is an empty tensor between here and
``attention.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastattn import backends
from fastattn.backends import Inputs, new_out
from fastattn.ops.pose import (
    NUM_INPUTS,
    check_contents,
    problem_of,
    split_arguments,
    step_plan,
)

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor? cu_seqlens, "
    "Tensor? cu_seqlens_k, Tensor? initial_S, Tensor? initial_z"
)
_OPTIONS = (
    "str feature_map, bool is_causal, bool normalize, float scale, float eps, str form, "
    "bool return_state, bool needs_grad, str backend"
)
_RETURN_STATE, NEEDS_GRAD = -3, -2  # their places among the arguments

library = torch.library.Library("fastattn", "DEF")
library.define(f"forward({_INPUTS}, {_OPTIONS}) -> (Tensor out, Tensor S, Tensor z, Tensor saved)")
library.define(
    f"backward(Tensor saved, Tensor grad_out, Tensor? grad_S, Tensor? grad_z, {_INPUTS}, "
    f"{_OPTIONS}) -> (Tensor query, Tensor key, Tensor value, Tensor initial_S, Tensor initial_z)"
)
library.define(
    "step(Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor(a!) S, Tensor(b!) z, "
    "str feature_map, bool normalize, float scale, float eps, str backend) -> Tensor out"
)
forward_op: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
backward_op: Callable[..., tuple[Tensor, ...]]
step_op: Callable[..., Tensor]
forward_op = torch.ops.fastattn.forward.default
backward_op = torch.ops.fastattn.backward.default
step_op = torch.ops.fastattn.step.default

# Calls inside go straight to the kernels; torch.library uses the same guard. With nothing to
# differentiate it also saves an eager call the walk through the autograd kernel.
below_autograd = torch._C._AutoDispatchBelowAutograd
_without = torch._C._ExcludeDispatchKeyGuard
_autocasts = torch.is_autocast_enabled
_AUTOCAST = {
    device_type: torch._C.DispatchKeySet(
        getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}")
    )
    for device_type in ("cpu", "cuda", "xpu")
}
is_transformed = torch._C._are_functorch_transforms_active  # by torch.func or torch.vmap


# --- autocast ---------------------------------------------------------------------------------


def autocast(x: Tensor) -> Tensor:
    """The cast that autocast gives the arguments of ``scaled_dot_product_attention``."""
    eligible = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(x.device.type)) if eligible else x


def below_autocast(op: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """``op`` for tensors like ``x`` that have been cast: not again, which costs 10 us."""
    keys = _AUTOCAST.get(x.device.type)
    if keys is None or torch.compiler.is_compiling() or not _autocasts(x.device.type):
        return op

    def call(*args: Any) -> Any:
        with _without(keys):
            return op(*args)

    return call


def _under_autocast(op: Callable[..., Any]) -> Callable[..., Any]:
    """``op`` on query, key and value that it casts: a graph that was traced without autocast calls
    it so. States are not cast."""

    def cast_and_call(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Any:
        with _without(_AUTOCAST[query.device.type]):
            return op(autocast(query), autocast(key), autocast(value), *rest)

    return cast_and_call


# --- forward ----------------------------------------------------------------------------------


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, options, backend = split_arguments(args)
    problem = problem_of(inputs, *options)
    if inputs.cu_seqlens is not None:
        check_contents(problem, inputs)
    out, S, z, saved = backends.choose(problem, backend).forward(problem, inputs)
    if S is None or z is None:
        S, z = _nothing(saved), _nothing(saved)
    return out, S, z, saved


def _forward_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, options, backend = split_arguments(args)
    p = problem_of(inputs, *options)
    out = new_out(p, inputs.query.device)
    saved_size = backends.choose(p, backend).saved_size(p)
    saved = inputs.query.new_empty(saved_size, dtype=p.accumulator_dtype)
    S, z = _nothing(saved), _nothing(saved)
    if p.return_state:
        leading = (p.state_batch, p.num_kv_heads, p.feature_dim)
        S, z = saved.new_empty(*leading, p.value_dim), saved.new_empty(leading)
    return out, S, z, saved


class _Forward(torch.autograd.Function):
    """Ties the forward op to the backward op."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # A graph traced without gradients says that none are needed, and is trained all the same.
        args = (*args[:NEEDS_GRAD], True, *args[NEEDS_GRAD + 1 :])
        with below_autograd():
            outputs = forward_op(*args)
        _keep_for_backward(ctx, args, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(backward_op, ctx, grads)


class TransformedForward(torch.autograd.Function):
    """The same where torch.func or torch.vmap transforms the call: around the op, because their
    levels are not seen inside of it, and with the two parts of ``forward`` apart, which costs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with below_autograd():
            return forward_op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _keep_for_backward(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(_Backward.apply, ctx, grads)

    @staticmethod
    def jvp(*_: Any) -> NoReturn:
        refuse_forward_mode()


def _keep_for_backward(ctx: Any, args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    out, S, z, saved = outputs
    ctx.save_for_backward(saved, *args[:NUM_INPUTS])
    ctx.options = args[NUM_INPUTS:]
    ctx.shapes = out.shape, S.shape, z.shape
    return_state = args[_RETURN_STATE]
    ctx.mark_non_differentiable(*([saved] if return_state else [saved, S, z]))
    ctx.set_materialize_grads(False)


def _gradients(
    compute: Callable[..., tuple[Tensor, ...]],
    ctx: Any,
    grads: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    grad_out, grad_S, grad_z, _ = grads
    saved, *inputs = ctx.saved_tensors
    out_shape, S_shape, z_shape = ctx.shapes
    if grad_out is None:  # the loss depends on the state alone
        grad_out = inputs[0].new_zeros(out_shape)
    if grad_S is not None or grad_z is not None:
        grad_S = saved.new_zeros(S_shape) if grad_S is None else grad_S
        grad_z = saved.new_zeros(z_shape) if grad_z is None else grad_z
    gradients = compute(saved, grad_out, grad_S, grad_z, *inputs, *ctx.options)
    query, key, value, *states = gradients
    initial = (None, None) if inputs[-1] is None else tuple(states)
    no_options = (None,) * len(ctx.options)
    return query, key, value, None, None, None, *initial, *no_options


def _forward_autograd(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if _needs_grad(*args[:NUM_INPUTS]):
        return _Forward.apply(*args)  # type: ignore[no-any-return, no-untyped-call]
    with below_autograd():
        return forward_op(*args)


# --- backward ---------------------------------------------------------------------------------


def _backward(
    saved: Tensor, grad_out: Tensor, grad_S: Tensor | None, grad_z: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    inputs, options, backend = split_arguments(args)
    problem = problem_of(inputs, *options)
    chosen = backends.choose(problem, backend)
    expected = chosen.saved_size(problem)
    if saved.numel() != expected:
        raise ValueError(
            f"saved must be what fastattn::forward gave for this problem with needs_grad=True, "
            f"{expected} numbers; got {saved.numel()}"
        )
    gradients = chosen.backward(problem, inputs, saved, grad_out, grad_S, grad_z)
    return tuple(_nothing(saved) if gradient is None else gradient for gradient in gradients)


def _backward_fake(
    saved: Tensor, grad_out: Tensor, grad_S: Tensor | None, grad_z: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    inputs, _, _ = split_arguments(args)
    states = (inputs.initial_S, inputs.initial_z)
    return (
        *(torch.empty_like(x) for x in inputs[:3]),
        *(_nothing(saved) if x is None else saved.new_empty(x.shape) for x in states),
    )


class _Backward(torch.autograd.Function):
    """The end of the chain: first derivatives only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        with below_autograd():
            return backward_op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps nothing: there is no second derivative."""

    @staticmethod
    def jvp(*_: Any) -> NoReturn:
        refuse_forward_mode()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            "linear_attention has first derivatives only: a gradient that went through it cannot "
            "be differentiated again (no create_graph=True, gradient penalty or Hessian)"
        )


def _backward_autograd(*args: Any) -> tuple[Tensor, ...]:
    if _needs_grad(*args[: 4 + NUM_INPUTS]):
        return _Backward.apply(*args)  # type: ignore[no-any-return, no-untyped-call]
    with below_autograd():
        return backward_op(*args)


# --- step -------------------------------------------------------------------------------------


def _step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    S: Tensor,
    z: Tensor,
    feature_map: str,
    normalize: bool,
    scale: float,
    eps: float,
    backend: str,
) -> Tensor:
    inputs = Inputs(query, key, value, key_mask, None, None, S, z)
    problem, chosen = step_plan(inputs, feature_map, normalize, scale, eps, backend)
    return chosen.step(problem, inputs)


def _step_fake(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Tensor:
    shape = (*query.shape[:3], value.shape[3])
    return torch.empty_permuted(shape, (0, 2, 1, 3), dtype=query.dtype, device=query.device)


def refuse_forward_mode() -> NoReturn:
    raise NotImplementedError(
        "linear attention has no derivatives in forward mode (torch.func.jvp, jacfwd, hessian, "
        "torch.autograd.forward_ad); take reverse mode: torch.func.vjp, jacrev, backward()"
    )


def _nothing(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


library.impl("forward", _forward, "CompositeExplicitAutograd")
library.impl("backward", _backward, "CompositeExplicitAutograd")
library.impl("step", _step, "CompositeExplicitAutograd")
library.impl("forward", _forward_autograd, "Autograd")
library.impl("backward", _backward_autograd, "Autograd")
for _type in _AUTOCAST:
    library.impl("forward", _under_autocast(forward_op), f"Autocast{_type.upper()}")
    library.impl("step", _under_autocast(step_op), f"Autocast{_type.upper()}")
torch.library.register_fake("fastattn::forward", _forward_fake, lib=library)
torch.library.register_fake("fastattn::backward", _backward_fake, lib=library)
torch.library.register_fake("fastattn::step", _step_fake, lib=library)
