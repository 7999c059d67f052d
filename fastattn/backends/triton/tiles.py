"""What every Triton kernel is made of: tiles in and out of memory, phi and its chain rule.

A tile of tokens is (BLOCK tokens, BLOCK_F features) or (BLOCK tokens, BLOCK_V values), a power of
two padded with zeros. A masked key is a row of zeros: that is all a kernel needs to know of masks.
The arithmetic is that of csrc/cpu/features.h and call.h, number by number.

Strides are counted in UNIT elements. UNIT is 8 where every stride is a multiple of 8 elements and
features lie side by side, so that the compiler sees it and copies 16 bytes at a time; 1 where only
the features lie side by side; 0 for any strides, also those too large for 32 bits. No length and no
stride is ever specialised on.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's interpreter computes with numpy, which has no bfloat16: operands are rounded to it all
# the same, then widened.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# As in csrc/feature_maps.h: exp is taken of at most 40, and phi == EXP_TOP says "clamped".
EXP_CLAMP = tl.constexpr(40.0)
EXP_TOP = tl.constexpr(2.3538526683701998541e17)
BELOW_EXP_TOP = tl.constexpr(2.3538526683701998541e17 * (1 - 2.0**-23))
ZERO_NORM = tl.constexpr(1e-12)
LOWEST = tl.constexpr(-3.4028234663852886e38)


# --- memory -----------------------------------------------------------------------------------


@triton.jit
def at(pointer, batch, head, token, stride_b, stride_h, stride_n, UNIT: tl.constexpr):
    """Address of a token's row. Offsets are 64-bit."""
    batch, head, token = (
        tl.cast(batch, tl.int64),
        tl.cast(head, tl.int64),
        tl.cast(token, tl.int64),
    )
    if UNIT > 0:  # it fits; a product of two numbers of 32 bits is one instruction
        stride_n = tl.cast(tl.cast(stride_n, tl.int32), tl.int64)
    offset = batch * stride_b + head * stride_h + token * stride_n
    if UNIT > 1:
        offset = offset * UNIT
    return pointer + offset


@triton.jit
def tile_offsets(rows, columns, stride_n, stride_d, UNIT: tl.constexpr):
    """Within a tile 32 bits do unless UNIT is 0, and save registers."""
    if UNIT == 0:
        offsets = rows[:, None] * stride_n + columns[None, :] * stride_d
    else:
        offsets = rows[:, None] * (tl.cast(stride_n, tl.int32) * UNIT) + columns[None, :]
    return offsets


