"""Every `auto` is decided from facts alone: no data set is read, and no device is looked at."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from localpipe import config as configs
from localpipe.config.resolve import DataFacts, Facts, MachineFacts, resolve
from localpipe.config.resolved import Resolved
from localpipe.config.resume import join_recorded
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


@pytest.mark.parametrize(
    ("sample", "sections", "batch"),
    [
        (None, {}, None),
        ((3, 64, 48), {}, 4),
        ((3, 64, 48), {"optim": {"accumulate": 2}}, 2),
        ((3, 64, 48), {"pipeline": {"stages": 1, "replicas": 4}}, 1),
        ((3, 16, 12), {}, 64),
    ],
)
def test_an_evaluation_message_has_as_many_pixels_as_a_training_message_or_one_image(
    sample: tuple[int, ...] | None, sections: dict[str, Any], batch: int | None
) -> None:
    facts = replace(DIGITS, evaluation_sample=sample)
    given = configs.parse({"data": {"batch_size": 16}, **sections}, "test")
    config = resolve(given, Facts(facts, MachineFacts(cores=1)))
    assert (config.evaluation_sample, config.evaluation_batch) == (sample, batch)
    assert config.data.evaluation_size == (None if sample is None else sample[1:])


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


@pytest.mark.parametrize(
    ("name", "data", "weights", "rate"),
    [
        ("sgd", "cifar10", None, 0.8),
        ("sgd", "imagenet", None, 0.4),
        ("adamw", "cifar10", None, 1e-3),
        ("adamw", "imagenet", None, 1e-3),
        ("adamw", "cifar10", "w.pt", 1e-4),
        ("sgd", "imagenet", "w.pt", 0.04),
    ],
)
def test_the_rate_follows_the_optimizer_the_data_and_trained_weights(
    name: str, data: str, weights: str | None, rate: float
) -> None:
    config = decide(
        MachineFacts(cores=1),
        optim={"name": name},
        data={"name": data, "batch_size": 1024},
        model={"weights": weights},
    )
    assert config.optim.lr == pytest.approx(rate)


def test_the_automatic_rate_on_imagenet_brings_its_cosine_and_no_warmup() -> None:
    machine, images = MachineFacts(cores=1), {"name": "imagenet"}

    def decided(**keys: Any) -> tuple[str, float]:
        optim = decide(machine, data=images, optim=keys).optim
        return optim.schedule, optim.warmup_epochs

    assert decided() == ("cosine_epoch_from_0", 0)
    assert decided(lr=0.1) == decided(name="adamw") == ("cosine_epoch", 10)
    assert decided(schedule="step", warmup_epochs=3) == ("step", 3)


def test_the_schedule_of_imagenet_is_kept_by_the_same_command() -> None:
    given = configs.parse({"data": {"name": "imagenet"}}, "test")
    recorded = decide(MachineFacts(cores=1), data={"name": "imagenet"})
    assert join_recorded(given, recorded, "run").optim == recorded.optim
    # A run of a version that took cosine_epoch there goes on as it began.
    old = decide(MachineFacts(cores=1), data={"name": "imagenet"}, optim={"lr": 0.1})
    assert join_recorded(given, old, "run").optim == old.optim
    explicit = configs.parse({"data": {"name": "imagenet"}, "optim": {"lr": 0.07}}, "test")
    with pytest.raises(UserError, match="config: optim.lr is 0.07"):
        join_recorded(explicit, recorded, "run")


@pytest.mark.parametrize("keys", [{"warmup_steps": 5}, {"epochs": None, "max_steps": 9}])
def test_an_automatic_warmup_is_0_where_steps_are_given(keys: dict[str, Any]) -> None:
    assert decide(MachineFacts(cores=1), optim=keys).optim.warmup_epochs == 0


# --- lengths


def test_a_length_in_steps_is_refused_another_one_where_rates_depend_on_it() -> None:
    steps = {"epochs": None, "max_steps": 9}
    recorded = decide(MachineFacts(cores=1), optim=steps)
    for changed in ({**steps, "max_steps": 10}, {}):
        given = configs.parse({"optim": changed}, "test")
        with pytest.raises(UserError, match="rates of cosine_epoch depend on it; give "):
            join_recorded(given, recorded, "run")
    constant = {**steps, "schedule": "constant"}
    recorded = decide(MachineFacts(cores=1), optim=constant)
    given = configs.parse({"optim": {**constant, "max_steps": 10}}, "test")
    assert join_recorded(given, recorded, "run").optim.max_steps == 10


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        (
            {"epochs": None},
            r"^config: optim.epochs and optim.max_steps are both null, .*; set one of them \(test",
        ),
        (
            {"warmup_steps": 3, "warmup_epochs": 1.5},
            r"^config: optim.warmup_steps 3 and optim.warmup_epochs 1.5 are both a warm-up; leave",
        ),
        (
            {"schedule": "poly", "lr": 0.1, "min_lr": 0.2},
            r"^config: optim.min_lr 0.2 is above the peak, optim.lr 0.1; lower optim.min_lr",
        ),
        ({"clip": 0}, "^config: optim.clip must be a number above 0 or null"),
        ({"ema": 1.0}, "^config: optim.ema must be a number above 0 and below 1 or null"),
        ({"betas": [0.9]}, "^config: optim.betas must be a list of 2 numbers"),
    ],
)
def test_what_cannot_be_is_one_line(optim: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        configs.parse({"optim": optim}, "test")


@pytest.mark.parametrize(
    ("value", "expected"),
    [(3, 3), ("3 epochs", 3), ("1 epoch", 1), ("100 steps", "100 steps"), ("1 step", "1 steps")],
)
def test_an_interval_is_in_epochs_or_in_steps(value: Any, expected: Any) -> None:
    config = configs.parse({"run": {"evaluate_every": value}}, "test")
    assert config.run.evaluate_every == expected


@pytest.mark.parametrize("value", [0, "0 steps", "-1 steps", "3 days", "steps", "1.5 epochs", True])
def test_any_other_interval_is_refused(value: Any) -> None:
    expected = "evaluate_every must be a whole number at least 1 or `N steps`"
    with pytest.raises(UserError, match=expected):
        configs.parse({"run": {"evaluate_every": value}}, "test")


def test_a_run_that_recovers_keeps_its_edges_in_host_memory() -> None:
    run = {"recover": "stage", "deterministic": True}
    config = decide(MachineFacts(cores=8, cuda_devices=4), run=run)
    assert (config.run.device, config.pipeline.backend) == ("cuda", "gloo")
    assert config.recovers and config.pipeline.replay == 8


def test_messages_are_kept_for_recovery_alone() -> None:
    machine = MachineFacts(cores=8)
    assert decide(machine, pipeline={"replay": 40}).pipeline.replay is None
    recovers = {"recover": "stage"}
    assert decide(machine, pipeline={"replay": 40}, run=recovers).pipeline.replay == 40
    for replay in ("auto", None):
        config = decide(
            machine, pipeline={"replay": replay, "depth": 5}, optim={"accumulate": 4}, run=recovers
        )
        assert config.pipeline.replay == 20


def test_recovery_is_refused_where_lost_steps_may_come_out_otherwise() -> None:
    with pytest.raises(UserError, match="on CUDA they differ .*; set run.deterministic=true"):
        decide(MachineFacts(cores=8, cuda_devices=4), run={"recover": "stage"})


def test_recovery_is_refused_under_torchrun_which_has_its_own() -> None:
    with pytest.raises(UserError, match="with --max-restarts torchrun starts all workers again"):
        decide(MachineFacts(cores=8, world=4), run={"recover": "stage"})
