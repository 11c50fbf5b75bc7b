"""The text of an error is one line that a terminal prints as it is."""

from __future__ import annotations

import pytest

from localpipe.errors import CrashError, NeighbourLostError, RunError, UserError, to_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("data: x is odd", "data: x is odd"),
        ("data: a\nb", "data: a\\nb"),
        ("data: a\r\n\tb", "data: a\\r\\n\\tb"),
        ("data: \x1b[31m", "data: \\x1b[31m"),
        ("data: caf\udce9", "data: caf\\udce9"),
        ("data: \u202etxt\u2028", "data: \\u202etxt\\u2028"),
        ("data: a\u00a0b\u3000é日本", "data: a\u00a0b\u3000é日本"),
    ],
)
def test_signs_that_cannot_be_printed_are_escapes(text: str, line: str) -> None:
    for kind in (UserError, RunError, NeighbourLostError):
        assert str(kind(text)) == line
    assert to_line(to_line(text)) == line


def test_the_middle_of_a_long_text_is_left_out() -> None:
    text = str(UserError(f"data: {'x' * 5000}; set it to y"))
    assert len(text) == 2000
    assert text.startswith("data: xxx") and text.endswith("xxx; set it to y") and " ... " in text
    assert str(UserError("x" * 2000)) == "x" * 2000


def test_a_crash_keeps_its_lines() -> None:
    assert str(CrashError("stage 0: one\ntwo")) == "stage 0: one\ntwo"
