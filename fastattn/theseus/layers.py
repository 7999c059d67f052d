"""Where a model keeps its layers, and how to leave it with fewer of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastattn.models.families import attention_modules


def layer_list(model: nn.Module, name: str | None = None) -> tuple[str, nn.ModuleList]:
    """The list of the model's layers and its name within the model.

    Args:
        name: as ``model.get_submodule`` takes it; None looks for the list each of whose members
            holds one self-attention module.

    Raises:
        ValueError: ``name`` is no ``nn.ModuleList`` in ``model``.
        NotImplementedError: a family whose layers aren't known, or share their weights.
    """
    if name is not None:
        found = dict(model.named_modules()).get(name)
        if not isinstance(found, nn.ModuleList):
            lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
            raise ValueError(
                f"layers must name an nn.ModuleList in {type(model).__name__}; got {name!r}; "
                f"there is {', '.join(lists) or 'none'}"
            )
        return name, found
    attention = {id(module) for module in attention_modules(model)}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == len(attention):
            holds = [sum(id(part) in attention for part in layer.modules()) for layer in module]
            if set(holds) == {1} and len(module) == _configured(model):
                return path, module
    raise NotImplementedError(
        f"{type(model).__name__} has no list of layers of their own (ALBERT's share one set of "
        "weights): only its attention can be replaced, with attention='linear' and no num_layers"
    )


def keep_layers(model: nn.Module, name: str, kept: Sequence[int]) -> None:
    """Leave ``model`` with the layers of these indices, in place, its configuration in step.

    Raises:
        NotImplementedError: the configuration does not count these layers.
    """
    old = model.get_submodule(name)
    assert isinstance(old, nn.ModuleList)
    config: Any = getattr(model, "config", None)
    counted = getattr(config, "num_hidden_layers", None)
    composite = getattr(config, "is_encoder_decoder", False)
    if len(kept) != len(old) and (composite or counted not in (None, len(old))):
        raise NotImplementedError(
            f"{type(model).__name__} can't be saved with {len(kept)} layers in {name!r}: its "
            f"configuration counts others (num_hidden_layers={counted})"
        )
    layers = nn.ModuleList(old[index] for index in kept)
    set_submodule(model, name, layers)
    for position, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = position  # type: ignore[assignment]
    if counted is None:
        return
    types = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(kept)
    if types is not None:
        config.layer_types = [types[index] for index in kept]


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """``model.<name> = module`` for a dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def forget_captures(model: nn.Module) -> None:
    """Let transformers find the modules anew from which it takes hidden states: it looks once, and
    would go on hooking layers that are no longer there and miss those that came."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") == "output_capturing_hook":
                del module._forward_hooks[key]
        if getattr(module, "_output_capturing_hooks_installed", False):
            module._output_capturing_hooks_installed = False  # type: ignore[assignment]


def _configured(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.num_hidden_layers)
