"""A self-terminating head on a transformers decoder, in training and in ``generate``.

The head is applied to the logits as the model returns them, not by a logits processor: beam search
normalises logits before any processor sees them, and reorders nothing but the cache. So the head's
one number for each sequence lives in the cache, and is reordered, repeated and reset with it.
"""

from __future__ import annotations

import functools
import inspect
import math
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache

from fastattn.generation.self_terminating import SelfTerminatingHead
from fastattn.models.attention import HEAD  # also the field of the configuration
from fastattn.models.conversion import record

SETTINGS = ("eos_token_id", "epsilon", "kind", "clock")
KEEP = "logits_to_keep"


def attach(head: SelfTerminatingHead, model: Any) -> Any:
    """See ``SelfTerminatingHead.attach``."""
    config = model.config
    if getattr(config, "is_encoder_decoder", False) or not model.can_generate():
        raise NotImplementedError(
            f"a self-terminating head needs a causal language model; got {type(model).__name__}"
        )
    if hasattr(model, "_fastattn_head"):
        raise ValueError(f"{type(model).__name__} has a self-terminating head already")
    vocabulary = config.get_text_config().vocab_size
    if head.eos_token_id >= vocabulary:
        raise ValueError(
            f"eos_token_id must be below the model's vocabulary of {vocabulary}; "
            f"got {head.eos_token_id}"
        )
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = head.eos_token_id
    check_end(head.eos_token_id, model)
    return _attach(head, model)


def check_end(eos_token_id: int, model: Any) -> None:
    """Raises:
    ValueError: ``generate`` would go on after the head's end of sequence.
    """
    ends = model.generation_config.eos_token_id
    if eos_token_id not in (ends if isinstance(ends, list) else [ends]):
        raise ValueError(
            f"the head ends at token {eos_token_id}, but the model's generation_config has "
            f"eos_token_id={ends}"
        )


def _attach(head: SelfTerminatingHead, model: Any) -> Any:
    hooks = (
        model.register_forward_pre_hook(partial(_before, head), with_kwargs=True),
        model.register_forward_hook(partial(_after, head), with_kwargs=True),
    )
    # Of the model, so that a copy of it has its own: handles find the hooks of their own model.
    model._fastattn_head = (hooks, model.loss_function)
    model.loss_function = _no_loss  # the head's loss takes its place
    model.init_continuous_batching = _no_continuous_batching
    record(model.config, {name: getattr(head, name) for name in SETTINGS}, HEAD)
    return model


def attach_again(model: Any) -> None:
    """Give a model that was just built the head that its configuration says it was saved with.

    Raises:
        ValueError: a damaged configuration. (Its generation_config is read later: ``load`` calls
            ``check_end`` then.)
    """
    settings = getattr(model.config, HEAD)
    if not isinstance(settings, dict) or set(settings) != set(SETTINGS):
        raise ValueError(f"config.json has a damaged field {HEAD!r}: {settings!r}")
    _attach(SelfTerminatingHead(**settings), model)


def detach(model: Any) -> Any:
    """Take the head off again; the model is a plain softmax model then.

    Raises:
        ValueError: a model without such a head.
    """
    if not hasattr(model, "_fastattn_head"):
        raise ValueError(f"{type(model).__name__} has no self-terminating head")
    hooks, model.loss_function = model._fastattn_head
    for hook in hooks:
        hook.remove()
    record(model.config, None, HEAD)
    del model._fastattn_head, model.init_continuous_batching
    return model


