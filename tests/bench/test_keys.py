"""Benchmarks under keys that shape a step, and on files that cannot be written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from localpipe import config as configs
from localpipe.bench import launch, memory, peer_cuts, processes
from localpipe.bench.systems.local import LOCALPIPE
from localpipe.bench.systems.part import Part
from localpipe.bench.systems.plain import choose_segments, count_plain_saved_bytes
from localpipe.bench.systems.spec import SystemRequest
from localpipe.cli.bench import COMMAND
from localpipe.cli.command_line import build_parser, main
from localpipe.config.keys import Bench
from localpipe.config.load import to_dict
from localpipe.pipeline.stages.stage_plan import build_blueprint, build_plans
from localpipe.plan.costs import count_costs
from tests.harness import settings


class _Stop(Exception):  # noqa: N818 - it only ends what is looked at
    pass


@pytest.mark.parametrize("module", [processes, peer_cuts])
def test_no_rate_makes_what_is_timed_diverge(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Any] = []

    def start(config: Any, job: Any, name: str, **_: Any) -> None:
        jobs.append(job)
        raise _Stop

    monkeypatch.setattr(module, "Workers", start)
    config = settings(tmp_path, optim={"lr": 1e6, "schedule": "cosine_epoch"})
    with pytest.raises(_Stop):
        if module is processes:
            processes.SystemProcesses(SystemRequest("localpipe"), config, lambda: 0)
        else:
            peer_cuts.measure_blocks(config, [4])
    optim = jobs[0].config["optim"]
    assert (optim["lr"], optim["schedule"]) == (0.0, "constant")
    assert config.optim.lr == 1e6


def test_bytes_between_replicas_count_as_those_of_ddp(tmp_path: Path) -> None:
    def sent(replicas: int) -> int:
        pipeline = {"stages": 2, "replicas": replicas, "processes": replicas}
        config = settings(tmp_path, pipeline=pipeline)
        return LOCALPIPE.count_sent_bytes(config, SystemRequest("localpipe"))

    config = settings(tmp_path, pipeline={"stages": 2})
    blueprint, plans = build_plans(config)
    parameters = sum(c.params + c.aux_params for c in count_costs(blueprint, plans, config))
    assert sent(1) == 0
    assert sent(2) == 2 * 4 * parameters
    assert sent(4) == 6 * 4 * parameters


def network(num_classes: int) -> nn.Sequential:
    """Return blocks of which every second one writes into its input."""
    blocks: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1)]
    for _ in range(3):
        blocks += [nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
    return nn.Sequential(*blocks, head)


@pytest.mark.parametrize("segments", [2, 3, 7])
def test_a_checkpointed_segment_may_begin_by_writing_in_place(
    segments: int, tmp_path: Path
) -> None:
    config = settings(tmp_path, model={"name": f"{__name__}:network"}, pipeline={"stages": 2})
    blueprint = build_blueprint(config)
    assert choose_segments(blueprint, config) > 1
    assert count_plain_saved_bytes(blueprint, config, segments) > 0
    gradients = []
    image = torch.rand(4, *blueprint.sample)
    for count in (1, segments):
        part = Part(blueprint, 0, len(blueprint.blocks) - 1, config)
        part.segments = count
        part(image).square().sum().backward()
        gradients.append([parameter.grad for parameter in part.parameters()])
        assert part.blocks.training
    for plain, again in zip(*gradients, strict=True):
        assert plain is not None and again is not None and torch.equal(plain, again)


def test_a_case_that_a_gpu_is_too_small_for_ends_no_other_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peaks = iter([2**30, 2**29])

    def measure(*_: Any) -> int:
        try:
            return next(peaks)
        except StopIteration:
            raise torch.OutOfMemoryError("too large") from None

    monkeypatch.setattr(memory, "measure_cuda_peak", measure)
    config = settings(tmp_path, pipeline={"stages": 2})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    given = configs.parse({**to_dict(config), "method": "dgl"}, "test")
    case = memory.MemoryCase("dgl", "equal", 2, config)
    rows = []
    for _ in range(3):
        row = memory.memory_row(case, build_blueprint(config), is_published=False)
        rows.append(row)
        row["against_e2e"] = None
        row["peak_against_e2e"] = memory._compare_with_first(rows, "peak_memory_bytes")
    assert [row["peak_memory_bytes"] for row in rows] == [2**30, 2**29, None]
    assert [row["peak_against_e2e"] for row in rows] == [0, -0.5, None]
    memory._show(rows, given, "a GPU")
    assert "too large" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "--json", "."], "is a folder"),
        (["--memory", "--json", "no/such/file"], "no folder"),
        (["--json", "."], "is a folder"),
        (["--picture", "no/p.png"], "no folder"),
        (["data.batch_size=100000"], "make no batch of 100000"),
        (["run.capture=graphs", "run.device=cpu"], "config: run.capture is graphs"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for module, name in ((launch, "resolve_request"), (memory, "memory_row")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("something was measured"))
    assert main(["bench", "demo", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_the_help_has_the_defaults_of_the_keys() -> None:
    _, parsers = build_parser()
    text = parsers["bench"].format_help()
    assert f"in turn ({Bench().windows})" in text
    assert f"window ({Bench().window_s:g})" in text
    assert f"have them ({Bench().micro_batches[0]})" in text
    assert COMMAND.help


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("cuts", ["equal", "memory"])
def test_memory_of_a_decoder_has_a_row_for_every_method_that_reads_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cuts: str
) -> None:
    """Tokens need no gradient, and torch would not run the first segment again."""
    text, target = tmp_path / "text", tmp_path / "memory.json"
    text.write_bytes(bytes(range(256)) * 8)
    words = [
        "model={name: gpt, args: {depth: 3, width: 8, heads: 2}}", "data.name=bytes",
        f"data.root={text}", "data.length=16", "data.batch_size=8", "data.augment=none",
        f"pipeline.cuts={cuts}",
    ]  # fmt: skip
    assert main(["bench", "demo", "--memory", "--json", str(target), *words]) == 0
    rows = json.loads(target.read_text())["rows"]
    methods = {row["method"] for row in rows}
    assert {"e2e", "checkpoint", "dgl", "auglocal", "sgr"} <= methods
    left_out = capsys.readouterr().err
    for method in ("predsim", "infopro", "contsup"):
        assert method not in methods and f"note: {method} is left out: objective: " in left_out
