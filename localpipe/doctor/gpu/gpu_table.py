"""The Markdown page of `localpipe doctor --gpu`, made of the report's JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def format_report(report: Mapping[str, Any]) -> str:
    """Return the page: a line on the machine, and a table of all steps and findings.

    report: the content of the JSON file.
    """
    lines = ["# localpipe doctor --gpu", "", _describe_machine(report), ""]
    lines += ["| step | what | status | result |", "|---|---|---|---|"]
    for step in report["steps"]:
        for cells in _list_step_rows(step):
            lines.append("| " + " | ".join(map(_escape, cells)) + " |")
    for step in report["steps"]:
        lines += _list_drawings(step)
    return "\n".join(lines) + "\n"


def _describe_machine(report: Mapping[str, Any]) -> str:
    machine = report["machine"]
    request = f"localpipe {report['localpipe']}, {report['minutes']:g} minutes"
    if report["size"] != "full":
        request += f", size {report['size']}: a rehearsal, its figures mean nothing"
    if machine is None:
        return request
    devices = machine["devices"]
    counted = [f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices)]
    line = (
        f"{', '.join(counted)}; torch {machine['torch']}, CUDA {machine['cuda']}, "
        f"NCCL {machine['nccl']}, {machine['cores']} cores; {request}"
    )
    if machine["emulated"]:
        return f"**emulated: true** (no real device) {line}"
    return line


def _list_step_rows(step: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield the row of a step itself, and a row for each of its findings."""
    status = step["status"]
    if step["wall_s"] is not None:
        status += f", {step['wall_s']:.0f} of {step['limit_s']:.0f} s"
    yield f"**{step['name']}**", step["question"], status, step["reason"]
    for finding in step["findings"]:
        yield "", finding["name"], finding["status"], finding["text"]


def _list_drawings(step: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of what a step found as a drawing, such as the links between devices."""
    for finding in step["findings"]:
        drawing = finding["figures"].get("lines")
        if drawing:
            yield from ("", f"{finding['name']}:", "", "```text", *drawing, "```")


def _escape(text: str) -> str:
    """Return a text for a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")
