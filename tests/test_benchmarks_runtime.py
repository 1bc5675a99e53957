"""The runtime's benchmark: its rivals load and do something, its stages measure every arm, its page shows them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import record, runtime, runtime_first_token, runtime_memory, runtime_speed, runtime_switch
from benchmarks.engine import Engine, StockModel, evaluate_anew, opened_model, opened_runtime
from benchmarks.measured import Measured, Recorder, find, in_rounds, ratio
from benchmarks.runtime_job import Job, run_job
from benchmarks.runtime_memory import PRIVATE, RESIDENT, read_memory
from benchmarks.runtime_plot import size_and_density_plot
from benchmarks.runtime_switch import IN_ALL, LORA, OURS, RELOAD, VECTOR
from benchmarks.runtime_tables import Artefact, ModelResult, runtime_tables
from benchmarks.synthetic_models import SHAPES, Shape, make_model
from benchmarks.synthetic_personas import PERSONAS, Rivals, make_lora, make_pack, make_rivals
from persona_edge.errors import GenerationError, InputError, ModelFileError
from persona_edge.maskpack import MaskPack

DENSITY = 0.05


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("synthetic")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return make_model(SHAPES["tiny"], folder)


@pytest.fixture(scope="module")
def rivals(model: Path, folder: Path) -> Rivals:
    return make_rivals(model, folder, DENSITY)


@pytest.fixture
def job(model: Path, rivals: Rivals) -> Job:
    loras, vectors = [str(p) for p in rivals.loras], [str(p) for p in rivals.vectors]
    return Job(
        "switch", str(model), str(rivals.pack), (loras[0], loras[1]), (vectors[0], vectors[1]), 1, 3, 1.0,
        n_tokens=4, n_prompt=16,
    )  # fmt: skip


def logits_of(engine: Engine) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Of the last of some tokens."""
    evaluate_anew(engine, [40, 41, 42])
    row = engine.last_logits(SHAPES["tiny"].n_vocab)
    return row.copy()


def test_the_shape_of_llama_3_8b_has_its_number_of_weights() -> None:
    def n_weights(shape: Shape) -> int:
        return sum(int(np.prod(size)) for _, size, _ in shape.tensors())

    assert n_weights(SHAPES["8b"]) == 8_030_261_248
    assert n_weights(SHAPES["1.7b"]) == 1_711_376_384
    kinds = {name: kind for name, _, kind in SHAPES["8b"].tensors()}
    assert sum(kinds[f"blk.{layer}.ffn_down"] == "Q6_K" for layer in range(32)) == 16


def test_a_synthetic_model_is_made_once_and_computes_numbers(model: Path, folder: Path) -> None:
    before = model.stat().st_mtime_ns
    assert make_model(SHAPES["tiny"], folder).stat().st_mtime_ns == before
    with opened_model(str(model)) as loaded, opened_runtime(loaded, n_ctx=64, n_threads=1) as (session, _):
        logits = session.logits([40, 41, 42])
    assert np.isfinite(logits).all()
    assert 0.01 < logits.std() < 100


def test_a_model_that_the_disk_has_no_room_for_is_refused(folder: Path) -> None:
    huge = replace(SHAPES["8b"], feed_forward=1 << 34, name="huge")
    with pytest.raises(InputError, match=r"huge-shape.* takes .* GB"):
        make_model(huge, folder)
    assert not list(folder.glob("huge*"))


def test_a_random_pack_has_the_density_it_says_and_belongs_to_the_model(model: Path, folder: Path) -> None:
    path = make_pack(model, folder, DENSITY)
    pack = MaskPack.open(path)
    n_groups = sum(tensor.n_units(32) for tensor in pack.identity.tensors)
    gated = sum(plane.n_positions for name in PERSONAS[0] for plane in pack.pole(name).planes)
    assert gated / n_groups == pytest.approx(DENSITY, rel=0.1)
    assert len(pack.personas) == 16
    with opened_model(str(model)) as loaded, opened_runtime(loaded, n_ctx=64, n_threads=1) as (session, _):
        session.attach(path)
        assert session.switch(PERSONAS[0]).n_units_written > 0


