"""The recurrent form: one token after another, the state updated before it is read.

    S += phi(k) v^T     z += phi(k)     out = phi(q) S / max(phi(q) . z, eps)

One reading and writing of S per call is all the memory traffic there is: this is the decode step
(one token, the state updated in place), and the causal form for tests of the chunked one.
"""

from __future__ import annotations

import triton.language as tl

from fastattn.backends.triton.launch import kernel
from fastattn.backends.triton.segments import first_row, tokens_of
from fastattn.backends.triton.states import load_state, store_state
from fastattn.backends.triton.tiles import (
    at,
    inverse_denominator,
    keys_kept,
    load_tile,
    phi_of_keys,
    phi_of_queries,
    store_tile,
)


@kernel
def recurrent(
    query, key, value, out, mask, cu, start_S, start_z, end_S, end_z, saved_S, saved_z,
    query_b: tl.int64, query_h: tl.int64, query_n: tl.int64, query_d: tl.int64,
    key_b: tl.int64, key_h: tl.int64, key_n: tl.int64, key_d: tl.int64,
    value_b: tl.int64, value_h: tl.int64, value_n: tl.int64, value_d: tl.int64,
    out_b: tl.int64, out_h: tl.int64, out_n: tl.int64, out_d: tl.int64,
    mask_b: tl.int64, mask_n: tl.int64,
    length: tl.int32, num_heads: tl.int32, num_kv_heads: tl.int32, rows_of_sequence: tl.int32,
    scale: tl.float32, eps: tl.float32,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, MAP: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_MASK: tl.constexpr, HAS_START: tl.constexpr,
    RETURN_STATE: tl.constexpr, SAVE: tl.constexpr, PACKED: tl.constexpr, UNIT: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr,
    VALUE_TILES: tl.constexpr,
):  # fmt: skip
    """One kv head of one sequence a program; `start` and `end` may be the same memory. With SAVE
    the state at the start of every segment goes to `saved`."""
    sequence, head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    batch, first, tokens = tokens_of(sequence, cu, length, PACKED)
    one, features = tl.arange(0, 1), tl.arange(0, BLOCK_F)
    present = one < 1
    state = sequence * num_kv_heads + head
    z_0 = tl.zeros((BLOCK_F,), tl.float32)
    for value_tile in range(VALUE_TILES):
        values = value_tile * BLOCK_V + tl.arange(0, BLOCK_V)
        S, z = load_state(start_S, start_z, state, features, values, HAS_START, D, DV, MAP)
        if VALUE_TILES > 1:  # the first tile may have overwritten z: all others start from its
            z_0 = tl.where(value_tile == 0, z, z_0)
            z = z_0
        for t in range(tokens):
            if SAVE:  # noqa: SIM102  (decided when it is compiled, the other as it runs)
                if t % SEGMENT == 0:
                    row = first_row(sequence, cu, rows_of_sequence, SEGMENT, PACKED) + t // SEGMENT
                    own = row * num_kv_heads + head
                    store_state(saved_S, saved_z, S, z, own, features, values, True, D, DV, MAP)
            keep = keys_kept(mask, batch, first + t, one, present, mask_b, mask_n, HAS_MASK)
            key_row = at(key, batch, head, first + t, key_b, key_h, key_n, UNIT)
            value_row = at(value, batch, head, first + t, value_b, value_h, value_n, UNIT)
            k = load_tile(key_row, one, features, keep, key_n, key_d, D, BLOCK_F, UNIT)
            v = load_tile(value_row, one, values, keep, value_n, value_d, DV, BLOCK_V, UNIT)
            phi_k, _ = phi_of_keys(k, features, keep, z, D, BLOCK_F, MAP)
            S += tl.trans(phi_k) * v.to(tl.float32)
            z += tl.sum(phi_k, 0)
            for member in range(GROUP):
                h = head * GROUP + member
                query_row = at(query, batch, h, first + t, query_b, query_h, query_n, UNIT)
                q = load_tile(query_row, one, features, present, query_n, query_d, D, BLOCK_F, UNIT)
                phi_q, _ = phi_of_queries(q, features, scale, D, BLOCK_F, MAP, NORMALIZE)
                o = tl.sum(tl.trans(phi_q) * S, 0)[None, :]
                if NORMALIZE:
                    den = tl.sum(phi_q * z[None, :], 1)
                    o *= inverse_denominator(den, eps)[:, None]
                out_row = at(out, batch, h, first + t, out_b, out_h, out_n, UNIT)
                store_tile(out_row, o, one, values, present, out_n, out_d, DV, BLOCK_V, UNIT)
        if RETURN_STATE:
            tl.debug_barrier()  # a step replaces the state that it reads: all have read it by now
            store_state(end_S, end_z, S, z, state, features, values, True, D, DV, MAP)
