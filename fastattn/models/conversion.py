"""``linearize``, ``restore`` and ``load``: softmax attention out, linear attention in, and back.

No module is replaced: an attention module gets feature maps as children and the model another
``attn_implementation``. Names of weights stay, and hidden states are captured as ever.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from fastattn.models.attention import NAME
from fastattn.models.families import attention_modules
from fastattn.nn.feature_maps import LEARNED
from fastattn.ops import feature_maps

FIELD = "fastattn"  # of the configuration: what linearize was asked for
MAPS = ("query_feature_map", "key_feature_map")


def linearize(
    model: nn.Module, feature_map: str = "elu", layers: Sequence[int] | None = None
) -> Any:
    """Give ``model`` linear attention, in place, and return it.

    A swap alone costs most of a model's accuracy: train it afterwards (``fastattn linearize``).

    Args:
        model: a transformers encoder of a family in ``families.ATTENTION_CLASSES``.
        feature_map: a fused map by name, or a learned one: "hedgehog" or "t2r".
        layers: indices of the layers to make linear, all by default; the others keep softmax.

    Raises:
        NotImplementedError: a model without linear attention.
        ValueError: an unknown feature map, or a layer that is not there.
    """
    modules = attention_modules(model)
    known = [*LEARNED, *(name for name in feature_maps.names() if name not in UNUSABLE)]
    if feature_map not in known:
        raise ValueError(f"feature_map must be one of {', '.join(known)}; got {feature_map!r}")
    chosen = set(range(len(modules)) if layers is None else layers)
    if bad := sorted(index for index in chosen if not 0 <= index < len(modules)):
        raise ValueError(f"layers must be within 0..{len(modules) - 1}; got {bad}")
    _remove(modules)
    config: Any = model.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    for index, module in enumerate(modules):
        module.fastattn_softmax = index not in chosen  # type: ignore[assignment]
        module.fastattn_feature_map = feature_map  # type: ignore[assignment]
        if index in chosen and feature_map in LEARNED:
            device = next(module.parameters()).device
            for name in MAPS:
                setattr(module, name, LEARNED[feature_map](heads, size).to(device))
    setattr(config, FIELD, {"feature_map": feature_map, "layers": sorted(chosen)})
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    return model


UNUSABLE = ("identity", "features")  # not for projections, which can be negative


def restore(model: nn.Module) -> Any:
    """Undo ``linearize``, in place, and return ``model``. Weights that training changed stay so."""
    _remove(attention_modules(model))
    if hasattr(model.config, FIELD):
        delattr(model.config, FIELD)
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    return model


def load(path: str | Path) -> Any:
    """The linearised model that ``save_pretrained`` left in ``path``, in evaluation mode.

    Raises:
        ValueError: no linearised checkpoint, or its weights don't fit its configuration.
    """
    path = Path(path)
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    settings = getattr(config, FIELD, None)
    if settings is None:
        raise ValueError(f"{path} holds no linearised model: load it with from_pretrained")
    model = getattr(transformers, config.architectures[0])(config)
    linearize(model, **settings)
    result = model.load_state_dict(_weights(path), strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if missing := [name for name in result.missing_keys if name not in tied]:
        raise ValueError(f"{path} has no weights for {', '.join(missing[:5])}")
    if result.unexpected_keys:
        raise ValueError(f"{path} has weights of no use: {', '.join(result.unexpected_keys[:5])}")
    model.tie_weights()
    return model.eval()


def _weights(path: Path) -> dict[str, Tensor]:
    index = path / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.exists():
        files = set(json.loads(index.read_text())["weight_map"].values())
    return {name: value for file in files for name, value in load_file(path / file).items()}


def _remove(modules: list[nn.Module]) -> None:
    for module in modules:
        for name in (*MAPS, "fastattn_softmax", "fastattn_feature_map"):
            if hasattr(module, name):
                delattr(module, name)
