"""The state (S, z) in memory, its sums over keys, and the fold of the sums of many segments.

    S = sum_j phi(k_j) v_j^T     z = sum_j phi(k_j)

Both forms begin with these sums, so their kernels are here: one reads keys and values once, the
other adds up partial sums in order. A buffer of states is (rows, heads, F, Dv) for S and
(rows, heads, F) for z, float32, dense; what a row is, segments.py says.

Bytes per token and head, 16-bit inputs, D = Dv = d: 4d, and per segment the 4 d^2 of its sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.backends.triton.launch import kernel
from fastattn.backends.triton.segments import (
    first_row,
    length_of_segments,
    sequence_at,
    tokens_of,
)
from fastattn.backends.triton.tiles import (
    LOWEST,
    all_of,
    at,
    inverse_or_zero,
    keys_kept,
    load_tile,
    matmul_add,
    operand,
    phi_of_keys,
)

# --- a state in memory ------------------------------------------------------------------------


@triton.jit
def state_row(features, D: tl.constexpr, MAP: tl.constexpr):
    """Row of a state that holds a feature: the constant feature of cosine comes first there."""
    if MAP == "cosine":
        features = tl.where(features < D, features + 1, 0)
    return features


@triton.jit
def num_features(D: tl.constexpr, MAP: tl.constexpr):
    F: tl.constexpr = D + 1 if MAP == "cosine" else D
    return F


@triton.jit
def _real(features, values, present, F: tl.constexpr, DV: tl.constexpr):
    """Which elements of a state's tiles there are: no comparison where a tile has its size."""
    if features.shape[0] != F:
        real = features < F
    else:
        real = features >= 0
    real = all_of(real, present)
    both = real[:, None]
    if values.shape[0] != DV:
        both = both & (values < DV)[None, :]
    return real, both


