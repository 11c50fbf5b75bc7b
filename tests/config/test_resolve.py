"""Every `auto` is decided from facts alone: no data set is read, and no device is looked at."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from localpipe import config as configs
from localpipe.config.resolve import DataFacts, Facts, MachineFacts, resolve
from localpipe.config.resolved import Resolved
from localpipe.errors import UserError

DIGITS = DataFacts((3, 32, 24), 7, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), "crop")


def decide(machine: MachineFacts, **sections: dict[str, Any]) -> Resolved:
    """Return a configuration resolved for a machine."""
    return resolve(configs.parse(sections, "test"), Facts(DIGITS, machine))


def test_eight_gpus_give_every_stage_a_device() -> None:
    machine = MachineFacts(cores=64, cuda_devices=8)
    config = decide(machine, pipeline={"stages": 8})
    assert (config.run.device, config.pipeline.backend) == ("cuda", "nccl")
    assert (config.pipeline.processes, config.run.threads) == (8, 8)
    assert config.run.deterministic is False


def test_workers_share_the_cores_of_a_machine_without_gpus() -> None:
    config = decide(MachineFacts(cores=3), pipeline={"stages": 8})
    assert (config.run.device, config.pipeline.backend) == ("cpu", "gloo")
    assert (config.pipeline.processes, config.run.threads) == (3, 1)
    assert config.run.deterministic is True


def test_only_the_workers_of_one_machine_share_its_cores() -> None:
    machine = MachineFacts(cores=8, world=4, local_workers=2)
    config = decide(machine, pipeline={"stages": 4})
    assert (config.pipeline.processes, config.run.threads) == (4, 4)


def test_every_replica_gets_as_many_workers_as_the_others() -> None:
    batch = {"batch_size": 96}
    config = decide(MachineFacts(cores=7), data=batch, pipeline={"stages": 4, "replicas": 3})
    assert config.pipeline.processes == 6
    config = decide(MachineFacts(cores=1), pipeline={"stages": 3, "replicas": [1, 2, 1]})
    assert config.pipeline.processes == 4


def test_the_data_set_decides_what_is_auto_of_the_data() -> None:
    config = decide(MachineFacts(cores=1), optim={"epochs": 32}, data={"batch_size": 64})
    assert (config.model.num_classes, config.sample, config.data.augment) == (
        7,
        (3, 32, 24),
        "crop",
    )
    assert (config.data.mean, config.data.std) == (DIGITS.mean, DIGITS.std)
    assert (config.optim.lr, config.optim.warmup_epochs) == (0.05, 2)


def test_given_values_are_kept() -> None:
    machine = MachineFacts(cores=64, cuda_devices=8)
    run = {"device": "cpu", "threads": 2, "deterministic": False}
    config = decide(machine, run=run, pipeline={"processes": 1}, optim={"lr": 1.0})
    assert (config.run.device, config.run.threads, config.run.deterministic) == ("cpu", 2, False)
    assert (config.pipeline.processes, config.optim.lr) == (1, 1.0)


def test_more_workers_of_torchrun_than_stages_are_refused() -> None:
    with pytest.raises(UserError, match="torchrun started 5 workers, but 4 stages .* at most 4$"):
        decide(MachineFacts(cores=8, world=5), pipeline={"stages": 4})


def test_how_image_files_are_checked_is_decided_once() -> None:
    facts = Facts(replace(DIGITS, verify="headers"), MachineFacts(cores=1))
    assert resolve(configs.parse({}, "test"), facts).data.verify == "headers"
    given = configs.parse({"data": {"verify": "none"}}, "test")
    assert resolve(given, facts).data.verify == "none"
