"""The page of a run: its content, its text where something is missing, and no requests."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from localpipe.cli.command_line import main
from localpipe.config.load import to_yaml
from localpipe.results.report.figures import COLOURS
from localpipe.results.report.page import NO_TRACE
from localpipe.results.report.timeline import Window, steady_window
from localpipe.runs.clock import ClockOffset
from localpipe.runs.records import append_record, begin_records
from localpipe.runs.trace import Span, Trace, TraceRow, merge_traces
from tests.harness import settings

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
NAMES = ("timeline", "accuracy", "loss", "shares", "memory")
STEP_S = 0.1


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a finished run with a trace."""
    run_dir = a_run(tmp_path_factory.mktemp("runs") / "run")
    assert main(["report", str(run_dir)]) == 0
    return run_dir / "report.html"


def row(stage: int, steps: int, interrupts: dict[int, str], late: float = 0.0) -> TraceRow:
    """Return the spans of a stage: ten steps a second, some with an evaluation or a checkpoint."""
    spans, now = [], late
    for step in range(1, steps + 1):
        for phase, length in (
            ("receive", 0.01),
            ("forward", 0.03),
            ("send", 0.01),
            ("loss", 0.01),
            ("update", 0.04),
        ):
            spans.append(Span(stage, phase, step, now, now + length))
            now += length
        if step in interrupts:
            spans.append(Span(stage, interrupts[step], step, now, now + 1.0))
            now += 1.0
    return TraceRow(stage, stage, tuple(spans))


def a_run(run_dir: Path, finished: bool = True, traced: bool = True) -> Path:
    """Leave what a run of three stages in three processes leaves."""
    config = settings(run_dir, pipeline={"stages": 3, "processes": 3})
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    begin_records(run_dir / "metrics.jsonl", {"steps": 40}, 0, lambda step: False)
    for step in range(2, 41, 2):
        for stage in range(3):
            shares = {
                "busy": 0.5,
                "receive_wait": 0.2,
                "send_wait": 0.1,
                "peak_memory_bytes": 2**28,
            }
            record = {
                "kind": "train",
                "step": step,
                "epoch": 1,
                "stage": stage,
                "loss": 2.0 / step,
                **shares,
            }
            append_record(run_dir / "metrics.jsonl", record)
    for stage in range(3):
        accuracy = None if stage == 1 else 0.75
        record = {
            "kind": "eval",
            "step": 40,
            "epoch": 1,
            "stage": stage,
            "split": "test",
            "accuracy": accuracy,
        }
        append_record(run_dir / "metrics.jsonl", record)
    if traced:
        for stage in range(3):
            kept = Trace()
            for span in row(stage, 40, {20: "eval"}, late=stage * STEP_S).spans:
                kept.add(*span)
            kept.write(run_dir, stage, ClockOffset())
        merge_traces(run_dir)
    if finished:
        (run_dir / "summary.json").write_text(json.dumps(SUMMARY))
    return run_dir


SUMMARY: dict[str, Any] = {
    "schema": 1, "test_accuracy": 0.75, "best_test_accuracy": 0.8, "best_epoch": 1, "seed": 0,
    "steps": 40, "test_accuracy_per_stage": [0.75, None, 0.75], "probe_accuracy_per_stage": None,
    "loss_per_stage": [0.1, 0.2, 0.3], "busy_share_per_stage": [0.5, 0.5, 0.5],
    "saved_activation_bytes_per_sample": [2048, 4096, 1024],
    "train_samples_per_s": 100.0, "bound_samples_per_s": 110.0, "efficiency": 0.91, "wall_s": 12.0,
    "train_macs_per_sample": 10**6, "peak_memory_bytes": [2**28, 2**29, 2**28],
    "weights_sha256": "ab" * 32,
}  # fmt: skip


class Page(HTMLParser):
    """Every tag with its attributes, and the text of every section."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self._section = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self._section = str(dict(attrs)["id"])

    def handle_data(self, data: str) -> None:
        self.sections[self._section] = self.sections.get(self._section, "") + " " + data

    def picture(self, name: str) -> str | None:
        """Return a picture's SVG."""
        source = next(
            (
                str(a["src"])
                for tag, a in self.tags
                if tag == "img" and a.get("id") == f"{name}-picture"
            ),
            None,
        )
        return None if source is None else base64.b64decode(source.partition("base64,")[2]).decode()


def bars(svg: str) -> list[tuple[int, str, int, float, float]]:
    """Return (stage, phase, step, left, right) of every bar that a timeline draws."""
    found = []
    for group in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}g"):
        if group.get("id", "").startswith("bar-"):
            _, stage, _, phase, step = group.get("id", "").split("-")
            corners = re.findall(r"[ML] ([\d.]+) [\d.]+", group[0].get("d", ""))
            found.append(
                (int(stage), phase, int(step), min(map(float, corners)), max(map(float, corners)))
            )
    return found