def test_adapters_and_vectors_change_what_is_computed_and_leave_no_trace(model: Path, rivals: Rivals) -> None:
    stock = StockModel(model)
    with Engine(stock, n_ctx=64, n_threads=1) as engine:
        plain = logits_of(engine)
        engine.set_lora(engine.load_lora(rivals.loras[0]))
        with_lora = logits_of(engine)
        engine.set_lora(None)
        engine.set_vector(np.load(rivals.vectors[0]))
        with_vector = logits_of(engine)
        engine.set_vector(None)
        assert not np.array_equal(with_lora, plain)
        assert not np.array_equal(with_vector, plain)
        assert np.array_equal(logits_of(engine), plain)
    stock.close()


def test_what_is_no_adapter_is_refused(model: Path) -> None:
    stock = StockModel(model)
    with Engine(stock, n_ctx=64, n_threads=1) as engine, pytest.raises(GenerationError, match="does not load"):
        engine.load_lora(model)
    stock.close()


def test_a_lora_covers_every_matrix_of_every_block(model: Path, folder: Path) -> None:
    from gguf import GGUFReader

    names = {tensor.name for tensor in GGUFReader(make_lora(model, folder, 0)).tensors}
    matrices = [name for name, size, _ in SHAPES["tiny"].tensors() if name.startswith("blk.") and len(size) == 2]
    assert names == {f"{name}.weight.{part}" for name in matrices for part in ("lora_a", "lora_b")}


def test_every_arm_switches(job: Job) -> None:
    found = runtime_switch.measure(job)
    assert {each.arm for each in found} == {OURS, LORA, VECTOR, RELOAD}
    assert {len(each.values) for each in found if each.arm == OURS} == {3}
    assert all(find(found, arm, IN_ALL) for arm in (OURS, LORA, VECTOR, RELOAD))


def test_denser_packs_write_more(job: Job, model: Path, folder: Path, rivals: Rivals) -> None:
    sparse = make_pack(model, folder, 0.01)
    found = runtime_switch.measure_densities(replace(job, packs=((0.01, str(sparse)), (DENSITY, str(rivals.pack)))))
    few, many = (find(found, arm, runtime_switch.DENSITY_UNITS) for arm in ("0.01", "0.05"))
    assert few is not None
    assert many is not None
    assert 3 < ratio(many, few).p50 < 6


def test_every_way_reaches_a_first_token(job: Job) -> None:
    found = runtime_first_token.measure(replace(job, lengths=(300, 100_000), rounds=2))
    assert len(found) == 8
    assert {each.what for each in found} == {"300 tokens"}  # the longer one does not fit into the model's context
    ours, kept = find(found, OURS, "300 tokens"), find(found, runtime_first_token.KEEP, "300 tokens")
    assert ours is not None
    assert kept is not None
    assert ours.spread.p50 > 0 < kept.spread.p50
    [said] = runtime.left_out(replace(job, lengths=(300, 100_000)), found)
    assert said.startswith("a context of 100000 tokens, for the model's context is shorter")


def test_every_arm_decodes(job: Job) -> None:
    found = runtime_speed.measure(replace(job, rounds=2))
    arms = {runtime_speed.STOCK, runtime_speed.UNMASKED, OURS, LORA, VECTOR}
    assert {(each.arm, each.what) for each in found} == {(arm, what) for arm in arms for what in ("decode", "prefill")}


@pytest.mark.parametrize("arm", [runtime_memory.SWITCHED, LORA])
def test_memory_is_measured_in_a_process_of_its_own(job: Job, arm: str) -> None:
    found = run_job(replace(job, stage="memory", arm=arm))
    assert find(found, arm, "load")
    if Path("/proc/self/smaps_rollup").exists():
        resident, private = find(found, arm, RESIDENT), find(found, arm, PRIVATE)
        assert resident is not None
        assert private is not None
        assert resident.values[0] >= private.values[0] > 0


