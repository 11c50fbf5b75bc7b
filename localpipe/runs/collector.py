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
from localpipe.config.resolved import Resolved
from localpipe.files import SCHEMA, write_whole
from localpipe.pipeline.launch.job import Job
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.stages.weights import weights_digest
from localpipe.pipeline.workers.steps import StepSchedule
from localpipe.plan.costs import count_costs
from localpipe.runs.directory import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, file_sha256
from localpipe.runs.progress import View
from localpipe.runs.summary import _best, _share, _speed, print_summary
from localpipe.runs.trace import merge_traces
from localpipe.runs.trackers import build_trackers


class Collector:
    """One for a run: in localpipe's launcher, or in rank 0 under torchrun. The workers only append to metrics.jsonl."""

    def __init__(self, config: Resolved, todo: StepSchedule, decided: Job) -> None:
        self._config, self._job = config, decided
        self._run_dir = Path(config.run.dir)
        self._offset = 0
        self._evals: list[dict[str, Any]] = []
        self._trackers = build_trackers(
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
            merge_traces(self._run_dir)

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
        peaks = [int(store.get(f"peak/{rank}")) for rank in range(self._config.pipeline.processes)]
        summary = self._summary(ends, peaks)
        write_whole(self._run_dir / SUMMARY_FILE, json.dumps(summary, indent=1) + "\n")
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
        costs = count_costs(*build_plans(config), config)
        speed = _speed(config, ends)
        return {
            "schema": SCHEMA,
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
            "weights_sha256": weights_digest(line for end in ends for line in end["weights"]),
        }
