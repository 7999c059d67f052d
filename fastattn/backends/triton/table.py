"""The launch table: how large tiles are, and when a call is cut into more launches.

Tiles were chosen by compiling ahead of time and reading registers and spills from the binaries
(``fastattn info --kernels``); none was timed yet, see docs/gpu-status.md. How a sum is cut decides
its bits, so tiles and segments depend on the pass, head sizes and type alone. How many heads
and multiprocessors there are only decides who computes which segment.
"""

from __future__ import annotations

from fastattn.backends.triton.launch import Tile

# Tile(tokens, most values, warps, stages) by pass, by bytes of an operand of the matrix units
# (2: bfloat16; 4: float32, and float16, which is computed in TF32 for its range) and by features
# padded to a power of two.
TILES: dict[tuple[str, int], dict[int, Tile]] = {
    ("noncausal forward", 2): {
        16: Tile(64, 64, 4, 3),
        32: Tile(64, 64, 4, 3),
        64: Tile(64, 64, 4, 3),
        128: Tile(64, 128, 8, 3),
        256: Tile(32, 64, 8, 2),
        512: Tile(16, 32, 8, 2),
    },
    ("noncausal forward", 4): {
        16: Tile(32, 64, 8, 1),
        32: Tile(32, 64, 8, 1),
        64: Tile(32, 64, 8, 1),
        128: Tile(32, 64, 8, 2),
        256: Tile(16, 32, 8, 2),
        512: Tile(16, 16, 8, 1),
    },
    ("noncausal backward", 2): {
        16: Tile(64, 64, 4, 2),
        32: Tile(64, 64, 4, 2),
        64: Tile(32, 64, 4, 2),
        128: Tile(32, 128, 8, 2),
        256: Tile(16, 32, 8, 1),
        512: Tile(16, 16, 8, 1),
    },
    ("noncausal backward", 4): {
        16: Tile(16, 64, 8, 1),
        32: Tile(16, 64, 8, 1),
        64: Tile(16, 64, 8, 2),
        128: Tile(16, 64, 8, 1),
        256: Tile(16, 32, 8, 1),
        512: Tile(16, 16, 8, 1),
    },
    ("causal forward", 2): {
        16: Tile(32, 64, 4, 3),
        32: Tile(32, 64, 4, 3),
        64: Tile(32, 64, 4, 3),
        128: Tile(32, 128, 8, 2),
        256: Tile(32, 32, 8, 2),
        512: Tile(16, 16, 8, 1),
    },
    ("causal forward", 4): {
        16: Tile(16, 64, 8, 1),
        32: Tile(16, 64, 8, 1),
        64: Tile(16, 64, 8, 1),
        128: Tile(16, 32, 8, 1),
        256: Tile(16, 32, 8, 1),
        512: Tile(16, 16, 8, 1),
    },
    ("causal backward", 2): {
        16: Tile(16, 64, 4, 2),
        32: Tile(16, 64, 4, 2),
        64: Tile(16, 64, 8, 1),
        128: Tile(16, 128, 8, 1),
        256: Tile(16, 16, 8, 2),
        512: Tile(16, 16, 8, 1),
    },
    ("causal backward", 4): {
        16: Tile(16, 64, 8, 1),
        32: Tile(16, 64, 8, 1),
        64: Tile(16, 64, 8, 1),
        128: Tile(16, 32, 8, 1),
        256: Tile(16, 32, 8, 1),
        512: Tile(16, 16, 8, 1),
    },
    # No matrix units and one token at a time: the type does not matter.
    ("recurrent", 4): {
        16: Tile(1, 64, 1, 1),
        32: Tile(1, 64, 2, 1),
        64: Tile(1, 64, 4, 1),
        128: Tile(1, 128, 8, 1),
        256: Tile(1, 64, 8, 1),
        512: Tile(1, 32, 8, 1),
    },
}

SHORT_TOKENS = 512  # up to here one launch does both passes of a non-causal call
FOLD_BLOCK = 256  # elements of a state that one program folds


def segment_tokens(features: int, values: int) -> int:
    """Least tokens of a segment: a state of 4 F Dv bytes begins each, so that of larger ones is
    spread over more tokens. Never less than SHORT_TOKENS."""
    return 512 if features * values <= 64 * 64 else 1024


def shares_out_segments(programs: int, multiprocessors: int) -> bool:
    """Whether the segments of a sequence go to programs of their own (two more launches and another
    reading of what is summed), because whole sequences would not occupy the GPU."""
    return programs < multiprocessors


def sweeps_in_one_program(padded_features: int, operand_bytes: int, feature_map: str) -> bool:
    """Whether one launch may do both sweeps of the causal backward. Where operands are wider, or
    phi's derivative needs sums over features, one kernel of both spills registers at 64
    features, and either alone does not: two launches then, whatever the number of heads."""
    if padded_features <= 32:
        return True
    return operand_bytes == 2 and feature_map not in ("softmax", "cosine")
