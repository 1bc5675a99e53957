"""Intervals, tables, Markdown, HTML and the plot, from a record whose numbers are known."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from persona_edge.conditions import conditions
from persona_edge.effect.interfaces import CHAT_KL, SHARE, TOWARD_POLE, EngineName, Items
from persona_edge.effect.intervals import estimate, oriented, paired_difference
from persona_edge.effect.plots import effect_plot
from persona_edge.effect.record import ArmRecord, Axis, Outcome, Record, from_json, to_json
from persona_edge.effect.report_html import html
from persona_edge.effect.report_markdown import markdown
from persona_edge.effect.reports import report_path, write_reports
from persona_edge.effect.tables import (
    Table,
    facts_table,
    overview_tables,
    persona_tables,
    problems,
    side_effect_tables,
    standing_tables,
)

EI = Axis("EI", "E", "I")
NASTY = "<script>alert('|')</script> & *bold* | `code`"
HigherIs = Literal["positive", "better", "worse", "neutral"]


def items(
    values: Sequence[float] | NDArray[np.float64],
    unit: str = SHARE,
    higher_is: HigherIs = "positive",
    name: str = TOWARD_POLE,
) -> Items:
    return Items(name, np.array(values, dtype=np.float64), unit, higher_is)


def share(n_won: int, n: int = 20) -> Items:
    return items([1.0] * n_won + [0.0] * (n - n_won))


def arm(name: str, pole: str | None, n_won: int, kl: float, engine: EngineName = "pytorch") -> ArmRecord:
    toward = {"E": 1, "I": -1}.get(pole or "", 0)
    margin = items(np.linspace(-1, 1, 20) + n_won / 20, "nats per token", name="margin")
    ratio = items([np.log(1 + kl)] * 8, "nats per token", "worse", "log perplexity ratio to base")
    outcomes = (
        Outcome("held-out contrasts: EI", "persona", "EI", toward, (share(n_won), margin)),
        Outcome("pairs EI (other author)", "persona", "EI", toward, (share(max(0, n_won - 2)),)),
        Outcome("wikitext-2", "side effect", None, 0, (ratio,)),
        Outcome("chat KL", "side effect", None, 0, (items([kl, 2 * kl, 0.0], "nats per token", "worse", CHAT_KL),)),
        Outcome("hellaswag", "side effect", None, 0, (items([1, 0, 1, 1], higher_is="better", name="acc"),)),
        Outcome("replies", "replies", None, 0, (), {"Who are you?": f"I am {name} {pole}.", NASTY: NASTY}),
    )
    facts = {} if pole is None else {"artefact_bytes": 12345.0, "strength": 0.0125, "seconds_to_make": 3.0}
    return ArmRecord(engine, name, pole, facts, outcomes)


@pytest.fixture
def record() -> Record:
    arms = (
        arm("base", None, 10, 0.0),
        arm("system-prompt", "E", 12, 0.02),
        arm("system-prompt", "I", 9, 0.03),
        arm("contrastive-fisher", "E", 18, 0.1),
        arm("contrastive-fisher", "I", 1, 0.15),
        arm("base", None, 11, 0.0, "runtime"),
        arm("contrastive-fisher", "E", 20, 0.1, "runtime"),
        ArmRecord("pytorch", "lora-sft", "E", error="peft is not installed"),
    )
    settings: dict[str, object] = {"items per task, at most": 20, "pack": None, "sets": {"EI": "own, SHA-256 f1"}}
    return Record("tiny_model", "f00", (EI,), arms, settings, conditions(["persona-edge", "eval"]), ("no data",))


def cells(table: Table, row: str) -> tuple[str, ...]:
    return next(cells for cells in table.rows if cells[0] == row)


# Intervals


def test_the_interval_of_a_mean_is_that_of_theory() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    found = estimate(items(values, "nats"))
    assert found is not None
    error = values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    assert estimate(items(values, "nats")) == found
    assert estimate(items(values, "nats"), seed=1) != found


def test_intervals_hold_the_truth_nineteen_times_in_twenty() -> None:
    random = np.random.default_rng(2)
    held = 0
    for _ in range(300):
        found = estimate(items((random.random(100) < 0.7).astype(float)))
        assert found is not None
        held += found.low <= 0.7 <= found.high
    assert 0.90 <= held / 300 <= 0.99


@pytest.mark.parametrize(("won", "low", "high"), [(1.0, 0.025**0.05, 1.0), (0.0, 0.0, 1 - 0.025**0.05)])
def test_a_share_of_all_or_nothing_is_not_certain(won: float, low: float, high: float) -> None:
    found = estimate(items([won] * 20))
    assert found is not None
    assert [found.low, found.high] == pytest.approx([low, high])
    drift = estimate(items([0.0] * 20, "nats per token", "worse"))
    assert drift is not None
    assert (drift.low, drift.high) == (0, 0)


def test_items_that_could_not_be_measured_do_not_count() -> None:
    found = estimate(items([np.nan, 1, 3], "nats"))
    assert found is not None
    assert (found.mean, found.n_items) == (2, 2)
    assert estimate(items([np.nan])) is None
    assert estimate(items([])) is None


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30))
def test_a_pair_differs_by_what_was_added(values: list[float]) -> None:
    found = paired_difference(items(np.array(values) + 0.5, "nats"), items(values, "nats"))
    assert found is not None
    assert [found.low, found.mean, found.high] == pytest.approx([0.5] * 3)
    assert found.excludes_zero
    assert paired_difference(items(values, "nats"), items([*values, 1.0], "nats")) is None


def test_the_other_pole_sees_the_mirror_image() -> None:
    assert oriented(share(15), -1).mean() == pytest.approx(0.25)
    assert oriented(items([0.7], "AUC"), -1)[0] == pytest.approx(0.3)
    assert oriented(items([4.0], "points 1-5"), -1)[0] == pytest.approx(2.0)
    assert oriented(items([0.7], "nats"), -1)[0] == -0.7
    assert oriented(items([0.7], higher_is="better"), -1)[0] == 0.7
    assert oriented(items([0.7]), 1)[0] == 0.7


# Tables


def test_the_overview_shows_effect_and_cost_of_every_arm(record: Record) -> None:
    pytorch, runtime = overview_tables(record)
    assert [row[0] for row in pytorch.rows] == [
        *(
            "E: base",
            "E: system-prompt",
            "E: contrastive-fisher",
            "I: base",
            "I: system-prompt",
            "I: contrastive-fisher",
        )
    ]
    _label, own, other, kl, ratio, size = cells(pytorch, "E: contrastive-fisher")
    assert own.startswith("90.0 [")
    assert own.endswith("] +40.0*")
    assert other.startswith("80.0 [")
    assert kl.startswith("0.100 [0.000, 0.200]")
    assert ratio == "1.100 [1.100, 1.100]"
    assert size == "12,345"
    assert cells(pytorch, "I: contrastive-fisher")[1].startswith("95.0 [")
    assert cells(pytorch, "I: base")[1].startswith("50.0 [")
    assert cells(runtime, "E: contrastive-fisher")[1] == "100.0 [83.2, 100.0] +45.0*"


def test_persona_tables_speak_in_terms_of_the_pole(record: Record) -> None:
    for_e, for_i, *_ = persona_tables(record)
    assert for_e.headers == (
        "arm",
        "held-out contrasts: EI: E likelier (%)",
        "pairs EI (other author): E likelier (%)",
        "held-out contrasts: EI: margin (nats per token)",
    )
    assert for_i.caption == "Engine pytorch, axis EI, toward I"
    assert cells(for_e, "contrastive-fisher")[3].endswith(" +0.400*")
    assert cells(for_i, "contrastive-fisher")[3].endswith(" +0.450*")


def test_side_effects_have_one_row_per_arm(record: Record) -> None:
    pytorch, runtime = side_effect_tables(record)
    assert pytorch.headers[1:] == (
        "wikitext-2: perplexity ratio to base",
        "chat KL (nats per token)",
        "hellaswag: acc (%)",
    )
    assert [row[0] for row in runtime.rows] == ["base", "E: contrastive-fisher"]
    assert cells(pytorch, "I: system-prompt")[3].endswith("] +0.0")


def test_the_default_method_stands_against_every_arm(record: Record) -> None:
    for_e, for_i, _ = standing_tables(record)
    assert cells(for_e, "system-prompt") == ("system-prompt", "+30.0*", "+30.0*", "2 of 2 (2 clearly, 0 clearly lower)")
    assert cells(for_i, "base")[1] == "+45.0*"
    reversed_view = next(standing_tables(record, "system-prompt"))
    assert cells(reversed_view, "contrastive-fisher")[3] == "0 of 2 (0 clearly, 2 clearly lower)"


def test_base_alone_is_shown_as_the_positive_pole_sees_it(record: Record) -> None:
    (table,) = overview_tables(replace(record, arms=record.arms[:1]))
    assert [row[:2] for row in table.rows] == [("E: base", "50.0 [30.0, 70.0]")]
    only_i = [arm for arm in record.arms if arm.pole != "E" and arm.engine == "pytorch"]
    (table,) = overview_tables(replace(record, arms=tuple(only_i)))
    assert [row[0] for row in table.rows] == ["I: base", "I: system-prompt", "I: contrastive-fisher"]


def test_facts_and_problems(record: Record) -> None:
    table = facts_table(record)
    assert table.headers == ("arm", "artefact bytes", "strength", "seconds to make")
    assert table.rows[0] == ("E: system-prompt", "12,345", "0.0125", "3")
    failed = replace(record.arms[0], outcomes=(Outcome("mmlu", "side effect", None, 0, error="no such file"),))
    lines = problems(replace(record, arms=(failed, *record.arms[1:])))
    assert lines == ("no data", "base (pytorch), mmlu: no such file", "E: lora-sft (pytorch): peft is not installed")


# Pages


class Checker(HTMLParser):
    """Every tag that is opened is closed, and no script is among them."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_one_sound_file_without_scripts(record: Record) -> None:
    page = html(record, plot=effect_plot(record))
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert {"svg", "table", "caption"} <= checker.seen
    assert "script" not in checker.seen
    assert not re.search(r"""(src|href)=["'](?!#)|@import|url\((?!#)""", page)  # nothing is fetched from anywhere
    assert "&lt;script&gt;" in page
    for text in ("I am contrastive-fisher I.", "90.0 [", "peft is not installed", "persona-edge eval", "no data"):
        assert text in page


