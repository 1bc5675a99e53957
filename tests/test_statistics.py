"""Sums that merge, and files that are taken only for what they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from persona_edge.errors import CalibrationError, OutputError
from persona_edge.statistics import Kind, Statistics, load_statistics, merge, save_statistics, stored_means

KEY: dict[str, object] = {"model": "abc", "set": [1, 2], "fisher": True}


def statistics(seed: int, kind: Kind = "damage", *, tensors: tuple[str, ...] = ("blk.1.b", "blk.0.a")) -> Statistics:
    """Tensors in an order that is not the alphabet's, as a model's need not be."""
    rng = np.random.default_rng(seed)
    sums = {
        field: {name: rng.standard_normal(shape).astype(np.float32) for name in tensors}
        for field, shape in (("z_first", (3, 2)), ("a_second", (4,)))
    }
    return Statistics(kind, {"batches": 1, "tokens": seed}, sums)


def assert_equal(a: Statistics, b: Statistics) -> None:
    assert (a.kind, dict(a.counts), a.tensors) == (b.kind, dict(b.counts), b.tensors)
    assert a.sums.keys() == b.sums.keys()
    for field, tensors in a.sums.items():
        for name, values in tensors.items():
            np.testing.assert_array_equal(values, b.sums[field][name])
            assert b.sums[field][name].dtype == np.float32


def test_merging_adds_sums_and_counts() -> None:
    a, b = statistics(3), statistics(4)
    both = merge(statistics(3), b)
    assert both.counts == {"batches": 2, "tokens": 7}
    for field in ("z_first", "a_second"):
        for name in a.tensors:
            np.testing.assert_array_equal(both.sums[field][name], a.sums[field][name] + b.sums[field][name])


def test_merging_makes_no_second_set_of_arrays() -> None:
    first = statistics(3)
    both = merge(first, statistics(4))
    for field, tensors in first.sums.items():
        assert all(both.sums[field][name] is values for name, values in tensors.items())


def test_nothing_is_neutral_in_a_merge() -> None:
    assert_equal(merge(Statistics("damage"), statistics(3)), statistics(3))
    assert_equal(merge(statistics(3), Statistics("damage")), statistics(3))


@pytest.mark.parametrize(
    "other",
    [
        statistics(4, "margin"),
        statistics(4, tensors=("blk.1.b",)),
        Statistics("damage", {"tokens": 1}, {"z_first": statistics(4).sums["z_first"]}),
    ],
    ids=["kind", "tensors", "fields"],
)
def test_what_does_not_belong_together_is_not_merged(other: Statistics) -> None:
    for first, second in ((statistics(3), other), (other, statistics(3))):
        with pytest.raises(CalibrationError, match="cannot be merged"):
            merge(first, second)


def test_a_mean_divides_by_its_count() -> None:
    a = statistics(4)
    np.testing.assert_allclose(a.mean("a_second", "tokens")["blk.0.a"], a.sums["a_second"]["blk.0.a"] / 4)
    with pytest.raises(CalibrationError, match="no contrasts were counted"):
        a.mean("a_second", "contrasts")


def test_saved_statistics_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_statistics(path, statistics(3), KEY)
    loaded = load_statistics(path, dict(reversed(KEY.items())))
    assert loaded is not None
    assert_equal(loaded, statistics(3))
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_array_in_column_order_comes_back_as_it_was(tmp_path: Path) -> None:
    path, values = tmp_path / "a.safetensors", np.arange(6, dtype=np.float32).reshape(2, 3)
    save_statistics(path, Statistics("damage", {"tokens": 1}, {"field": {"a": np.asfortranarray(values)}}), KEY)
    loaded = load_statistics(path, KEY)
    assert loaded is not None
    np.testing.assert_array_equal(loaded.sums["field"]["a"], values)


def test_another_key_a_missing_and_a_damaged_file_are_all_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    assert load_statistics(path, KEY) is None
    save_statistics(path, statistics(3), KEY)
    assert load_statistics(path, {**KEY, "fisher": False}) is None
    whole = path.read_bytes()
    for damaged in (b"", whole[:20], whole[:-1], b"\xff" * len(whole)):
        path.write_bytes(damaged)
        assert load_statistics(path, KEY) is None


def test_means_read_from_the_disk_are_those_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "sums.safetensors"
    save_statistics(path, statistics(7), KEY)
    stored, held = stored_means(path, KEY, "z_first", "tokens"), statistics(7).mean("z_first", "tokens")
    assert list(stored) == list(held)
    for name in held:
        np.testing.assert_array_equal(stored[name], held[name])


def test_means_of_other_statistics_or_of_none_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "sums.safetensors"
    with pytest.raises(CalibrationError, match="cannot be read"):
        stored_means(path, KEY, "z_first", "tokens")
    save_statistics(path, statistics(7), KEY)
    with pytest.raises(CalibrationError, match="other statistics"):
        stored_means(path, {**KEY, "set": [2]}, "z_first", "tokens")


def test_a_folder_that_is_not_there_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="Create the folder"):
        save_statistics(tmp_path / "none" / "a.safetensors", statistics(3), KEY)