@triton.jit
def within(keep, columns, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """keep for every column that exists: no comparison where a size is a power of two."""
    if SIZE % BLOCK == 0:
        mask = keep[:, None]
    else:
        mask = keep[:, None] & (columns < SIZE)[None, :]
    return mask


@triton.jit
def all_of(mask, scalar):
    """Where mask holds, if scalar does. Triton 3.9's interpreter makes numbers of their `&`."""
    return (mask & scalar) != 0


@triton.jit
def convert(tile, TYPE: tl.constexpr):
    """To another type, to the nearest number: Triton's interpreter cuts bfloat16 off instead, and
    makes something else of numbers below the least normal one, so bits to be cut off are zeros."""
    if INTERPRETED and TYPE == tl.bfloat16:  # noqa: SIM300
        wide = tile.to(tl.float32)
        bits = wide.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        tile = tl.where(wide == wide, nearest.to(tl.float32, bitcast=True), wide)
    return tile.to(TYPE)


@triton.jit
def load_tile(
    row, rows, columns, keep, stride_n, stride_d,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Rows from `row` on, as they are in memory; zeros where not kept."""
    offsets = tile_offsets(rows, columns, stride_n, stride_d, UNIT)
    return tl.load(row + offsets, mask=within(keep, columns, SIZE, BLOCK), other=0.0)


@triton.jit
def store_tile(
    row, tile, rows, columns, keep, stride_n, stride_d,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    offsets = tile_offsets(rows, columns, stride_n, stride_d, UNIT)
    mask = within(keep, columns, SIZE, BLOCK)
    tl.store(row + offsets, convert(tile, row.dtype.element_ty), mask=mask)


@triton.jit
def sum_over_value_tiles(
    sums, tile, batch, head, num_heads, token, length, rows, columns, keep, value_tile,
    VALUE_TILES: tl.constexpr, D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """The gradient of a query or key is a sum over value tiles, which are launched one after the
    other and hand it on in float32. Returns the sum so far, and which rows are now complete."""
    if VALUE_TILES > 1:
        row = tl.cast(batch, tl.int64) * num_heads + head
        row = sums + (row * length + token) * D
        offsets = rows[:, None] * D + columns[None, :]
        real = keep[:, None] & (columns < D)[None, :]
        tile += tl.load(row + offsets, mask=all_of(real, value_tile > 0), other=0.0)
        tl.store(row + offsets, tile, mask=all_of(real, value_tile < VALUE_TILES - 1))
        keep = all_of(keep, value_tile == VALUE_TILES - 1)
    return tile, keep


@triton.jit
def keys_kept(mask, batch, token, rows, in_range, stride_b, stride_n, HAS_MASK: tl.constexpr):
    """Which rows of a tile are keys that take part."""
    if HAS_MASK:
        row = mask + batch * stride_b + token * stride_n
        in_range = in_range & (tl.load(row + rows * stride_n, mask=in_range, other=0) != 0)
    return in_range


# --- products ---------------------------------------------------------------------------------


@triton.jit
def operand(tile, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """A tile as the matrix units take it: bfloat16 for bfloat16 inputs, else float32, of which
    they read all or (PRECISION "tf32") the first ten bits. They cut the others off, always towards
    zero, and all features and sums would be too small: so it is rounded before."""
    if PRECISION == "tf32":
        tile = tile.to(tl.float32)
        bits = (tile.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        tile = tl.where(tile == tile, bits.to(tl.float32, bitcast=True), tile)
    if INTERPRETED:
        return convert(tile, OPERAND).to(tl.float32)
    return convert(tile, OPERAND)


@triton.jit
def matmul(a, b, PRECISION: tl.constexpr):
    """a b in float32, of operands."""
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def matmul_add(a, b, c, PRECISION: tl.constexpr):
    return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def flipped_matmul(a, b, PRECISION: tl.constexpr):
    """a b for a few tokens a, computed as (b^T a^T)^T. The rows of the first operand are what is
    shared out between warps: b, a state that stays for many tokens, would be whole in each."""
    return tl.trans(matmul(tl.trans(b), tl.trans(a), PRECISION))


@triton.jit
def flipped_matmul_add(a, b, c, PRECISION: tl.constexpr):
    return tl.trans(matmul_add(tl.trans(b), tl.trans(a), tl.trans(c), PRECISION))


@triton.jit
def lower(scores, BLOCK: tl.constexpr):
    """The scores of queries i and keys j <= i of the same chunk."""
    rows = tl.arange(0, BLOCK)
    return tl.where(rows[:, None] >= rows[None, :], scores, 0.0)


# --- the denominator --------------------------------------------------------------------------


@triton.jit
def inverse_denominator(den, eps):
    """1 / max(den, eps); a NaN stays one."""
    return 1.0 / tl.where(den < eps, eps, den)


@triton.jit
def inverse_denominator_of_gradient(den, eps):
    """The same for gradients, which are 0 where there is nothing to attend to."""
    return tl.where(den <= 0.0, 0.0, inverse_denominator(den, eps))


@triton.jit
def denominator_slope(den, eps):
    """-d log(1 / max(den, eps)) / d den: 1 / den, or 0 where eps holds."""
    return tl.where(den < eps, 0.0, 1.0 / den)


@triton.jit
def inverse_or_zero(x):
    """1 / x for a sum of positive numbers, 0 for an empty one."""
    return tl.where(x > 0.0, 1.0 / x, 0.0)


# --- phi --------------------------------------------------------------------------------------


@triton.jit
def _min(x, y):
    """A NaN in x stays one."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _clamped_exp(x):
    return tl.where(x > EXP_CLAMP, EXP_TOP, _min(tl.exp(x), BELOW_EXP_TOP))


@triton.jit
def _exp_below_row_maximum(x, real):
    return tl.exp(x - tl.max(tl.where(real, x, LOWEST), 1)[:, None])


@triton.jit
def _softmax(x, real):
    e = tl.where(real, _exp_below_row_maximum(x, real), 0.0)
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def _inverse_norm(x):
    """1 / |x| of each row, 0 where it has no direction. Divided by the largest magnitude first, so
    that squares neither overflow nor vanish."""
    top = tl.max(tl.abs(x), 1)
    safe = tl.where(top > 0.0, top, 1.0)
    scaled = x / safe[:, None]
    norm = safe * tl.sqrt(tl.sum(scaled * scaled, 1))
    return tl.where(norm > ZERO_NORM, 1.0 / norm, 0.0)


@triton.jit
def _phi(x, columns, D: tl.constexpr, MAP: tl.constexpr):
    """Maps that treat queries and keys alike. The cosine map's constant feature comes last here
    (first in a state, see `state_row`), so that tiles of tokens keep their alignment."""
    norm = tl.sum(x, 1) * 0.0  # only cosine has one; a compiler removes what is not used
    if MAP == "elu":
        phi = tl.where(x > 0.0, x + 1.0, tl.exp(_min(x, 0.0)))
    elif MAP == "relu":
        phi = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif MAP == "softmax":
        phi = _softmax(x, (columns < D)[None, :])
    elif MAP == "cosine":
        norm = _inverse_norm(x)
        phi = tl.where((columns == D)[None, :], 1.0, x * norm[:, None])
    else:  # identity, features
        phi = x
    return phi, norm


@triton.jit
def phi_of_queries(
    q, columns, scale,
    D: tl.constexpr, BLOCK_F: tl.constexpr, MAP: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """phi(scale q) and, for cosine, 1 / |scale q|; zeros in padded features."""
    x = q.to(tl.float32) * scale
    real = (columns < D)[None, :]
    norm = tl.sum(x, 1) * 0.0
    if MAP == "exp":
        if NORMALIZE:
            phi = _exp_below_row_maximum(x, real)
        else:
            phi = _clamped_exp(x)
    elif MAP == "efficient":
        phi = _softmax(x, real)
    else:
        phi, norm = _phi(x, columns, D, MAP)
    if MAP != "cosine" and D % BLOCK_F != 0:
        phi = tl.where(real, phi, 0.0)
    return phi, norm


@triton.jit
def phi_of_keys(
    k, columns, keep, maximum,
    D: tl.constexpr, BLOCK_F: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """phi(k), rows of zeros where not kept. `maximum` (of every feature) is for `efficient` only:
    its keys are exp(k - maximum), and whoever uses them divides by their sum."""
    x = k.to(tl.float32)
    norm = tl.sum(x, 1) * 0.0
    if MAP == "exp":
        phi = _clamped_exp(x)
    elif MAP == "efficient":
        phi = tl.exp(x - maximum[None, :])
    else:
        phi, norm = _phi(x, columns, D, MAP)
    real = keep[:, None]
    if MAP != "cosine" and D % BLOCK_F != 0:
        real = real & (columns < D)[None, :]
    return tl.where(real, phi, 0.0), norm


# --- the chain rule: d/dphi in, d/dx out --------------------------------------------------------


@triton.jit
def _chain(phi, norm, g, columns, D: tl.constexpr, MAP: tl.constexpr):
    if MAP == "elu":
        dx = _min(phi, 1.0) * g
    elif MAP == "relu":
        dx = tl.where(phi > 0.0, g, 0.0)
    elif MAP == "softmax":
        dx = phi * (g - tl.sum(phi * g, 1)[:, None])
    elif MAP == "cosine":
        real = (columns < D)[None, :]
        along = tl.sum(tl.where(real, phi * g, 0.0), 1)
        dx = (g - phi * along[:, None]) * norm[:, None]
    else:
        dx = g
    return dx


@triton.jit
def chain_queries(
    phi, norm, g, columns, scale, D: tl.constexpr, MAP: tl.constexpr, NORMALIZE: tl.constexpr
):
    if MAP == "exp":
        if NORMALIZE:
            dx = phi * g  # the maximum cancels in num / den
        else:
            dx = tl.where(phi < EXP_TOP, phi * g, 0.0)
    elif MAP == "efficient":
        dx = phi * (g - tl.sum(phi * g, 1)[:, None])
    else:
        dx = _chain(phi, norm, g, columns, D, MAP)
    return dx * scale


@triton.jit
def chain_keys(phi, norm, g, columns, keep, column_sum, D: tl.constexpr, MAP: tl.constexpr):
    """`column_sum`: sum_j phi(k_j) dphi(k_j) of every feature, for `efficient` only."""
    if MAP == "exp":
        dx = tl.where(phi < EXP_TOP, phi * g, 0.0)
    elif MAP == "efficient":
        dx = phi * (g - column_sum[None, :])
    else:
        dx = _chain(phi, norm, g, columns, D, MAP)
    return tl.where(keep[:, None], dx, 0.0)
