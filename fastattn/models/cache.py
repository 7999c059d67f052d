"""Decoding in constant time and memory: the state (S, z) in transformers' cache.

``model.generate`` makes a cache of keys and values, which grows. At a linear layer's first token
its layer in that cache is exchanged for a ``StateLayer``, transformers' linear-attention cache
layer with S and z as its two recurrent states. It hands on the keys and values it is given, those
of new tokens alone. The attention function gets it as an argument, which transformers' modules hand
through: nothing is kept on the module, which several threads may be running.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    EncoderDecoderCache,
    LinearAttentionLayer,
)

from fastattn.models.marks import NAME
from fastattn.ops import LinearAttentionState, linear_attention, linear_attention_step

LAYER = "fastattn_state_layer"  # the argument of the attention function


class StateLayer(LinearAttentionLayer, CacheLayerMixin):  # type: ignore[misc, override, unused-ignore]
    """(S, z) after ``get_seq_length()`` tokens; its size does not depend on their number."""

    is_compileable = False  # it counts its tokens in Python

    def __init__(self) -> None:
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=2)
        self.tokens = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Count the new tokens; nothing of them is kept here, and the past is not given back."""
        self.tokens += key_states.shape[-2]
        return key_states, value_states

    @property
    def state(self) -> LinearAttentionState | None:
        """The sums themselves, to be updated in place; None before the first token."""
        if not self.has_previous_state[0]:
            return None
        S, z = self.recurrent_states[0], self.recurrent_states[1]
        assert S is not None and z is not None
        return LinearAttentionState(S, z)

    def write(self, state: LinearAttentionState) -> None:
        place: Any = self  # the device and type are first annotated as None
        place.device, place.dtype = state.S.device, state.S.dtype
        for index, value in enumerate(state):
            self.update_recurrent_state(value.detach(), index)
            self.has_previous_state[index] = True

    def get_seq_length(self) -> int:
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def reset(self) -> None:
        super().reset()
        self.tokens = 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda value: value.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda value: value[indices])

    def _each(self, change: Any) -> None:
        for index, value in self.recurrent_states.items():
            if value is not None:
                self.recurrent_states[index] = change(value)


def causal(
    layer: StateLayer | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    feature_map: str,
) -> Tensor:
    """Causal linear attention of new tokens (B, H, N, D), after those in the state of ``layer``."""
    new = query.shape[2]
    mask = _mask_of_new(mask, new, new if layer is None else layer.get_seq_length())
    options: dict[str, Any] = {"feature_map": feature_map, "key_mask": mask}
    if layer is None:
        out: Tensor = linear_attention(query, key, value, is_causal=True, **options)
        return out
    state = layer.state
    needs_grad = torch.is_grad_enabled() and query.requires_grad
    if new == 1 and state is not None and not needs_grad:
        return linear_attention_step(query, key, value, state, **options)
    out, after = linear_attention(
        query, key, value, is_causal=True, initial_state=state, return_state=True, **options
    )
    layer.write(after)
    return out


def _mask_of_new(mask: Tensor | None, new: int, total: int) -> Tensor | None:
    """The part for the ``new`` last tokens of a mask that has all ``total`` so far.

    Raises:
        ValueError: it has another length.
    """
    if mask is None:
        return None
    if mask.shape[1] != total:
        flat = " (GPT-2 flattens a mask of 3 dimensions)" if mask.shape[1] == new * total else ""
        raise ValueError(
            "attention_mask must have one column for each of the tokens so far, those in the cache "
            f"included: shape (batch, {total}); got {tuple(mask.shape)}{flat}"
        )
    return mask[:, total - new :]


def hand_layer(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The hook of a decoder's self-attention: its layer of the cache becomes an argument."""
    if module.config._attn_implementation != NAME:
        return args, kwargs  # set back to softmax by name, which needs its keys and values
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    if cache is None:
        return args, kwargs
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    return args, {**kwargs, LAYER: _layer(cache, module.layer_idx)}


def _layer(cache: Any, index: int) -> StateLayer:
    """The layer of ``cache`` for the attention module ``index``, made at its first token."""
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[index]
    if isinstance(layer, StateLayer):
        return layer
    if layer.get_seq_length():
        raise ValueError(
            "the cache holds keys and values of softmax attention: linear attention needs a "
            "cache that it has filled itself"
        )
    cache.layers[index] = StateLayer()
    return cache.layers[index]  # type: ignore[no-any-return]
