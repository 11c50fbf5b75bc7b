"""The learning rate of a step, against the published values, and the optimizers of stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from localpipe.config.keys import Optim
from localpipe.config.resolve import auto_milestones, auto_warmup
from localpipe.pipeline.stages.learning_rate import LearningRateSchedule
from localpipe.pipeline.stages.optimizer import build_optimizer, build_update, set_rate

STEPS = 7  # of an epoch


def schedule(**keys: Any) -> LearningRateSchedule:
    given = {"lr": 0.8, "warmup_epochs": 10, "epochs": 160, **keys}
    if given.get("schedule") == "step" and "milestones" not in given:
        given["milestones"] = tuple(auto_milestones(given["epochs"] or given["max_steps"]))
    return LearningRateSchedule(Optim(**given), STEPS)


def rate_of_epoch(found: LearningRateSchedule, epoch: int) -> float:
    return found.rate((epoch - 1) * STEPS + 1)


# --- The papers' cosine

INFOPRO_08 = {
    1: 0.01,
    2: 0.08897,
    5: 0.32523,
    10: 0.71408,
    11: 0.79071,
    80: 0.4,
    120: 0.11716,
    160: 0,
}
INFOPRO_01 = {1: 0.01, 10: 0.09014, 11: 0.09884, 80: 0.05}
AUGLOCAL = {
    1: 0.01,
    2: 0.089,
    3: 0.168,
    5: 0.326,
    10: 0.720,
    11: 0.7985,
    100: 0.683,
    200: 0.4,
    300: 0.117,
    400: 0,
}


@pytest.mark.parametrize(
    ("peak", "epochs", "published", "digits"),
    [(0.8, 160, INFOPRO_08, 5e-6), (0.1, 160, INFOPRO_01, 5e-6), (0.8, 400, AUGLOCAL, 5e-4)],
    ids=["infopro 0.8", "infopro 0.1", "auglocal"],
)
def test_cosine_by_epoch_has_the_published_rates(
    peak: float, epochs: int, published: dict[int, float], digits: float
) -> None:
    found = schedule(lr=peak, epochs=epochs)
    for epoch, rate in published.items():
        assert rate_of_epoch(found, epoch) == pytest.approx(rate, abs=digits), epoch


def test_cosine_by_epoch_peaks_behind_the_warmup_and_is_exactly_0_in_the_last_epoch() -> None:
    found = schedule()
    rates = [rate_of_epoch(found, epoch) for epoch in range(1, 161)]
    assert max(rates) == rates[10]
    assert rates[158] == pytest.approx(8e-5, rel=0.05) and rates[159] == 0
    assert rate_of_epoch(schedule(epochs=400), 399) == pytest.approx(1e-5, rel=0.3)


def test_cosine_by_epoch_holds_its_rate_within_an_epoch() -> None:
    found = schedule()
    assert len({found.rate(step) for step in range(1, STEPS + 1)}) == 1
    assert found.rate(STEPS) != found.rate(STEPS + 1)


def test_cosine_by_epoch_without_warmup_is_half_a_cosine_from_the_first_epoch() -> None:
    found = schedule(warmup_epochs=0, epochs=4)
    assert [rate_of_epoch(found, epoch) for epoch in (1, 2, 3, 4)] == pytest.approx(
        [0.68284, 0.4, 0.11716, 0], abs=1e-5
    )


def test_imagenets_cosine_begins_at_the_peak_and_never_reaches_0() -> None:
    found = schedule(schedule="cosine_epoch_from_0", lr=0.4, warmup_epochs=0, epochs=90)
    rates = [rate_of_epoch(found, epoch) for epoch in (1, 2, 46, 90)]
    assert rates == pytest.approx([0.4, 0.399878, 0.2, 0.000122], abs=1e-6)
    assert found.rate(STEPS) == found.rate(1) != found.rate(STEPS + 1)
    half = schedule(schedule="cosine_epoch_from_0", lr=0.4, warmup_epochs=0.5, epochs=90)
    assert max(half.rate(step) for step in range(1, 60)) == 0.4
    behind = schedule(schedule="cosine_epoch_from_0", lr=0.4, warmup_epochs=2, epochs=90)
    assert [behind.rate(step) for step in (1, 2 * STEPS, 2 * STEPS + 1)] == pytest.approx(
        [0.4 / 14, 0.4, 0.4]
    )


@pytest.mark.parametrize(
    ("epochs", "warmup"), [(1, 0), (15, 0), (16, 1), (80, 5), (159, 9), (160, 10), (400, 10)]
)
def test_automatic_warmup_is_a_sixteenth_of_the_epochs_and_at_most_ten(
    epochs: int, warmup: int
) -> None:
    assert auto_warmup(epochs) == warmup


# --- The other schedules


def test_cosine_by_step_rises_to_the_peak_and_falls_to_0_with_the_last_step() -> None:
    found = schedule(schedule="cosine_step", warmup_epochs=2, epochs=200)
    ramp, total = 2 * STEPS, 200 * STEPS
    assert [found.rate(step) for step in (1, 7, 14)] == pytest.approx([0.8 / ramp, 0.4, 0.8])
    falling = [found.rate(step) for step in range(ramp + 1, total + 1)]
    assert all(before > after for before, after in zip(falling, falling[1:], strict=False))
    assert found.rate(ramp + (total - ramp) // 2) == pytest.approx(0.4, rel=0.01)
    assert found.rate(total) == pytest.approx(0, abs=1e-5)


def test_cosine_by_step_without_warmup_starts_at_the_peak() -> None:
    assert schedule(schedule="cosine_step", warmup_epochs=0).rate(1) == pytest.approx(0.8, rel=1e-4)


def test_warmup_of_part_of_an_epoch_counts_in_steps() -> None:
    found = schedule(schedule="constant", warmup_epochs=4 / STEPS)
    assert [found.rate(step) for step in range(1, 7)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 0.8, 0.8]
    )


def test_constant_schedule_is_the_peak_everywhere() -> None:
    found = schedule(schedule="constant", warmup_epochs=0)
    assert {found.rate(step) for step in range(1, 160 * STEPS + 1)} == {0.8}


@pytest.mark.parametrize("name", ["cosine_epoch", "cosine_step", "step", "constant"])
def test_stopping_early_leaves_the_schedule_as_it_is(name: str) -> None:
    whole, cut_off = schedule(schedule=name), schedule(schedule=name, max_steps=20)
    assert [cut_off.rate(step) for step in range(1, 21)] == [
        whole.rate(step) for step in range(1, 21)
    ]


# --- Optimizers


def test_sgd_takes_its_settings_over_every_parameter() -> None:
    layer = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    found = build_optimizer(
        Optim(momentum=0.8, nesterov=True, weight_decay=0.3), layer.parameters()
    )
    assert type(found) is torch.optim.SGD
    (group,) = found.param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.8, True, 0.3)
    assert len(group["params"]) == 4


def test_sgd_without_nesterov() -> None:
    found = build_optimizer(Optim(momentum=0.0, nesterov=False), nn.Linear(3, 2).parameters())
    assert found is not None and not found.param_groups[0]["nesterov"]


def test_adamw_takes_its_weight_decay() -> None:
    found = build_optimizer(Optim(name="adamw", weight_decay=0.3), nn.Linear(3, 2).parameters())
    assert type(found) is torch.optim.AdamW
    assert found.param_groups[0]["weight_decay"] == 0.3


def test_optimizer_moves_nothing_before_its_first_rate_is_set() -> None:
    for name in ("sgd", "adamw"):
        weight = nn.Parameter(torch.ones(3))
        found = build_optimizer(Optim(name=name), [weight])
        weight.sum().backward()
        assert found is not None
        found.step()
        assert torch.equal(weight, torch.ones(3))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_stage_without_parameters_has_no_optimizer(name: str) -> None:
    assert build_optimizer(Optim(name=name), iter([])) is None


def test_adamw_takes_its_betas_and_eps() -> None:
    optim = Optim(name="adamw", betas=(0.8, 0.95), eps=1e-6)
    found = build_optimizer(optim, nn.Linear(3, 2).parameters())
    assert found is not None
    (group,) = found.param_groups
    assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_decay_of_matrices_leaves_norms_and_biases_out(name: str) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 4))
    optim = Optim(name=name, weight_decay=0.3, decay="matrices")
    found = build_optimizer(optim, layers.parameters())
    assert found is not None
    decays = {}
    for group in found.param_groups:
        for parameter in group["params"]:
            decays[id(parameter)] = group["weight_decay"]
    assert [decays[id(p)] for p in layers.parameters()] == [0.3, 0, 0, 0, 0.3, 0]
    norm = build_optimizer(optim, nn.LayerNorm(3).parameters())
    assert norm is not None and [group["weight_decay"] for group in norm.param_groups] == [0]


# --- The update


def draw_gradients(layer: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter.grad = 3 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("clip", [1.0, 1e6])
def test_gradients_are_clipped_as_torch_clips_them(clip: float) -> None:
    layers = [nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    update = build_update(Optim(clip=clip), layers[0].parameters())
    optimizer = build_optimizer(Optim(), layers[1].parameters())
    assert update is not None and optimizer is not None
    for step in range(3):
        for layer in layers:
            draw_gradients(layer, step)
        set_rate(update.optimizer, 0.1)
        set_rate(optimizer, 0.1)
        update.run()
        norm = nn.utils.clip_grad_norm_(layers[1].parameters(), clip)
        assert 1 < norm < 1e6
        optimizer.step()
    for ours, theirs in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_average_is_the_sum_by_the_formula_and_parameters_get_their_bits_back() -> None:
    layer = nn.Linear(3, 2)
    update = build_update(Optim(ema=0.75, momentum=0.0, nesterov=False), layer.parameters())
    assert update is not None and update.average is not None
    set_rate(update.optimizer, 0.1)
    expected = layer.weight.detach().clone()
    for step in range(4):
        draw_gradients(layer, step)
        update.run()
        expected = 0.75 * expected + 0.25 * layer.weight.detach()
    trained, address = layer.weight.detach().clone(), layer.weight.data_ptr()
    with update.average.applied():
        assert torch.allclose(layer.weight, expected, rtol=1e-6)
        assert not torch.equal(layer.weight, trained)
    assert torch.equal(layer.weight, trained) and layer.weight.data_ptr() == address
    update.average.restart()
    with update.average.applied():
        assert torch.equal(layer.weight, trained)


def test_an_update_without_an_average_keeps_none() -> None:
    update = build_update(Optim(), nn.Linear(3, 2).parameters())
    assert update is not None and update.average is None
    assert build_update(Optim(clip=1.0, ema=0.9), iter([])) is None


# --- Schedules in steps


def test_poly_has_the_power_of_nine_tenths_and_ends_near_its_least_rate() -> None:
    found = schedule(schedule="poly", lr=0.5, min_lr=0.1, warmup_epochs=0, epochs=10)
    total = 10 * STEPS
    for step in (1, 20, total):
        expected = 0.1 + 0.4 * (1 - (step - 1) / total) ** 0.9
        assert found.rate(step) == pytest.approx(expected), step
    assert found.rate(total + 1) == found.rate(total + 9) == 0.1  # a benchmark goes on


def test_cosine_by_step_ends_at_the_least_rate() -> None:
    found = schedule(schedule="cosine_step", min_lr=0.2, warmup_epochs=0)
    assert found.rate(1) == pytest.approx(0.8)
    assert found.rate(80 * STEPS + 1) == pytest.approx(0.5)
    assert found.rate(160 * STEPS) == pytest.approx(0.2, abs=1e-4)


@pytest.mark.parametrize("name", ["cosine_epoch_from_0", "cosine_step", "poly", "constant"])
def test_a_warmup_in_steps_is_that_of_as_many_steps_of_epochs(name: str) -> None:
    steps = schedule(schedule=name, warmup_epochs=0, warmup_steps=2 * STEPS)
    epochs = schedule(schedule=name, warmup_epochs=2)
    rates = [[found.rate(step) for step in range(1, 40)] for found in (steps, epochs)]
    assert rates[0] == rates[1]


def test_cosine_by_epoch_with_a_warmup_in_steps_rises_to_the_peak() -> None:
    found = schedule(warmup_epochs=0, warmup_steps=4, epochs=4)
    assert [found.rate(step) for step in (1, 2, 4)] == pytest.approx([0.2, 0.4, 0.8])
    plain = schedule(warmup_epochs=0, epochs=4)
    assert [found.rate(step) for step in range(5, 28)] == [
        plain.rate(step) for step in range(5, 28)
    ]


@pytest.mark.parametrize("name", ["cosine_step", "poly"])
def test_without_epochs_the_schedule_is_as_long_as_the_steps(name: str) -> None:
    optim = Optim(lr=0.8, schedule=name, epochs=None, max_steps=5 * STEPS, warmup_epochs=1)  # type: ignore[arg-type]
    found, epochs = (
        LearningRateSchedule(optim, STEPS),
        schedule(schedule=name, warmup_epochs=1, epochs=5),
    )
    steps = range(1, 5 * STEPS + 1)
    assert [found.rate(step) for step in steps] == [epochs.rate(step) for step in steps]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cosine_epoch", [0.68284, 0.4, 0.11716, 0]),
        ("cosine_epoch_from_0", [0.8, 0.68284, 0.4, 0.11716]),
        ("step", [0.8, 0.08, 0.008, 0.008]),
    ],
)
def test_without_epochs_what_counts_epochs_counts_steps(name: str, expected: list[float]) -> None:
    found = schedule(schedule=name, epochs=None, max_steps=4, warmup_epochs=0)
    assert [found.rate(step) for step in (1, 2, 3, 4)] == pytest.approx(expected, abs=1e-5)
