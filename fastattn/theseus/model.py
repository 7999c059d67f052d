"""``Theseus``: predecessor and successor as one model, and the plain successor out of it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastattn.models.conversion import check_settings, linearize
from fastattn.models.families import attention_modules
from fastattn.models.marks import is_linear
from fastattn.theseus.gates import draw
from fastattn.theseus.layers import forget_captures, keep_layers, layer_list, set_submodule
from fastattn.theseus.replaceable import Replaceable
from fastattn.theseus.schedules import LinearSchedule, Schedule

PARTS = ("layers", "embeddings", "head")
EMBEDDING_WORDS = ("embed", "wte", "wpe")


class Theseus(nn.Module):
    """A model whose layers or attention modules are replaced at random while it trains.

    With fewer layers, or ``attention="softmax"``, whole layers are replaced: of n predecessor
    layers and m successor layers, successor layer i stands in for predecessor layers
    i n/m .. (i+1) n/m - 1. With ``attention="linear"`` and as many layers, attention modules alone.

    Phase 1: only the successor's modules train; predecessor, embeddings and head are frozen. Train
    as usual, with a ``TheseusCallback`` or a call of ``step`` after each optimizer step. Phase 2:
    ``fine_tune`` leaves the successor alone and thaws what it is told to. ``export`` gives the
    successor as a plain model at any time.

    A draw that replaces nothing gives a loss without gradients; it then has zeros for all of the
    successor, as distributed training wants.

    Args:
        predecessor: a fine-tuned model; it is copied, not changed.
        num_layers: m, which must divide n; default n.
        attention: of the successor.
        feature_map: as for ``linearize``, default "hedgehog"; only for linear attention.
        schedule: of the share replaced; default the paper's.
        layers: name of the ``nn.ModuleList`` of layers in ``predecessor``; default: found for the
            families of ``linearize``.
        linear_layers: indices, in the successor, of the layers that get linear attention, all by
            default; the others keep softmax.
        start: a model of the same shape whose layers the successor starts from instead, such as
            the predecessor with feature maps fitted by attention transfer.
        first: start from the first m layers, as the paper does, rather than from the first layer
            of each n/m that are replaced.
        match: weight of the matching loss in ``loss`` of the output: the successor's squared
            error on each module's output relative to its variance, a mean over modules; both then
            run at each step. The output has it as ``matching_loss`` as well. 0: none.
        seed: of the gates.

    Raises:
        ValueError: m that does not divide n, a layer that isn't there, an unknown word, an argument
            that needs linear attention, or a ``start`` of another shape.
        TypeError: a schedule that is none.
        NotImplementedError: a model whose layers aren't known, or without linear attention.
    """

    def __init__(
        self,
        predecessor: nn.Module,
        num_layers: int | None = None,
        attention: Literal["softmax", "linear"] = "softmax",
        feature_map: str | None = None,
        schedule: Schedule | None = None,
        *,
        layers: str | None = None,
        linear_layers: Sequence[int] | None = None,
        start: nn.Module | None = None,
        first: bool = False,
        match: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if attention not in ("softmax", "linear"):
            raise ValueError(f"attention must be 'softmax' or 'linear'; got {attention!r}")
        if not match >= 0:
            raise ValueError(f"match must not be negative; got {match}")
        if linear_layers is not None and attention != "linear":
            raise ValueError(f"linear_layers={linear_layers!r} needs attention='linear'")
        if feature_map is not None and attention != "linear":
            raise ValueError(f"feature_map={feature_map!r} needs attention='linear'")
        if schedule is not None and not (callable(schedule) and hasattr(schedule, "blends")):
            raise TypeError(f"schedule must be one such as LinearSchedule(); got {schedule!r}")
        if start is not None:
            _check_start(predecessor, start)
        feature_map = feature_map or "hedgehog"
        self.schedule: Schedule = schedule or LinearSchedule()
        self.match, self.seed = match, seed
        self.steps = 0
        self.forwards = 0
        linear = attention == "linear"
        was_linear = is_linear(getattr(predecessor, "config", None))
        if was_linear and not linear:
            raise ValueError("the predecessor has linear attention: attention must be 'linear'")
        old: Any = copy.deepcopy(predecessor).requires_grad_(False)
        new: Any = copy.deepcopy(predecessor if start is None else start)
        forget_captures(old)
        forget_captures(new)
        attention_only = (
            linear and not was_linear and num_layers in (None, _depth(predecessor, layers))
        )
        if attention_only:
            chosen = check_settings(new, feature_map, linear_layers)["layers"]
            self._slots = [_name_of(new, attention_modules(new)[index]) for index in chosen]
            pieces: list[Sequence[nn.Module]] = [[attention_modules(old)[i]] for i in chosen]
        else:
            name, found = layer_list(old, layers)
            kept, pieces = _divide(found, num_layers, first)
            keep_layers(new, name, kept)
            self._slots = [f"{name}.{index}" for index in range(len(kept))]
        self._layers = _layers_name(new, layers)
        if linear:
            # Softmax layers in a model that hands linear attention's mask through.
            if not was_linear:
                linearize(old, feature_map, layers=[])
            _linearize(new, feature_map, linear_layers)
        new.requires_grad_(False)
        for slot, piece in zip(self._slots, pieces, strict=True):
            successor = new.get_submodule(slot).requires_grad_(True)
            block = Replaceable(piece, successor)
            if hasattr(successor, "attention_type"):
                block.attention_type = _one_type(piece)
            set_submodule(new, slot, block)
        self.model = new
        self.register_state_dict_post_hook(_without_aliases)  # type: ignore[no-untyped-call]
        self.train(predecessor.training)

    @property
    def blocks(self) -> list[Replaceable]:
        """The modules that are being replaced, first to last."""
        found = [self.model.get_submodule(slot) for slot in self._slots]
        return [block for block in found if isinstance(block, Replaceable)]

    @property
    def config(self) -> Any:
        """The successor's configuration, which the Trainer looks at."""
        return self.model.config

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As of the model inside; the Trainer calls it."""
        self.model.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.model.gradient_checkpointing_disable()

    @property
    def share(self) -> float:
        """Of the successor at this step: the schedule's, and 1 in phase 2."""
        return self.schedule(self.steps) if self.blocks else 1.0

    def step(self) -> None:
        """Count one optimizer step; ``TheseusCallback`` does it for the Trainer."""
        self.steps += 1

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the predecessor's, with a seeded draw before it in training mode, where the output has
        fields also for ``return_dict=False``."""
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "labels": labels,
        }
        kwargs |= {name: value for name, value in given.items() if value is not None}
        blocks = self.blocks
        if not self.training or not blocks:
            return self.model(**kwargs)
        if getattr(self, "_is_replica", False):
            raise NotImplementedError(
                "Theseus can't train in nn.DataParallel, whose copies forget what was drawn: start "
                "one process per device (torchrun), or let the process see one device only"
            )
        self._leave_out_cache(kwargs)
        self.set_gates(attention_mask)
        config = getattr(self.model, "config", None)
        if not kwargs.get("return_dict", getattr(config, "return_dict", True)):
            kwargs["return_dict"] = True  # what follows adds to its fields
        output = self.model(**kwargs)
        if self.match:
            errors = [error for block in blocks for error in block.errors]
            output["matching_loss"] = torch.stack(errors).mean()
            if output.get("loss") is not None:
                output["loss"] = output["loss"] + self.match * output["matching_loss"]
        elif not any(block.share for block in blocks):
            output = _attach(output, [p for p in self.parameters() if p.requires_grad])
        return output

    def _leave_out_cache(self, kwargs: dict[str, Any]) -> None:
        """Old and new layers would write into the same places of a decoder's cache."""
        given = [name for name in ("cache", "past_key_values") if kwargs.get(name) is not None]
        if kwargs.get("use_cache"):
            given.append("use_cache=True")
        if given:
            raise ValueError(f"a Theseus in training keeps no cache; got {', '.join(given)}")
        if "use_cache" in inspect.signature(self.model.forward).parameters:
            kwargs["use_cache"] = False

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def set_gates(self, mask: Tensor | None = None) -> None:
        """Draw for the next forward pass; ``forward`` does this in training mode."""
        blocks, share = self.blocks, self.share
        if self.schedule.blends:
            shares: Sequence[float] = [share] * len(blocks)
        else:
            shares = [float(gate) for gate in draw(self.seed, self.forwards, len(blocks), share)]
        self.forwards += 1
        for block, value in zip(blocks, shares, strict=True):
            block.share, block.matching, block.mask = value, self.match > 0, mask
            block.errors = []

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile each replaceable module's branches; the gates stay outside."""
        for block in self.blocks:
            for module in (*block.predecessor, block.successor):
                module.compile(*args, **kwargs)

    def fine_tune(self, train: Sequence[str] = ("layers", "head")) -> None:
        """Start phase 2: drop the predecessor for good and train these parts of the successor.

        Args:
            train: of "layers", "embeddings" and "head" (whatever is not the others).

        Raises:
            ValueError: another word.
        """
        train = [train] if isinstance(train, str) else train
        if unknown := [part for part in train if part not in PARTS]:
            raise ValueError(f"train takes {', '.join(PARTS)}; got {', '.join(unknown)}")
        for slot, block in zip(self._slots, self.blocks, strict=False):
            set_submodule(self.model, slot, block.successor)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._part(name) in train)

    def export(self) -> Any:
        """The successor as a plain model, in evaluation mode, everything thawed.

        ``save_pretrained``, ``from_pretrained`` and pipelines work as for any model of its class:
        without fastattn for softmax attention, as a linearised model (``fastattn.load``) otherwise.
        """
        blocks = self.blocks
        try:
            for slot, block in zip(self._slots, blocks, strict=False):
                set_submodule(self.model, slot, block.successor)
            model = copy.deepcopy(self.model)
        finally:
            for slot, block in zip(self._slots, blocks, strict=False):
                set_submodule(self.model, slot, block)
        forget_captures(model)
        return model.requires_grad_(True).eval()

    def get_extra_state(self) -> Tensor:
        """Steps and forward passes so far: with them in the checkpoint, draws go on after it."""
        return torch.tensor([self.steps, self.forwards])

    def set_extra_state(self, state: Tensor) -> None:
        self.steps, self.forwards = (int(value) for value in state)

    def _part(self, name: str) -> str:
        if self._layers is not None:
            in_layers = name.startswith(self._layers + ".")
        else:  # layers that share weights: what is around the attention
            in_layers = any(name.startswith(slot.rsplit(".", 1)[0] + ".") for slot in self._slots)
        if in_layers:
            return "layers"
        return "embeddings" if any(word in name for word in EMBEDDING_WORDS) else "head"


