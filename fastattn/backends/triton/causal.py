"""Causal linear attention, in chunks: query i attends to keys j <= i.

    S_i = S_0 + sum_{j<=i} phi(k_j) v_j^T     out_i = phi(q_i) S_i / max(phi(q_i) . z_i, eps)

Within a chunk the sum is a masked product, A = tril(phi(q) phi(k)^T); everything before the chunk
is in the state. The state of a chunk is P + L: P at the start of its segment, L summed from zero
since. So a segment needs only its P, and programs may take segments in any order.

Backward, with g_i = do_i / den_i, u_i = S_i g_i, delta_i = -phi(q_i) . u_i / den_i:

    forward sweep:   dphi(q_i) = u_i + delta_i z_i
    reverse sweep:   dS_j = sum_{i>=j} phi(q_i) g_i^T        dphi(k_j) = dS_j v_j + dz_j
                     dz_j = sum_{i>=j} delta_i phi(q_i)      dv_j = dS_j^T phi(k_j)

The forward sweep also leaves the segment's sums dS and dz, from zero; the reverse sweep runs on
from the sums of all later segments. A program takes one segment after another, the last first:
forward sweep, then reverse sweep (sweeps.py), each from the segment's own end. Where there are
fewer heads than multiprocessors, two launches share the segments out: one for the forward
sweeps, a fold of the sums, and one for the reverse sweeps.

Walking the state backwards by subtraction would save reading a segment again, but is wrong where
its features differ by many orders of magnitude: what is left of a large sum is its rounding.

Bytes per token and head, 16-bit inputs, D = Dv = d, states (4 d^2 each) apart: forward 8d with one
program a head; 12d where segments are shared out, since their sums read k and v once more.
Backward 14d with one program a head, and its segment's q, k, v and do once more (8d) right after;
where segments are shared out 10d and 12d. bench/traffic.py counts.

The loop over a group's query heads has constant bounds, so that one head leaves no loop: only
innermost loops are pipelined.
"""

from __future__ import annotations

import triton.language as tl

from fastattn.backends.triton.launch import kernel
from fastattn.backends.triton.segments import first_row, sequence_at, tokens_of
from fastattn.backends.triton.states import (
    add_key,
    dz_of_earlier_value_tiles,
    load_state,
    store_state,
)
from fastattn.backends.triton.sweeps import sweep_forward, sweep_reverse
from fastattn.backends.triton.tiles import (
    at,
    flipped_matmul,
    flipped_matmul_add,
    inverse_denominator,
    keys_kept,
    load_tile,
    lower,
    matmul,
    operand,
    phi_of_keys,
    phi_of_queries,
    store_tile,
)

# --- forward ----------------------------------------------------------------------------------


