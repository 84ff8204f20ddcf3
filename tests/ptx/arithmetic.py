"""Arithmetic of PTX that numpy lacks, on arrays with one entry per lane."""

import ctypes

import numpy as np

from tests.ptx.program import F4, F8, I4, I8, U2, U4, U8, EmulatorError

_libm_fma = ctypes.CDLL("libm.so.6").fma
_libm_fma.restype, _libm_fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
_fma_of_doubles = np.frompyfunc(_libm_fma, 3, 1)
SMALLEST_NORMAL = F4(2.0**-126)


# --- floating point


def fma64(a, b, c):
    """a * b + c in float64, rounded once."""
    return _fma_of_doubles(a, b, c).astype(F8)


def fma32(a, b, c):
    """a * b + c in float32, rounded once: the exact sum is rounded to odd in float64, then to float32."""
    product, c = a.astype(F8) * b.astype(F8), c.astype(F8)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    is_inexact = (error != 0) & np.isfinite(total) & np.isfinite(error)
    bits = total.view(I8)
    return np.where(is_inexact, (bits - ((error < 0) != (total < 0))) | 1, bits).view(F8).astype(F4)


def flush_subnormals(x):
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(F4(0), x), x)


def minimum(a, b, propagates_nan):
    bits = U4 if a.dtype == F4 else U8
    of_equals = (a.view(bits) | b.view(bits)).view(a.dtype)  # of two zeros, the negative one
    return _canonical_nan(np.where(a == b, of_equals, (np.minimum if propagates_nan else np.fmin)(a, b)))


def maximum(a, b, propagates_nan):
    bits = U4 if a.dtype == F4 else U8
    of_equals = (a.view(bits) & b.view(bits)).view(a.dtype)
    return _canonical_nan(np.where(a == b, of_equals, (np.maximum if propagates_nan else np.fmax)(a, b)))


def _canonical_nan(x):
    return np.where(np.isnan(x), U4(0x7FFFFFFF).view(F4), x) if x.dtype == F4 else x


def to_bfloat16(x):
    """The bits of the nearest bfloat16, ties to even."""
    bits = x.view(U4)
    rounded = (bits + U4(0x7FFF) + ((bits >> U4(16)) & U4(1))) >> U4(16)
    return np.where(np.isnan(x), U4(0x7FFF), rounded).astype(U2)


def from_bfloat16(bits):
    return (bits.astype(U4) << U4(16)).view(F4)


def reciprocal_approx_f64(x):
    """`rcp.approx.ftz.f64`: reads and writes the upper 32 bits only."""
    high = (x.view(U8) & U8(0xFFFFFFFF00000000)).view(F8)
    high = np.where(np.abs(high) < 2.0**-1022, np.copysign(0.0, high), high)
    return ((1.0 / high).view(U8) & U8(0xFFFFFFFF00000000)).view(F8)


# --- approximate instructions, whose results are off by as much as PTX allows


def approximate_ex2(x):
    out = np.exp2(x.astype(F8)).astype(F4)
    return np.where(x == 0, out, _nudge(out, x.view(U4), 2))


def approximate_div(a, b):
    out = a / b
    is_exact = ((b.view(U4) & U4(0x7FFFFF)) == 0) | (a == b)  # divisors that are powers of two
    return np.where(is_exact, out, _nudge(out, a.view(U4) ^ b.view(U4), 2))


def approximate_sqrt(x):
    return _nudge(np.sqrt(x), x.view(U4), 1)


def _nudge(x, seed, most_ulps):
    """Move x up or down by at most so many units in the last place, by a hash of its bits and a seed."""
    bits = x.view(I4)
    mixed = (bits.view(U4) ^ seed) * U4(2654435761)
    mixed ^= mixed >> U4(15)
    step = (mixed % U4(2 * most_ulps + 1)).astype(I4) - I4(most_ulps)
    is_ordinary = np.isfinite(x) & (np.abs(x) > F4(1e-37)) & (np.abs(x) < F4(1e38))
    return np.where(is_ordinary, bits + step, bits).view(F4)


# --- integers and bits


def permute_bytes(a, b, selector):
    """`prmt`: each nibble of the selector picks a byte of b:a, or its sign."""
    both = a.astype(U8) | (b.astype(U8) << U8(32))
    out = np.zeros_like(a)
    for byte in range(4):
        nibble = (selector >> U4(4 * byte)) & U4(0xF)
        value = (both >> ((nibble & U4(7)).astype(U8) * U8(8))).astype(U4) & U4(0xFF)
        sign = np.where(value & U4(0x80), U4(0xFF), U4(0))
        out |= np.where(nibble & U4(8), sign, value) << U4(8 * byte)
    return out


def shift_left(a, by):
    width = 8 * a.dtype.itemsize
    safe = np.minimum(by, U4(width - 1)).astype(a.dtype)
    return np.where(by >= width, a.dtype.type(0), a << safe)


def shift_right(a, by):
    width = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(by, U4(width - 1)).astype(a.dtype)
    # beyond the width, signed numbers are filled with their sign
    return shifted if a.dtype.kind == "i" else np.where(by >= width, a.dtype.type(0), shifted)


def extract_bits(a, start, length):
    """`bfe.u32`."""
    start, length = (start & U4(255)).astype(U8), (length & U4(255)).astype(U8)
    mask = (U8(1) << np.minimum(length, U8(32))) - U8(1)
    return ((a.astype(U8) >> np.minimum(start, U8(63))) & mask).astype(U4)


def quotient(a, b):
    """Integer division towards zero; any result where b is 0."""
    b = np.where(b == 0, b.dtype.type(1), b)
    down = a // b
    if a.dtype.kind == "i":
        down = down + ((a - down * b != 0) & ((a < 0) != (b < 0))).astype(a.dtype)
    return down


def remainder(a, b):
    return a - quotient(a, b) * np.where(b == 0, b.dtype.type(1), b)


def multiply_high(a, b):
    if a.dtype not in (U4, I4):
        raise EmulatorError("mul.hi of 64 bits is not implemented")
    wide = U8 if a.dtype == U4 else I8
    return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)


def logic_of_three(a, b, c, table):
    """`lop3`: bit k of the table is the result where the operands' bits are k."""
    out = np.zeros_like(a)
    for k in range(8):
        if table >> k & 1:
            out |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return out
