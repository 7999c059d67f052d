"""Decoding that always ends: sampling rules that never cut off the end of the sequence, and heads
whose end gets likelier until it wins."""

import fastattn.models  # noqa: F401  # says which extra is missing
from fastattn.generation.attached import detach
from fastattn.generation.consistent import ConsistentTopK, ConsistentTopP
from fastattn.generation.self_terminating import SelfTerminatingHead

__all__ = ["ConsistentTopK", "ConsistentTopP", "SelfTerminatingHead", "detach"]