@kernel
def forward(
    query, key, value, out, mask, cu, start_S, start_z, end_S, end_z, saved_S, saved_z,
    query_b: tl.int64, query_h: tl.int64, query_n: tl.int64, query_d: tl.int64,
    key_b: tl.int64, key_h: tl.int64, key_n: tl.int64, key_d: tl.int64,
    value_b: tl.int64, value_h: tl.int64, value_n: tl.int64, value_d: tl.int64,
    out_b: tl.int64, out_h: tl.int64, out_n: tl.int64, out_d: tl.int64,
    mask_b: tl.int64, mask_n: tl.int64,
    length: tl.int32, num_heads: tl.int32, num_kv_heads: tl.int32, num_sequences: tl.int32,
    rows_of_sequence: tl.int32, scale: tl.float32, eps: tl.float32,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, MAP: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_MASK: tl.constexpr, HAS_START: tl.constexpr,
    RETURN_STATE: tl.constexpr, SAVE: tl.constexpr, PACKED: tl.constexpr, UNIT: tl.constexpr,
    SPLIT: tl.constexpr, SEGMENT: tl.constexpr, CHUNK: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """SPLIT: one segment a program, from the state in its row of `start`. Else: one sequence a
    program, from its initial state in `start`; with SAVE every segment's state goes to `saved`.
    """
    row, head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    rows, features = tl.arange(0, CHUNK), tl.arange(0, BLOCK_F)
    values = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    stores_z = tl.program_id(1) == 0
    if SPLIT:
        sequence, segment = sequence_at(row, cu, num_sequences, rows_of_sequence, SEGMENT, PACKED)
    else:
        sequence, segment = row, row * 0
    batch, first, tokens = tokens_of(sequence, cu, length, PACKED)
    last = tl.cdiv(tokens, SEGMENT)
    if SPLIT:
        last = tl.minimum(last, segment + 1)
    P, P_z = load_state(
        start_S, start_z, row * num_kv_heads + head, features, values, HAS_START, D, DV, MAP
    )
    for i in range(segment, last):
        begin = i * SEGMENT
        end = tl.minimum(tokens, begin + SEGMENT)
        if SAVE:
            own = (first_row(sequence, cu, rows_of_sequence, SEGMENT, PACKED) + i) * num_kv_heads
            store_state(
                saved_S, saved_z, P, P_z, own + head, features, values, stores_z, D, DV, MAP
            )
        L = tl.zeros((BLOCK_F, BLOCK_V), tl.float32)
        L_z = tl.zeros((BLOCK_F,), tl.float32)
        for t in tl.range(begin, end, CHUNK, disable_licm=True):
            in_range = rows < end - t
            keep = keys_kept(mask, batch, first + t, rows, in_range, mask_b, mask_n, HAS_MASK)
            key_row = at(key, batch, head, first + t, key_b, key_h, key_n, UNIT)
            value_row = at(value, batch, head, first + t, value_b, value_h, value_n, UNIT)
            k = load_tile(key_row, rows, features, keep, key_n, key_d, D, BLOCK_F, UNIT)
            v = load_tile(value_row, rows, values, keep, value_n, value_d, DV, BLOCK_V, UNIT)
            phi_k, _ = phi_of_keys(k, features, keep, L_z, D, BLOCK_F, MAP)
            keys = tl.trans(operand(phi_k, OPERAND, PRECISION))
            state = operand(P + L, OPERAND, PRECISION)
            for member in range(GROUP):
                h = head * GROUP + member
                query_row = at(query, batch, h, first + t, query_b, query_h, query_n, UNIT)
                q = load_tile(
                    query_row, rows, features, in_range, query_n, query_d, D, BLOCK_F, UNIT
                )
                phi_q, _ = phi_of_queries(q, features, scale, D, BLOCK_F, MAP, NORMALIZE)
                queries = operand(phi_q, OPERAND, PRECISION)
                A = lower(matmul(queries, keys, PRECISION), CHUNK)
                o = flipped_matmul(queries, state, PRECISION)
                o = flipped_matmul_add(
                    operand(A, OPERAND, PRECISION), operand(v, OPERAND, PRECISION), o, PRECISION
                )
                if NORMALIZE:
                    den = tl.sum(A, 1) + tl.sum(phi_q * (P_z + L_z)[None, :], 1)
                    o *= inverse_denominator(den, eps)[:, None]
                out_row = at(out, batch, h, first + t, out_b, out_h, out_n, UNIT)
                store_tile(out_row, o, rows, values, in_range, out_n, out_d, DV, BLOCK_V, UNIT)
            L, L_z = add_key(L, L_z, phi_k, v, OPERAND, PRECISION)
        P += L
        P_z += L_z
    if RETURN_STATE and not SPLIT:
        own = sequence * num_kv_heads + head
        store_state(end_S, end_z, P, P_z, own, features, values, stores_z, D, DV, MAP)


# --- backward ---------------------------------------------------------------------------------


@kernel
def backward(
    query, key, value, mask, grad_out, grad_query, grad_key, grad_value, factors, cu,
    S, z, dS, dz, start_S, start_z, end_S, end_z,
    query_b: tl.int64, query_h: tl.int64, query_n: tl.int64, query_d: tl.int64,
    key_b: tl.int64, key_h: tl.int64, key_n: tl.int64, key_d: tl.int64,
    value_b: tl.int64, value_h: tl.int64, value_n: tl.int64, value_d: tl.int64,
    grad_out_b: tl.int64, grad_out_h: tl.int64, grad_out_n: tl.int64, grad_out_d: tl.int64,
    grad_query_b: tl.int64, grad_query_h: tl.int64, grad_query_n: tl.int64, grad_query_d: tl.int64,
    grad_key_b: tl.int64, grad_key_h: tl.int64, grad_key_n: tl.int64, grad_key_d: tl.int64,
    grad_value_b: tl.int64, grad_value_h: tl.int64, grad_value_n: tl.int64, grad_value_d: tl.int64,
    mask_b: tl.int64, mask_n: tl.int64,
    length: tl.int32, num_heads: tl.int32, num_kv_heads: tl.int32, rows_of_sequence: tl.int32,
    scale: tl.float32, eps: tl.float32,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, MAP: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_MASK: tl.constexpr, HAS_START: tl.constexpr,
    HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr, UNIT: tl.constexpr, SEGMENT: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Both passes in one launch: one kv head of one sequence a program, its last segment first.
    The sums T of all later segments wait in memory while it sweeps forward."""
    sequence, head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    features, values = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_V)
    batch, first, tokens = tokens_of(sequence, cu, length, PACKED)
    segments = tl.cdiv(tokens, SEGMENT)
    row = first_row(sequence, cu, rows_of_sequence, SEGMENT, PACKED)
    state = sequence * num_kv_heads + head
    T, T_z = load_state(start_S, start_z, state, features, values, HAS_START, D, DV, MAP)
    store_state(dS, dz, T, T_z, state, features, values, True, D, DV, MAP)
    for i in range(segments):
        segment = segments - 1 - i
        begin = segment * SEGMENT
        end = tl.minimum(tokens, begin + SEGMENT)
        own = (row + segment) * num_kv_heads + head
        S_tile, z_tile = load_state(S, z, own, features, values, True, D, DV, MAP)
        L, L_z = sweep_forward(
            query, key, value, mask, grad_out, grad_query, grad_query, factors, S_tile, z_tile,
            batch, head, first, begin, end, length, num_heads, values, 0, scale, eps,
            query_b, query_h, query_n, query_d, key_b, key_h, key_n, key_d,
            value_b, value_h, value_n, value_d, grad_out_b, grad_out_h, grad_out_n, grad_out_d,
            grad_query_b, grad_query_h, grad_query_n, grad_query_d, mask_b, mask_n,
            D, DV, GROUP, MAP, NORMALIZE, HAS_MASK, UNIT, CHUNK, BLOCK_F, BLOCK_V, 1,
            OPERAND, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()  # row factors and T come from other threads
        T, T_z = load_state(dS, dz, state, features, values, True, D, DV, MAP)
        tl.debug_barrier()  # all have T before any replaces it
        store_state(dS, dz, T + L, T_z + L_z, state, features, values, True, D, DV, MAP)
        sweep_reverse(
            query, key, value, mask, grad_out, grad_key, grad_value, grad_key, factors, T, T_z,
            batch, head, first, begin, end, length, num_heads, num_kv_heads, values, 0, scale,
            query_b, query_h, query_n, query_d, key_b, key_h, key_n, key_d,
            value_b, value_h, value_n, value_d, grad_out_b, grad_out_h, grad_out_n, grad_out_d,
            grad_key_b, grad_key_h, grad_key_n, grad_key_d,
            grad_value_b, grad_value_h, grad_value_n, grad_value_d, mask_b, mask_n,
            D, DV, GROUP, MAP, NORMALIZE, HAS_MASK, UNIT, CHUNK, BLOCK_F, BLOCK_V, 1,
            OPERAND, PRECISION,
        )  # fmt: skip
    if HAS_INITIAL:
        tl.debug_barrier()
        T, T_z = load_state(dS, dz, state, features, values, True, D, DV, MAP)
        store_state(end_S, end_z, T, T_z, state, features, values, True, D, DV, MAP)


@kernel
def backward_segments(
    query, key, value, mask, grad_out, grad_query, sums, factors, cu, S, z, dS, dz,
    query_b: tl.int64, query_h: tl.int64, query_n: tl.int64, query_d: tl.int64,
    key_b: tl.int64, key_h: tl.int64, key_n: tl.int64, key_d: tl.int64,
    value_b: tl.int64, value_h: tl.int64, value_n: tl.int64, value_d: tl.int64,
    grad_out_b: tl.int64, grad_out_h: tl.int64, grad_out_n: tl.int64, grad_out_d: tl.int64,
    grad_query_b: tl.int64, grad_query_h: tl.int64, grad_query_n: tl.int64, grad_query_d: tl.int64,
    mask_b: tl.int64, mask_n: tl.int64,
    length: tl.int32, num_heads: tl.int32, num_kv_heads: tl.int32, num_sequences: tl.int32,
    rows_of_sequence: tl.int32, value_tile: tl.int32, scale: tl.float32, eps: tl.float32,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, MAP: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, UNIT: tl.constexpr,
    SEGMENT: tl.constexpr, CHUNK: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr,
    VALUE_TILES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """First pass: dq of one segment a program, and its sums dS and dz."""
    row, head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    features = tl.arange(0, BLOCK_F)
    values = value_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    sequence, segment = sequence_at(row, cu, num_sequences, rows_of_sequence, SEGMENT, PACKED)
    batch, first, tokens = tokens_of(sequence, cu, length, PACKED)
    begin = segment * SEGMENT
    end = tl.minimum(tokens, begin + SEGMENT)
    own = row * num_kv_heads + head
    S_tile, z_tile = load_state(S, z, own, features, values, begin < tokens, D, DV, MAP)
    L, L_z = sweep_forward(
        query, key, value, mask, grad_out, grad_query, sums, factors, S_tile, z_tile,
        batch, head, first, begin, end, length, num_heads, values, value_tile, scale, eps,
        query_b, query_h, query_n, query_d, key_b, key_h, key_n, key_d,
        value_b, value_h, value_n, value_d, grad_out_b, grad_out_h, grad_out_n, grad_out_d,
        grad_query_b, grad_query_h, grad_query_n, grad_query_d, mask_b, mask_n,
        D, DV, GROUP, MAP, NORMALIZE, HAS_MASK, UNIT, CHUNK, BLOCK_F, BLOCK_V, VALUE_TILES,
        OPERAND, PRECISION,
    )  # fmt: skip
    if VALUE_TILES > 1:
        L_z += dz_of_earlier_value_tiles(dz, L_z * 0.0, own, features, value_tile, D, MAP)
    store_state(dS, dz, L, L_z, own, features, values, True, D, DV, MAP)


@kernel
def backward_keys(
    query, key, value, mask, grad_out, grad_key, grad_value, sums, factors, cu, dS, dz,
    query_b: tl.int64, query_h: tl.int64, query_n: tl.int64, query_d: tl.int64,
    key_b: tl.int64, key_h: tl.int64, key_n: tl.int64, key_d: tl.int64,
    value_b: tl.int64, value_h: tl.int64, value_n: tl.int64, value_d: tl.int64,
    grad_out_b: tl.int64, grad_out_h: tl.int64, grad_out_n: tl.int64, grad_out_d: tl.int64,
    grad_key_b: tl.int64, grad_key_h: tl.int64, grad_key_n: tl.int64, grad_key_d: tl.int64,
    grad_value_b: tl.int64, grad_value_h: tl.int64, grad_value_n: tl.int64, grad_value_d: tl.int64,
    mask_b: tl.int64, mask_n: tl.int64,
    length: tl.int32, num_heads: tl.int32, num_kv_heads: tl.int32, num_sequences: tl.int32,
    rows_of_sequence: tl.int32, value_tile: tl.int32, scale: tl.float32,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, MAP: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, UNIT: tl.constexpr,
    SEGMENT: tl.constexpr, CHUNK: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr,
    VALUE_TILES: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Second pass: dk and dv of one segment a program, from the sums dS and dz of all
    later segments."""
    row, head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    features = tl.arange(0, BLOCK_F)
    values = value_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    sequence, segment = sequence_at(row, cu, num_sequences, rows_of_sequence, SEGMENT, PACKED)
    batch, first, tokens = tokens_of(sequence, cu, length, PACKED)
    begin = segment * SEGMENT
    end = tl.minimum(tokens, begin + SEGMENT)
    own = row * num_kv_heads + head
    T, T_z = load_state(dS, dz, own, features, values, begin < tokens, D, DV, MAP)
    if VALUE_TILES > 1:
        T_z = tl.where(value_tile == 0, T_z, 0.0)  # the first tile alone adds it
    sweep_reverse(
        query, key, value, mask, grad_out, grad_key, grad_value, sums, factors, T, T_z,
        batch, head, first, begin, end, length, num_heads, num_kv_heads, values, value_tile, scale,
        query_b, query_h, query_n, query_d, key_b, key_h, key_n, key_d,
        value_b, value_h, value_n, value_d, grad_out_b, grad_out_h, grad_out_n, grad_out_d,
        grad_key_b, grad_key_h, grad_key_n, grad_key_d,
        grad_value_b, grad_value_h, grad_value_n, grad_value_d, mask_b, mask_n,
        D, DV, GROUP, MAP, NORMALIZE, HAS_MASK, UNIT, CHUNK, BLOCK_F, BLOCK_V, VALUE_TILES,
        OPERAND, PRECISION,
    )  # fmt: skip
