"""The benchmark of pages: every arm does everything, and small pages are small."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import pages
from persona_edge.errors import InputError
from persona_edge.maskpack import MaskPack, encode_pack
from persona_edge.masks import PersonaSet


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it measures Linux's pages")
def test_every_arm_opens_decodes_and_switches(smollm2_path: Path, smollm2_personas: PersonaSet) -> None:
    first, second = (pole.name for pole in smollm2_personas.poles[:2])
    renamed = replace(smollm2_personas, personas={"INFP": (first,), "ENTJ": (second,)})
    pack = MaskPack.from_bytes(encode_pack(renamed)[0])
    result = pages.measure(smollm2_path, pack, n_rounds=2, n_tokens=3, n_threads=1)
    (table,) = result.tables
    assert [row[0].split(": ")[1] for row in table.rows] == [pages.HUGE, pages.SMALL, pages.MAPPED] * 5
    assert all(float(row[1]) > 0 for row in table.rows)
    assert all(re.fullmatch(r"1|\d+\.\d\d( \(.*\))?", row[3]) for row in table.rows)


def test_elsewhere_than_on_linux_it_is_refused(monkeypatch: pytest.MonkeyPatch, smollm2_pack: Path) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(InputError, match="Linux"):
        pages.measure(Path("model.gguf"), MaskPack.open(smollm2_pack))