def _depth(model: nn.Module, layers: str | None) -> int:
    """Layers that a forward pass goes through."""
    if layers is not None:
        return len(layer_list(model, layers)[1])
    attention_modules(model)  # says so if the family isn't known
    config: Any = model.config
    return int(config.num_hidden_layers)


def _layers_name(model: nn.Module, layers: str | None) -> str | None:
    """None where layers share their weights."""
    try:
        return layer_list(model, layers)[0]
    except NotImplementedError:
        return None


def _divide(
    layers: nn.ModuleList, num_layers: int | None, first: bool
) -> tuple[list[int], list[Sequence[nn.Module]]]:
    """Indices of the layers that the successor starts from, and what each stands in for."""
    n = len(layers)
    m = n if num_layers is None else num_layers
    if m < 1 or n % m:
        divisors = ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
        raise ValueError(f"num_layers must divide the {n} layers ({divisors}); got {m}")
    width = n // m
    pieces: list[Sequence[nn.Module]] = [
        list(layers[i * width : (i + 1) * width]) for i in range(m)
    ]
    return [i if first else i * width for i in range(m)], pieces


def _linearize(model: Any, feature_map: str, layers: Sequence[int] | None) -> None:
    """``linearize``, keeping the learned maps of a model that has them already."""
    maps = {n: p.detach() for n, p in model.named_parameters() if "feature_map" in n}
    linearize(model, feature_map, layers)
    if maps:
        wanted = {n: p for n, p in model.named_parameters() if "feature_map" in n}
        if any(n not in maps or maps[n].shape != p.shape for n, p in wanted.items()):
            raise ValueError(f"start has other feature maps than feature_map={feature_map!r}")
        model.load_state_dict({name: maps[name] for name in wanted}, strict=False)


