"""Records what a user sees, as the committed text files of tests/recorded.

python -m tests.record                  writes what commands print, and what a run leaves
python -m tests.record --into FOLDER    writes it there; test_recorded.py compares it
python -m tests.record --session FILE   writes tests.txt and errors.txt from FILE
python -m tests.record --missing FILE   prints their lines that FILE has not; status 1 if any

FILE is what `LOCALPIPE_RECORD=FILE python -m pytest` wrote (conftest.py).

Everything is made through the command line, the files of a run, and `localpipe.__all__`. What is
measured is not recorded. A plan whose cut is measured (`pipeline.cuts: time`) is recorded with the
equal cut. Of the other outputs only names and types are recorded.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import runpy
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
RECORDED = ROOT / "tests" / "recorded"
CONFIGS = ROOT / "configs"
COMMANDS = ("train", "eval", "export", "plan", "bench", "report", "compare", "doctor", "configs")
# Of all machines the same: no GPU is seen, and nothing is folded for a terminal.
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "1000", "NO_COLOR": "1"}
TINY = (
    "model.name=resnet8", "pipeline.stages=2", "pipeline.processes=1",
    "data.train_subset=512", "data.validation=64", "data.batch_size=32",
    "optim.epochs=2", "optim.lr=0.05",
    "run.threads=1", "run.probe=linear", "run.trace=true", "run.log_every=4",
)  # fmt: skip


def texts(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of every file; runs and images go into a folder."""
    yield "public.txt", public()
    yield "keys.txt", command("train", "--keys")
    yield "help.txt", helps()
    yield from plans(folder)
    run_dir = folder / "run"
    command("train", "demo", *TINY, f"run.dir={run_dir}")
    yield "tensorboard.txt", tensorboard(run_dir)
    yield "outputs.json", as_text(outputs(folder, run_dir))


def command(*words: object, statuses: tuple[int, ...] = (0,)) -> str:
    """Run localpipe in this process, as `python -m localpipe` does; return what it printed."""
    shown = io.StringIO()
    before, sys.argv = sys.argv, ["localpipe", *map(str, words)]
    try:
        with contextlib.redirect_stdout(shown):
            runpy.run_module("localpipe", run_name="__main__")
    except SystemExit as ended:
        assert (ended.code or 0) in statuses, f"localpipe {words} ended with {ended.code}"
    finally:
        sys.argv = before
    return shown.getvalue()


def as_text(value: Any) -> str:
    """Return JSON with a line for every value, in the order of names."""
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


# -- what is printed -------------------------------------------------------------------------------


def public() -> str:
    """Return the names that `import localpipe` promises."""
    import localpipe

    return "".join(f"{name}\n" for name in sorted(localpipe.__all__))


def helps() -> str:
    """Return the help of localpipe and of its commands, as every version of argparse writes it."""
    shown = {name: command(*name.split(), "--help") for name in ("", *COMMANDS)}
    parts = [f"# localpipe {name}\n{one_help(text)}\n" for name, text in shown.items()]
    return "\n".join(parts).replace("# localpipe \n", "# localpipe\n")


def one_help(text: str) -> str:
    """Return a help without its columns: an argument and what it does are one line."""
    text = re.sub(r"(-\w) ([A-Z]+), (--[\w-]+) \2", r"\1, \3 \2", text)  # before Python 3.13
    text = re.sub(r"\n {8,}", " ", text)
    return "\n".join(" ".join(line.split()) for line in text.splitlines() if line.strip())