def test_the_steady_window_holds_no_evaluation_and_ten_steps_of_the_last_stage() -> None:
    rows = [row(stage, 44, {14: "eval", 32: "save"}, late=stage * STEP_S) for stage in range(3)]
    window = steady_window(rows)
    assert window is not None and window.last_step - window.first_step == 9
    assert window.first_step > 14 and window.last_step <= 32
    phases = {span.phase for each in window.rows for span in each.spans}
    assert phases == {"receive", "forward", "send", "loss", "update"}
    assert all(
        window.begin <= s.begin <= s.end <= window.end for each in window.rows for s in each.spans
    )


def test_a_short_run_shows_the_steps_that_it_has() -> None:
    window = steady_window([row(0, 3, {1: "eval"})])
    assert window is not None and (window.first_step, window.last_step) == (2, 3)
    assert (
        steady_window([TraceRow(0, 0, (Span(0, "start", 0, 0.0, 1.0),))]) is None
        and steady_window([]) is None
    )


def test_the_overlap_is_the_time_in_which_two_workers_compute() -> None:
    def window(*spans: tuple[int, float, float]) -> Window:
        rows = tuple(
            TraceRow(rank, rank, (Span(rank, "forward", 1, begin, end),))
            for rank, begin, end in spans
        )
        return Window(0.0, 10.0, rows, 1, 1)

    apart = window((0, 0.0, 5.0), (1, 5.0, 10.0))
    assert (apart.computing, apart.overlap) == (1.0, 0.0)
    together = window((0, 0.0, 8.0), (1, 4.0, 10.0), (2, 6.0, 7.0))
    assert together.computing == pytest.approx(1.5) and together.overlap == pytest.approx(0.4)


def test_the_page_of_a_traced_run_shows_stages_that_overlap_in_time(shown: Path) -> None:
    svg = Page(shown).picture("timeline")
    assert svg is not None
    computing = [bar for bar in bars(svg) if bar[1] in ("forward", "loss", "update")]
    assert {bar[0] for bar in computing} == {0, 1, 2} and len({bar[2] for bar in computing}) >= 10
    for a, b in ((0, 1), (1, 2)):
        assert any(
            one[4] > other[3] and other[4] > one[3]
            for one in computing
            for other in computing
            if (one[0], other[0]) == (a, b)
        )


def test_the_page_has_the_numbers_and_the_configuration_of_the_run(tmp_path: Path) -> None:
    run_dir = a_run(tmp_path / "run")
    assert main(["report", str(run_dir), "-o", str(tmp_path / "out" / "page.html")]) == 0
    page = Page(tmp_path / "out" / "page.html")
    for fact in ("75.0 %", "80.0 % (epoch 1)", "0.91", "best on test", "3 on 3"):
        assert fact in page.sections[""]
    assert re.search(r"0\s+0\.1000\s+75\.0 %.*1\s+0\.2000\s+-", page.sections["stages"], re.DOTALL)
    assert "batch_size: 16" in page.sections["configuration"]
    written = set(os.listdir(tmp_path / "out"))
    assert written == {"page.html", *(f"page_{name}.png" for name in NAMES)}
    for name in NAMES:
        assert np.asarray(Image.open(tmp_path / "out" / f"page_{name}.png").convert("L")).std() > 5


def test_an_exit_that_was_never_trained_has_no_curve(shown: Path) -> None:
    svg = Page(shown).picture("accuracy")
    assert svg is not None and "stage 0" in svg and "stage 1" not in svg


def test_an_unfinished_run_without_a_trace_says_what_is_missing(tmp_path: Path) -> None:
    run_dir = a_run(tmp_path / "run", finished=False, traced=False)
    assert main(["report", str(run_dir)]) == 0
    page = Page(run_dir / "report.html")
    assert "step 40 of 40" in page.sections[""] and "unfinished" in page.sections[""]
    assert NO_TRACE in page.sections["timeline"] and page.picture("timeline") is None
    assert all(page.picture(name) is not None for name in NAMES[1:])
    assert not (run_dir / "report_timeline.png").exists()


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    run_dir = a_run(tmp_path / "run", finished=False, traced=False)
    begin_records(run_dir / "metrics.jsonl", {"steps": 40}, 0, lambda step: False)
    assert main(["report", str(run_dir)]) == 0
    page = Page(run_dir / "report.html")
    assert all("nothing has been recorded yet" in page.sections[name] for name in NAMES[1:])


def test_the_page_asks_for_nothing_from_outside(shown: Path) -> None:
    page = Page(shown)
    assert not {tag for tag, _ in page.tags} & {
        "script",
        "iframe",
        "object",
        "embed",
        "video",
        "audio",
    }
    links = [
        str(value)
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href")
    ]
    assert links and all(link.startswith("data:") for link in links)
    assert "@import" not in shown.read_text() and "url(" not in shown.read_text()
    policy = next(
        a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert str(policy).startswith("default-src 'none'")


def test_what_a_run_is_named_cannot_write_into_the_page(tmp_path: Path) -> None:
    run_dir = a_run(tmp_path / "<script>alert(1)<")
    assert main(["report", str(run_dir)]) == 0
    assert "<script" not in (run_dir / "report.html").read_text()


@pytest.mark.parametrize("there", [None, "empty"])
def test_a_directory_that_is_no_run_is_refused(
    tmp_path: Path, there: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    if there:
        folder.mkdir()
    assert main(["report", str(folder)]) == 2
    captured = capsys.readouterr()
    assert (
        captured.out == ""
        and "found nothing, expected config.yaml and metrics.jsonl; give the directory of a run"
        in captured.err
        and captured.err.count("\n") == 1
    )


def test_a_damaged_trace_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = a_run(tmp_path / "run")
    (run_dir / "trace.json").write_text('{"traceEvents": [')
    assert main(["report", str(run_dir)]) == 2
    assert "trace.json" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = a_run(tmp_path / "run")
    (tmp_path / "file").write_text("")
    assert main(["report", str(run_dir), "-o", str(tmp_path / "file" / "page.html")]) == 2
    assert "file is not a folder; give another file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rep.pdf", "rep"])
