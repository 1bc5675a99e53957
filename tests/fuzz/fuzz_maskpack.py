"""Fuzz target: whatever the bytes, reading a pack succeeds or raises PackError.

With atheris: `python tests/fuzz/fuzz_maskpack.py CORPUS_FOLDER`. Without it: mutates the golden packs N times
(`python tests/fuzz/fuzz_maskpack.py 100000`), half of the time with every checksum put right again.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import random
import struct
import sys
from pathlib import Path

from persona_edge.errors import PackError
from persona_edge.maskpack import PREAMBLE_SIZE, MaskPack

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.maskpack"))


def fuzz(data: bytes) -> bool:
    """Whether `data` is a pack; any exception but PackError is a finding."""
    try:
        MaskPack.from_bytes(data).load()
    except PackError:
        return False
    return True


def resealed(data: bytes) -> bytes:
    """`data` with the checksums that it should have, so that what lies behind them is reached."""
    try:
        (size,) = struct.unpack_from("<I", data, 12)
        header = json.loads(data[PREAMBLE_SIZE : PREAMBLE_SIZE + size])
        sections = data[PREAMBLE_SIZE + size :]
        for section in header["sections"]:
            part = sections[section["offset"] : section["offset"] + section["length"]]
            section["sha256"] = hashlib.sha256(part).hexdigest()
        spelled = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    except (ValueError, LookupError, TypeError, struct.error):
        return data
    return data[:12] + struct.pack("<I", len(spelled)) + hashlib.sha256(spelled).digest() + spelled + sections


def mutated(data: bytes, rng: random.Random) -> bytes:
    """`data` with up to four bytes changed, removed, inserted or copied elsewhere, and perhaps resealed."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(len(changed)), rng.choice([0, 1, 1, 1, 2, 4])
        source = rng.randrange(len(changed))
        insert = rng.choice([b"", rng.randbytes(size), bytes(changed[source : source + size])])
        changed[at : at + size] = insert
    return resealed(bytes(changed)) if rng.random() < 0.5 else bytes(changed)


def main() -> None:
    """Run under atheris where it is installed, otherwise the plain mutator."""
    if importlib.util.find_spec("atheris"):
        atheris = importlib.import_module("atheris")
        atheris.instrument_all()
        atheris.Setup(sys.argv, fuzz)
        atheris.Fuzz()
    packs, rng = [path.read_bytes() for path in GOLDEN], random.Random(0)
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    n_valid = sum(fuzz(mutated(packs[i % len(packs)], rng)) for i in range(n))
    print(f"{n_valid} of {n} mutated packs are valid, no unexpected error")


if __name__ == "__main__":
    main()
