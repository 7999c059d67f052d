"""How a call is cut: which sequence and which segment of it a program works on.

Sums over tokens are formed per segment from zero and folded in order. Where segments begin depends
on the length of the sequence and on the head sizes alone, so the same input gives the same bits
whatever else is in the batch; how many heads there are only decides who computes a segment.

Programs and saved states are numbered by *row*: the segments of sequence 0, then those of sequence
1, and so on. Packed sequences (cu_seqlens) are numbered without reading their lengths on the host:
a sequence that begins at token t has its first row at t // SEGMENT + its index, which leaves room
for all its segments, and some rows stay idle.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A sequence of keys that is not causal has at most so many segments: they are only summed, and
# longer ones cost fewer bytes of partial sums. Causal ones stay short: a state begins each.
MAX_SEGMENTS = tl.constexpr(32)
SEGMENT_MULTIPLE = tl.constexpr(64)


def segment_length(tokens: int, segment: int, is_causal: bool) -> int:
    """Tokens of a segment, as the kernels count them; `segment` is the least."""
    if is_causal:
        return segment
    share = -(-tokens // MAX_SEGMENTS.value)
    return max(segment, -(-share // SEGMENT_MULTIPLE.value) * SEGMENT_MULTIPLE.value)


def rows_per_sequence(tokens: int, segment: int, is_causal: bool) -> int:
    """Segments of a sequence that is not packed; at least one, so that its state is written."""
    return max(1, -(-tokens // segment_length(tokens, segment, is_causal)))


def packed_rows(tokens: int, num_sequences: int, segment: int) -> int:
    """Rows of packed sequences: an upper bound that needs no look at their lengths."""
    return tokens // segment + num_sequences


@triton.jit
def length_of_segments(tokens, SEGMENT: tl.constexpr, CAUSAL: tl.constexpr):
    length = tokens * 0 + SEGMENT
    if not CAUSAL:
        share = tl.cdiv(tokens, MAX_SEGMENTS)
        length = tl.maximum(length, tl.cdiv(share, SEGMENT_MULTIPLE) * SEGMENT_MULTIPLE)
    return length


@triton.jit
def sequence_at(row, cu, num_sequences, rows, SEGMENT: tl.constexpr, PACKED: tl.constexpr):
    """The sequence that a row belongs to, and which of its segments the row is. `rows` is the
    number of rows of a sequence that is not packed."""
    if PACKED:
        first, last = row * 0, row * 0 + num_sequences
        while last - first > 1:
            middle = (first + last) // 2
            if tl.load(cu + middle) // SEGMENT + middle <= row:
                first = middle
            else:
                last = middle
        sequence = first
        segment = row - (tl.load(cu + sequence) // SEGMENT + sequence)
    else:
        sequence = row // rows
        segment = row % rows
    return sequence, segment


@triton.jit
def tokens_of(sequence, cu, length, PACKED: tl.constexpr):
    """Row of the batch, first token, and number of tokens of a sequence."""
    if PACKED:
        batch = sequence * 0
        begin = tl.load(cu + sequence)
        tokens = tl.load(cu + sequence + 1) - begin
    else:
        batch = sequence
        begin = sequence * 0
        tokens = begin + length
    return batch, begin, tokens


@triton.jit
def first_row(sequence, cu, rows, SEGMENT: tl.constexpr, PACKED: tl.constexpr):
    """Row of a sequence's first segment."""
    if PACKED:
        row = tl.load(cu + sequence) // SEGMENT + sequence
    else:
        row = sequence * rows
    return row
