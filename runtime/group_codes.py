"""Gates on groups that have no scale to multiply: their codes are rewritten, 32 at a time.

MXFP4's scale is a power of two and cannot be zero; TQ2_0 shares one scale among 256 weights. A gate g makes a group:

- 1: as it is, every bit;
- 0: the code of zero in all 32 places, the scale as it was;
- otherwise TQ2_0: each weight at the nearest of -1, 0, 1 to g times it, ties to 0: below 0.5 in magnitude nothing is
  left, above it nothing changes, and a negative gate turns the signs;
- otherwise MXFP4: the exponent moves by k, where |g| / 2^k lies in (0.625, 1.25], and each code becomes the nearest to
  what is left of the gate times it, ties towards zero. A power of two is exact. At the ends of the exponent's range
  (0 to 254) the codes take over what the exponent cannot: they vanish, or saturate.

Why 0.625 to 1.25: below 1 the small codes lose, above it the largest saturate; the errors balance thereabouts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from persona_edge.masks import GROUP_SIZE
from persona_edge.runtime.dequantize import code_values
from persona_edge.runtime.layouts import CodeFormat, WeightLayout

__all__ = ["nearest_codes", "scale_group_codes"]

_CODE_LIMIT = 2.0**20  # beyond any code, and small enough that a distance to a code is exact
_LAST_EXPONENT = 254  # 255 is not a number in the MX specification
_LARGEST_REST = 1.25


def nearest_codes(codes: CodeFormat, values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The codes (n,) whose values come nearest to `values` (n,); ties as the module and number_formats.py say."""
    wanted = np.clip(values, -_CODE_LIMIT, _CODE_LIMIT)
    if not codes.codebook:
        return codes.numbers.nearest_code(wanted)
    book = np.array(codes.codebook, np.float64)
    nearest: NDArray[np.uint8] = np.abs(book - wanted[:, None]).argmin(axis=1).astype(np.uint8)
    return nearest


def scale_group_codes(layout: WeightLayout, fields: NDArray[np.uint8], gates: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Fields (n, n_field_bytes) of groups whose codes are part of them, times `gates` (n,), finite. Pure."""
    codes = layout.codes
    assert codes is not None
    out = fields.copy()
    rest = gates.astype(np.float64)
    if codes.n_scales:
        out[:, 0], rest = _moved(fields[:, 0], rest)
    each, which = np.unique(rest, return_inverse=True)
    tables = np.stack([_table(codes, float(gate)) for gate in each]) if len(each) else np.zeros((0, 256), np.uint8)
    n_code_bytes = GROUP_SIZE * codes.group_bits // 8
    out[:, -n_code_bytes:] = tables[which[:, None], fields[:, -n_code_bytes:]]
    return np.where((gates == 1)[:, None], fields, out)


def _moved(exponents: NDArray[np.uint8], gates: NDArray[np.float64]) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """The exponents with as much of the gates in them as they can take, and what is left of the gates. Exact."""
    fraction, power = np.frexp(np.abs(gates))  # a fraction in [0.5, 1), or 0
    shift = np.where(2 * fraction <= _LARGEST_REST, power - 1, power)
    before = exponents.astype(np.int64)
    after = np.where(gates == 0, before, np.clip(before + shift, 0, _LAST_EXPONENT))
    return after.astype(np.uint8), np.ldexp(gates, before - after)


def _table(codes: CodeFormat, gate: float) -> NDArray[np.uint8]:
    """What becomes of each byte of packed codes: (256,)."""
    bits = codes.group_bits
    values = code_values(codes, np.arange(1 << bits, dtype=np.uint8)).astype(np.float64)
    table = nearest_codes(codes, values * gate)
    packed = np.arange(256)
    parts = [table[packed >> shift & (1 << bits) - 1].astype(np.int64) << shift for shift in range(0, 8, bits)]
    table_of_bytes: NDArray[np.uint8] = np.bitwise_or.reduce(parts).astype(np.uint8)
    return table_of_bytes
