"""The two sweeps of the causal backward over one segment, see causal.py.

Denominators divide products, not do: do then needs no rounding, and only one layout in registers.
A state of a segment stays for many chunks of few tokens, so products with it are flipped (see
tiles.py). What does not change from chunk to chunk is computed anew all the same: the compiler
would keep it in registers, and they are short here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.backends.triton.states import add_key
from fastattn.backends.triton.tiles import (
    at,
    chain_keys,
    chain_queries,
    denominator_slope,
    flipped_matmul,
    flipped_matmul_add,
    inverse_denominator_of_gradient,
    keys_kept,
    load_tile,
    lower,
    matmul,
    matmul_add,
    operand,
    phi_of_keys,
    phi_of_queries,
    store_tile,
    sum_over_value_tiles,
)


@triton.jit
def factors_of(factors, batch, head, num_heads, length, token):
    """Address of a row's two factors: 1 / den, and delta."""
    row = (tl.cast(batch, tl.int64) * num_heads + head) * length + token
    return factors + 2 * row


@triton.jit
def sweep_forward(
    query, key, value, mask, grad_out, grad_query, sums, factors, S, z,
    batch, head, first, begin, end, length, num_heads, values, value_tile, scale, eps,
    query_b, query_h, query_n, query_d, key_b, key_h, key_n, key_d,
    value_b, value_h, value_n, value_d, grad_out_b, grad_out_h, grad_out_n, grad_out_d,
    grad_query_b, grad_query_h, grad_query_n, grad_query_d, mask_b, mask_n,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, MAP: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_MASK: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr, VALUE_TILES: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a segment that begins with the state (S, z), and the factors of its rows: what do has
    to be multiplied with to give g, and delta. Returns the segment's sums dS and dz."""
    rows, features = tl.arange(0, CHUNK), tl.arange(0, BLOCK_F)
    L = tl.zeros((BLOCK_F, BLOCK_V), tl.float32)
    L_z = tl.zeros((BLOCK_F,), tl.float32)
    for t in tl.range(begin, end, CHUNK, disable_licm=True):
        in_range = rows < end - t
        keep = keys_kept(mask, batch, first + t, rows, in_range, mask_b, mask_n, HAS_MASK)
        key_row = at(key, batch, head, first + t, key_b, key_h, key_n, UNIT)
        value_row = at(value, batch, head, first + t, value_b, value_h, value_n, UNIT)
        k = load_tile(key_row, rows, features, keep, key_n, key_d, D, BLOCK_F, UNIT)
        v = load_tile(value_row, rows, values, keep, value_n, value_d, DV, BLOCK_V, UNIT)
        phi_k, _ = phi_of_keys(k, features, keep, z, D, BLOCK_F, MAP)
        keys = operand(phi_k, OPERAND, PRECISION)
        for member in range(GROUP):
            h = head * GROUP + member
            query_row = at(query, batch, h, first + t, query_b, query_h, query_n, UNIT)
            out_row = at(grad_out, batch, h, first + t, grad_out_b, grad_out_h, grad_out_n, UNIT)
            q = load_tile(query_row, rows, features, in_range, query_n, query_d, D, BLOCK_F, UNIT)
            do = load_tile(
                out_row, rows, values, in_range, grad_out_n, grad_out_d, DV, BLOCK_V, UNIT
            )
            do = operand(do, OPERAND, PRECISION)
            phi_q, norm = phi_of_queries(q, features, scale, D, BLOCK_F, MAP, NORMALIZE)
            scaled = operand(phi_q, OPERAND, PRECISION)
            if NORMALIZE:
                A = lower(matmul(scaled, tl.trans(keys), PRECISION), CHUNK)
                den = tl.sum(A, 1) + tl.sum(phi_q * z[None, :], 1)
                inverse = inverse_denominator_of_gradient(den, eps)
                scaled = operand(phi_q * inverse[:, None], OPERAND, PRECISION)
            dphi = flipped_matmul(do, tl.trans(operand(S, OPERAND, PRECISION)), PRECISION)
            dA = lower(matmul(do, tl.trans(operand(v, OPERAND, PRECISION)), PRECISION), CHUNK)
            dphi = flipped_matmul_add(operand(dA, OPERAND, PRECISION), keys, dphi, PRECISION)
            L = matmul_add(tl.trans(scaled), do, L, PRECISION)
            if NORMALIZE:
                dphi *= inverse[:, None]
                delta = -tl.sum(phi_q * dphi, 1) * denominator_slope(den, eps)
                L_z += tl.sum(delta[:, None] * phi_q, 0)
                dphi += delta[:, None] * (z[None, :] + tl.cumsum(phi_k, 0))
                row = factors_of(factors, batch, h, num_heads, length, first + t)
                tl.store(row + 2 * rows, inverse, mask=in_range)
                tl.store(row + 2 * rows + 1, delta, mask=in_range)
            dq = chain_queries(phi_q, norm, dphi, features, scale, D, MAP, NORMALIZE)
            dq, complete = sum_over_value_tiles(
                sums, dq, batch, h, num_heads, first + t, length, rows, features, in_range,
                value_tile, VALUE_TILES, D, BLOCK_F,
            )  # fmt: skip
            dq_row = at(
                grad_query, batch, h, first + t, grad_query_b, grad_query_h, grad_query_n, UNIT
            )
            store_tile(
                dq_row, dq, rows, features, complete, grad_query_n, grad_query_d, D, BLOCK_F, UNIT
            )
        S, z = add_key(S, z, phi_k, v, OPERAND, PRECISION)
    return L, L_z


@triton.jit
def sweep_reverse(
    query, key, value, mask, grad_out, grad_key, grad_value, sums, factors, T, T_z,
    batch, head, first, begin, end, length, num_heads, num_kv_heads, values, value_tile, scale,
    query_b, query_h, query_n, query_d, key_b, key_h, key_n, key_d,
    value_b, value_h, value_n, value_d, grad_out_b, grad_out_h, grad_out_n, grad_out_d,
    grad_key_b, grad_key_h, grad_key_n, grad_key_d,
    grad_value_b, grad_value_h, grad_value_n, grad_value_d, mask_b, mask_n,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr, MAP: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_MASK: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr, VALUE_TILES: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a segment, last chunk first; (T, T_z) are the sums dS and dz of all later
    tokens, to begin with those of later segments."""
    rows, features = tl.arange(0, CHUNK), tl.arange(0, BLOCK_F)
    chunks = tl.cdiv(end - begin, CHUNK)
    for c in tl.range(0, chunks, disable_licm=True):
        t = begin + (chunks - 1 - c) * CHUNK
        in_range = rows < end - t
        keep = keys_kept(mask, batch, first + t, rows, in_range, mask_b, mask_n, HAS_MASK)
        key_row = at(key, batch, head, first + t, key_b, key_h, key_n, UNIT)
        value_row = at(value, batch, head, first + t, value_b, value_h, value_n, UNIT)
        k = load_tile(key_row, rows, features, keep, key_n, key_d, D, BLOCK_F, UNIT)
        v = load_tile(value_row, rows, values, keep, value_n, value_d, DV, BLOCK_V, UNIT)
        phi_k, norm = phi_of_keys(k, features, keep, T_z, D, BLOCK_F, MAP)
        keys, v = operand(phi_k, OPERAND, PRECISION), operand(v, OPERAND, PRECISION)
        later = operand(T, OPERAND, PRECISION)
        dphi = flipped_matmul(v, tl.trans(later), PRECISION) + T_z[None, :]
        dv = flipped_matmul(keys, later, PRECISION)
        for member in range(GROUP):
            h = head * GROUP + member
            query_row = at(query, batch, h, first + t, query_b, query_h, query_n, UNIT)
            out_row = at(grad_out, batch, h, first + t, grad_out_b, grad_out_h, grad_out_n, UNIT)
            q = load_tile(query_row, rows, features, in_range, query_n, query_d, D, BLOCK_F, UNIT)
            do = load_tile(
                out_row, rows, values, in_range, grad_out_n, grad_out_d, DV, BLOCK_V, UNIT
            )
            do = operand(do, OPERAND, PRECISION)
            phi_q, _ = phi_of_queries(q, features, scale, D, BLOCK_F, MAP, NORMALIZE)
            queries = operand(phi_q, OPERAND, PRECISION)
            A = lower(matmul(queries, tl.trans(keys), PRECISION), CHUNK)
            dA = matmul(do, tl.trans(v), PRECISION)
            scaled = queries
            if NORMALIZE:
                row = factors_of(factors, batch, h, num_heads, length, first + t)
                inverse = tl.load(row + 2 * rows, mask=in_range, other=0.0)
                delta = tl.load(row + 2 * rows + 1, mask=in_range, other=0.0)
                A *= inverse[:, None]
                dA = dA * inverse[:, None] + delta[:, None]
                scaled = operand(phi_q * inverse[:, None], OPERAND, PRECISION)
                T_z += tl.sum(delta[:, None] * phi_q, 0)
            dv = flipped_matmul_add(tl.trans(operand(A, OPERAND, PRECISION)), do, dv, PRECISION)
            dA = tl.trans(operand(lower(dA, CHUNK), OPERAND, PRECISION))
            dphi = flipped_matmul_add(dA, queries, dphi, PRECISION)
            T = matmul_add(tl.trans(scaled), do, T, PRECISION)
        dk = chain_keys(phi_k, norm, dphi, features, keep, T_z, D, MAP)
        dv_row = at(
            grad_value, batch, head, first + t, grad_value_b, grad_value_h, grad_value_n, UNIT
        )
        dv = tl.where(keep[:, None], dv, 0.0)
        store_tile(
            dv_row, dv, rows, values, in_range, grad_value_n, grad_value_d, DV, BLOCK_V, UNIT
        )
        dk, complete = sum_over_value_tiles(
            sums, dk, batch, head, num_kv_heads, first + t, length, rows, features, in_range,
            value_tile, VALUE_TILES, D, BLOCK_F,
        )  # fmt: skip
        dk_row = at(grad_key, batch, head, first + t, grad_key_b, grad_key_h, grad_key_n, UNIT)
        store_tile(dk_row, dk, rows, features, complete, grad_key_n, grad_key_d, D, BLOCK_F, UNIT)