def _before(
    head: SelfTerminatingHead, _: Any, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    if head.kind == "st" and head.clock == "all" and kwargs.get(KEEP):
        return args, {**kwargs, KEEP: 0}  # the product over the prompt needs all its logits
    return None


def _after(
    head: SelfTerminatingHead, model: Any, args: Any, kwargs: dict[str, Any], output: Any
) -> Any:
    if not hasattr(output, "logits"):
        raise NotImplementedError("a self-terminating head needs return_dict=True")
    kind: Any = type(model)
    given = _signature(kind).bind_partial(model, *args, **kwargs).arguments
    given.update(given.pop("kwargs", {}))
    cache = getattr(output, "past_key_values", None)
    # A model makes a cache by default, also for whoever only wants the logits of a text. With the
    # clock "generated" they are others than those of a prompt, so a cache must be asked for.
    caches = (given.get(name) for name in ("past_key_values", "cache"))  # from 5.24 on the latter
    given_caches = [given_cache for given_cache in caches if given_cache is not None]
    if any(not isinstance(given_cache, Cache) for given_cache in given_caches):
        _no_continuous_batching()
    asked = given.get("use_cache") or given_caches
    if given.get("labels") is not None:
        _score(head, output, given)
    elif isinstance(cache, Cache) and (asked or head.clock == "all"):
        _decode(head, output, given)
    else:
        _check_all_logits(output, given)
        output.logits = head.log_probs(output.logits, _unpadded(head, given), _ended(head, given))
        if isinstance(cache, Cache):
            _carry_in(cache)
            cache.scored = True  # type: ignore[attr-defined]
    return output


def _no_loss(*args: Any, **kwargs: Any) -> None:
    return None


def _no_continuous_batching(*args: Any, **kwargs: Any) -> NoReturn:
    raise NotImplementedError(
        "continuous batching (generate_batch) has no place for what a self-terminating head "
        "counts: use generate"
    )


@functools.cache
def _signature(kind: Any) -> inspect.Signature:
    return inspect.signature(kind.forward)


def _score(head: SelfTerminatingHead, output: Any, given: dict[str, Any]) -> None:
    """Training and evaluation: all positions at once, and the loss of the labels."""
    _check_all_logits(output, given)
    labels = given["labels"]
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    if head.clock == "all":
        started = _unpadded(head, given)
    else:
        started = (following != -100).cumsum(1) > 0
    ended = _ended(head, given)
    if ended is None:
        ended = labels == head.eos_token_id
    output.logits = head.log_probs(output.logits, started, ended.to(output.logits.device))
    total = torch.nn.functional.nll_loss(
        output.logits.flatten(0, 1), following.to(output.logits.device).flatten(), reduction="sum"
    )
    items = given.get("num_items_in_batch")
    output.loss = total / ((following != -100).sum() if items is None else items)


def _decode(head: SelfTerminatingHead, output: Any, given: dict[str, Any]) -> None:
    """``generate``: a prompt, and then token after token."""
    cache, logits = output.past_key_values, output.logits
    if getattr(cache, "scored", False):
        raise ValueError(
            "this cache comes from a call that scored its text: to go on from it, read the prompt "
            "with use_cache=True"
        )
    carry = getattr(cache, "carry", None)
    tokens, kept = _tokens(given), logits.shape[1]
    started, ended = _unpadded(head, given), _ended(head, given)
    if carry is not None and tokens == 1 and ended is not None:
        _check_going_on(head, ended)
    if head.clock == "generated":
        ended = None  # texts in the prompt are not counted anyway
    if carry is None:
        _carry_in(cache)
        if head.clock == "generated":
            started = torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)
            started[:, -1] = True  # the prompt's other positions predict the prompt
    elif tokens > 1 and head.clock == "generated":
        raise ValueError(
            f"{tokens} tokens after the prompt in one call: with clock='generated' the prompt must "
            "be read in one call and tokens generated one by one (no prefill_chunk_size, assistant "
            "model or prompt lookup, and no cache of an earlier conversation)"
        )
    if head.kind == "st" and head.clock == "all" and kept < tokens:
        raise ValueError(f"kind='st' with clock='all' needs the logits of all {tokens} tokens")
    if carry is not None and len(carry) != len(logits):
        raise ValueError(f"the cache holds {len(carry)} sequences, but {len(logits)} are decoded")
    if head.kind == "nmst" and head.clock == "all" and kept < tokens:
        unseen = tokens - kept
        parts = [None if x is None else x[:, :unseen].to(logits.device) for x in (started, ended)]
        carry = _past_unseen(head, logits, carry, unseen, *parts)
        started, ended = (None if x is None else x[:, unseen:] for x in (started, ended))
    output.logits, cache.carry = head._apply(logits, carry, started, ended)


