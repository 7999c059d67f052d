"""``linearize`` and ``restore``: softmax attention out, linear attention in, and back.

No module is replaced: an attention module gets feature maps as children and the model another
``attn_implementation``. Names of weights stay, and hidden states are captured as ever. What was
asked for is kept in the configuration, see ``checkpoint``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastattn.models.attention import HEAD
from fastattn.models.cache import hand_layer
from fastattn.models.checks import refuse_weights
from fastattn.models.families import attention_modules, is_decoder, is_local
from fastattn.models.integers import integer
from fastattn.models.marks import FIELD, MARK, NAME, add_hook, is_linear, remove_hook
from fastattn.nn.feature_maps import LEARNED, make_pair
from fastattn.ops import feature_maps

MAPS = ("query_feature_map", "key_feature_map")
UNUSABLE = ("identity", "features")  # not for projections, which can be negative


def linearize(
    model: PreTrainedModel, feature_map: str = "elu", layers: Sequence[int] | None = None
) -> Any:
    """Give ``model`` linear attention, in place, and return it.

    A swap alone costs most of a model's accuracy: train it afterwards (``fastattn linearize``).
    Layers that attend within a window (ModernBERT's local ones) keep softmax, computed in blocks.
    A model that has exactly this already keeps its maps, trained or not; ``restore`` it first for
    new ones.

    Args:
        model: a transformers encoder of a family in ``families.ATTENTION_CLASSES``, or a decoder
            of one in ``DECODER_CLASSES``, which then generates with a state of constant size.
        feature_map: a fused map by name, or "hedgehog", "t2r" (learned) or "performer" (random).
        layers: indices of the layers to make linear, all by default; the others keep softmax. In
            ALBERT, whose layers share weights, indices of its distinct layers. In decoders all.

    Raises:
        TypeError, NotImplementedError: a model without linear attention, or an index that is no
            integer.
        ValueError: an unknown feature map, a layer that is not there or is local, or a
            configuration that asks for attention weights.
    """
    settings = check_settings(model, feature_map, layers)
    if getattr(model.config, "output_attentions", False):
        raise ValueError(
            "linear attention has no weights to give, and config.output_attentions is True: set it "
            "to False first"
        )
    if not is_linear(model.config):
        model._fastattn_previous = model.config._attn_implementation
    if not _has_maps(model, **settings):
        _remove_maps(model)
        add_maps(model, **settings)
    record(model.config, settings)
    model.set_attn_implementation(NAME)
    return model


def restore(model: PreTrainedModel) -> Any:
    """Undo ``linearize``, in place, and return ``model``. Weights that training changed stay so.

    Raises:
        TypeError, NotImplementedError: a model without linear attention.
    """
    attention_modules(model, decoders=True)  # raises
    _remove_maps(model)
    record(model.config, None)
    previous = getattr(model, "_fastattn_previous", None)
    model.set_attn_implementation(previous if previous not in (None, NAME) else "sdpa")
    return model


def add_maps(model: PreTrainedModel, feature_map: str, layers: Sequence[int]) -> None:
    """Mark each attention module with its map; learned maps become its children."""
    config: Any = model.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if is_decoder(model):
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                add_hook(part, refuse_weights)
    for index, module in enumerate(attention_modules(model, decoders=True)):
        if is_decoder(model):
            add_hook(module, hand_layer)
        setattr(module, MARK, feature_map if index in layers else None)
        if index in layers and feature_map in LEARNED:
            like = _weight_like(module, model)
            for name, phi in zip(MAPS, make_pair(feature_map, heads, heads, size)):
                setattr(module, name, phi.to(like.device, like.dtype))


def _weight_like(module: nn.Module, model: nn.Module) -> Tensor:
    """A weight with the device and type of new maps: of the layer, or where that has none that is
    a floating-point number (it is quantised) of the model."""
    for weight in itertools.chain(module.parameters(), model.parameters()):
        if weight.is_floating_point():
            return weight
    return torch.empty(0)


def record(config: Any, settings: dict[str, Any] | None, field: str = FIELD) -> None:
    """Write into the configuration what ``linearize`` was asked for (or ``attach`` of a
    self-terminating head, whose field is ``HEAD``), or take it out.

    ``attn_implementation`` is what makes a checkpoint safe: transformers reads it back, and where
    fastattn is not imported refuses to build the model rather than run softmax.
    """
    _set(config, field, settings)
    headed = getattr(config, HEAD, None) is not None
    _set(config, "attn_implementation", NAME if is_linear(config) else HEAD if headed else None)


def _set(config: Any, name: str, value: Any) -> None:
    if value is not None:
        setattr(config, name, value)
    elif name in vars(config):
        delattr(config, name)


def check_settings(
    model: PreTrainedModel, feature_map: str, layers: Sequence[int] | None
) -> dict[str, Any]:
    modules = attention_modules(model, decoders=True)
    known = [*LEARNED, *(name for name in feature_maps.names() if name not in UNUSABLE)]
    if feature_map not in known:
        raise ValueError(f"feature_map must be one of {', '.join(known)}; got {feature_map!r}")
    able = [index for index, module in enumerate(modules) if not is_local(module)]
    if layers is None:
        return {"feature_map": feature_map, "layers": able}
    chosen = sorted({integer("layers", index) for index in layers})
    if bad := [index for index in chosen if not 0 <= index < len(modules)]:
        shared = getattr(model.config, "num_hidden_layers", len(modules)) != len(modules)
        hint = " (its layers share their weights)" if shared else ""
        raise ValueError(f"layers must be within 0..{len(modules) - 1}{hint}; got {bad}")
    if is_decoder(model) and chosen != able:
        raise NotImplementedError(f"in a decoder all layers are made linear; got layers={chosen}")
    if bad := [index for index in chosen if index not in able]:
        raise ValueError(
            f"layers {bad} attend within a window, in time linear in the length already, and keep "
            f"softmax; layers that can be made linear: {able}"
        )
    return {"feature_map": feature_map, "layers": chosen}


def _has_maps(model: PreTrainedModel, feature_map: str, layers: Sequence[int]) -> bool:
    modules = attention_modules(model, decoders=True)
    wanted = [feature_map if index in layers else None for index in range(len(modules))]
    return [getattr(module, MARK, "none yet") for module in modules] == wanted


def _remove_maps(model: PreTrainedModel) -> None:
    for module in model.modules():
        remove_hook(module)
    for module in attention_modules(model, decoders=True):
        for name in (*MAPS, MARK):
            if hasattr(module, name):
                delattr(module, name)
