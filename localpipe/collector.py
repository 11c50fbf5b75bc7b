"""Follows metrics.jsonl while a run writes it: the live view, the trackers, and last of all summary.json."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import localpipe
from localpipe import config as configs
from localpipe import metrics, trace
from localpipe.job import (
    CONFIG_FILE,
    METRICS_FILE,
    SUMMARY_FILE,
    Job,
    file_sha256,
    image_of,
    plans_of,
)
from localpipe.loader import Course
from localpipe.mesh import hosts
from localpipe.planner import measure
from localpipe.sections import Config
from localpipe.tracker import trackers
from localpipe.view import View, print_summary


class Collector:
    """One for a run: in localpipe's launcher, or in rank 0 under torchrun. The workers only append to metrics.jsonl."""

    def __init__(self, config: Config, todo: Course, decided: Job) -> None:
        self._config, self._job = config, decided
        self._run_dir = Path(config.run.dir)
        self._offset = 0
        self._evals: list[dict[str, Any]] = []
        self._trackers = trackers(
            self._run_dir, decided.start_step, config.run.wandb, decided.config
        )
        self._view = View(config, todo)

    def tick(self) -> None:
        """Take in what was written since the last call."""
        for record in self._new():
            if record["kind"] == "eval":
                self._evals.append(record)
            for tracker in self._trackers:
                tracker.add(record)
            self._view.add(record)
        self._view.refresh()

    def close(self) -> None:
        """Give the terminal back, and join what the workers have left of a trace."""
        self._view.close()
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []
        if self._config.run.trace:
            trace.merge(self._run_dir)

    def finish(self, store: dist.Store) -> bool:
        """Write summary.json when the run has made all its steps and every stage its last evaluation; return whether."""
        self.tick()
        self.close()
        stages = self._config.pipeline.stages
        assert stages is not None
        ends = [json.loads(store.get(f"end/{stage}")) for stage in range(stages)]
        steps = self._view.course.steps
        judged = {e["stage"] for e in self._evals if e["step"] == steps and e["split"] == "test"}
        if (
            ends[-1]["step"] < steps or len(judged) < stages
        ):  # stopped in the last evaluation: a resume begins with it
            return False
        assert isinstance(self._config.pipeline.processes, int)
        peaks = [int(store.get(f"peak/{rank}")) for rank in range(self._config.pipeline.processes)]
        summary = self._summary(ends, peaks)
        metrics.write_whole(self._run_dir / SUMMARY_FILE, json.dumps(summary, indent=1) + "\n")
        print_summary(summary, str(self._run_dir))
        return True

    def _new(self) -> Iterator[dict[str, Any]]:
        with (
            contextlib.suppress(FileNotFoundError),
            open(self._run_dir / METRICS_FILE, "rb") as file,
        ):
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                with contextlib.suppress(ValueError):
                    yield json.loads(line)

    def _summary(self, ends: list[dict[str, Any]], peaks: list[int]) -> dict[str, Any]:
        config = self._config
        stages = len(ends)
        last_step = ends[-1]["step"]
        last = {
            e["stage"]: e for e in self._evals if e["step"] == last_step and e["split"] == "test"
        }
        final = {stage: record["accuracy"] for stage, record in last.items()}
        probed = (
            [last[stage]["probe_accuracy"] for stage in range(stages)]
            if config.run.probe != "none"
            else None
        )
        best = _best([e for e in self._evals if e["stage"] == stages - 1])
        costs = measure(*plans_of(config, image_of(config)), config)
        speed = _speed(config, ends)
        return {
            "schema": metrics.SCHEMA,
            "test_accuracy": final[stages - 1],
            "best_test_accuracy": best["accuracy"],
            "best_epoch": best["epoch"],
            "test_accuracy_per_stage": [final[stage] for stage in range(stages)],
            "probe_accuracy_per_stage": probed,
            "loss_per_stage": [end["loss"] for end in ends],
            "busy_s_per_stage": [round(end["busy_s"], 3) for end in ends],
            "busy_share_per_stage": [_share(end["pace"]) for end in ends],
            "saved_activation_bytes_per_sample": [
                cost.activation_bytes_per_sample for cost in costs
            ],
            "train_macs_per_sample": sum(cost.train_macs for cost in costs),
            "inference_macs_per_sample": sum(cost.macs + cost.context_macs for cost in costs),
            "aux_params": sum(cost.aux_params for cost in costs),
            "context_params": sum(cost.context_params for cost in costs),
            "seed": config.run.seed,
            "epochs": config.optim.epochs,
            "config_sha256": file_sha256(self._run_dir / CONFIG_FILE),
            "data_sha256": self._job.data_sha256,
            "localpipe": localpipe.__version__,
            "torch": torch.__version__,
            **speed,
            "peak_memory_bytes": peaks,
            "stages": stages,
            "processes": config.pipeline.processes,
            "replicas": config.pipeline.replicas,
            "steps": last_step,
            "deterministic": config.run.deterministic,
            "wall_s": round(self._job.elapsed_s + time.time() - self._job.started, 3),
            "weights_sha256": metrics.digest(line for end in ends for line in end["weights"]),
        }


def _best(evals: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the test record of the best epoch, the earliest of equals, chosen on held-out images where there are some."""
    chosen_on = "validation" if any(e["split"] == "validation" for e in evals) else "test"
    candidates = [e for e in evals if e["split"] == chosen_on]
    step = max(candidates, key=lambda e: (e["accuracy"], -e["step"]))["step"]
    return next(e for e in evals if e["split"] == "test" and e["step"] == step)


def _speed(config: Config, ends: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the throughput of the last stage and the bound that the workers' compute spans give."""
    processes = config.pipeline.processes
    assert isinstance(processes, int)
    paces = [end["pace"] for end in ends]
    if any(not pace["samples"] for pace in paces):
        return {
            "train_samples_per_s": None,
            "bound_samples_per_s": None,
            "bound_from": "spans",
            "efficiency": None,
        }
    rate = paces[-1]["samples"] / paces[-1]["wall_s"]
    per_sample = [
        sum(paces[stage]["compute_s"] / paces[stage]["samples"] for stage in host.stages)
        for host in hosts(configs.replicas_of(config), processes)
        if host.replica == 0
    ]
    bound = 1 / max(per_sample)
    fits = all(end["has_cores"] for end in ends)
    return {
        "train_samples_per_s": round(rate, 2),
        "bound_samples_per_s": round(bound, 2),
        "bound_from": "spans",
        "efficiency": round(rate / bound, 4) if fits else None,
    }


def _share(pace: dict[str, float]) -> float | None:
    return round(pace["compute_s"] / pace["wall_s"], 4) if pace["wall_s"] else None