def plans(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the plan of every configuration, and of one whose cut is balanced by memory.

    test_papers.py plans the papers' rows.
    """
    images, labels = np.zeros((10, 32, 32, 3), np.uint8), np.arange(10)
    archive = folder / "images.npz"
    np.savez(archive, x_train=images, y_train=labels, x_test=images, y_test=labels)
    for path in sorted(CONFIGS.rglob("*.yaml")):
        name = path.relative_to(CONFIGS).with_suffix("").as_posix()
        if not name.startswith(("clusters/", "papers/")):
            text = path.read_text(encoding="utf-8")
            yield f"plans/{name}.json", plan(name, *without_data(text, archive))
    words = (
        "model.name=resnet110",
        "pipeline.stages=4",
        "pipeline.cuts=memory",
        f"data.root={archive}",
    )
    yield "plans/resnet110_infopro_k4_memory.json", plan("cifar10_resnet32_infopro_k2", *words)


def plan(name: str, *words: str) -> str:
    """Return the plan of a configuration that ships."""
    return as_text(json.loads(command("plan", name, "--json", *words)))


def without_data(text: str, archive: Path) -> Iterator[str]:
    """Yield the overrides that make a plan need no images and no measurement."""
    if re.search(r"name: npz\b", text):
        yield from (f"data.root={archive}", "data.train_subset=null")
    if re.search(r"name: imagenet\b", text):
        yield from ("data.name=synthetic", "data.samples=4", "data.image_size=224")
    if re.search(r"name: image_folder\b", text):
        yield from ("data.name=synthetic", "data.samples=64")
    if re.search(r"weights: [^,]+\.pth\b", text):
        yield "model.weights=null"
    if re.search(r"cuts: time\b", text):
        yield "pipeline.cuts=equal"


# -- what a run and the commands on it leave -------------------------------------------------------


def tensorboard(run_dir: Path) -> str:
    """Return the tags of a run's TensorBoard files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return "".join(f"{tag}\n" for tag in sorted(events.Tags()["scalars"]))


def outputs(folder: Path, run_dir: Path) -> dict[str, Any]:
    """Return the names and types of what a run leaves, and of the JSON of all commands."""
    found: dict[str, Any] = {"files of a run": sorted(path.name for path in run_dir.iterdir())}
    found["summary.json"] = outline(read(run_dir / "summary.json"))
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found["metrics.jsonl"] = by(map(json.loads, lines), lambda record: record["kind"])
    newest = max((run_dir / "checkpoints").glob("step_*"))
    found["checkpoints/step_*/manifest.json"] = outline(read(newest / "manifest.json"))
    trace = read(run_dir / "trace.json")
    events = by(trace.pop("traceEvents"), lambda event: event["ph"])
    found["trace.json"] = {**outline(trace), "traceEvents": events}
    found["eval --json"] = printed("eval", run_dir, "--json")
    found["compare --json"] = printed("compare", run_dir, unfinished(folder, run_dir), "--json")
    found["export"] = exported(folder, run_dir)
    found["doctor --json --quick"] = doctor(folder)

    chain = ("bench/chain_2", "model.args={time_ms: 1, message_bytes: 4096, blocks: 3}")
    cluster = CONFIGS / "clusters" / "internet_8.yaml"
    found["plan --json --cluster"] = printed("plan", "demo", "--json", "--cluster", cluster)
    profile = folder / "profile.json"
    measure = ("--measure", "--profile", profile)
    found["plan --json --measure"] = printed("plan", *chain, "--json", *measure)
    found["plan --measure --profile"] = outline(read(profile))
    short = ("--windows", 1, "--window-s", 0.05, "--systems", "localpipe,e2e")
    command("bench", *chain, *short, "--json", folder / "bench.json")
    found["bench --json"] = benchmark(read(folder / "bench.json"))
    command("bench", "demo", "model.name=resnet8", "--memory", "--json", folder / "memory.json")
    found["bench --memory --json"] = benchmark(read(folder / "memory.json"))
    return found


def read(path: Path) -> Any:
    """Return what a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def printed(*words: object) -> Any:
    """Return the outline of the JSON that a command prints."""
    return outline(json.loads(command(*words)))


def unfinished(folder: Path, run_dir: Path) -> Path:
    """Return a copy of a run that has not ended."""
    copy = folder / "unfinished"
    shutil.copytree(run_dir, copy)
    (copy / "summary.json").unlink()
    return copy


def exported(folder: Path, run_dir: Path) -> dict[str, Any]:
    """Return the outline of the metadata in exported weights, whole and up to an exit."""
    from safetensors import safe_open

    found: dict[str, dict[str, Any]] = {}
    for name, words in (("whole", ()), ("exit", ("--exit", 0))):
        target = folder / f"{name}.safetensors"
        command("export", run_dir, "-o", target, *words)
        with safe_open(str(target), framework="pt") as file:
            metadata = file.metadata()
        found[name] = {}
        for key, text in metadata.items():
            found[name][key] = outline(json.loads(text)) if "{" in text else outline(text)
    return found


def doctor(folder: Path) -> dict[str, Any]:
    """Return the outline of doctor's report. Of figures only the names: a machine may lack any."""
    report = json.loads(command("doctor", "--json", "--quick", "--dir", folder, statuses=(0, 1)))
    for check in report["checks"]:
        check["figures"] = dict.fromkeys(check["figures"], "...")
    checks = by(report.pop("checks"), lambda check: check["name"])
    return {**outline(report), "checks": checks}


def benchmark(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the outline of a benchmark's file; what its configuration holds is in keys.txt."""
    shown = {key: outline(value) for key, value in result.items() if key != "config"}
    return {**shown, "config": sorted(result["config"])}


# -- names and types -------------------------------------------------------------------------------


def outline(value: Any) -> Any:
    """Return a JSON value with names of types in place of values; a list's elements are joined."""
    if isinstance(value, dict):
        return {key: outline(each) for key, each in value.items()}
    if isinstance(value, list):
        return [joined(value)] if value else []
    return {
        bool: "true or false",
        int: "whole number",
        float: "number",
        str: "text",
        type(None): "null",
    }[type(value)]


def joined(records: Iterable[Any]) -> Any:
    """Return one outline of records that may have different keys."""
    return reduce(join, map(outline, records))


def join(first: Any, second: Any) -> Any:
    """Return the outline of what is one or the other."""
    if isinstance(first, dict) and isinstance(second, dict):
        both = {key: join(first[key], second[key]) for key in first.keys() & second.keys()}
        return {key: both.get(key, value) for key, value in {**first, **second}.items()}
    if isinstance(first, list) and isinstance(second, list):
        return [join(first[0], second[0])] if first and second else first or second
    words = {each if isinstance(each, str) else json.dumps(each) for each in (first, second)}
    return " | ".join(sorted({word for text in words for word in text.split(" | ")}))


def by(records: Iterable[dict[str, Any]], kind: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
    """Return one outline for the records of each kind."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(kind(record), []).append(record)
    return {name: joined(found[name]) for name in sorted(found)}


# -- what a test session told ----------------------------------------------------------------------


def write_session(file: Path) -> None:
    """Write the committed lists from the record of a test session."""
    for name, lines in read(file).items():
        text = "".join(f"{line}\n" for line in lines)
        (RECORDED / f"{name}.txt").write_text(text, encoding="utf-8")


def missing(file: Path) -> list[str]:
    """Return the lines of the committed lists that the record of a test session has fewer times."""
    found = []
    for name, lines in read(file).items():
        committed = (RECORDED / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        found += [f"{name}.txt: {line}" for line in Counter(committed) - Counter(lines)]
    return found


def main() -> int:
    """Record what a user sees."""
    parser = argparse.ArgumentParser(prog="python -m tests.record", description=main.__doc__)
    parser.add_argument("--into", type=Path, default=RECORDED, metavar="FOLDER", help="write there")
    parser.add_argument("--session", type=Path, metavar="FILE", help="write the lists of FILE")
    parser.add_argument("--missing", type=Path, metavar="FILE", help="print what FILE lacks")
    asked = parser.parse_args()
    if asked.session is not None:
        write_session(asked.session)
        return 0
    if asked.missing is not None:
        lines = missing(asked.missing)
        print("".join(f"{line}\n" for line in lines), end="")
        return int(bool(lines))
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in texts(Path(folder)):
            (asked.into / name).parent.mkdir(parents=True, exist_ok=True)
            (asked.into / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
