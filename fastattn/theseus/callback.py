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
            add_to_logs(logs, state, {"replacing": self.theseus.share})


def add_to_logs(logs: dict[str, Any], state: Any, values: dict[str, float]) -> None:
    """Into what later callbacks show, and into the history (``trainer_state.json``), which has a
    copy of the logs already."""
    logs.update(values)
    if state.log_history:
        state.log_history[-1].update(values)