def test_where_memory_is_not_told_the_rest_is_measured(
    job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(runtime_memory, "_ROLLUP", tmp_path / "nothing")
    assert read_memory() == {}
    found = runtime_memory.measure(replace(job, stage="memory", arm=OURS))
    assert {each.what for each in found} == {"load", "attach", "decode the pack", "decoding"}


def test_a_stage_that_fails_says_why(job: Job, tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"not a model")
    with pytest.raises(GenerationError, match=r"switch.*code 1: .*no\.gguf"):
        run_job(replace(job, model=str(tmp_path / "no.gguf")))
    with pytest.raises(ModelFileError):
        runtime_switch.measure(replace(job, model=str(tmp_path / "no.gguf")))


def test_rounds_end_when_time_is_over_but_not_before_the_least() -> None:
    assert list(in_rounds(3, 60)) == [0, 1, 2, 3]
    assert list(in_rounds(9, 0, least=2)) == [0, 1, 2]
    assert list(in_rounds(2, 60, warm_up=False)) == [1, 2]


def test_ratios_are_paired_by_round() -> None:
    one, other = Measured("a", "x", "ms", (2.0, 40.0)), Measured("b", "x", "ms", (1.0, 20.0))
    assert ratio(one, other).p25 == ratio(one, other).p75 == 2
    assert Measured.from_json(json.loads(json.dumps(one.to_json()))) == one


def _result(name: str, n_bytes: int) -> ModelResult:
    recorder = Recorder()
    values: Mapping[str, float] = {OURS: 1.0, LORA: 4.0, VECTOR: 2.0, RELOAD: 100.0}
    for arm, value in values.items():
        for factor in (1.0, 1.1):
            recorder.add(arm, runtime_switch.A_TO_B, "ms", value * factor)
            recorder.add(arm, IN_ALL, "ms", value * factor)
            recorder.add(arm, "512 tokens", "ms", 50 * value * factor)
    for density in ("0.01", "0.1"):
        recorder.add(density, runtime_switch.DENSITY_UNITS, "units", 1e6 * float(density))
        recorder.add(density, runtime_switch.DENSITY_A_TO_B, "ms", 10 * float(density))
        recorder.add(density, runtime_switch.DENSITY_TO_A, "ms", 5 * float(density))
    return ModelResult(name, n_bytes, tuple(recorder.result()), (), (Artefact("pack", 105, 100.0),))


def test_the_page_shows_ratios_and_the_plot_every_model(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = [_result("small", 10**8), _result("large", 5 * 10**9)]
    plot = size_and_density_plot(found)
    assert plot.startswith("<svg")
    assert "small" in plot
    assert "large" in plot
    assert plot == size_and_density_plot(found)
    result = record.Result("Title", runtime_tables(found), {"models": [each.to_json() for each in found]}, (), plot)
    paths = record.write("runtime", result, record.conditions([]), tmp_path)
    assert [path.name for path in paths] == ["runtime.json", "runtime.md", "runtime.svg"]
    page = paths[1].read_text(encoding="utf-8")
    assert page.startswith("# Title\n\n![Title](runtime.svg)\n")
    assert f"| small, {LORA} | 4.2 | 4.38 | 4.2 | 4.1–4.3 | 4 |" in page
    assert "| large, pack | 105 | 100 | 1.050 |" in page


def test_quick_asks_for_less() -> None:
    plan = runtime.Plan().quick()
    assert plan.lengths == (512,)
    assert plan.rounds == 10
    assert plan.of_size(5 << 30).n_prompt == 128
    assert runtime.Plan().of_size(5 << 30).n_tokens < runtime.Plan().n_tokens
