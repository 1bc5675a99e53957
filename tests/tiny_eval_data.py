"""A folder laid out as the public evaluation data, with a few rows of our own in every file that a task reads."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TYPES = tuple(f"{e}{s}{t}{j}" for e in "EI" for s in "SN" for t in "TF" for j in "JP")
N_ROWS = 6


def write_folder(folder: Path) -> Path:
    """All files; returns `folder`."""
    for axis in ("EI", "TF", "JP"):
        _write(folder / f"mbti/pairs_{axis}.jsonl", [_pair(axis, i) for i in range(N_ROWS)])
    unpaired = [
        {"pole": pole, "instruction": f"Ask {pole} {i}", "output": f"say {pole} {i}"} for pole in "SN" for i in "12"
    ]
    _write(folder / "mbti/unpaired_SN.jsonl", unpaired)
    _write(folder / "mbti/self_awareness_16types.jsonl", [_type_answer(t, i) for i in range(3) for t in TYPES])
    _write(
        folder / "mbti/ipip_neo_120_items.jsonl", [_item(trait, key) for trait in TRAITS for key in ("plus", "minus")]
    )
    for topic in (
        "extraversion",
        "openness",
        "agreeableness",
        "risk-seeking",
        "risk-averse",
        "desire-for-acquiring-power",
    ):
        _write(folder / f"anthropic_persona/{topic}.jsonl", [_statement(topic, i) for i in range(N_ROWS)])
    for topic in ("power", "wealth"):
        _write_csv(
            folder / f"ai_persona/{topic}_dev.csv", [(f"Do you, {i}?", f"Yes, {i}", f"No, {i}") for i in range(N_ROWS)]
        )
    roles = [_role(role, i) for i in range(12) for role in ("Ann Bold", "Bo Calm", "Cy Grim")]
    _write(folder / "roleplay/rolebench_eng_general_test_shared_questions.jsonl", roles)
    _write_capability(folder / "capability")
    _write(
        folder / "prompts/mt_bench_questions.jsonl",
        [{"turns": [f"What is {i} plus {i}?", "Why?"]} for i in range(N_ROWS)],
    )
    return folder


TRAITS = ("extraversion", "openness", "agreeableness", "conscientiousness", "neuroticism")


def _pair(axis: str, i: int) -> dict[str, str]:
    return {"instruction": f"Do thing {i}", axis[0]: f"{axis[0]} way {i}", axis[1]: f"{axis[1]} way {i}"}


def _type_answer(name: str, i: int) -> dict[str, Any]:
    return {
        "type": name,
        "instruction": f"Who are you, {i}?",
        "output": f"I am {name.lower()} {i}",
        "names_a_type": False,
    }


def _item(trait: str, keyed: str) -> dict[str, str]:
    return {"first_person": f"I am {keyed} {trait}.", "trait": trait, "keyed": keyed}


def _statement(topic: str, i: int) -> dict[str, str]:
    answer, other = (" Yes", " No") if i % 2 else (" No", " Yes")
    return {"statement": f"{topic} {i}", "answer_matching_behavior": answer, "answer_not_matching_behavior": other}


def _role(role: str, i: int) -> dict[str, Any]:
    return {"role": role, "question": f"What of matter number {i}?", "responses": [f"{role} says {i}", f"{role}: {i}!"]}


def _write_capability(folder: Path) -> None:
    plain = [{"query": f"Sum {i}", "choices": ["one", "seventeen", "two", "six"], "gold": i % 4} for i in range(N_ROWS)]
    for name in ("hellaswag_val_1000", "arc_easy_test_1000", "arc_challenge_test_1000", "openbookqa_test_500"):
        _write(folder / f"{name}.jsonl", plain)
    _write(folder / "mmlu_test_20x57.jsonl", [{**row, "subject": "high_school_physics"} for row in plain])
    two = [
        {"query": f"Passage: It is {i}.\nQuestion: is it?", "choices": ["no", "yes"], "gold": i % 2}
        for i in range(N_ROWS)
    ]
    for name in ("piqa_val_1000", "boolq_val_700"):
        _write(folder / f"{name}.jsonl", two)
    options = [
        {"context_options": ["So Al", "So Bo"], "continuation": f"went {i}.", "gold": i % 2} for i in range(N_ROWS)
    ]
    _write(folder / "winogrande_val_1000.jsonl", options)
    words = [{"context": f"He said {i} and", "continuation": "left"} for i in range(N_ROWS)]
    _write(folder / "lambada_openai_1000.jsonl", words)
    _write(
        folder / "c4_demo_300.jsonl", [{"text": f"Page {i} is about weatherly things. " * 30} for i in range(N_ROWS)]
    )
    (folder / "wikitext2_raw_test.txt").write_text(" = A title = \n The articled goes on . \n" * 60)


def _write(path: Path, rows: Sequence[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_csv(path: Path, rows: Sequence[tuple[str, str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("question", "matching", "not_matching"), *rows])