def _past_unseen(
    head: SelfTerminatingHead,
    logits: Tensor,
    carry: Tensor | None,
    tokens: int,
    started: Tensor | None,
    ended: Tensor | None,
) -> Tensor:
    """``carry`` after the first tokens of a call, which the model gave no logits of: the prompt's,
    or a piece's of it. "nmst" only counts them."""
    shape = len(logits), tokens
    counts = logits.new_ones(shape, dtype=torch.bool) if started is None else started
    total = logits.new_zeros(len(logits), dtype=torch.float32) if carry is None else carry
    if ended is not None:
        counts = counts & ((ended.flip(1).cumsum(1).flip(1) - ended.long()) == 0)
        total = total.masked_fill(ended.any(1), 0)
    return total + math.log1p(-head.epsilon) * counts.sum(1)


def _check_going_on(head: SelfTerminatingHead, ended: Tensor) -> None:
    """When all texts have ended ``generate`` stops, unless it was told of another end. (Or goes on
    for other processes whose texts have not; and a graph can't look at tokens.)"""
    if torch.compiler.is_compiling() or _has_other_processes():
        return
    if bool(ended.all()):
        raise ValueError(
            f"every text has ended with the head's token {head.eos_token_id} and decoding goes on: "
            "generate has another eos_token_id (its own argument, or in generation_config)"
        )


def _tokens(given: dict[str, Any]) -> int:
    ids = given.get("input_ids")
    tokens: Tensor = given["inputs_embeds"] if ids is None else ids
    return tokens.shape[1]


def _ended(head: SelfTerminatingHead, given: dict[str, Any]) -> Tensor | None:
    """Which of this call's tokens are ends of sequence (B, N), if it has tokens."""
    ids = given.get("input_ids")
    return None if ids is None else ids == head.eos_token_id


def _has_other_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _check_all_logits(output: Any, given: dict[str, Any]) -> None:
    if output.logits.shape[1] != _tokens(given):
        raise ValueError(
            f"logits of {output.logits.shape[1]} of {_tokens(given)} tokens: without a cache a "
            "self-terminating head needs all of them (generate with use_cache=True)"
        )


def _unpadded(head: SelfTerminatingHead, given: dict[str, Any]) -> Tensor | None:
    """For the clock "all", which of this call's tokens are no padding (B, N)."""
    mask = given.get("attention_mask")
    if head.clock == "generated" or mask is None:
        return None
    if mask.ndim != 2:
        raise NotImplementedError("clock='all' needs a padding mask of shape (batch, tokens)")
    unpadded: Tensor = mask[:, -_tokens(given) :] != 0
    return unpadded


def _carry_in(cache: Cache) -> None:
    """Make ``cache`` carry the head's number for each sequence wherever its own content goes."""
    kind: Any = type(cache)
    if not issubclass(kind, _Carrying):
        cache.__class__ = _carrying(kind)


class _Carrying:
    """What a cache with a head's numbers does besides."""

    carry: Tensor | None = None
    scored = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        assert self.carry is not None
        self.carry = self.carry.index_select(0, beam_idx.to(self.carry.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        assert self.carry is not None
        self.carry = self.carry.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        assert self.carry is not None
        self.carry = self.carry[indices]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.carry, self.scored = None, False

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("a self-terminating head can't take tokens back")


@functools.cache
def _carrying(kind: Any) -> Any:
    return type(kind.__name__, (_Carrying, kind), {"__module__": kind.__module__})
