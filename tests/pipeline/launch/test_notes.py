"""How long something has stayed the same, by the clock of one who was awake."""

from __future__ import annotations

import pytest

from localpipe.pipeline.launch.notes import UnchangedTimer


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("localpipe.pipeline.launch.notes.time.monotonic", lambda: self.now)


def test_seconds_without_change_add_up_and_a_change_begins_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    looker = UnchangedTimer()
    found = []
    for thing in ("a", "a", "a", "b", "b"):
        clock.now += 0.5
        found.append(looker.update(thing))
    assert found == [0.0, 0.5, 1.0, 0.0, 0.5]


def test_an_hour_in_which_the_looker_slept_counts_for_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    looker = UnchangedTimer()
    looker.update("a")
    clock.now += 3600
    assert looker.update("a") == 2.0