def test_a_page_is_html(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = a_run(tmp_path / "run")
    assert main(["report", str(run_dir), "-o", str(tmp_path / name)]) == 2
    assert "expected one of .html, .htm" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_page_of_a_dot_is_titled_by_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = a_run(tmp_path / "run")
    monkeypatch.chdir(run_dir)
    assert main(["report", "."]) == 0
    assert ": run</title>" in (run_dir / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("finished", "reason"), [(False, "no trace yet"), (True, "is gone")])
def test_a_run_that_asked_for_a_trace_is_not_told_to_ask(
    tmp_path: Path, finished: bool, reason: str
) -> None:
    run_dir = a_run(tmp_path / "run", finished=finished, traced=False)
    config = (run_dir / "config.yaml").read_text(encoding="utf-8")
    assert "trace: false" in config
    (run_dir / "config.yaml").write_text(config.replace("trace: false", "trace: true"))
    assert main(["report", str(run_dir)]) == 0
    section = Page(run_dir / "report.html").sections["timeline"]
    assert reason in section and "add run.trace=true" not in section


# --- In a browser

_ASKED = """<script>addEventListener("load", () => {
  const box = document.getElementById("timeline-picture").getBoundingClientRect()
  const names = performance.getEntriesByType("resource").map(entry => entry.name)
  const asked = names.filter(name => !name.startsWith("data:"))
  const facts = {x: box.x, y: box.y, width: box.width, height: box.height, asked}
  const text = document.createElement("pre")
  document.body.append(Object.assign(text, {id: "facts", textContent: JSON.stringify(facts)}))
})</script></body>"""


def browse(page: Path, *words: str) -> tuple[str, list[str]]:
    """Open a page in headless Chromium; return what it printed and the lines of its console."""
    assert CHROMIUM is not None
    quiet = [
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
        "--disable-gpu",
    ]
    quiet += ["--disable-quic", "--disable-sync"]
    own = [
        "--headless",
        "--no-sandbox",
        "--hide-scrollbars",
        "--window-size=1200,1600",
        "--enable-logging=stderr",
    ]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    shown = subprocess.run(
        [CHROMIUM, *own, *quiet, profile, *words, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return shown.stdout, [line for line in shown.stderr.splitlines() if "CONSOLE" in line]


def read_timeline(page: Path) -> dict[str, Any]:
    """Return the position of the timeline in a page, and the page's requests.

    A script in a copy of the page writes them into it.
    """
    copy = page.with_name("copy.html")
    text = page.read_text().replace(
        "default-src 'none';", "default-src *; script-src 'unsafe-inline';"
    )
    copy.write_text(text.replace("</body>", _ASKED))
    printed, _ = browse(copy, "--dump-dom")
    (found,) = re.findall(r'<pre id="facts">(.*?)</pre>', printed)
    loaded: dict[str, Any] = json.loads(found)
    return loaded


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_opens_in_a_browser_with_a_timeline_no_error_and_no_request(
    shown: Path, tmp_path: Path
) -> None:
    _, console = browse(shown, f"--screenshot={tmp_path / 'page.png'}")
    assert console == []
    position = read_timeline(shown)
    assert position["asked"] == []
    left, top = round(position["x"]), round(position["y"])
    shot = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    box = shot[top : top + round(position["height"]), left : left + round(position["width"])]
    for phase in (
        "forward",
        "update",
        "send",
    ):  # in every eighth of the axes: ten steps stand side by side
        colour = [int(COLOURS[phase][i : i + 2], 16) for i in (1, 3, 5)]
        where = (np.abs(box - colour).max(axis=-1) < 12).any(axis=0)
        inner = where[round(0.1 * len(where)) : round(0.98 * len(where))]
        assert all(part.any() for part in np.array_split(inner, 8)), phase


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_page_with_a_request_or_an_error_would_be_seen(tmp_path: Path) -> None:
    """What the test above looks with can see."""
    page = tmp_path / "page.html"
    policy = (
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:">'
    )
    wrong = '<img src="http://127.0.0.1:9/x.png">'
    body = f"{wrong}<img id='timeline-picture' src='data:,'>"
    page.write_text(f"<html><head>{policy}</head><body>{body}</body></html>")
    assert browse(page, "--dump-dom")[1] != []
    assert read_timeline(page)["asked"] == ["http://127.0.0.1:9/x.png"]
