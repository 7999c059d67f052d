"""``LinearAttention``: what stands where ``torch.nn.MultiheadAttention`` stood.

The same constructor words, parameter names and call, so a checkpoint loads and a Transformer layer
takes it; linear time, a state for streaming, and an error for what linear attention cannot do.
"""

from __future__ import annotations

import functools
import warnings
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastattn.nn import feature_maps as learned_maps
from fastattn.nn import masks
from fastattn.ops import (
    LinearAttentionState,
    feature_maps,
    linear_attention,
    linear_attention_step,
)
from fastattn.ops.check import MAX_DIM, check_bool, check_eps, check_tensor


class LinearAttention(nn.Module):
    """Multi-head linear attention with the interface of ``torch.nn.MultiheadAttention``.

    Args:
        embed_dim, num_heads, bias, kdim, vdim, batch_first, device, dtype: as
            ``torch.nn.MultiheadAttention``. Head sizes up to 256.
        dropout: there are no attention weights to drop: a warning says so once.
        add_bias_kv, add_zero_attn: must be False.
        is_causal: token i sees tokens 0..i.
        feature_map: the name of a fused map (``fastattn.feature_maps.names()``; "features", for
            tensors that are features already, with ``normalize=False`` only) or of one with
            parameters or randomness ("hedgehog", "t2r", "performer", "cosformer"), or a module that
            maps (B, heads, tokens, D) to non-negative features and serves queries and keys.
        num_kv_heads: fewer heads for keys and values (grouped heads); divides ``num_heads``.
        normalize, eps: as ``fastattn.linear_attention``.
        max_length: the longest input; for "cosformer" only.

    Parameters are those of ``torch.nn.MultiheadAttention``: ``in_proj_weight`` (or
    ``q_proj_weight``, ``k_proj_weight``, ``v_proj_weight`` when ``kdim`` or ``vdim`` differ),
    ``in_proj_bias`` and ``out_proj``; a map with parameters adds ``query_feature_map`` and
    ``key_feature_map``.

    Source: Katharopoulos et al., "Transformers are RNNs", 2020, https://arxiv.org/abs/2006.16236.
    """

    # nn.TransformerEncoderLayer has a fast path for inference that reads the weights of its
    # attention and runs softmax on them, without calling it. It asks this first, and is told
    # "no" whatever the sizes are.
    _qkv_same_embed_dim = False

    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        is_causal: bool = False,
        feature_map: str | nn.Module = "elu",
        num_kv_heads: int | None = None,
        normalize: bool = True,
        eps: float = 1e-6,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_sizes(embed_dim, num_heads, num_kv_heads)
        check_bool("is_causal", is_causal)
        check_bool("normalize", normalize)
        check_eps(eps)
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be within 0..1; got {dropout}")
        for name, given in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if given:
                raise NotImplementedError(f"LinearAttention has no {name}: it must be False")
        embed_dim, num_heads, num_kv_heads = map(int, (embed_dim, num_heads, num_kv_heads))
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout, self.batch_first, self.is_causal = dropout, batch_first, is_causal
        self.normalize, self.eps = normalize, eps
        if dropout > 0:
            _say_no_dropout()

        factory: Any = {"device": device, "dtype": dtype}
        kv_dim = num_kv_heads * self.head_dim
        if self.kdim == self.vdim == embed_dim:
            self.in_proj_weight = nn.Parameter(
                torch.empty(embed_dim + 2 * kv_dim, embed_dim, **factory)
            )
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                self.register_parameter(name, None)
        else:
            self.register_parameter("in_proj_weight", None)
            self.q_proj_weight = nn.Parameter(torch.empty(embed_dim, embed_dim, **factory))
            self.k_proj_weight = nn.Parameter(torch.empty(kv_dim, self.kdim, **factory))
            self.v_proj_weight = nn.Parameter(torch.empty(kv_dim, self.vdim, **factory))
        if bias:
            self.in_proj_bias = nn.Parameter(torch.empty(embed_dim + 2 * kv_dim, **factory))
        else:
            self.register_parameter("in_proj_bias", None)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)
        self._set_feature_map(feature_map, max_length, factory)
        self._reset_parameters()

    def _set_feature_map(
        self, feature_map: str | nn.Module, max_length: int | None, factory: dict[str, Any]
    ) -> None:
        """``feature_map`` is the fused map's name, also of what follows a module."""
        self.query_feature_map: nn.Module | None = None
        self.key_feature_map: nn.Module | None = None
        if max_length is not None and feature_map != "cosformer":
            raise ValueError(f"max_length is for feature_map='cosformer'; got {feature_map!r}")
        if isinstance(feature_map, nn.Module):
            self.feature_map = learned_maps.fused_part(feature_map)
            self.query_feature_map = self.key_feature_map = feature_map
        elif feature_map in learned_maps.NAMES:
            pair = learned_maps.make_pair(
                feature_map, self.num_heads, self.num_kv_heads, self.head_dim, max_length
            )
            self.query_feature_map, self.key_feature_map = (phi.to(**factory) for phi in pair)
            self.feature_map = learned_maps.fused_part(pair[0])
        else:
            known = [*feature_maps.names(), *learned_maps.NAMES]
            if feature_map not in known:
                raise ValueError(
                    f"feature_map must be a module or one of {', '.join(map(repr, known))}; "
                    f"got {feature_map!r}"
                )
            phi = feature_maps.get(feature_map)
            # Projections have both signs, so they can't be features as they are.
            if self.normalize and (feature_map == "features" or not phi.is_nonnegative):
                raise ValueError(f"feature_map={feature_map!r} needs normalize=False")
            if self.is_causal and not phi.is_separable:
                raise ValueError(f"feature_map={feature_map!r} has no causal form")
            self.feature_map = feature_map

    def _reset_parameters(self) -> None:
        weights = (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        for weight in weights:
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attention of ``query`` to ``key`` and ``value``.

        The arguments are those of ``torch.nn.MultiheadAttention`` in the same order.

        Args:
            query: (N, B, E), with ``batch_first`` (B, N, E), or without a batch (N, E). Self
                attention takes a nested tensor as well and gives one.
            key: (M, B, kdim), (B, M, kdim) or (M, kdim).
            value: (M, B, vdim), (B, M, vdim) or (M, vdim).
            key_padding_mask: (B, M) or (M,): bool, True = IGNORE this key; or floating point,
                0 = take part, -inf = ignore.
            need_weights: must be False, which is the default here: there are no weights.
            attn_mask: None, or the causal mask (N, N): bool, True = hidden; or 0 and -inf. Under
                ``torch.compile`` its contents can't be seen and ``is_causal`` is taken at its word.
            average_attn_weights: without effect, as always where there are no weights.
            is_causal: causal attention; ``attn_mask`` may then be left out.

        Returns:
            (output in the shape of ``query``, None).

        Raises:
            ValueError, TypeError, NotImplementedError: naming the argument and what is allowed.
        """
        if need_weights:
            raise NotImplementedError(
                "need_weights=True: linear attention never forms the weights; pass False"
            )
        for name, x in (("query", query), ("key", key), ("value", value)):
            check_tensor(name, x)
        if query.is_nested or key.is_nested or value.is_nested:
            causal = is_causal or self.is_causal
            return self._nested(query, key, value, key_padding_mask, attn_mask, causal), None
        self._check_inputs(query, key, value)
        causal = self._is_causal(query, key, attn_mask, is_causal)
        q, k, v = self._project(query, key, value)
        mask = None
        if key_padding_mask is not None:
            expected = (k.shape[0], k.shape[2]) if key.dim() == 3 else (k.shape[2],)
            mask = masks.key_mask(key_padding_mask, expected).view(k.shape[0], k.shape[2])
        out = linear_attention(
            *self._features(q, k), v, is_causal=causal, key_mask=mask, **self._options
        )
        return self._output(out, batched=query.dim() == 3), None

    def zero_state(self, batch_size: int) -> LinearAttentionState:
        """The state before the first token, for ``step``."""
        weight = self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight
        features = self.head_dim
        if self.key_feature_map is not None:
            with torch.no_grad():
                probe = weight.new_zeros(1, self.num_kv_heads, 1, self.head_dim)
                features = self.key_feature_map(probe).shape[-1]
        return LinearAttentionState.zeros(
            batch_size,
            self.num_kv_heads,
            features,
            self.head_dim,
            feature_map=self.feature_map,
            dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32,
            device=weight.device,
        )

    @torch.no_grad()
    def step(self, x: Tensor, state: LinearAttentionState) -> Tensor:
        """The next tokens of a stream: causal self attention to them and to all before them.

        However a sequence is cut into calls, the outputs are those of one causal ``forward``, and
        each call takes constant time and memory per token.

        Args:
            x: (n, B, E), with ``batch_first`` (B, n, E); the prompt first, say, then one token a
                call.
            state: from ``zero_state`` or earlier steps. Updated IN PLACE.

        Returns:
            The output, in the shape of ``x``. There is no gradient.
        """
        if isinstance(self.query_feature_map, learned_maps.Cosformer):
            raise NotImplementedError("feature_map='cosformer' counts positions from 0: no step")
        if not feature_maps.get(self.feature_map).is_separable:
            raise ValueError(f"feature_map={self.feature_map!r} has no running state: no step")
        if x.dim() != 3:
            shape = "(B, n, embed_dim)" if self.batch_first else "(n, B, embed_dim)"
            raise ValueError(f"x must have shape {shape}; got {tuple(x.shape)}")
        self._check_inputs(x, x, x)
        q, k, v = self._project(x, x, x)
        q, k = self._features(q, k)
        if q.shape[2] == 1:
            return self._output(linear_attention_step(q, k, v, state, **self._options))
        out, after = linear_attention(
            q, k, v, is_causal=True, initial_state=state, return_state=True, **self._options
        )
        for old, new in zip(state, after):
            old.copy_(new)
        return self._output(out)

    def extra_repr(self) -> str:
        kv = f", num_kv_heads={self.num_kv_heads}" if self.num_kv_heads != self.num_heads else ""
        phi = f", feature_map={self.feature_map!r}" if self.query_feature_map is None else ""
        return (
            f"{self.embed_dim}, {self.num_heads}{kv}{phi}, "
            f"is_causal={self.is_causal}, batch_first={self.batch_first}"
        )

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "feature_map": self.feature_map,
            "normalize": self.normalize,
            "eps": self.eps,
            "enable_gqa": self.num_kv_heads != self.num_heads,
        }

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, heads, tokens, D) of each, as views of what the matrix products give."""
        sizes = [heads * self.head_dim for heads in (self.num_heads, *2 * (self.num_kv_heads,))]
        bias = self.in_proj_bias
        if self.in_proj_weight is not None and query is key and key is value:
            projected = F.linear(query, self.in_proj_weight, bias).split(sizes, -1)
        else:
            weights: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            if self.in_proj_weight is not None:
                weights = self.in_proj_weight.split(sizes)
            biases = (None, None, None) if bias is None else bias.split(sizes)
            projected = tuple(map(F.linear, (query, key, value), weights, biases))
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in projected)
        if query.dim() == 2:
            return tuple(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        order = (0, 2, 1, 3) if self.batch_first else (1, 2, 0, 3)
        return tuple(x.permute(order) for x in (q, k, v))

    def _features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.query_feature_map is None or self.key_feature_map is None:
            return q, k
        q, _ = learned_maps.for_kernel(self.query_feature_map, q)
        k, _ = learned_maps.for_kernel(self.key_feature_map, k)
        return q, k

    def _output(self, out: Tensor, batched: bool = True) -> Tensor:
        """(B, H, N, D) to the shape of the query."""
        if not batched:
            out = out[0].transpose(0, 1)
        else:
            out = out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)
        projected: Tensor = self.out_proj(out.flatten(-2))
        return projected

    def _is_causal(self, query: Tensor, key: Tensor, mask: Tensor | None, hint: bool) -> bool:
        if mask is None:
            return hint or self.is_causal
        tokens = 1 if query.dim() == 3 and self.batch_first else 0
        shape = (query.shape[tokens], key.shape[tokens])
        batch = query.shape[1 - tokens] if query.dim() == 3 else 1
        return masks.is_causal(mask, hint, shape, batch * self.num_heads) or self.is_causal

    def _nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        causal: bool,
    ) -> Tensor:
        """nn.TransformerEncoder makes nested tensors of padded ones where it may."""
        is_self = query is key and key is value
        has_mask = key_padding_mask is not None or attn_mask is not None
        if not is_self or has_mask or not self.batch_first:
            raise ValueError(
                "nested tensors need self attention (the same tensor as query, key and value), "
                "batch_first=True and no masks; for causal attention pass is_causal=True"
            )
        lengths = [row.shape[0] for row in query.unbind()]
        padded = query.to_padded_tensor(0.0)
        tokens = torch.arange(padded.shape[1], device=padded.device)
        ignored = tokens >= torch.tensor(lengths, device=padded.device).unsqueeze(1)
        out, _ = self(padded, padded, padded, key_padding_mask=ignored, is_causal=causal)
        rows = [row[:length] for row, length in zip(out, lengths)]
        jagged: Any = query if query.layout == torch.jagged else None
        if jagged is not None and jagged.lengths() is None:  # with the very sizes of the query
            return torch.nested.nested_tensor_from_jagged(torch.cat(rows), jagged.offsets())
        return torch.nested.as_nested_tensor(rows, layout=query.layout)

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        weight = self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight
        sizes = {"query": self.embed_dim, "key": self.kdim, "value": self.vdim}
        for (name, size), x in zip(sizes.items(), (query, key, value)):
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != size:
                shape = "(B, tokens, {})" if self.batch_first else "(tokens, B, {})"
                raise ValueError(
                    f"{name} must have shape {shape.format(size)}, or (tokens, {size}) as all "
                    f"three; got {tuple(x.shape)}"
                )
            if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
                raise TypeError(
                    f"{name} must be {weight.dtype} like the module's weights, if not under "
                    f"torch.autocast; got {x.dtype}"
                )


def _check_sizes(embed_dim: int, num_heads: int, num_kv_heads: int) -> None:
    sizes: dict[str, Any] = {
        "embed_dim": embed_dim,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
    }
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, Integral):
            raise TypeError(f"{name} must be an integer; got {size!r}")
    if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
        raise ValueError(
            "embed_dim must be a positive multiple of num_heads; "
            f"got embed_dim={embed_dim} and num_heads={num_heads}"
        )
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads={num_heads}; got {num_kv_heads}")
    if embed_dim // num_heads > MAX_DIM:
        raise ValueError(
            f"heads of size embed_dim / num_heads = {embed_dim // num_heads} are too large: at "
            f"most {MAX_DIM}"
        )


@functools.cache
def _say_no_dropout() -> None:
    warnings.warn(
        "linear attention has no attention weights to drop: dropout has no effect", stacklevel=3
    )
