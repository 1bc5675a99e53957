"""Slow, obvious reference of what masking does to a block of weights, one block and one unit at a time.

Every block is taken apart into numbers, changed, and put together again; arithmetic is exact (fractions). Nothing at
run time imports this: tests hold the NumPy and C kernels equal to it. It shares no code with them.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from fractions import Fraction

__all__ = ["BLOCK_BYTES", "BLOCK_WEIGHTS", "Block", "gate_group", "gate_weight", "pack", "unpack"]

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
BOOKS = {"IQ4_NL": IQ4, "IQ4_XS": IQ4, "MXFP4": E2M1, "NVFP4": E2M1}
BLOCK_WEIGHTS = {"F32": 32, "F16": 32, "BF16": 32, "Q2_K": 256, "Q3_K": 256, "Q4_K": 256, "Q5_K": 256, "Q6_K": 256,
                 "IQ4_XS": 256, "TQ2_0": 256, "NVFP4": 64, "MXFP4": 32,
                 "Q4_0": 32, "Q4_1": 32, "Q5_0": 32, "Q5_1": 32, "Q8_0": 32, "IQ4_NL": 32}  # fmt: skip
BLOCK_BYTES = {"F32": 128, "F16": 64, "BF16": 64, "Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210,
               "IQ4_XS": 136, "TQ2_0": 66, "NVFP4": 36, "MXFP4": 17,
               "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "IQ4_NL": 18}  # fmt: skip
FLOATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
ZERO_CODE = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 0, "Q6_K": 32, "Q3_K": 4, "TQ2_0": 1}
"""The code that stands for 0, where codes are offset; 0 for the others, which have a minimum or a codebook."""
CODE_BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q2_K": 2, "Q3_K": 3, "Q4_K": 4, "Q5_K": 5, "Q6_K": 6}
LARGEST_CODE: dict[str, int] = {name: 2**bits - 1 for name, bits in CODE_BITS.items()} | {"TQ2_0": 2}
SCALE_RANGE = {"Q2_K": (0, 15), "Q3_K": (-32, 31), "Q4_K": (0, 63), "Q5_K": (0, 63), "Q6_K": (-128, 127),
               "IQ4_XS": (-32, 31)}  # fmt: skip


@dataclass
class Block:
    """A block taken apart. fp16 numbers are their 16 bits, integer scales their values.

    For F32, F16 and BF16 (32 weights make a block here) `codes` are the weights' bits.
    """

    codes: list[int]
    scales: list[int] = field(default_factory=list)
    minima: list[int] = field(default_factory=list)
    super_scale: int | None = None
    super_minimum: int | None = None


def gate_group(name: str, raw: bytes, group: int, gate: float) -> bytes:
    """The block `raw` with its `group`-th 32 weights multiplied by `gate`, as far as scales allow."""
    block = unpack(name, raw)
    if name in FLOATS:
        block.codes = [_times_float(bits, gate, FLOATS[name]) for bits in block.codes]
        return pack(name, block)
    if name in ("MXFP4", "TQ2_0"):
        return pack(name, block) if gate == 1 else pack(name, _gate_codes(name, block, group, gate))
    width = len(block.codes) // len(block.scales)
    for s in range(len(block.scales)):
        if s * width // 32 != group:
            continue
        for numbers in (block.scales, block.minima):
            if numbers:
                numbers[s] = _times_scale(name, numbers[s], gate)
    return pack(name, block)


def _gate_codes(name: str, block: Block, group: int, gate: float) -> Block:
    """Groups without a scale to multiply; see group_codes.py for the rule."""
    rest = Fraction(gate)
    if name == "MXFP4" and gate != 0:
        shift = next(k for k in range(-200, 200) if abs(rest) <= Fraction(5, 4) * Fraction(2) ** k)
        exponent = max(0, min(254, block.scales[0] + shift))
        rest *= Fraction(2) ** (block.scales[0] - exponent)
        block.scales[0] = exponent
    for j in range(32 * group, 32 * group + 32):
        block.codes[j] = _nearest_code(name, rest * _code_value(name, block.codes[j]))
    return block


def _nearest_code(name: str, wanted: Fraction) -> int:
    """The code nearest to a number in units of the scale; among equals the first of a codebook, else the even one."""
    if name in BOOKS:
        return min(range(16), key=lambda code: abs(BOOKS[name][code] - wanted))
    if name == "Q8_0":
        return max(-128, min(127, round(wanted))) & 0xFF
    nearest: int = round(wanted) + ZERO_CODE.get(name, 0)
    return max(0, min(LARGEST_CODE[name], nearest))


def gate_weight(name: str, raw: bytes, weight: int, gate: float) -> bytes:
    """The block `raw` with one weight at the code that is nearest to `gate` times its value."""
    block = unpack(name, raw)
    if name in FLOATS:
        block.codes[weight] = _times_float(block.codes[weight], gate, FLOATS[name])
        return pack(name, block)
    s = weight * len(block.scales) // len(block.codes)
    scale = _value(name, block.scales[s], block.super_scale)
    minimum = _value(name, block.minima[s], block.super_minimum) if block.minima else Fraction(0)
    if gate == 1 or scale is None or scale == 0 or minimum is None:
        return raw
    if "_K" in name:
        minimum = -minimum
    wanted = Fraction(gate) * (scale * _code_value(name, block.codes[weight]) + minimum) - minimum
    block.codes[weight] = _nearest_code(name, wanted / scale)
    return pack(name, block)


def _code_value(name: str, code: int) -> int:
    if name in BOOKS:
        return BOOKS[name][code]
    return (code ^ 0x80) - 0x80 if name == "Q8_0" else code - ZERO_CODE.get(name, 0)


def _value(name: str, number: int, factor: int | None) -> Fraction | None:
    """What a scale or minimum stands for; None when it is not finite."""
    if name in ("MXFP4", "NVFP4"):
        return Fraction(2) ** (number - 128) if name == "MXFP4" else _ue4m3(number)
    values = [_decode(number, "f16") if name not in SCALE_RANGE else float(number)]
    values += [] if factor is None else [_decode(factor, "f16")]
    return math.prod(map(Fraction, values), start=Fraction(1)) if all(map(math.isfinite, values)) else None


def _times_scale(name: str, number: int, gate: float) -> int:
    if name == "NVFP4":
        wanted = Fraction(gate) * _ue4m3(number)
        return number if gate == 1 else min(range(0x7F), key=lambda byte: (abs(_ue4m3(byte) - wanted), byte % 2))
    if name not in SCALE_RANGE:
        return _times_float(number, gate, "f16")
    low, high = SCALE_RANGE[name]
    return number if gate == 1 else max(low, min(high, round(Fraction(gate) * number)))


def _ue4m3(byte: int) -> Fraction:
    """Half of an unsigned float of four bits of exponent and three of fraction. GGML reads the one NaN as zero."""
    exponent, fraction = byte >> 3 & 15, byte & 7
    if byte == 0x7F:
        return Fraction(0)
    return Fraction(fraction, 1024) if exponent == 0 else Fraction(8 + fraction, 16) * Fraction(2) ** (exponent - 7)


def _decode(bits: int, kind: str) -> float:
    if kind == "f16":
        return float(struct.unpack("<e", struct.pack("<H", bits))[0])
    return float(struct.unpack("<f", struct.pack("<I", bits << 16 if kind == "bf16" else bits))[0])


_LARGEST = {"f16": 0x7BFF, "bf16": 0x7F7F, "f32": 0x7F7FFFFF}
_SIGN = {"f16": 1 << 15, "bf16": 1 << 15, "f32": 1 << 31}


def _times_float(bits: int, gate: float, kind: str) -> int:
    """Nearest float to gate times this one: among all finite ones, found by bisection over their bits."""
    value = _decode(bits, kind)
    if gate == 1 or (math.isnan(value) and gate != 0):
        return bits
    if gate == 0:
        return 0
    sign = (bits & _SIGN[kind]) ^ (_SIGN[kind] if gate < 0 else 0)
    if math.isinf(value):
        return sign | (bits & ~_SIGN[kind])
    wanted = abs(Fraction(value) * Fraction(gate))
    low, high = 0, _LARGEST[kind]  # magnitudes grow with their bits
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if Fraction(_decode(middle, kind)) <= wanted else (low, middle)
    down, up = wanted - Fraction(_decode(low, kind)), Fraction(_decode(high, kind)) - wanted
    return sign | (low if down < up or (down == up and low % 2 == 0) else high)


# ---- blocks apart and together, after the struct definitions of GGML ----


def unpack(name: str, raw: bytes) -> Block:
    """The numbers of a block."""
    if name in FLOATS:
        return Block(list(struct.unpack("<32I" if name == "F32" else "<32H", raw)))
    if name == "Q6_K":
        return _unpack_q6_k(raw)
    if name in ("Q2_K", "Q3_K"):
        return _unpack_q2_k(raw) if name == "Q2_K" else _unpack_q3_k(raw)
    if name in ("Q4_K", "Q5_K"):
        return _unpack_q4_k(name, raw)
    if name == "IQ4_XS":
        return _unpack_iq4_xs(raw)
    if name in ("MXFP4", "NVFP4", "TQ2_0"):
        return _unpack_fp4(name, raw) if name != "TQ2_0" else Block(_crumbs(raw), [int.from_bytes(raw[64:], "little")])
    (scale,) = struct.unpack_from("<H", raw)
    minima = list(struct.unpack_from("<H", raw, 2)) if name.endswith("_1") else []
    rest = raw[4 if minima else 2 :]
    if name == "Q8_0":
        return Block(list(rest), [scale])
    high = int.from_bytes(rest[:4], "little") if name.startswith("Q5") else 0
    nibbles = rest[-16:]
    codes = [nibbles[j] & 15 for j in range(16)] + [nibbles[j] >> 4 for j in range(16)]
    return Block([code | (high >> j & 1) << 4 for j, code in enumerate(codes)], [scale], minima)


def pack(name: str, block: Block) -> bytes:
    """The bytes of a block."""
    if name in FLOATS:
        return struct.pack("<32I" if name == "F32" else "<32H", *block.codes)
    if name == "Q6_K":
        return _pack_q6_k(block)
    if name in ("Q2_K", "Q3_K"):
        return _pack_q2_k(block) if name == "Q2_K" else _pack_q3_k(block)
    if name in ("Q4_K", "Q5_K"):
        return _pack_q4_k(name, block)
    if name == "IQ4_XS":
        return _pack_iq4_xs(block)
    if name in ("MXFP4", "NVFP4"):
        return _pack_fp4(name, block)
    if name == "TQ2_0":
        return _pack_crumbs(block.codes) + struct.pack("<H", block.scales[0])
    head = struct.pack(f"<{1 + len(block.minima)}H", *block.scales, *block.minima)
    if name == "Q8_0":
        return head + bytes(block.codes)
    if name.startswith("Q5"):
        head += sum((code >> 4) << j for j, code in enumerate(block.codes)).to_bytes(4, "little")
    return head + bytes((block.codes[j] & 15) | (block.codes[j + 16] & 15) << 4 for j in range(16))


def _unpack_q4_k(name: str, raw: bytes) -> Block:
    d, dmin = struct.unpack_from("<2H", raw)
    q = raw[4:16]
    scales = [q[j] & 63 for j in range(4)] + [(q[j + 4] & 15) | (q[j - 4] >> 6) << 4 for j in range(4, 8)]
    minima = [q[j + 4] & 63 for j in range(4)] + [q[j + 4] >> 4 | (q[j] >> 6) << 4 for j in range(4, 8)]
    nibbles = raw[-128:]
    codes = []
    for group in range(8):
        for j in range(32):
            byte = nibbles[group // 2 * 32 + j]
            low = byte >> 4 if group % 2 else byte & 15
            codes.append(low | (raw[16 + j] >> group & 1) << 4 if name == "Q5_K" else low)
    return Block(codes, scales, minima, d, dmin)


def _pack_q4_k(name: str, block: Block) -> bytes:
    q = bytearray(12)
    for j in range(4):
        q[j] = block.scales[j] | (block.scales[j + 4] >> 4) << 6
        q[j + 4] = block.minima[j] | (block.minima[j + 4] >> 4) << 6
        q[j + 8] = (block.scales[j + 4] & 15) | (block.minima[j + 4] & 15) << 4
    high, nibbles = bytearray(32), bytearray(128)
    for i, code in enumerate(block.codes):
        group, j = divmod(i, 32)
        nibbles[group // 2 * 32 + j] |= (code & 15) << group % 2 * 4
        high[j] |= (code >> 4) << group
    middle = bytes(high) if name == "Q5_K" else b""
    return struct.pack("<2H", block.super_scale, block.super_minimum) + bytes(q) + middle + bytes(nibbles)


def _crumbs(raw: bytes) -> list[int]:
    """256 two-bit numbers from 64 bytes: each half of the bytes holds four rows of 32."""
    return [raw[half * 32 + j] >> 2 * row & 3 for half in range(2) for row in range(4) for j in range(32)]


def _pack_crumbs(crumbs: list[int]) -> bytes:
    raw = bytearray(64)
    for i, crumb in enumerate(crumbs):
        half, row, j = i // 128, i % 128 // 32, i % 32
        raw[half * 32 + j] |= crumb << 2 * row
    return bytes(raw)


def _unpack_q2_k(raw: bytes) -> Block:
    d, dmin = struct.unpack_from("<2H", raw, 80)
    return Block(_crumbs(raw[16:80]), [b & 15 for b in raw[:16]], [b >> 4 for b in raw[:16]], d, dmin)


def _pack_q2_k(block: Block) -> bytes:
    scales = bytes(s | m << 4 for s, m in zip(block.scales, block.minima, strict=True))
    return scales + _pack_crumbs(block.codes) + struct.pack("<2H", block.super_scale, block.super_minimum)


def _unpack_q3_k(raw: bytes) -> Block:
    third = [raw[j] >> row & 1 for row in range(8) for j in range(32)]
    q = raw[96:108]
    scales = [(q[s % 8] >> s // 8 * 4 & 15 | (q[8 + s % 4] >> s // 4 * 2 & 3) << 4) - 32 for s in range(16)]
    codes = [low | high << 2 for low, high in zip(_crumbs(raw[32:96]), third, strict=True)]
    return Block(codes, scales, [], int.from_bytes(raw[108:], "little"))


def _pack_q3_k(block: Block) -> bytes:
    mask, q = bytearray(32), bytearray(12)
    for i, code in enumerate(block.codes):
        mask[i % 32] |= (code >> 2) << i // 32
    for s, scale in enumerate(block.scales):
        q[s % 8] |= (scale + 32 & 15) << s // 8 * 4
        q[8 + s % 4] |= (scale + 32 >> 4) << s // 4 * 2
    return bytes(mask) + _pack_crumbs([c & 3 for c in block.codes]) + bytes(q) + struct.pack("<H", block.super_scale)


def _unpack_q6_k(raw: bytes) -> Block:
    codes = []
    for i, high in enumerate(_crumbs(raw[128:192])):
        half, within = divmod(i, 128)
        byte = raw[half * 64 + within % 64]
        codes.append((byte >> 4 if within >= 64 else byte & 15) | high << 4)
    return Block(codes, list(struct.unpack_from("<16b", raw, 192)), [], int.from_bytes(raw[208:], "little"))


def _pack_q6_k(block: Block) -> bytes:
    low = bytearray(128)
    for i, code in enumerate(block.codes):
        half, within = divmod(i, 128)
        low[half * 64 + within % 64] |= (code & 15) << within // 64 * 4
    high = _pack_crumbs([code >> 4 for code in block.codes])
    return bytes(low) + high + struct.pack("<16bH", *block.scales, block.super_scale)


def _unpack_iq4_xs(raw: bytes) -> Block:
    d, high = struct.unpack_from("<2H", raw)
    scales = [(raw[4 + g // 2] >> g % 2 * 4 & 15 | (high >> 2 * g & 3) << 4) - 32 for g in range(8)]
    codes = []
    for group in range(8):
        nibbles = raw[8 + group * 16 : 24 + group * 16]
        codes += [b & 15 for b in nibbles] + [b >> 4 for b in nibbles]
    return Block(codes, scales, [], d)


def _pack_iq4_xs(block: Block) -> bytes:
    high = sum((scale + 32 >> 4) << 2 * g for g, scale in enumerate(block.scales))
    low = [scale + 32 & 15 for scale in block.scales]
    head = struct.pack("<2H", block.super_scale, high) + bytes(low[g] | low[g + 1] << 4 for g in range(0, 8, 2))
    groups = [block.codes[g * 32 : g * 32 + 32] for g in range(8)]
    return head + bytes(codes[j] | codes[j + 16] << 4 for codes in groups for j in range(16))


def _unpack_fp4(name: str, raw: bytes) -> Block:
    n_scales, half = (1, 16) if name == "MXFP4" else (4, 8)
    codes = []
    for start in range(n_scales, len(raw), half):
        codes += [b & 15 for b in raw[start : start + half]] + [b >> 4 for b in raw[start : start + half]]
    return Block(codes, list(raw[:n_scales]))


def _pack_fp4(name: str, block: Block) -> bytes:
    half = 16 if name == "MXFP4" else 8
    parts = [block.codes[start : start + 2 * half] for start in range(0, len(block.codes), 2 * half)]
    return bytes(block.scales) + bytes(part[j] | part[j + half] << 4 for part in parts for j in range(half))
