"""Progressive module replacing (BERT-of-Theseus, Xu et al. 2020), and what comes after it.

A fine-tuned model, the predecessor, is replaced piece by piece by a smaller one, the successor,
while both work as one model: the successor's pieces learn in the company they will keep.
"""

import fastattn.models  # noqa: F401  # says which extra is missing
from fastattn.theseus.callback import TheseusCallback
from fastattn.theseus.model import Theseus
from fastattn.theseus.schedules import BlendSchedule, ConstantSchedule, LinearSchedule, Schedule

__all__ = [
    "BlendSchedule",
    "ConstantSchedule",
    "LinearSchedule",
    "Schedule",
    "Theseus",
    "TheseusCallback",
]
