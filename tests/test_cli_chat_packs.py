"""Which pack `persona-edge chat` takes when none is named, and its failures: one line, before anything is printed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from persona_edge.catalogue import load_catalogue
from persona_edge.errors import PersonaNotFoundError
from persona_edge.find_packs import find_pack, packs_beside, shipped_packs
from persona_edge.maskpack import MaskPack, write_pack
from persona_edge.persona_sets import load_persona_set
from persona_edge.runtime.session import PersonaRuntime
from tests.program import run_chat
from tests.tiny_chat import personas_for, write_model

# Choosing the pack


def test_packs_beside_are_those_of_this_model_newest_first(tmp_path: Path) -> None:
    for name in ("a.gguf", "a.Q4.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    names = ["a.one.maskpack", "a.Q4.two.maskpack", "a.three.maskpack", "b.four.maskpack", "five.maskpack"]
    for age, name in enumerate(names):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, ns=(0, 10**18 - age))
    assert [p.name for p in packs_beside(tmp_path / "a.gguf")] == ["a.one.maskpack", "a.three.maskpack"]
    assert [p.name for p in packs_beside(tmp_path / "a.Q4.gguf")] == ["a.Q4.two.maskpack"]
    assert packs_beside(tmp_path / "c.gguf") == ()


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """A model with three packs: old and new hold INFP, the newest holds only XYZ."""
    model = write_model(tmp_path / "m.gguf")
    personas: dict[str, dict[str, tuple[str, ...]]] = {
        "old": {"INFP": ("I", "N"), "OLD": ("I",)},
        "new": {"INFP": ("I", "N")},
        "newest": {"XYZ": ("E",)},
    }
    for age, (name, held) in enumerate(personas.items()):
        path = tmp_path / f"m.{name}.maskpack"
        write_pack(path, personas_for(model, personas=held))
        os.utime(path, ns=(0, 10**18 + age))
    return model


def test_the_newest_pack_that_holds_all_that_is_wanted_is_taken(several: Path) -> None:
    found = find_pack(several, ["INFP"], "m")
    assert found.path.name == "m.new.maskpack"
    assert found.note == "using m.new.maskpack, the newest of 2 packs with INFP; --pack chooses another"
    assert find_pack(several, ["infp", "OLD"], "m").note is None
    assert find_pack(several, [], "m").path.name == "m.newest.maskpack"
    result = run_chat("--persona", "INFP", "--message", "Hi", model=str(several))
    assert (result.exit_code, result.stderr) == (0, f"{found.note}\n")


def test_a_damaged_pack_is_passed_over_as_long_as_another_serves(several: Path) -> None:
    damaged = several.with_name("m.new.maskpack")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    found = find_pack(several, ["INFP"], "m")
    assert found.path.name == "m.old.maskpack"
    assert found.note is not None
    assert "passed over a damaged pack" in found.note
    assert str(damaged) in found.note


def test_a_pack_that_nobody_asked_for_does_not_keep_the_model_from_talking(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.gguf", seed=1)
    write_pack(tmp_path / "m.mbti.maskpack", personas_for(write_model(tmp_path / "other.gguf", seed=2)))
    result = run_chat(model=str(model), text="Hi\n/persona INFP\n")
    assert result.stdout.endswith("\n")
    assert "m.mbti.maskpack was left out: the pack was made from other weights" in result.stderr
    assert "no persona 'INFP': the pack was made from other weights" in result.stderr
    assert result.exit_code == 2


# Packs that ship

SHIPPED = "SmolLM2-135M-Instruct.Q4_1"


def test_a_pack_that_ships_serves_when_none_beside_the_model_does(tmp_path: Path) -> None:
    model = write_model(tmp_path / f"{SHIPPED}.gguf")
    assert find_pack(model, ["INFP"], "m").path == shipped_packs(model)[0]
    own = tmp_path / f"{SHIPPED}.own.maskpack"
    write_pack(own, personas_for(model, personas={"INFP": ("I", "N"), "pirate": ("I",)}))
    assert (find_pack(model, ["infp"], "m").path, find_pack(model, [], "m").path) == (own, own)
    assert find_pack(model, ["INFP"], "m").note is None
    assert find_pack(model, ["ENTJ"], "m").path == shipped_packs(model)[0]
    with pytest.raises(PersonaNotFoundError, match=r"no persona 'formal' in the 2 packs of the model"):
        find_pack(model, ["formal"], "m")
    own.write_bytes(b"PEMP")
    assert "passed over a damaged pack" in str(find_pack(model, ["INFP"], "m").note)


def test_a_pack_that_ships_is_found_by_the_name_of_the_file_or_the_onnx_folder(tmp_path: Path) -> None:
    assert shipped_packs(tmp_path / f"{SHIPPED}.onnx-int4" / "model.onnx") == shipped_packs(Path(f"{SHIPPED}.gguf"))
    for other in (f"{SHIPPED}.onnx-int4.gguf", "SmolLM2-135M-Instruct.gguf", "model.onnx", "m.gguf"):
        assert shipped_packs(tmp_path / other) == ()


def test_packs_that_ship_belong_to_a_file_of_the_catalogue_and_hold_their_whole_set() -> None:
    known = {source.file for entry in load_catalogue().values() for source in entry.sources}
    packs = sorted(shipped_packs(Path(f"{SHIPPED}.gguf"))[0].parent.glob("*.maskpack"))
    for path in packs:
        stem, set_name = path.stem.rsplit(".", 1)
        assert f"{stem}.gguf" in known
        pack, wanted = MaskPack.open(path), load_persona_set(set_name)
        assert dict(pack.personas) == dict(wanted.personas)


def test_the_default_model_takes_the_pack_that_ships_for_it(smollm2_path: Path) -> None:
    with PersonaRuntime.open(smollm2_path, shipped_packs(smollm2_path)[0]) as model:
        assert model.switch("INFP").n_units_written > 10_000


def test_a_shipped_pack_is_refused_by_other_weights_of_that_name(tmp_path: Path) -> None:
    line = failure("--persona", "INFP", model=str(write_model(tmp_path / f"{SHIPPED}.gguf")))
    assert "the pack was made from another model" in line


# Failures


def failure(*arguments: str, model: str) -> str:
    """The one line on stderr of a call that fails before anything is printed."""
    result = run_chat(*arguments, "--message", "Hi", model=model)
    assert result.exit_code in (1, 2)
    assert result.stdout == ""
    assert result.stderr.startswith("persona-edge: error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("persona-edge: error: ").strip()


def test_no_pack_names_the_command_that_makes_one(tmp_path: Path) -> None:
    model = str(write_model(tmp_path / "my model.gguf"))
    command = f"persona-edge export --model '{model}' --personas"
    for persona, made_with in (("INFP", "mbti16"), ("i", "mbti16"), ("pirate", "CONTRASTS.jsonl")):
        assert failure("--persona", persona, model=model) == (
            f"no mask pack next to {model}; make one with: {command} {made_with} (or pass --pack)"
        )


def test_a_pack_without_the_persona_lists_what_it_has(tiny_model: str, tiny_folder: Path) -> None:
    line = failure("--persona", "INTJ", model=tiny_model)
    assert line.startswith("no persona 'INTJ' in tiny.mbti.maskpack, which has INFP, ENTJ, I, E, N, night owl; ")
    assert line.endswith("--personas mbti16")
    pack = tiny_folder / "tiny.mbti.maskpack"
    line = failure("--compare", "base,INTJ", "--pack", str(pack), model=tiny_model)
    assert line == f"no persona 'INTJ' in {pack}; it has INFP, ENTJ, I, E, N, night owl"


def test_failures_are_one_line(tiny_model: str, tmp_path: Path, tiny_folder: Path) -> None:
    pack = (tiny_folder / "tiny.mbti.maskpack").read_bytes()
    bad = tmp_path / "bad.maskpack"
    assert f"{bad}: cannot be read" in failure("--pack", str(bad), model=tiny_model)
    for data in (b"", pack[:100], pack[:-5], pack[:-5] + bytes([pack[-5] ^ 1]) + pack[-4:]):
        bad.write_bytes(data)
        assert str(bad) in failure("--pack", str(bad), "--persona", "INFP", model=tiny_model)
    other = str(write_model(tmp_path / "other.gguf", seed=3))
    whole = str(tiny_folder / "tiny.mbti.maskpack")
    assert "the pack was made from other weights" in failure("--pack", whole, model=other)
    assert "no such file" in failure(model=str(tmp_path / "none.gguf"))
    assert "the question is empty" in failure("--message", " ", model=tiny_model)
    assert "temperature is -1.0" in failure("--temperature", "-1", model=tiny_model)
    assert "max_tokens is 0" in failure("--max-tokens", "0", model=tiny_model)
    assert "seed is -1" in failure("--seed", "-1", model=tiny_model)
    assert "n_threads is 0" in failure("--threads", "0", model=tiny_model)
    assert "n_ctx is 0" in failure("--context", "0", model=tiny_model)
    assert "strength" in failure("--strength", "1.5", model=tiny_model)
    assert "but the context holds 256" in failure("--context", "256", "--message", "a" * 300, model=tiny_model)
