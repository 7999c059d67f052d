"""Top-k and nucleus sampling that always end: the end-of-sequence token is never cut off.

Both usual rules can leave the end out of what may be sampled at every single step, and then a text
never ends although the model gives its end a chance. Keeping that one token is enough.

Source: Welleck et al., "Consistency of a Recurrent Language Model With Respect to Incomplete
Decoding", 2020, https://arxiv.org/abs/2002.02492, section 4.1. Proven for sampling; greedy decoding
and beam search need ``SelfTerminatingHead``.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Integral
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process

# Built-in rules that cut tokens after this one has run, and so could cut the end off again.
TRUNCATING = tuple(
    getattr(logits_process, name)
    for name in (
        "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper",
        "EpsilonLogitsWarper", "EtaLogitsWarper", "TopHLogitsWarper",
    )
    if hasattr(logits_process, name)
)  # fmt: skip


class _Consistent(LogitsProcessor, ABC):
    """Keeps ``kept(scores)`` and the end-of-sequence tokens; everything else gets -inf."""

    supports_continuous_batching = False

    def __init__(self, eos_token_id: int | Sequence[int]) -> None:
        given: Any = eos_token_id if isinstance(eos_token_id, list | tuple) else [eos_token_id]
        if not given or any(isinstance(i, bool) or not isinstance(i, Integral) for i in given):
            raise ValueError(f"eos_token_id must be a token id or several; got {eos_token_id!r}")
        ids = [int(i) for i in given]
        if min(ids) < 0:
            raise ValueError(f"eos_token_id must be a token id or several; got {eos_token_id!r}")
        self.eos_token_ids = ids

    @abstractmethod
    def kept(self, scores: Tensor) -> Tensor:
        """Bool (rows, vocabulary): the tokens of the usual rule, which each subclass is."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (rows, vocabulary) with what is not kept at -inf.

        Raises:
            ValueError: ``generate`` would truncate once more or ends at other tokens, or an eos id
                beyond the vocabulary.
        """
        self._check_caller()
        if max(self.eos_token_ids) >= scores.shape[-1]:
            raise ValueError(
                f"eos_token_id must be below the vocabulary's {scores.shape[-1]}; "
                f"got {self.eos_token_ids}"
            )
        kept = self.kept(scores)
        kept[:, self.eos_token_ids] = True
        return scores.masked_fill(~kept, -torch.inf)

    def _check_caller(self) -> None:
        """``generate`` runs its own truncation after a user's processors and tells them nothing of
        it, nor of where texts end, so both are looked up where they are: in the calling frames."""
        frame = inspect.currentframe()
        for _ in range(3):  # this method, __call__, the list's __call__
            caller = None if frame is None else frame.f_locals.get("self")
            if isinstance(caller, LogitsProcessorList):
                for other in caller:
                    if isinstance(other, TRUNCATING):
                        raise ValueError(
                            f"{type(self).__name__} truncates by itself, and "
                            f"{type(other).__name__} could cut the end of sequence off: "
                            "call generate(..., top_k=0, top_p=1.0) without min_p, typical_p, "
                            "top_h, epsilon_cutoff and eta_cutoff"
                        )
                self._check_ends(frame.f_back if frame else None)
                return
            frame = None if frame is None else frame.f_back

    def _check_ends(self, generating: FrameType | None) -> None:
        config = generating.f_locals.get("generation_config") if generating else None
        ends = getattr(config, "eos_token_id", None)
        if ends is None or set(ends if isinstance(ends, list) else [ends]) & {*self.eos_token_ids}:
            return
        raise ValueError(
            f"{type(self).__name__} keeps {self.eos_token_ids}, but generate ends at "
            f"eos_token_id={ends}"
        )


class ConsistentTopK(_Consistent):
    """The k likeliest tokens, and the end of the sequence.

    Give it to ``generate(..., do_sample=True, top_k=0, logits_processor=[ConsistentTopK(...)])``.

    Args:
        k: how many tokens are kept, at least 1; ties go to the smaller token id.
        eos_token_id: one id or several, all kept.

    Raises:
        ValueError: when made, for k below 1 or no eos; when called, if ``generate`` truncates too.
    """

    def __init__(self, k: int, eos_token_id: int | Sequence[int]) -> None:
        super().__init__(eos_token_id)
        if type(k) is not int or k < 1:
            raise ValueError(f"k must be an integer of at least 1; got {k!r}")
        self.k = k

    def kept(self, scores: Tensor) -> Tensor:
        order = scores.argsort(dim=-1, descending=True, stable=True)[:, : self.k]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


class ConsistentTopP(_Consistent):
    """The fewest likeliest tokens whose probability exceeds p, and the end of the sequence.

    Give it to ``generate(..., do_sample=True, top_k=0, logits_processor=[ConsistentTopP(...)])``.
    It sees the scores before the temperature does.

    Args:
        p: in [0, 1); the nucleus is the smallest set of total probability above it.
        eos_token_id: one id or several, all kept.

    Raises:
        ValueError: when made, for p out of range or no eos; when called, if ``generate`` truncates
            too.
    """

    def __init__(self, p: float, eos_token_id: int | Sequence[int]) -> None:
        super().__init__(eos_token_id)
        if not 0 <= p < 1:
            raise ValueError(f"p must be in [0, 1); got {p}")
        self.p = p

    def kept(self, scores: Tensor) -> Tensor:
        ordered, order = scores.sort(dim=-1, descending=True, stable=True)
        mass = ordered.softmax(-1, torch.promote_types(scores.dtype, torch.float32)).cumsum(-1)
        before = torch.cat([torch.zeros_like(mass[:, :1]), mass[:, :-1]], -1)
        wanted = (before <= self.p) & (ordered > -torch.inf)
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, wanted)
