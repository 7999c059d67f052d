"""Non-causal linear attention: every query attends to every key.

    S = sum_j phi(k_j) v_j^T     z = sum_j phi(k_j)     out_i = phi(q_i) S / max(phi(q_i) . z, eps)

Backward, with g_i = do_i / den_i:

    u_i = S g_i    delta_i = -phi(q_i) . u_i / den_i    dphi(q_i) = u_i + delta_i z
    dS = sum_i phi(q_i) g_i^T    dz = sum_i delta_i phi(q_i)
    dphi(k_j) = dS v_j + dz      dv_j = dS^T phi(k_j)

Bytes per token and head, 16-bit inputs, D = Dv = d: forward 8d (k and v once for S and z, q once
for out), backward 14d (q, do and dq in one pass, k, v, dk, dv in another); the states come on top,
4 d^2 or 8 d^2 per segment. Short sequences take one launch: one program does both passes of a head.

The `efficient` map keeps S and z as sums of exp(k - maximum): dividing row f by z_f is left to
whoever reads them, since phi(q) S / z = (phi(q) / z) S.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.backends.triton.launch import kernel
from fastattn.backends.triton.segments import length_of_segments, sequence_at, tokens_of
from fastattn.backends.triton.states import (
    dz_of_earlier_value_tiles,
    load_state,
    maximum_of_segment,
    softmax_over_tokens,
    store_state,
    sum_segment,
)
from fastattn.backends.triton.tiles import (
    all_of,
    at,
    chain_keys,
    chain_queries,
    denominator_slope,
    flipped_matmul,
    inverse_denominator,
    inverse_denominator_of_gradient,
    inverse_or_zero,
    keys_kept,
    load_tile,
    matmul,
    matmul_add,
    operand,
    phi_of_keys,
    phi_of_queries,
    store_tile,
    sum_over_value_tiles,
)

# --- forward ----------------------------------------------------------------------------------


@triton.jit
def emit_segment(
    query, out, S, z, batch, head, first, begin, end, values, scale, eps,
    query_b, query_h, query_n, query_d, out_b, out_h, out_n, out_d,
    D: tl.constexpr, DV: tl.constexpr, MAP: tl.constexpr, NORMALIZE: tl.constexpr,
    UNIT: tl.constexpr, CHUNK: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of the queries `begin` to `end`, given S and z."""
    rows, features = tl.arange(0, CHUNK), tl.arange(0, BLOCK_F)
    if MAP == "efficient":
        S *= inverse_or_zero(z)[:, None]
    right = operand(S, OPERAND, PRECISION)
    for t in range(begin, end, CHUNK):
        keep = rows < end - t
        query_row = at(query, batch, head, first + t, query_b, query_h, query_n, UNIT)
        q = load_tile(query_row, rows, features, keep, query_n, query_d, D, BLOCK_F, UNIT)
        phi_q, _ = phi_of_queries(q, features, scale, D, BLOCK_F, MAP, NORMALIZE)
        o = matmul(operand(phi_q, OPERAND, PRECISION), right, PRECISION)
        if NORMALIZE and MAP != "efficient":
            o *= inverse_denominator(tl.sum(phi_q * z[None, :], 1), eps)[:, None]
        out_row = at(out, batch, head, first + t, out_b, out_h, out_n, UNIT)
        store_tile(out_row, o, rows, values, keep, out_n, out_d, DV, BLOCK_V, UNIT)


