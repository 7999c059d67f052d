"""The Trainer's side of replacing: it tells the schedule which step it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from fastattn.theseus.model import Theseus


class TheseusCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """``Trainer(theseus, ..., callbacks=[TheseusCallback(theseus)])``: one step of the schedule for
    each of the optimizer, also after a resume; logs get the share as ``replacing``."""

    def __init__(self, theseus: Theseus) -> None:
        self.theseus = theseus

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.theseus.steps = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is not None:
            logs["replacing"] = self.theseus.share
