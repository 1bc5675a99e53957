"""The number formats that scales, minima and weights are stored in, and what multiplying such a number by a gate means.

A number is handled as its raw little-endian bytes, whatever the machine's byte order. Scaling follows one rule for all:

- gate 1 leaves every bit alone, gate 0 gives +0, also where the number is NaN or infinite;
- floats (F16, BF16, F32): the product is exact, then rounded once, to nearest, ties to even; a finite number that would
  overflow becomes the largest finite one; NaN stays as it is and an infinity only takes the gate's sign;
- integers: rounded to nearest, ties to even, and saturated at the ends of the format's range;
- UE4M3, the unsigned 8-bit floats of NVFP4: as integers, between 0 and 448; what they hold instead of NaN counts as 0.

E8M0, the powers of two of MXFP4, are read here and never scaled alone: zero is not among them (see group_codes.py).

So a soft gate on a 6-bit scale of 5 can only land on a multiple of a fifth: gate 0.5 gives 2 (2.5 rounds to even).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

__all__ = ["BF16", "E8M0", "F16", "F32", "UE4M3", "NumberFormat", "NumberKind", "integer"]


class NumberKind(IntEnum):
    """How the bytes of a number are read. The values are shared with the C kernels."""

    INTEGER = 0
    F16 = 1
    BF16 = 2
    F32 = 3
    UE4M3 = 4
    E8M0 = 5


_N_BYTES = {NumberKind.F16: 2, NumberKind.BF16: 2, NumberKind.F32: 4}
_LAST_UE4M3 = 0x7E  # 448; the code after it is no number


def _ue4m3_values() -> NDArray[np.float32]:
    """What each byte stands for: four bits of exponent, three of fraction, halved because E2M1 codes are doubled."""
    byte = np.arange(256)
    exponent, fraction = byte >> 3 & 15, byte & 7
    values = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10.0)) / 2
    return np.where(byte == _LAST_UE4M3 + 1, 0, values).astype(np.float32)


_UE4M3_VALUES = _ue4m3_values()
_E8M0_VALUES = (2.0 ** (np.arange(256) - 128.0)).astype(np.float32)  # halved likewise; 0 and 1 are denormal


@dataclass(frozen=True)
class NumberFormat:
    """One number format. An INTEGER byte `b` stands for `(b ^ flip) - zero`, with `b ^ flip` in [0, max]."""

    kind: NumberKind
    flip: int = 0
    zero: int = 0
    max: int = 0

    @property
    def n_bytes(self) -> int:
        """Bytes that one number takes in a field."""
        return _N_BYTES.get(self.kind, 1)

    @property
    def is_signed(self) -> bool:
        """Whether a negative gate has a meaning."""
        return self.n_bytes > 1 or self.zero > 0

    def to_float32(self, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The values of raw numbers: (n, k) uint8 bytes to (n, k // n_bytes) float32, exactly."""
        raw = np.ascontiguousarray(raw)
        if self.kind in (NumberKind.UE4M3, NumberKind.E8M0):
            values: NDArray[np.float32] = (_UE4M3_VALUES if self.kind is NumberKind.UE4M3 else _E8M0_VALUES)[raw]
            return values
        with np.errstate(invalid="ignore"):
            if self.kind is NumberKind.F16:
                return raw.view("<f2").astype(np.float32)
            if self.kind is NumberKind.BF16:
                return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
            if self.kind is NumberKind.F32:
                return raw.view("<f4").astype(np.float32)
            return (raw ^ np.uint8(self.flip)).astype(np.float32) - np.float32(self.zero)

    def scale(self, raw: NDArray[np.uint8], gates: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Raw numbers (n, k) uint8 times `gates` (n,) float32, finite; same shape out. Pure."""
        if self.kind is NumberKind.INTEGER:
            return self._scale_integers(raw, gates)
        if self.kind is NumberKind.UE4M3:
            return self._scale_ue4m3(raw, gates)
        return self._scale_floats(raw, gates)

    def nearest_code(self, values: NDArray[np.float64]) -> NDArray[np.uint8]:
        """The integers nearest to `values`, as raw bytes; ties to even, saturated."""
        codes = np.clip(np.rint(values) + self.zero, 0, self.max).astype(np.uint8)
        raw: NDArray[np.uint8] = codes ^ np.uint8(self.flip)
        return raw

    def _scale_integers(self, raw: NDArray[np.uint8], gates: NDArray[np.float32]) -> NDArray[np.uint8]:
        gate = gates.astype(np.float64)[:, None]
        return np.where(gate == 1, raw, self.nearest_code(self.to_float32(raw).astype(np.float64) * gate))

    def _scale_ue4m3(self, raw: NDArray[np.uint8], gates: NDArray[np.float32]) -> NDArray[np.uint8]:
        gate = gates.astype(np.float64)[:, None]
        values = _UE4M3_VALUES[: _LAST_UE4M3 + 1].astype(np.float64)
        halfway = (values[1:] + values[:-1]) / 2
        wanted = self.to_float32(raw).astype(np.float64) * gate
        below = np.searchsorted(halfway, wanted)  # at a tie, the lower one
        is_tie = halfway[np.minimum(below, len(halfway) - 1)] == wanted
        return np.where(gate == 1, raw, below + (is_tie & (below % 2 == 1))).astype(np.uint8)

    def _scale_floats(self, raw: NDArray[np.uint8], gates: NDArray[np.float32]) -> NDArray[np.uint8]:
        unsigned = np.dtype(f"<u{self.n_bytes}")
        bits = np.ascontiguousarray(raw).view(unsigned)
        gate = gates.astype(np.float64)[:, None]
        with np.errstate(all="ignore"):
            value = self.to_float32(raw).astype(np.float64)
            scaled = self._encode(value * gate).astype(unsigned)
        sign = unsigned.type(1 << (8 * self.n_bytes - 1))
        scaled = np.where(np.isinf(value), np.where(gate < 0, bits ^ sign, bits), scaled)
        scaled = np.where(np.isnan(value) | (gate == 1), bits, scaled)
        return np.where(gate == 0, unsigned.type(0), scaled).astype(unsigned).view(np.uint8)

    def _encode(self, values: NDArray[np.float64]) -> NDArray[np.unsignedinteger]:
        """Bits of `values`, rounded once; clipping to the largest finite number before rounding is what saturates."""
        if self.kind is NumberKind.F16:
            limit = float(np.finfo(np.float16).max)
            return np.clip(values, -limit, limit).astype(np.float16).view(np.uint16)
        if self.kind is NumberKind.F32:
            limit = float(np.finfo(np.float32).max)
            return np.clip(values, -limit, limit).astype(np.float32).view(np.uint32)
        limit = 255 * 2.0**120
        values = np.clip(values, -limit, limit)
        exponent = np.maximum(np.frexp(values)[1] - 1, -126) - 7  # of the last bit that BF16 keeps
        rounded = np.ldexp(np.rint(np.ldexp(values, -exponent)), exponent)
        bits: NDArray[np.uint32] = rounded.astype(np.float32).view(np.uint32)
        return (bits >> np.uint32(16)).astype(np.uint16)


def integer(maximum: int, *, zero: int = 0, flip: int = 0) -> NumberFormat:
    """A one-byte integer format; see NumberFormat."""
    return NumberFormat(NumberKind.INTEGER, flip, zero, maximum)


F16 = NumberFormat(NumberKind.F16)
BF16 = NumberFormat(NumberKind.BF16)
F32 = NumberFormat(NumberKind.F32)
UE4M3 = NumberFormat(NumberKind.UE4M3)
E8M0 = NumberFormat(NumberKind.E8M0)
