"""The list of messages is complete, and what they advise exists."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache

import pytest

from localpipe.config.resume import FREE_KEYS
from tests import ROOT
from tests.messages.__main__ import main
from tests.messages.advice import find_faults, find_keys
from tests.messages.listing import Message, list_messages
from tests.messages.source import read_source
from tests.messages.texts import Interpreter

RECORDED = ROOT / "tests" / "recorded" / "errors.txt"
# Recorded texts that no line of the package makes.
FOREIGN = (
    "data: cannot read N.png",  # of a test's own data set
    "lost stage N: reset by peer",  # of a test
    "rank N was killed by SIGKILL",  # a part of the launcher's line, kept by a test
)
# Errors that carry the whole text of another message, which is listed where it is made.
CARRIERS = {
    "localpipe/bench/processes.py": "{cause.partition('\\n')[0]}",
    "localpipe/data/dataset.py": "{error}",
    "localpipe/data/evaluation.py": "{error}",
    "localpipe/data/scenes/scene_check.py": "{error}",
    "localpipe/data/user/pool.py": "{content['error']}",
    "localpipe/plan/measure.py": "{store.get(REFUSED_KEY).decode()}",
}


@cache
def messages() -> tuple[Message, ...]:
    return tuple(list_messages())


def unmatched(listed: tuple[Message, ...]) -> list[str]:
    """Return the recorded errors that no listed message can be."""
    patterns = [each.template.pattern for each in listed if each.template.has_words]
    lines = RECORDED.read_text(encoding="utf-8").splitlines()
    texts = [line.partition(": ")[2] for line in lines]
    return [text for text in texts if not any(each.fullmatch(text) for each in patterns)]


def test_the_list_holds_every_error_that_tests_have_seen() -> None:
    assert [text for text in unmatched(messages()) if text not in FOREIGN] == []


@pytest.mark.parametrize("kind", ["UserError", "RunError", "ClusterError", "NeighbourLostError"])
def test_without_one_kind_of_error_the_list_is_not_complete(kind: str) -> None:
    assert len(unmatched(tuple(each for each in messages() if each.kind != kind))) > len(FOREIGN)


@pytest.mark.parametrize("method", ["_returns", "_arguments", "_target"])
def test_without_calls_arguments_or_loops_the_list_is_not_complete(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def nothing(*words: object) -> list[object]:
        return []

    monkeypatch.setattr(Interpreter, method, nothing)
    lost = {each.text for each in messages()} - {each.text for each in list_messages()}
    assert len(lost) > 5


def test_every_error_has_words_of_its_own_or_carries_a_message() -> None:
    wordless = {
        each.file: each.text
        for each in messages()
        if each.kind.endswith("Error") and not each.template.has_words
    }
    assert wordless == CARRIERS


def test_every_note_of_the_source_is_listed() -> None:
    listed = [each.template.words for each in messages()]
    for text in note_literals():
        assert any(words.startswith(text) or text in words for words in listed), text


def note_literals() -> Iterator[str]:
    """Yield how every note of the source begins."""
    for scope in read_source().scopes:
        for node in scope.nodes:
            if isinstance(node, ast.Constant) and str(node.value).startswith("note: "):
                yield str(node.value)


def test_what_messages_name_exists() -> None:
    faults = [(each.text, fault) for each in messages() for fault in find_faults(each.text)]
    assert faults == []


def test_advice_after_the_start_asks_for_no_key_that_a_resume_refuses() -> None:
    """A run's recorded keys stay, so another value of one needs a new run."""
    for each in messages():
        if each.kind in ("RunError", "NeighbourLostError", "abort", "CrashError"):
            kept = set(find_keys(each.advice)) - FREE_KEYS
            assert not kept or "new run" in each.advice, each.text


def test_what_the_page_of_errors_names_exists() -> None:
    page = (ROOT / "docs" / "hangs.md").read_text(encoding="utf-8")
    assert [fault for line in page.splitlines() for fault in find_faults(line)] == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("set optim.lrr=1", "optim.lrr is no key"),
        ("set run.capture=graph", "run.capture does not take graph"),
        ("set run.capture={name}", "run.capture does not take {name}"),
        ("plan --measur", "--measur is no flag of any command"),
        ("make one with plan --memory", "--memory is no flag of plan"),
        ("run `localpipe docter`", "docter is no command"),
        ("derive from localpipe.Losses", "localpipe.Losses is not public"),
    ],
)
def test_a_wrong_advice_is_found(text: str, fault: str) -> None:
    assert fault in find_faults(text)


def test_the_command_prints_every_message(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    whole = capsys.readouterr().out
    main(["--advice"])
    advice = capsys.readouterr().out
    assert "  localpipe/runs/prepare.py:" in whole
    assert 50 < len(advice.splitlines()) < len(whole.splitlines())