def _one_type(layers: Sequence[nn.Module]) -> Any:
    """ModernBERT's kinds of layer get different masks, so one can't stand in for another."""
    types = {str(layer.attention_type) for layer in layers}
    if len(types) > 1:
        raise NotImplementedError(
            f"layers that are replaced by one must be of one kind; got {', '.join(sorted(types))}"
        )
    return layers[0].attention_type


def _check_start(predecessor: nn.Module, start: nn.Module) -> None:
    there = {name: tuple(value.shape) for name, value in start.state_dict().items()}
    for name, value in predecessor.state_dict().items():
        if there.get(name) != tuple(value.shape):
            raise ValueError(
                f"start must be a model of the predecessor's shape: its {name} is "
                f"{there.get(name, 'missing')}, not {tuple(value.shape)}"
            )


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    return names[id(wanted)]


def _without_aliases(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    """Tied weights become copies: the Trainer's safetensors can't hold one tensor twice."""
    seen: set[int] = set()
    for name, value in state.items():
        if value.data_ptr() in seen:
            state[name] = value.clone()
        seen.add(value.data_ptr())


def _attach(output: Any, parameters: list[nn.Parameter]) -> Any:
    """Give what is differentiable in ``output`` zero gradients for ``parameters``."""
    zero = torch.stack([parameter.sum() for parameter in parameters]).sum() * 0.0
    if isinstance(output, Tensor):
        return output + zero.to(output.dtype)
    for name, value in output.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            output[name] = value + zero.to(value.dtype)
    return output
