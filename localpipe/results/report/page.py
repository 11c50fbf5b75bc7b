"""One self-contained HTML page of a run, and the same pictures as PNG files beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure

import localpipe
from localpipe.config.load import to_yaml
from localpipe.errors import RunError
from localpipe.files import write_whole
from localpipe.results.report.figures import (
    draw_accuracy,
    draw_loss,
    draw_memory,
    draw_shares,
    draw_timeline,
)
from localpipe.results.report.shares import Share, stage_shares
from localpipe.results.report.timeline import Window, steady_window
from localpipe.runs.directory import RunDirectory, read_run_directory
from localpipe.runs.trace import trace_rows

NO_TRACE = (
    "this run wrote no trace; add run.trace=true to the command of a run to have its timeline here"
)
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": "#888888",
}
_DPI = 110


@dataclass(frozen=True)
class Picture:
    """A figure under its heading, or the words that say why there is none."""

    name: str
    heading: str
    caption: str
    figure: Figure | None


def write_report(run_dir: Path, target: Path | None = None) -> list[Path]:
    """Write the page of a run (RUN_DIR/report.html) and its PNG files, named after it; return what was written."""
    run = read_run_directory(run_dir)
    page = target if target is not None else run_dir / "report.html"
    rows = () if run.trace is None else trace_rows(run.trace)
    window = steady_window(rows)
    divided = stage_shares(run)
    with matplotlib.rc_context(_STYLE):
        pictures = _pictures(run, window, divided)
        embedded = [{**vars(picture), "source": _data_uri(picture)} for picture in pictures]
        try:
            page.parent.mkdir(parents=True, exist_ok=True)
            written = [path for picture in pictures if (path := _save(picture, page)) is not None]
        except OSError as error:
            raise RunError(
                f"report: cannot write beside {page}: {error.strerror}; choose another with -o"
            ) from None
    settings, facts, stages = to_yaml(run.config), list(_facts(run)), _stages(run, divided)
    template = _environment().get_template("page.html")
    text = template.render(
        version=localpipe.__version__,
        run=run,
        facts=facts,
        stages=stages,
        settings=settings,
        pictures=embedded,
    )
    write_whole(page, text)
    return [page, *written]


def _pictures(run: RunDirectory, window: Window | None, divided: list[Share]) -> list[Picture]:
    drawn = None if window is None else draw_timeline(window)
    said = NO_TRACE if run.trace is None else "the trace holds no training step"
    if window is not None:
        said = (
            f"{window.computing:.2f} of {run.config.pipeline.processes} workers compute at once on average, and at least "
            f"two of them {100 * window.overlap:.0f} % of the time. All workers, one clock; thin bars wait. trace.json "
            "opens in Perfetto and in chrome://tracing."
        )
    exits = "A stage's exit is its own classifier; the last stage's is the whole network's."
    none = "nothing has been recorded yet"
    return [
        Picture("timeline", "Timeline of all stages, steady state", said, drawn),
        _picture("accuracy", "Accuracy of every exit", exits, draw_accuracy(run), none),
        _picture(
            "loss",
            "Local loss of every stage",
            "Means between two records.",
            draw_loss(run),
            none,
        ),
        _picture(
            "shares",
            "Busy and waiting",
            "The busiest worker sets the pace.",
            draw_shares(divided),
            none,
        ),
        _picture("memory", "Memory", "One process a rank.", draw_memory(run), none),
    ]


def _picture(name: str, heading: str, caption: str, figure: Figure | None, none: str) -> Picture:
    return Picture(name, heading, none if figure is None else caption, figure)


def _save(picture: Picture, page: Path) -> Path | None:
    """Write a picture's PNG; remove one of an earlier page where there is no picture now."""
    path = page.with_name(f"{page.stem}_{picture.name}.png")
    if picture.figure is None:
        path.unlink(missing_ok=True)
        return None
    picture.figure.savefig(path, dpi=_DPI)
    return path


def _data_uri(picture: Picture) -> str | None:
    """Return the picture as SVG inside an address, so that the page needs no other file."""
    if picture.figure is None:
        return None
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    picture.figure.savefig(buffer, format="svg", metadata=nothing)
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _facts(run: RunDirectory) -> Iterator[tuple[str, str]]:
    """Yield the headline: (what, how much)."""
    summary, pipeline = run.summary, run.config.pipeline
    if summary is None:
        of = "" if run.steps is None else f" of {run.steps}"
        yield "unfinished", f"step {run.last_step}{of}"
    else:
        chosen = "validation" if run.config.data.validation else "test"
        yield "accuracy, last", _percent(summary["test_accuracy"])
        yield (
            f"accuracy, best on {chosen}",
            f"{_percent(summary['best_test_accuracy'])} (epoch {summary['best_epoch']})",
        )
        yield "samples/s", _number(summary["train_samples_per_s"])
        yield "bound (from spans)", _number(summary["bound_samples_per_s"])
        yield "efficiency", "-" if summary["efficiency"] is None else f"{summary['efficiency']:.2f}"
        yield "steps", f"{summary['steps']:,} in {summary['wall_s']:,.0f} s"
        yield "training MMACs/sample", f"{summary['train_macs_per_sample'] / 1e6:,.1f}"
    yield "stages on processes", f"{run.stages} on {pipeline.processes}"
    yield "seed", str(run.config.run.seed)


def _stages(run: RunDirectory, divided: list[Share]) -> list[dict[str, Any]]:
    """Return a table row for every stage."""
    summary = run.summary or {}
    probes = summary.get("probe_accuracy_per_stage")
    rows = []
    for stage in range(run.stages):
        trained, judged = list(run.of("train", stage)), list(run.of("eval", stage, "test"))
        share = divided[stage] if divided else None
        losses = summary.get("loss_per_stage") or [record["loss"] for record in trained[-1:]]
        told = losses[stage] if summary else next(iter(losses), None)
        row = {
            "stage": str(stage),
            "local loss": "-" if told is None else f"{told:.4f}",
            "exit accuracy": _percent(judged[-1]["accuracy"] if judged else None),
            "probe": _percent(probes[stage]) if probes else None,
            "busy": _percent(share.busy if share else None),
            "waits to receive": _percent(share.receive if share else None),
            "waits to send": _percent(share.send if share else None),
            "efficiency": _percent(summary["busy_share_per_stage"][stage]) if summary else None,
            "KiB saved/sample": f"{summary['saved_activation_bytes_per_sample'][stage] / 1024:,.0f}"
            if summary
            else None,
        }
        rows.append({name: value for name, value in row.items() if value is not None})
    return rows


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