@kernel
def emit_queries(
    query, out, cu, S, z,
    query_b: tl.int64, query_h: tl.int64, query_n: tl.int64, query_d: tl.int64,
    out_b: tl.int64, out_h: tl.int64, out_n: tl.int64, out_d: tl.int64,
    query_length: tl.int32, num_heads: tl.int32, num_kv_heads: tl.int32,
    num_sequences: tl.int32, query_rows: tl.int32, scale: tl.float32, eps: tl.float32,
    D: tl.constexpr, DV: tl.constexpr, MAP: tl.constexpr, NORMALIZE: tl.constexpr,
    PACKED: tl.constexpr, UNIT: tl.constexpr, SEGMENT: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Second pass of the forward: one segment of queries of one head a program."""
    row, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    sequence, segment = sequence_at(row, cu, num_sequences, query_rows, SEGMENT, PACKED)
    batch, first, tokens = tokens_of(sequence, cu, query_length, PACKED)
    length = length_of_segments(tokens, SEGMENT, False)
    begin = segment * length
    features = tl.arange(0, BLOCK_F)
    values = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    kv_head = sequence * num_kv_heads + head // (num_heads // num_kv_heads)
    S_tile, z_tile = load_state(S, z, kv_head, features, values, True, D, DV, MAP)
    emit_segment(
        query, out, S_tile, z_tile, batch, head, first,
        begin, tl.minimum(tokens, begin + length), values, scale, eps,
        query_b, query_h, query_n, query_d, out_b, out_h, out_n, out_d,
        D, DV, MAP, NORMALIZE, UNIT, CHUNK, BLOCK_F, BLOCK_V, OPERAND, PRECISION,
    )  # fmt: skip


@kernel
def forward_of_head(
    query, key, value, out, mask, cu, cu_k, initial_S, initial_z, S, z, saved_S, saved_z,
    saved_maximum,
    query_b: tl.int64, query_h: tl.int64, query_n: tl.int64, query_d: tl.int64,
    key_b: tl.int64, key_h: tl.int64, key_n: tl.int64, key_d: tl.int64,
    value_b: tl.int64, value_h: tl.int64, value_n: tl.int64, value_d: tl.int64,
    out_b: tl.int64, out_h: tl.int64, out_n: tl.int64, out_d: tl.int64,
    mask_b: tl.int64, mask_n: tl.int64,
    query_length: tl.int32, key_length: tl.int32, num_heads: tl.int32, num_kv_heads: tl.int32,
    scale: tl.float32, eps: tl.float32,
    D: tl.constexpr, DV: tl.constexpr, MAP: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_INITIAL: tl.constexpr, RETURN_STATE: tl.constexpr,
    SAVE: tl.constexpr, PACKED: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both passes of a short sequence in one launch: one kv head a program, S in registers."""
    sequence, head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    batch, first, tokens = tokens_of(sequence, cu_k, key_length, PACKED)
    features = tl.arange(0, BLOCK_F)
    values = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    if MAP == "efficient":
        maximum = maximum_of_segment(
            key, mask, batch, head, first, 0, tokens, key_b, key_h, key_n, key_d, mask_b, mask_n,
            D, HAS_MASK, UNIT, CHUNK, BLOCK_F,
        )  # fmt: skip
    else:
        maximum = tl.zeros((BLOCK_F,), tl.float32)
    S_tile, z_tile = sum_segment(
        key, value, mask, maximum, batch, head, first, 0, tokens, values,
        key_b, key_h, key_n, key_d, value_b, value_h, value_n, value_d, mask_b, mask_n,
        D, DV, MAP, HAS_MASK, UNIT, CHUNK, BLOCK_F, BLOCK_V, OPERAND, PRECISION,
    )  # fmt: skip
    state, stores_z = sequence * num_kv_heads + head, tl.program_id(1) == 0
    if HAS_INITIAL:
        S_0, z_0 = load_state(initial_S, initial_z, state, features, values, True, D, DV, MAP)
        S_tile, z_tile = S_0 + S_tile, z_0 + z_tile
    if RETURN_STATE:
        store_state(S, z, S_tile, z_tile, state, features, values, stores_z, D, DV, MAP)
    if SAVE:
        store_state(saved_S, saved_z, S_tile, z_tile, state, features, values, stores_z, D, DV, MAP)
        if MAP == "efficient":
            address = saved_maximum + tl.cast(state, tl.int64) * D + features
            tl.store(address, maximum, mask=all_of(features < D, stores_z))
    batch, first, tokens = tokens_of(sequence, cu, query_length, PACKED)
    group = num_heads // num_kv_heads
    for h in range(head * group, (head + 1) * group):
        emit_segment(
            query, out, S_tile, z_tile, batch, h, first, 0, tokens, values, scale, eps,
            query_b, query_h, query_n, query_d, out_b, out_h, out_n, out_d,
            D, DV, MAP, NORMALIZE, UNIT, CHUNK, BLOCK_F, BLOCK_V, OPERAND, PRECISION,
        )  # fmt: skip


# --- backward ---------------------------------------------------------------------------------


@triton.jit
def backward_of_queries(
    query, grad_out, grad_query, sums, S, z, batch, head, num_heads, query_length,
    first, begin, end, values, value_tile, scale, eps,
    query_b, query_h, query_n, query_d, grad_out_b, grad_out_h, grad_out_n, grad_out_d,
    grad_query_b, grad_query_h, grad_query_n, grad_query_d, dS, dz,
    D: tl.constexpr, DV: tl.constexpr, MAP: tl.constexpr, NORMALIZE: tl.constexpr,
    UNIT: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr, VALUE_TILES: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of the queries `begin` to `end`; adds their share to dS and dz."""
    rows, features = tl.arange(0, CHUNK), tl.arange(0, BLOCK_F)
    if MAP == "efficient":
        S *= inverse_or_zero(z)[:, None]
    S_transposed = tl.trans(operand(S, OPERAND, PRECISION))
    for t in range(begin, end, CHUNK):
        keep = rows < end - t
        query_row = at(query, batch, head, first + t, query_b, query_h, query_n, UNIT)
        out_row = at(grad_out, batch, head, first + t, grad_out_b, grad_out_h, grad_out_n, UNIT)
        q = load_tile(query_row, rows, features, keep, query_n, query_d, D, BLOCK_F, UNIT)
        do = load_tile(out_row, rows, values, keep, grad_out_n, grad_out_d, DV, BLOCK_V, UNIT)
        do = operand(do, OPERAND, PRECISION)
        phi_q, norm = phi_of_queries(q, features, scale, D, BLOCK_F, MAP, NORMALIZE)
        dphi = flipped_matmul(do, S_transposed, PRECISION)
        scaled = phi_q
        if NORMALIZE and MAP != "efficient":
            den = tl.sum(phi_q * z[None, :], 1)
            inverse = inverse_denominator_of_gradient(den, eps)[:, None]
            dphi *= inverse
            scaled *= inverse
            delta = -tl.sum(phi_q * dphi, 1) * denominator_slope(den, eps)
            delta = tl.where(keep, delta, 0.0)
            dphi += delta[:, None] * z[None, :]
            dz += tl.sum(delta[:, None] * phi_q, 0)
        dS = matmul_add(tl.trans(operand(scaled, OPERAND, PRECISION)), do, dS, PRECISION)
        dq = chain_queries(phi_q, norm, dphi, features, scale, D, MAP, NORMALIZE)
        dq, keep = sum_over_value_tiles(
            sums, dq, batch, head, num_heads, first + t, query_length, rows, features, keep,
            value_tile, VALUE_TILES, D, BLOCK_F,
        )  # fmt: skip
        dq_row = at(
            grad_query, batch, head, first + t, grad_query_b, grad_query_h, grad_query_n, UNIT
        )
        store_tile(dq_row, dq, rows, features, keep, grad_query_n, grad_query_d, D, BLOCK_F, UNIT)
    return dS, dz


@triton.jit
def backward_of_keys(
    key, value, mask, grad_key, grad_value, sums, dS, dz, maximum, inverse_sum, column_sum,
    batch, head, num_kv_heads, key_length, first, begin, end, values, value_tile,
    key_b, key_h, key_n, key_d, value_b, value_h, value_n, value_d,
    grad_key_b, grad_key_h, grad_key_n, grad_key_d,
    grad_value_b, grad_value_h, grad_value_n, grad_value_d, mask_b, mask_n,
    D: tl.constexpr, DV: tl.constexpr, MAP: tl.constexpr, HAS_MASK: tl.constexpr,
    UNIT: tl.constexpr, CHUNK: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr,
    VALUE_TILES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of the keys `begin` to `end`."""
    rows, features = tl.arange(0, CHUNK), tl.arange(0, BLOCK_F)
    right = operand(dS, OPERAND, PRECISION)
    right_transposed = tl.trans(right)
    for t in range(begin, end, CHUNK):
        in_range = rows < end - t
        keep = keys_kept(mask, batch, first + t, rows, in_range, mask_b, mask_n, HAS_MASK)
        key_row = at(key, batch, head, first + t, key_b, key_h, key_n, UNIT)
        value_row = at(value, batch, head, first + t, value_b, value_h, value_n, UNIT)
        k = load_tile(key_row, rows, features, keep, key_n, key_d, D, BLOCK_F, UNIT)
        v = load_tile(value_row, rows, values, keep, value_n, value_d, DV, BLOCK_V, UNIT)
        phi_k, norm = phi_of_keys(k, features, keep, maximum, D, BLOCK_F, MAP)
        if MAP == "efficient":
            phi_k *= inverse_sum[None, :]
        dphi = (
            flipped_matmul(operand(v, OPERAND, PRECISION), right_transposed, PRECISION)
            + dz[None, :]
        )
        dv = flipped_matmul(operand(phi_k, OPERAND, PRECISION), right, PRECISION)
        dk = chain_keys(phi_k, norm, dphi, features, keep, column_sum, D, MAP)
        dv_row = at(
            grad_value, batch, head, first + t, grad_value_b, grad_value_h, grad_value_n, UNIT
        )
        store_tile(
            dv_row, dv, rows, values, in_range, grad_value_n, grad_value_d, DV, BLOCK_V, UNIT
        )
        dk, in_range = sum_over_value_tiles(
            sums, dk, batch, head, num_kv_heads, first + t, key_length, rows, features, in_range,
            value_tile, VALUE_TILES, D, BLOCK_F,
        )  # fmt: skip
        dk_row = at(grad_key, batch, head, first + t, grad_key_b, grad_key_h, grad_key_n, UNIT)
        store_tile(dk_row, dk, rows, features, in_range, grad_key_n, grad_key_d, D, BLOCK_F, UNIT)


@kernel
def backward_queries(
    query, grad_out, grad_query, sums, cu, S, z, dS, dz,
    query_b: tl.int64, query_h: tl.int64, query_n: tl.int64, query_d: tl.int64,
    grad_out_b: tl.int64, grad_out_h: tl.int64, grad_out_n: tl.int64, grad_out_d: tl.int64,
    grad_query_b: tl.int64, grad_query_h: tl.int64, grad_query_n: tl.int64, grad_query_d: tl.int64,
    query_length: tl.int32, num_heads: tl.int32, num_kv_heads: tl.int32, num_sequences: tl.int32,
    query_rows: tl.int32, value_tile: tl.int32, scale: tl.float32, eps: tl.float32,
    D: tl.constexpr, DV: tl.constexpr, MAP: tl.constexpr, NORMALIZE: tl.constexpr,
    PACKED: tl.constexpr, UNIT: tl.constexpr,
    SEGMENT: tl.constexpr, CHUNK: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr,
    VALUE_TILES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """First pass of the backward: dq of one segment of queries, and its sums dS and dz."""
    row, head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    features = tl.arange(0, BLOCK_F)
    values = value_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    sequence, segment = sequence_at(row, cu, num_sequences, query_rows, SEGMENT, PACKED)
    batch, first, tokens = tokens_of(sequence, cu, query_length, PACKED)
    length = length_of_segments(tokens, SEGMENT, False)
    begin = segment * length
    end = tl.minimum(tokens, begin + length)
    own, kv_head = row * num_kv_heads + head, sequence * num_kv_heads + head
    S_tile, z_tile = load_state(S, z, kv_head, features, values, True, D, DV, MAP)
    dS_tile = tl.zeros((BLOCK_F, BLOCK_V), tl.float32)
    dz_tile = tl.zeros((BLOCK_F,), tl.float32)
    if VALUE_TILES > 1:  # dz is a sum over value tiles: earlier ones have left theirs
        dz_tile = dz_of_earlier_value_tiles(dz, dz_tile, own, features, value_tile, D, MAP)
    group = num_heads // num_kv_heads
    for h in range(head * group, (head + 1) * group):
        dS_tile, dz_tile = backward_of_queries(
            query, grad_out, grad_query, sums, S_tile, z_tile, batch, h, num_heads,
            query_length, first, begin, end, values, value_tile, scale, eps,
            query_b, query_h, query_n, query_d, grad_out_b, grad_out_h, grad_out_n, grad_out_d,
            grad_query_b, grad_query_h, grad_query_n, grad_query_d, dS_tile, dz_tile,
            D, DV, MAP, NORMALIZE, UNIT, CHUNK, BLOCK_F, BLOCK_V, VALUE_TILES,
            OPERAND, PRECISION,
        )  # fmt: skip
    store_state(dS, dz, dS_tile, dz_tile, own, features, values, True, D, DV, MAP)


@kernel
def backward_keys(
    key, value, mask, grad_key, grad_value, sums, cu_k, S, z, saved_maximum, dS, dz,
    key_b: tl.int64, key_h: tl.int64, key_n: tl.int64, key_d: tl.int64,
    value_b: tl.int64, value_h: tl.int64, value_n: tl.int64, value_d: tl.int64,
    grad_key_b: tl.int64, grad_key_h: tl.int64, grad_key_n: tl.int64, grad_key_d: tl.int64,
    grad_value_b: tl.int64, grad_value_h: tl.int64, grad_value_n: tl.int64, grad_value_d: tl.int64,
    mask_b: tl.int64, mask_n: tl.int64,
    key_length: tl.int32, num_kv_heads: tl.int32, num_sequences: tl.int32, key_rows: tl.int32,
    value_tile: tl.int32,
    D: tl.constexpr, DV: tl.constexpr, MAP: tl.constexpr, HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr, UNIT: tl.constexpr, SEGMENT: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr, VALUE_TILES: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Second pass of the backward: dk and dv of one segment of keys of one head."""
    row, head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    sequence, segment = sequence_at(row, cu_k, num_sequences, key_rows, SEGMENT, PACKED)
    batch, first, tokens = tokens_of(sequence, cu_k, key_length, PACKED)
    length = length_of_segments(tokens, SEGMENT, False)
    begin = segment * length
    features = tl.arange(0, BLOCK_F)
    values = value_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    state = sequence * num_kv_heads + head
    dS_tile, dz_tile = load_state(dS, dz, state, features, values, True, D, DV, MAP)
    if VALUE_TILES > 1:
        dz_tile = tl.where(value_tile == 0, dz_tile, 0.0)  # the first tile alone adds it
    if MAP == "efficient":
        S_tile, z_tile = load_state(S, z, state, features, values, True, D, DV, MAP)
        address = saved_maximum + tl.cast(state, tl.int64) * D + features
        maximum = tl.load(address, mask=features < D, other=0.0)
        dz_tile *= 0.0
    else:
        S_tile, z_tile, maximum = dS_tile, dz_tile, dz_tile
    inverse_sum, column_sum = softmax_over_tokens(
        S_tile, dS_tile, z_tile, MAP, BLOCK_F, OPERAND, PRECISION
    )
    backward_of_keys(
        key, value, mask, grad_key, grad_value, sums, dS_tile, dz_tile, maximum, inverse_sum,
        column_sum, batch, head, num_kv_heads, key_length, first,
        begin, tl.minimum(tokens, begin + length), values, value_tile,
        key_b, key_h, key_n, key_d, value_b, value_h, value_n, value_d,
        grad_key_b, grad_key_h, grad_key_n, grad_key_d,
        grad_value_b, grad_value_h, grad_value_n, grad_value_d, mask_b, mask_n,
        D, DV, MAP, HAS_MASK, UNIT, CHUNK, BLOCK_F, BLOCK_V, VALUE_TILES, OPERAND, PRECISION,
    )  # fmt: skip


@kernel
def backward_of_head(
    query, key, value, mask, grad_out, grad_query, grad_key, grad_value, cu, cu_k,
    S, z, saved_maximum, start_S, start_z, dS, dz,
    query_b: tl.int64, query_h: tl.int64, query_n: tl.int64, query_d: tl.int64,
    key_b: tl.int64, key_h: tl.int64, key_n: tl.int64, key_d: tl.int64,
    value_b: tl.int64, value_h: tl.int64, value_n: tl.int64, value_d: tl.int64,
    grad_out_b: tl.int64, grad_out_h: tl.int64, grad_out_n: tl.int64, grad_out_d: tl.int64,
    grad_query_b: tl.int64, grad_query_h: tl.int64, grad_query_n: tl.int64, grad_query_d: tl.int64,
    grad_key_b: tl.int64, grad_key_h: tl.int64, grad_key_n: tl.int64, grad_key_d: tl.int64,
    grad_value_b: tl.int64, grad_value_h: tl.int64, grad_value_n: tl.int64, grad_value_d: tl.int64,
    mask_b: tl.int64, mask_n: tl.int64,
    query_length: tl.int32, key_length: tl.int32, num_heads: tl.int32, num_kv_heads: tl.int32,
    scale: tl.float32, eps: tl.float32,
    D: tl.constexpr, DV: tl.constexpr, MAP: tl.constexpr, NORMALIZE: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_START: tl.constexpr, HAS_INITIAL: tl.constexpr,
    PACKED: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both passes of a short sequence in one launch: one kv head a program, dS in registers."""
    sequence, head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    features, values = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_V)
    state = sequence * num_kv_heads + head
    S_tile, z_tile = load_state(S, z, state, features, values, True, D, DV, MAP)
    dS_tile = tl.zeros((BLOCK_F, BLOCK_V), tl.float32)
    dz_tile = tl.zeros((BLOCK_F,), tl.float32)
    batch, first, tokens = tokens_of(sequence, cu, query_length, PACKED)
    group = num_heads // num_kv_heads
    for h in range(head * group, (head + 1) * group):
        dS_tile, dz_tile = backward_of_queries(
            query, grad_out, grad_query, grad_query, S_tile, z_tile, batch, h, num_heads,
            query_length, first, 0, tokens, values, 0, scale, eps,
            query_b, query_h, query_n, query_d, grad_out_b, grad_out_h, grad_out_n, grad_out_d,
            grad_query_b, grad_query_h, grad_query_n, grad_query_d, dS_tile, dz_tile,
            D, DV, MAP, NORMALIZE, UNIT, CHUNK, BLOCK_F, BLOCK_V, 1, OPERAND, PRECISION,
        )  # fmt: skip
    if HAS_START:
        start, start_of_z = load_state(start_S, start_z, state, features, values, True, D, DV, MAP)
        dS_tile, dz_tile = start + dS_tile, start_of_z + dz_tile
    if HAS_INITIAL:
        store_state(dS, dz, dS_tile, dz_tile, state, features, values, True, D, DV, MAP)
    maximum = tl.zeros((BLOCK_F,), tl.float32)
    if MAP == "efficient":
        address = saved_maximum + tl.cast(state, tl.int64) * D + features
        maximum = tl.load(address, mask=features < D, other=0.0)
    inverse_sum, column_sum = softmax_over_tokens(
        S_tile, dS_tile, z_tile, MAP, BLOCK_F, OPERAND, PRECISION
    )
    batch, first, tokens = tokens_of(sequence, cu_k, key_length, PACKED)
    backward_of_keys(
        key, value, mask, grad_key, grad_value, grad_key, dS_tile, dz_tile, maximum, inverse_sum,
        column_sum, batch, head, num_kv_heads, key_length, first, 0, tokens, values, 0,
        key_b, key_h, key_n, key_d, value_b, value_h, value_n, value_d,
        grad_key_b, grad_key_h, grad_key_n, grad_key_d,
        grad_value_b, grad_value_h, grad_value_n, grad_value_d, mask_b, mask_n,
        D, DV, MAP, HAS_MASK, UNIT, CHUNK, BLOCK_F, BLOCK_V, 1, OPERAND, PRECISION,
    )  # fmt: skip
