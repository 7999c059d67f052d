"""Who takes part on a GPU: both of our backends, plain PyTorch, softmax kernels, other libraries.

The libraries are imported when they are first asked for, and stay out where they are missing. They
have no feature map inside, so they get elu + 1 the way their users apply it: in PyTorch, before.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from bench import plain
from bench.cases import STEP, Case, Inputs
from bench.peers import Attend, Peer, Settings, Step

OURS = ("triton", "cuda")
COMPILED_LENGTHS = (512, 16384)  # compiling takes seconds a case


# --- ourselves --------------------------------------------------------------------------------


def _ours(backend: str) -> Peer:
    def attend(case: Case, inputs: Inputs, settings: Settings) -> Attend:
        return partial(fastattn.linear_attention, is_causal=case.causal, backend=backend)

    def step(case: Case, settings: Settings) -> Step:
        def one(query: Tensor, key: Tensor, value: Tensor, S: Tensor, z: Tensor) -> Tensor:
            return fastattn.linear_attention_step(query, key, value, (S, z), backend=backend)

        return one

    def why_not(case: Case, settings: Settings) -> str | None:
        loaded = fastattn.backends.load(backend)
        return loaded if isinstance(loaded, str) else loaded.missing()

    return Peer(backend, f"fastattn, {backend}", "linear", why_not, attend, step)


# --- plain PyTorch ----------------------------------------------------------------------------


def _plain(case: Case, inputs: Inputs, settings: Settings) -> Attend:
    return partial(plain.causal, chunk=128) if case.causal else plain.noncausal


def _plain_step(case: Case, settings: Settings) -> Step:
    return plain.step


def _compiled(case: Case, inputs: Inputs, settings: Settings) -> Attend:
    torch._dynamo.reset()
    return torch.compile(_plain(case, inputs, settings), dynamic=False)


def _compiled_step(case: Case, settings: Settings) -> Step:
    torch._dynamo.reset()
    return torch.compile(plain.step, dynamic=False)


def _always(case: Case, settings: Settings) -> str | None:
    return None


def _why_not_compiled(case: Case, settings: Settings) -> str | None:
    if not settings.compile:
        return "left out (--no-compile)"
    selected = case.batch == 1 if case.pass_ == STEP else case.length in COMPILED_LENGTHS
    return None if selected and case.head_dim == 64 else ""


# --- softmax ----------------------------------------------------------------------------------


def _softmax(name: str, title: str, backend: SDPBackend) -> Peer:
    def attend(case: Case, inputs: Inputs, settings: Settings) -> Attend:
        def one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value, is_causal=case.causal)

        return one

    def why_not(case: Case, settings: Settings) -> str | None:
        return "" if case.pass_ == STEP else None

    return Peer(name, title, "softmax", why_not, attend)


# --- other libraries --------------------------------------------------------------------------


def _needs(package: str, wanted: Callable[[Case], bool]) -> Callable[..., str | None]:
    def why_not(case: Case, settings: Settings) -> str | None:
        if case.pass_ == STEP or not wanted(case):
            return ""
        return f"{package} is not installed" if importlib.util.find_spec(package) is None else None

    return why_not


def _flash_linear_attention(case: Case, inputs: Inputs, settings: Settings) -> Attend:
    """Yang et al.'s chunked kernels; their layout is (B, N, H, D), which these tensors have."""
    from fla.ops.linear_attn import chunk_linear_attn

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out, _ = chunk_linear_attn(
            plain.phi(query), plain.phi(key), value, scale=1.0, normalize=True
        )
        return out.transpose(1, 2)  # type: ignore[no-any-return]

    return attend


def _flash_bidirectional(case: Case, inputs: Inputs, settings: Settings) -> Attend:
    from flash_bla.ops.linear_attn.fused import linear_attention

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = linear_attention(plain.phi(query), plain.phi(key), value)
        return out

    return attend


PEERS = (
    *(_ours(backend) for backend in OURS),
    Peer("pytorch", "PyTorch", "linear", _always, _plain, _plain_step),
    Peer("compiled", "torch.compile", "linear", _why_not_compiled, _compiled, _compiled_step),
    _softmax("sdpa-flash", "SDPA, flash", SDPBackend.FLASH_ATTENTION),
    _softmax("sdpa-cudnn", "SDPA, cuDNN", SDPBackend.CUDNN_ATTENTION),
    Peer(
        "fla", "flash-linear-attention", "linear",
        _needs("fla", lambda case: case.causal), _flash_linear_attention,
    ),
    Peer(
        "flash-bla", "flash-bidirectional-linear-attention", "linear",
        _needs("flash_bla", lambda case: not case.causal), _flash_bidirectional,
    ),
)  # fmt: skip