@triton.jit
def load_state(
    S, z, head, features, values, present,
    D: tl.constexpr, DV: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """State number `head` of a buffer as tiles (BLOCK_F, BLOCK_V) and (BLOCK_F,); zeros where there
    is none."""
    F = num_features(D, MAP)
    row = state_row(features, D, MAP)
    head = tl.cast(head, tl.int64)
    real, both = _real(features, values, present, F, DV)
    offsets = row[:, None] * DV + values[None, :]
    S_tile = tl.load(S + head * (F * DV) + offsets, mask=both, other=0.0)
    return S_tile, tl.load(z + head * F + row, mask=real, other=0.0)


@triton.jit
def store_state(
    S, z, S_tile, z_tile, head, features, values, stores_z,
    D: tl.constexpr, DV: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """Only one value tile stores z."""
    F = num_features(D, MAP)
    row = state_row(features, D, MAP)
    head = tl.cast(head, tl.int64)
    real, both = _real(features, values, True, F, DV)
    offsets = row[:, None] * DV + values[None, :]
    tl.store(S + head * (F * DV) + offsets, S_tile, mask=both)
    tl.store(z + head * F + row, z_tile, mask=all_of(real, stores_z))


@triton.jit
def dz_of_earlier_value_tiles(
    dz, dz_tile, head, features, value_tile, D: tl.constexpr, MAP: tl.constexpr
):
    """In a backward whose value tiles are launched one after the other, dz is a sum over them: what
    earlier ones have left, or `dz_tile` for the first."""
    F = num_features(D, MAP)
    row = tl.cast(head, tl.int64) * F + state_row(features, D, MAP)
    real = all_of(features < F, value_tile > 0)
    return tl.where(value_tile > 0, tl.load(dz + row, mask=real, other=0.0), dz_tile)


@triton.jit
def softmax_over_tokens(
    S, dS, z, MAP: tl.constexpr, BLOCK_F: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the keys of `efficient` share: 1 / z, and sum_j phi(k_j) dphi(k_j) = rows of dS . S / z
    for S kept as sums of exp; zeros for other maps. It cancels with dphi where a key stands alone,
    so dS is rounded as in that product."""
    if MAP == "efficient":
        inverse_sum = inverse_or_zero(z)
        column_sum = tl.sum(operand(dS, OPERAND, PRECISION).to(tl.float32) * S, 1) * inverse_sum
    else:
        inverse_sum = tl.zeros((BLOCK_F,), tl.float32)
        column_sum = inverse_sum
    return inverse_sum, column_sum


# --- sums over keys ---------------------------------------------------------------------------


@triton.jit
def add_key(
    S, z, phi_k, v, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S += phi(k)^T v, z += sum of phi(k)."""
    S = matmul_add(
        tl.trans(operand(phi_k, OPERAND, PRECISION)), operand(v, OPERAND, PRECISION), S, PRECISION
    )
    return S, z + tl.sum(phi_k, 0)


@triton.jit
def sum_segment(
    key, value, mask, maximum, batch, head, first, begin, end, values,
    key_b, key_h, key_n, key_d, value_b, value_h, value_n, value_d, mask_b, mask_n,
    D: tl.constexpr, DV: tl.constexpr, MAP: tl.constexpr, HAS_MASK: tl.constexpr,
    UNIT: tl.constexpr, CHUNK: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S and z, from zero, of the keys `begin` to `end` of a sequence that starts at `first`."""
    rows, features = tl.arange(0, CHUNK), tl.arange(0, BLOCK_F)
    S = tl.zeros((BLOCK_F, BLOCK_V), tl.float32)
    z = tl.zeros((BLOCK_F,), tl.float32)
    for t in range(begin, end, CHUNK):
        in_range = rows < end - t
        keep = keys_kept(mask, batch, first + t, rows, in_range, mask_b, mask_n, HAS_MASK)
        key_row = at(key, batch, head, first + t, key_b, key_h, key_n, UNIT)
        value_row = at(value, batch, head, first + t, value_b, value_h, value_n, UNIT)
        k = load_tile(key_row, rows, features, keep, key_n, key_d, D, BLOCK_F, UNIT)
        v = load_tile(value_row, rows, values, keep, value_n, value_d, DV, BLOCK_V, UNIT)
        phi_k, _ = phi_of_keys(k, features, keep, maximum, D, BLOCK_F, MAP)
        S, z = add_key(S, z, phi_k, v, OPERAND, PRECISION)
    return S, z


@triton.jit
def load_maximum(
    maxima, sequence, head, cu, rows, num_heads, tokens,
    D: tl.constexpr, MAP: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_F: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Over all keys of a sequence, from the maxima of its segments; 0 for maps without one."""
    features = tl.arange(0, BLOCK_F)
    if MAP == "efficient":
        maximum = tl.full((BLOCK_F,), LOWEST, tl.float32)
        row = first_row(sequence, cu, rows, SEGMENT, PACKED)
        length = length_of_segments(tokens, SEGMENT, False)
        for i in range(tl.cdiv(tokens, length)):
            address = maxima + tl.cast((row + i) * num_heads + head, tl.int64) * D
            own = tl.load(address + features, mask=features < D, other=0.0)
            maximum = tl.maximum(maximum, own)
    else:
        maximum = tl.zeros((BLOCK_F,), tl.float32)
    return maximum


@triton.jit
def maximum_of_segment(
    key, mask, batch, head, first, begin, end,
    key_b, key_h, key_n, key_d, mask_b, mask_n,
    D: tl.constexpr, HAS_MASK: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    rows, features = tl.arange(0, CHUNK), tl.arange(0, BLOCK_F)
    maximum = tl.full((BLOCK_F,), LOWEST, tl.float32)
    for t in range(begin, end, CHUNK):
        keep = keys_kept(mask, batch, first + t, rows, rows < end - t, mask_b, mask_n, HAS_MASK)
        key_row = at(key, batch, head, first + t, key_b, key_h, key_n, UNIT)
        k = load_tile(key_row, rows, features, keep, key_n, key_d, D, BLOCK_F, UNIT)
        k = tl.where(keep[:, None], k.to(tl.float32), LOWEST)
        maximum = tl.maximum(maximum, tl.max(k, 0))
    return maximum


@kernel
def key_maxima(
    key, mask, cu_k, maxima,
    key_b: tl.int64, key_h: tl.int64, key_n: tl.int64, key_d: tl.int64,
    mask_b: tl.int64, mask_n: tl.int64,
    key_length: tl.int32, num_kv_heads: tl.int32, num_sequences: tl.int32, key_rows: tl.int32,
    D: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, UNIT: tl.constexpr,
    SEGMENT: tl.constexpr, CHUNK: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """For `efficient`, the maximum of every feature over the keys of each segment."""
    row, head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    sequence, segment = sequence_at(row, cu_k, num_sequences, key_rows, SEGMENT, PACKED)
    batch, first, tokens = tokens_of(sequence, cu_k, key_length, PACKED)
    length = length_of_segments(tokens, SEGMENT, False)
    begin = segment * length
    maximum = maximum_of_segment(
        key, mask, batch, head, first, begin, tl.minimum(tokens, begin + length),
        key_b, key_h, key_n, key_d, mask_b, mask_n,
        D, HAS_MASK, UNIT, CHUNK, BLOCK_F,
    )  # fmt: skip
    features = tl.arange(0, BLOCK_F)
    address = maxima + tl.cast(row * num_kv_heads + head, tl.int64) * D
    tl.store(address + features, maximum, mask=features < D)


@kernel
def sum_keys(
    key, value, mask, cu_k, maxima, maximum, initial_S, initial_z, S, z, saved_S, saved_z,
    key_b: tl.int64, key_h: tl.int64, key_n: tl.int64, key_d: tl.int64,
    value_b: tl.int64, value_h: tl.int64, value_n: tl.int64, value_d: tl.int64,
    mask_b: tl.int64, mask_n: tl.int64,
    key_length: tl.int32, num_kv_heads: tl.int32, num_sequences: tl.int32, key_rows: tl.int32,
    D: tl.constexpr, DV: tl.constexpr, MAP: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr, UNIT: tl.constexpr,
    SPLIT: tl.constexpr, SAVE: tl.constexpr, SEGMENT: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """SPLIT: one segment a program, its sums into its row of S and z. Else: one sequence a program,
    its segments folded onto the initial state, into the sequence's row."""
    row, head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    features = tl.arange(0, BLOCK_F)
    values = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    S_tile = tl.zeros((BLOCK_F, BLOCK_V), tl.float32)
    z_tile = tl.zeros((BLOCK_F,), tl.float32)
    if SPLIT:
        sequence, segment = sequence_at(row, cu_k, num_sequences, key_rows, SEGMENT, PACKED)
    else:
        sequence, segment = row, row * 0
    batch, first, tokens = tokens_of(sequence, cu_k, key_length, PACKED)
    length = length_of_segments(tokens, SEGMENT, CAUSAL)
    last = tl.cdiv(tokens, length)
    if SPLIT:
        last = tl.minimum(last, segment + 1)
    if HAS_INITIAL and not SPLIT:
        S_tile, z_tile = load_state(
            initial_S, initial_z, sequence * num_kv_heads + head, features, values, True, D, DV, MAP
        )
    highest = load_maximum(
        maxima, sequence, head, cu_k, key_rows, num_kv_heads, tokens,
        D, MAP, SEGMENT, BLOCK_F, PACKED,
    )  # fmt: skip
    for i in range(segment, last):
        begin = i * length
        part_S, part_z = sum_segment(
            key, value, mask, highest, batch, head, first,
            begin, tl.minimum(tokens, begin + length), values,
            key_b, key_h, key_n, key_d, value_b, value_h, value_n, value_d, mask_b, mask_n,
            D, DV, MAP, HAS_MASK, UNIT, CHUNK, BLOCK_F, BLOCK_V, OPERAND, PRECISION,
        )  # fmt: skip
        S_tile += part_S
        z_tile += part_z
    state, stores_z = row * num_kv_heads + head, tl.program_id(1) == 0
    store_state(S, z, S_tile, z_tile, state, features, values, stores_z, D, DV, MAP)
    if SAVE:
        store_state(saved_S, saved_z, S_tile, z_tile, state, features, values, stores_z, D, DV, MAP)
    if MAP == "efficient":  # for the backward
        address = maximum + tl.cast(sequence * num_kv_heads + head, tl.int64) * D
        tl.store(address + features, highest, mask=all_of(features < D, stores_z & (segment == 0)))


# --- the fold ---------------------------------------------------------------------------------


@triton.jit
def _fold(
    parts, start, end, saved, sequence, head, row, count, num_heads, element, SIZE: tl.constexpr,
    HAS_START: tl.constexpr, HAS_END: tl.constexpr, SAVE: tl.constexpr,
    EXCLUSIVE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    real = element < SIZE
    state = tl.cast(sequence * num_heads + head, tl.int64) * SIZE + element
    running = element.to(tl.float32) * 0.0
    if HAS_START:
        running = tl.load(start + state, mask=real, other=0.0)
    for i in range(count):
        own = row + (count - 1 - i if REVERSE else i)
        address = parts + tl.cast(own * num_heads + head, tl.int64) * SIZE + element
        part = tl.load(address, mask=real, other=0.0)
        if EXCLUSIVE:
            tl.store(address, running, mask=real)
        running += part
    if HAS_END:
        tl.store(end + state, running, mask=real)
    if SAVE:
        tl.store(saved + state, running, mask=real)


@kernel
def fold(
    cu, parts_S, parts_z, start_S, start_z, end_S, end_z, saved_S, saved_z,
    length: tl.int32, num_heads: tl.int32, num_sequences: tl.int32, rows: tl.int32,
    F: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr, HAS_START: tl.constexpr,
    HAS_END: tl.constexpr, SAVE: tl.constexpr, EXCLUSIVE: tl.constexpr, REVERSE: tl.constexpr,
    PACKED: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the sums of a sequence's segments to `start`, first to last (REVERSE: last to first),
    into `end` and, with SAVE, into `saved`. EXCLUSIVE: every part becomes the sum of all before it.

    A program takes BLOCK elements of S, or of z where its second number is beyond those of S.
    """
    sequence, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    _, _, tokens = tokens_of(sequence, cu, length, PACKED)
    count = tl.cdiv(tokens, length_of_segments(tokens, SEGMENT, CAUSAL))
    row = first_row(sequence, cu, rows, SEGMENT, PACKED)
    S_blocks = tl.cdiv(F * DV, BLOCK)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(1) < S_blocks:
        _fold(
            parts_S, start_S, end_S, saved_S, sequence, head, row, count, num_heads, element,
            F * DV, HAS_START, HAS_END, SAVE, EXCLUSIVE, REVERSE,
        )  # fmt: skip
    else:
        _fold(
            parts_z, start_z, end_z, saved_z, sequence, head, row, count, num_heads,
            element - S_blocks * BLOCK, F, HAS_START, HAS_END, SAVE, EXCLUSIVE, REVERSE,
        )  # fmt: skip