def test_markdown_tables_have_as_many_cells_as_headers(record: Record) -> None:
    page = markdown(record, picture="effect.svg")
    n_cells = None
    for line in page.splitlines():
        found = line.replace("\\|", "").count("|") if line.startswith("|") else None
        assert n_cells is None or found is None or found == n_cells, line
        n_cells = found
    assert "![Effect against side effect](effect.svg)" in page
    assert "\\<script\\>" in page
    assert "- sets: own, SHA-256 f1" in page
    assert "- pack:" not in page
    assert "<script>" not in page
    assert "| contrastive-fisher | 90.0 [" in page


def test_the_plot_is_svg_and_always_the_same(record: Record) -> None:
    plot = effect_plot(record)
    assert plot is not None
    texts = [element.text for element in ET.fromstring(plot).iter("{http://www.w3.org/2000/svg}text")]
    assert {"base", "system-prompt", "contrastive-fisher"} <= set(texts)
    assert any("EI on runtime" in (text or "") for text in texts)
    assert effect_plot(from_json(to_json(record))) == plot
    assert effect_plot(replace(record, arms=record.arms[-1:])) is None


def test_reports_of_next_to_nothing() -> None:
    empty = Record("m", "1", (), (), {}, conditions())
    assert markdown(empty).startswith("# Effect: m\n")
    assert "Overview" not in html(empty)


def test_reports_are_written_side_by_side(record: Record, tmp_path: Path) -> None:
    paths = write_reports(record, tmp_path / "effect.v2")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    assert {path.name for path in paths} == {f"effect.v2{suffix}" for suffix in (".json", ".md", ".html", ".svg")}
    back = from_json((tmp_path / "effect.v2.json").read_text(encoding="utf-8"))
    assert html(back, plot=effect_plot(back)) == (tmp_path / "effect.v2.html").read_text(encoding="utf-8")
    assert "(effect.v2.svg)" in (tmp_path / "effect.v2.md").read_text(encoding="utf-8")
    assert report_path(Path("a/effect.json"), ".md") == Path("a/effect.md")
