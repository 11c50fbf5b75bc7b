"""One self-contained HTML page of a run, and the same pictures as PNG files beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure

import localpipe
from localpipe.config.load import to_yaml
from localpipe.errors import RunError, UserError, to_line
from localpipe.files import check_output_path, write_output
from localpipe.plan.formats import format_number, format_percent
from localpipe.results.report.figures import (
    draw_loss,
    draw_memory,
    draw_metric,
    draw_shares,
    draw_timeline,
)
from localpipe.results.report.shares import Share, stage_shares
from localpipe.results.report.timeline import steady_window
from localpipe.runs.directory import RunDirectory
from localpipe.runs.recorded_run import RecordedRun, read_best, read_last, read_probes
from localpipe.runs.trace import trace_rows
from localpipe.tasks.metric import TOP5_ACCURACY

NO_TRACE = (
    "this run wrote no trace; add run.trace=true to the command of a run to have its timeline here"
)
UNFINISHED_TRACE = (
    "this run has run.trace=true and no trace yet: a run writes it when it ends, and one that is "
    "killed writes none; the same command goes on, and writes one of the steps that are left"
)
LOST_TRACE = "this run had run.trace=true, but its trace.json is gone"
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": "#888888",
}
_DPI = 110
_SUFFIXES = (".html", ".htm")


@dataclass(frozen=True)
class Picture:
    """A figure under its heading, or the words that say why there is none.

    name: the end of the PNG file's name. caption: the reason if `figure` is None.
    """

    name: str
    heading: str
    caption: str
    figure: Figure | None


def write_report(run_dir: Path, target: Path | None = None) -> list[Path]:
    """Write the page of a run (RUN_DIR/report.html) and its PNG files, named after it.

    target: another file for the page, whose folder is made. Returns the page, then the PNG files.
    Files there are replaced. A PNG of an earlier page without a figure now is removed. An
    unfinished run has a page too. Raises UserError for a directory that is no run or whose files
    are damaged, and for a target that is no .html or cannot be written. Raises RunError where the
    disk is full.
    """
    directory = RunDirectory(run_dir)
    run = directory.read()
    page = target if target is not None else run_dir / "report.html"
    if page.suffix.lower() not in _SUFFIXES:
        raise UserError(
            f"report: {page} ends in {page.suffix or 'nothing'!r}; the page is HTML, so expected "
            f"one of {', '.join(_SUFFIXES)}; PNG files are written beside it"
        )
    check_output_path("report: -o", page, makes_folders=True)
    shares = stage_shares(run)

    # Pictures are embedded in the page, and written as PNG files beside it.
    with matplotlib.rc_context(_STYLE):
        pictures = _draw_pictures(run, shares)
        embedded = [{**vars(picture), "source": _encode_picture(picture)} for picture in pictures]
        written = _save_pictures(pictures, page)

    template = _make_environment().get_template("page.html")
    text = template.render(
        version=localpipe.__version__,
        title=to_line(directory.title),
        run=run,
        facts=list(_list_facts(run)),
        stages=_build_stage_rows(run, shares),
        settings=to_yaml(run.config),
        pictures=embedded,
    )
    write_output(page, text, "file with -o")
    return [page, *written]


def _draw_pictures(run: RecordedRun, shares: Sequence[Share]) -> list[Picture]:
    """Return the pictures in the order of the page."""
    captions = {
        "accuracy": "A stage's exit is its own classifier; "
        "the last stage's is the whole network's.",
        "loss": "Means between two records.",
        "shares": "The busiest worker sets the pace.",
        "memory": "One process a rank.",
    }
    headings = {
        "accuracy": f"{run.metric.words.capitalize()} of every exit",
        "loss": "Local loss of every stage",
        "shares": "Busy and waiting",
        "memory": "Memory",
    }
    figures = {
        "accuracy": draw_metric(run),
        "loss": draw_loss(run),
        "shares": draw_shares(shares),
        "memory": draw_memory(run),
    }
    pictures = [_draw_timeline_picture(run)]
    for name, figure in figures.items():
        caption = captions[name] if figure is not None else "nothing has been recorded yet"
        pictures.append(Picture(name, headings[name], caption, figure))
    return pictures


def _draw_timeline_picture(run: RecordedRun) -> Picture:
    heading = "Timeline of all stages, steady state"
    if run.trace is None:
        return Picture("timeline", heading, _explain_missing_trace(run), None)
    try:
        window = steady_window(trace_rows(run.trace))
    except (KeyError, TypeError, ValueError):
        return Picture("timeline", heading, "trace.json holds no trace of this run", None)
    if window is None:
        return Picture("timeline", heading, "the trace holds no training step", None)
    caption = (
        f"{window.computing:.2f} of {run.config.pipeline.processes} workers compute at once on "
        f"average, and at least two of them {100 * window.overlap:.0f} % of the time. All workers, "
        "one clock; thin bars wait. trace.json opens in Perfetto and in chrome://tracing."
    )
    return Picture("timeline", heading, caption, draw_timeline(window))


def _explain_missing_trace(run: RecordedRun) -> str:
    if not run.config.run.trace:
        return NO_TRACE
    if run.summary is None:
        return UNFINISHED_TRACE
    return LOST_TRACE


def _save_pictures(pictures: Sequence[Picture], page: Path) -> list[Path]:
    """Write the pictures as PNG files and return the files."""
    written = []
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            path = page.with_name(f"{page.stem}_{picture.name}.png")
            if picture.figure is None:
                path.unlink(missing_ok=True)  # one of an earlier page
            else:
                picture.figure.savefig(path, dpi=_DPI)
                written.append(path)
    except OSError as error:
        raise RunError(
            f"report: cannot write beside {page}: {error.strerror}; choose another with -o"
        ) from None
    return written


def _encode_picture(picture: Picture) -> str | None:
    """Return the picture as SVG inside an address, so that the page needs no other file."""
    if picture.figure is None:
        return None
    buffer = io.BytesIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    picture.figure.savefig(buffer, format="svg", metadata=no_metadata)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/svg+xml;base64,{encoded}"


def _list_facts(run: RecordedRun) -> Iterator[tuple[str, str]]:
    """Yield the headline: a name and its value."""
    summary, processes = run.summary, run.config.pipeline.processes
    if summary is None:
        of_steps = "" if run.steps is None else f" of {run.steps}"
        yield "unfinished", f"step {run.last_step}{of_steps}"
    else:
        chosen_on = "validation" if run.config.data.validation else "test"
        metric = run.metric
        best = metric.format(read_best(summary))
        efficiency = format_number(summary["efficiency"], digits=2)
        yield f"{metric.words}, last", metric.format(read_last(summary))
        yield f"{metric.words}, best on {chosen_on}", f"{best} (epoch {summary['best_epoch']})"
        top5 = summary.get(f"test_{TOP5_ACCURACY.name}")
        if top5 is not None:
            yield f"{TOP5_ACCURACY.words}, last", TOP5_ACCURACY.format(top5)
        yield "samples/s", format_number(summary["train_samples_per_s"])
        yield "bound (from spans)", format_number(summary["bound_samples_per_s"])
        yield "efficiency", efficiency
        yield "steps", f"{summary['steps']:,} in {summary['wall_s']:,.0f} s"
        yield "training MMACs/sample", f"{summary['train_macs_per_sample'] / 1e6:,.1f}"
    yield "stages on processes", f"{run.stages} on {processes}"
    yield "seed", str(run.config.run.seed)


def _build_stage_rows(run: RecordedRun, shares: Sequence[Share]) -> list[dict[str, Any]]:
    """Return a table row for every stage."""
    rows = []
    for stage in range(run.stages):
        evaluations = list(run.of("eval", stage, "test"))
        metric = run.metric
        value = evaluations[-1].get(metric.name) if evaluations else None
        row = {
            "stage": str(stage),
            "local loss": _find_last_loss(run, stage),
            f"exit {metric.words}": metric.format(value),
        }
        if evaluations and TOP5_ACCURACY.name in evaluations[-1]:
            top5 = evaluations[-1][TOP5_ACCURACY.name]
            row[f"exit {TOP5_ACCURACY.words}"] = TOP5_ACCURACY.format(top5)
        summary = run.summary
        probes = [] if summary is None else read_probes(summary)
        if probes:
            row["probe"] = metric.format(probes[stage])
        busy = receive = send = None
        if shares:
            busy, receive, send = shares[stage].busy, shares[stage].receive, shares[stage].send
        row["busy"] = format_percent(busy)
        row["waits to receive"] = format_percent(receive)
        row["waits to send"] = format_percent(send)
        if summary is not None:
            saved = summary["saved_activation_bytes_per_sample"][stage]
            row["efficiency"] = format_percent(summary["busy_share_per_stage"][stage])
            row["KiB saved/sample"] = f"{saved / 1024:,.0f}"
        rows.append(row)
    return rows


def _find_last_loss(run: RecordedRun, stage: int) -> str:
    """Return the summary's loss of a stage, or the newest that was recorded."""
    if run.summary is not None:
        loss = run.summary["loss_per_stage"][stage]
    else:
        records = list(run.of("train", stage))
        loss = records[-1]["loss"] if records else None
    return "-" if loss is None else f"{loss:.4f}"


def _make_environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
