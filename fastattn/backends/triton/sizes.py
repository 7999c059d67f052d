"""Sizes of a problem's tiles, and the constants that kernels are compiled with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from fastattn.backends.triton import table
from fastattn.backends.triton.launch import Tile
from fastattn.backends.triton.segments import packed_rows, rows_per_sequence
from fastattn.backends.triton.table import TILES, shares_out_segments
from fastattn.ops.problem import Problem


@dataclass(frozen=True)
class Target:
    """What a plan depends on besides its problem. ``unit``: see tiles.py. ``precision``: what
    the matrix units may round float32 to, "ieee" or "tf32"."""

    multiprocessors: int
    unit: int
    precision: str
    has_tf32: bool = True

    def precision_of(self, dtype: torch.dtype) -> str:
        """What float32 operands are rounded to where the inputs are of this type."""
        wants_tf32 = dtype == torch.float16 or self.precision == "tf32"
        return "tf32" if wants_tf32 and self.has_tf32 else "ieee"


def round_up_to_power_of_2(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def operand_dtype(dtype: torch.dtype) -> Any:
    """What the matrix units multiply: float16 would overflow in S and in do / den, so it is
    widened to float32 and rounded to TF32, which has its precision and float32's range."""
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float32


class Sizes:
    """Everything about a problem that plans are made of."""

    def __init__(self, problem: Problem, kind: str) -> None:
        p = self.problem = problem
        self.features, self.values = p.feature_dim, p.value_dim
        self.packed = p.num_sequences is not None
        self.sequences = p.state_batch
        self.segment = table.segment_tokens(self.features, self.values)
        self.block_f = round_up_to_power_of_2(self.features)
        self.operand_bytes = 2 if p.dtype == torch.bfloat16 and kind != "recurrent" else 4
        self.tile: Tile = TILES[kind, self.operand_bytes][self.block_f]
        self.block_v = min(round_up_to_power_of_2(self.values), self.tile.block_v)
        self.value_tiles = -(-self.values // self.block_v)
        self.states = self.sequences * p.num_kv_heads
        self.state_elements = self.features * self.values
        self.key_rows = self.rows(p.key_length)
        self.query_rows = self.rows(p.query_length)

    def rows(self, tokens: int) -> int:
        """Segments of a sequence that is not packed."""
        return rows_per_sequence(tokens, self.segment, self.problem.is_causal)

    def all_rows(self, tokens: int) -> int:
        """Rows of all sequences, see segments.py."""
        if self.packed:
            return packed_rows(tokens, self.sequences, self.segment)
        return self.sequences * self.rows(tokens)

    def shares_out(self, tokens: int, multiprocessors: int) -> bool:
        several = self.packed or self.rows(tokens) > 1
        return several and shares_out_segments(self.states * self.value_tiles, multiprocessors)

    def constants(self, target: Target) -> dict[str, Any]:
        p = self.problem
        return {
            "D": p.head_dim,
            "DV": p.value_dim,
            "F": self.features,
            "GROUP": p.num_heads // p.num_kv_heads,
            "MAP": "identity" if p.feature_map == "features" else p.feature_map,
            "NORMALIZE": p.normalize,
            "CAUSAL": p.is_causal,
            "HAS_MASK": p.has_key_mask,
            "HAS_INITIAL": p.has_initial_state,
            "RETURN_STATE": p.return_state,
            "PACKED": self.packed,
            "UNIT": target.unit,
            "SEGMENT": self.segment,
            "CHUNK": self.tile.chunk,
            "BLOCK_F": self.block_f,
            "BLOCK_V": self.block_v,
            "VALUE_TILES": self.value_tiles,
            "OPERAND": operand_dtype(p.dtype),
            "PRECISION": target.precision_of(p.dtype),
        }

    def numbers(self) -> dict[str, int | float]:
        p = self.problem
        return {
            "query_length": p.query_length,
            "key_length": p.key_length,
            "length": p.key_length,
            "num_heads": p.num_heads,
            "num_kv_heads": p.num_kv_heads,
            "num_sequences": self.sequences,
            "query_rows": self.query_rows,
            "key_rows": self.key_rows,
            "rows_of_sequence": self.key_rows,
            "rows": self.key_rows,
            "value_tile": 0,
            "scale": p.scale,
            "eps": p.eps,
        }
