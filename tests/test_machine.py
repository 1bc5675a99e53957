"""How OpenMP's threads wait: as the machine's load says, unless the user has said it."""

from __future__ import annotations

import os

import pytest

from persona_edge import machine


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):  # set first, so that it is restored whatever it was
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(("load", "spins"), [(0.1, True), (1.5, False)])
def test_threads_spin_on_a_quiet_machine_alone(load: float, spins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    machine.set_thread_waiting()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert ("GOMP_SPINCOUNT" in os.environ) == spins


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    machine.set_thread_waiting()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert "GOMP_SPINCOUNT" not in os.environ


def test_without_a_load_average_threads_sleep_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "getloadavg", raising=False)
    machine.set_thread_waiting()
    assert "GOMP_SPINCOUNT" not in os.environ
