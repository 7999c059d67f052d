"""Language models whose texts end, whatever their weights: self-terminating heads.

A softmax over the vocabulary lets the end of the sequence be outscored for ever, so greedy decoding
and beam search may never stop. These heads bound its probability from below by something that goes
to one, in training as in decoding:

    st    alpha_t = prod_{s<=t} (1 - eps) sigma(z_s)                 a large z goes on; monotone
    nmst  alpha_t = (1 - eps)^t sigma(-z_t)                          a large z stops; not monotone

    p_t(eos) = 1 - alpha_t,   p_t(v) = alpha_t softmax(logits without eos)_v

with z the logit of the end. Both give p_t(eos) >= 1 - (1 - eps)^t, so greedy decoding ends within
-ln 2 / ln(1 - eps) tokens, rounded up (and one more where that is whole: a tie).

Sources: Welleck et al. 2020, https://arxiv.org/abs/2002.02492 (st); Choi, Chang, Cho, Welleck 2023,
https://arxiv.org/abs/2210.00660 (nmst).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

KINDS = ("nmst", "st")
CLOCKS = ("generated", "all")


class SelfTerminatingHead:
    """What turns a language model's logits into probabilities that end a text.

    It has no parameters: z is the logit of the end itself. Train with ``loss`` or, after
    ``attach``, as any transformers model is trained: the logits of a plain softmax model mean
    something else.

    Args:
        eos_token_id: the end of the sequence.
        epsilon: in (0, 1); see the bound above. Small values disturb the model less.
        kind: "nmst" or "st".
        clock: what t counts. "generated": generated tokens, so that a prompt does not bring the
            end nearer; "all": the prompt's tokens too. After an end of sequence it starts anew, so
            that texts packed into one row are trained like texts in rows of their own.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        eos_token_id: int,
        epsilon: float = 1e-3,
        kind: str = "nmst",
        clock: str = "generated",
    ) -> None:
        if type(eos_token_id) is not int or eos_token_id < 0:
            raise ValueError(f"eos_token_id must be one token id; got {eos_token_id!r}")
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon must be in (0, 1); got {epsilon}")
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
        if clock not in CLOCKS:
            raise ValueError(f"clock must be one of {', '.join(CLOCKS)}; got {clock!r}")
        self.eos_token_id, self.epsilon, self.kind, self.clock = eos_token_id, epsilon, kind, clock

    @property
    def longest(self) -> int:
        """Tokens, the end among them, within which greedy decoding has ended."""
        return math.floor(-math.log(2) / math.log1p(-self.epsilon)) + 1

    def log_probs(
        self, logits: Tensor, started: Tensor | None = None, ended: Tensor | None = None
    ) -> Tensor:
        """The parallel form: log-probabilities of a whole sequence, for training and scoring.

        Args:
            logits: (B, N, V); position i predicts token i + 1.
            started: bool (B, N), True where the clock runs: where the predicted token is generated
                or, with the clock "all", where the token is no padding. None: everywhere.
            ended: bool (B, N), True where the token is an end of sequence: what is predicted there
                begins another text. None: nowhere.

        Returns:
            (B, N, V), float32 (float64 for float64 logits).
        """
        result, _ = self._apply(logits, None, started, ended)
        return result

    def step(self, logits: Tensor, carry: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The step form: log-probabilities of one more token.

        Args:
            logits: (B, V).
            carry: (B,), from the step before; None at the first. It is all the state there is, and
                is reordered with the beams it belongs to.

        Returns:
            Log-probabilities (B, V) and the next carry.
        """
        result, carry = self._apply(logits[:, None], carry, None)
        return result[:, 0], carry

    def loss(self, logits: Tensor, labels: Tensor, started: Tensor | None = None) -> Tensor:
        """Mean negative log-likelihood.

        Args:
            logits: (B, N, V).
            labels: (B, N), the token that each position predicts (already shifted); -100 is left
                out.
            started: as for ``log_probs``; by default the clock "generated" runs from the first
                label that counts, "all" from the first position.
        """
        if started is None and self.clock == "generated":
            started = (labels != -100).cumsum(1) > 0
        ended = F.pad(labels[:, :-1] == self.eos_token_id, (1, 0))
        log_probs = self.log_probs(logits, started, ended)
        return F.nll_loss(log_probs.flatten(0, 1), labels.flatten())

    def _apply(
        self,
        logits: Tensor,
        carry: Tensor | None,
        started: Tensor | None,
        ended: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``carry`` is what the log of alpha has summed up over the tokens before."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        z = logits[..., self.eos_token_id]
        more = torch.full_like(z, math.log1p(-self.epsilon))
        if self.kind == "st":
            more = more + F.logsigmoid(z)
        if started is not None:
            more = torch.where(started, more, 0)
        total = more.cumsum(1)
        if carry is not None:
            total = total + carry[:, None]
        if ended is not None:  # less what had summed up at the last end: sums only ever fall
            total = total - torch.where(ended, total - more, 0).cummin(1).values
        log_alpha = total + F.logsigmoid(-z) if self.kind == "nmst" else total
        without_end = logits.index_fill(
            -1, torch.tensor([self.eos_token_id], device=logits.device), -torch.inf
        )
        others = log_alpha[..., None] + without_end.log_softmax(-1)
        end = torch.zeros_like(others, dtype=torch.bool)
        end[..., self.eos_token_id] = True
        return torch.where(end, log1mexp(log_alpha)[..., None], others), total[:, -1]

    def attach(self, model: Any) -> Any:
        """Give a transformers decoder this head, in training and in ``generate``; returns it.

        Raises:
            NotImplementedError: an encoder-decoder, or no causal language model.
            ValueError: a model that has such a head already, or another end of sequence.
        """
        from fastattn.generation.attached import attach

        return attach(self, model)

    def __repr__(self) -> str:
        return (
            f"SelfTerminatingHead({self.eos_token_id}, epsilon={self.epsilon:g}, "
            f"kind={self.kind!r}, clock={self.clock!r})"
        )


def log1mexp(a: Tensor) -> Tensor:
    """log(1 - e^a) for a <= 0 without loss of digits; -inf, with no gradient, at a = 0.

    Source: Maechler 2012, "Accurately computing log(1 - exp(-|a|))".
    """
    zero = a == 0
    near = a > -math.log(2)
    for_near = torch.where(near & ~zero, a, -0.5)
    for_far = torch.where(near, -1.0, a)
    value = torch.where(near, torch.log(-torch.expm1(for_near)), torch.log1p(-for_far.exp()))
    return value.masked_fill(zero, -torch.inf)
