"""The bits of a pack's section as docs/pack-format.md tells them, read one at a time."""

from __future__ import annotations


class SlowReader:
    """What a specification says and nothing clever: the lowest bit of a byte comes first, `at` is the next bit."""

    def __init__(self, data: bytes) -> None:
        self.bits = [byte >> i & 1 for byte in data for i in range(8)]
        self.at = 0

    def field(self, width: int) -> int:
        """A number of `width` bits, the lowest first."""
        value = sum(self.bits[self.at + i] << i for i in range(width))
        self.at += width
        return value

    def unary(self) -> int:
        """How many zeros come before the next one."""
        zeros = 0
        while not self.field(1):
            zeros += 1
        return zeros

    def align(self) -> None:
        """On to the next whole byte; what is passed over is zeros."""
        while self.at % 8:
            assert self.field(1) == 0
