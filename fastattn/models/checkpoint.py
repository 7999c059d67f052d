"""Checkpoints of models with linear attention or a self-terminating head: ``from_pretrained`` gives
them back whole, or refuses.

transformers does not save which attention a model runs, so a linearised checkpoint would come back
with softmax. ``linearize`` therefore writes two fields into ``config.json``: ``fastattn``, what it
was asked for, and ``attn_implementation``, which transformers does read. Without fastattn that
name is unknown and building the model fails. With fastattn imported the hook below, run when a
model has been built and before its weights are read, adds the feature maps. A self-terminating
head is kept and guarded in the same way.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from fastattn.models.attention import HEAD, SOFTMAX
from fastattn.models.conversion import add_maps, check_settings, record
from fastattn.models.families import ATTENTION_CLASSES, attention_modules
from fastattn.models.marks import FIELD, MARK, NAME, is_linear
from fastattn.nn.feature_maps import Performer, ProjectedMap


def load(path: str | Path, **options: Any) -> Any:
    """The model that ``save_pretrained`` left in ``path``, with the linear attention, the
    self-terminating head or both that it had, in evaluation mode.

    Like ``from_pretrained`` of the class that was saved, but a checkpoint that has neither, or
    whose weights are not exactly those of its model, is an error; and on a CPU outputs are those of
    the saved model bit for bit.

    Args:
        path: a folder, or whatever else ``from_pretrained`` takes.
        options: of ``from_pretrained``: ``dtype``, ``device_map``, ``revision``, ...

    Raises:
        ValueError: no checkpoint of that kind, its weights don't fit its configuration, or its
            self-terminating head ends otherwise than ``generate`` would.
        OSError: nothing there.
    """
    config, _ = PreTrainedConfig.get_config_dict(path, **options)
    if config.get(FIELD) is None and config.get(HEAD) is None:
        raise ValueError(f"{path} holds no linearised model: load it with from_pretrained")
    architecture = (config.get("architectures") or ["none"])[0]
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        raise ValueError(f"{path} holds a model of unknown class: {architecture}")
    model, report = model_class.from_pretrained(path, output_loading_info=True, **options)
    for kind, keys in report.items():
        if keys and kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            shown = ", ".join(str(key) for key in sorted(keys, key=str)[:5])
            raise ValueError(f"the weights in {path} don't fit: {kind.replace('_', ' ')} {shown}")
    if hasattr(model, "_fastattn_head"):  # a model without generation leaves it alone
        from fastattn.generation.attached import check_end

        check_end(config[HEAD]["eos_token_id"], model)
    # Weights lie where the file has them, on no boundary: matrix products then round otherwise
    # than those of the model that was saved.
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
    return model


def complete(model: PreTrainedModel) -> None:
    """Give a model that has just been built from a configuration of ours its feature maps and its
    self-terminating head.

    Raises:
        NotImplementedError: linear attention was asked for and the model can't have it.
        ValueError: a linearised configuration with another attention, or a damaged one.
    """
    config: Any = model.config
    if config._attn_implementation == HEAD:
        config._attn_implementation = "sdpa" if model._supports_sdpa else "eager"
    _complete_attention(model, config)
    if getattr(config, HEAD, None) is not None and model.can_generate():
        from fastattn.generation.attached import attach_again

        attach_again(model)


def _complete_attention(model: PreTrainedModel, config: Any) -> None:
    linear = config._attn_implementation == NAME
    if not is_linear(config):
        if linear:
            attention_modules(model)  # raises where the name would be ignored, and in decoders
        return
    if not linear:
        raise ValueError(
            f"this checkpoint was linearised; it can't be loaded with attn_implementation="
            f"{config._attn_implementation!r}: leave that out, and for softmax attention call "
            "fastattn.restore(model) afterwards. A composite model must be told the attention of "
            f"its linearised part: attn_implementation={{'encoder': {NAME!r}}}"
        )
    settings = getattr(config, FIELD)
    if not isinstance(settings, dict) or set(settings) != {"feature_map", "layers"}:
        raise ValueError(f"config.json has a damaged field {FIELD!r}: {settings!r}")
    record(config, settings)  # transformers has read attn_implementation and dropped it
    if not all(hasattr(module, MARK) for module in attention_modules(model, decoders=True)):
        add_maps(model, **check_settings(model, **settings))


def install() -> None:
    """Have ``complete`` run at the end of every transformers model's construction,
    ``set_attn_implementation`` say where it has no effect, feature maps that a checkpoint has not
    start as new ones do, and no model saved as another than it is."""
    post_init: Any = PreTrainedModel.post_init
    if hasattr(post_init, "__wrapped__"):
        return

    @functools.wraps(post_init)
    def post_init_and_complete(self: PreTrainedModel) -> None:
        post_init(self)
        complete(self)

    set_attention: Any = PreTrainedModel.set_attn_implementation

    @functools.wraps(set_attention)
    def set_and_check(self: Any, attn_implementation: Any, *args: Any, **rest: Any) -> Any:
        parts = [part for part in self.modules() if isinstance(part, PreTrainedModel)]
        before = [part.config._attn_implementation for part in parts]
        result = set_attention(self, attn_implementation, *args, **rest)
        wanted = attn_implementation
        if isinstance(wanted, dict):  # by part; the key of the model itself is ""
            wanted, parts, before = wanted.get(""), parts[:1], before[:1]
        if wanted in (NAME, SOFTMAX):
            _check_taken(parts, before, wanted)
        return result

    initialize: Any = PreTrainedModel._initialize_weights

    @functools.wraps(initialize)
    def initialize_maps_too(self: Any, module: Any, *args: Any, **rest: Any) -> None:
        flag = "_is_hf_initialized"  # of a module, and of each tensor that was read
        if isinstance(module, (ProjectedMap, Performer)) and not getattr(module, flag, False):
            tensors = (*module.parameters(), *module.buffers())
            if not all(getattr(tensor, flag, False) for tensor in tensors):
                module.reset_parameters()
        initialize(self, module, *args, **rest)

    save: Any = PreTrainedModel.save_pretrained

    @functools.wraps(save)
    def check_and_save(self: Any, *args: Any, **rest: Any) -> Any:
        _check_saved(self.config)
        return save(self, *args, **rest)

    PreTrainedModel._initialize_weights = initialize_maps_too  # type: ignore[method-assign]
    PreTrainedModel.save_pretrained = check_and_save  # type: ignore[method-assign]
    PreTrainedModel.post_init = post_init_and_complete  # type: ignore[method-assign]
    PreTrainedModel.set_attn_implementation = set_and_check  # type: ignore[method-assign]


def _check_saved(config: Any) -> None:
    """The checkpoint of a linearised model comes back linear, whatever it ran last.

    Raises:
        ValueError: that is softmax attention.
    """
    active = config._attn_implementation
    if is_linear(config) and not str(active).startswith("fastattn_"):
        raise ValueError(
            f"this model was linearised and now runs {active!r}; saved, it would come back linear: "
            f"call fastattn.restore(model) first, or set_attn_implementation({NAME!r})"
        )


def _check_taken(parts: list[Any], before: list[str], name: str) -> None:
    """transformers only logs a line where a model doesn't call the attention interface.

    Raises:
        NotImplementedError: a part keeps another attention than ``name``; all are set back.
    """
    for part in parts:
        if part.config._attn_implementation != name:
            for one, previous in zip(parts, before, strict=True):
                one.config._attn_implementation = previous
            raise NotImplementedError(
                f"{type(part).__name__} does not take attn_implementation={name!r}: it keeps its "
                f"own attention; supported: {', '.join(ATTENTION_CLASSES)}"
            )


install()
