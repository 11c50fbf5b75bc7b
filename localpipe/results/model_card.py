"""The model card beside exported weights: what the network is, what it takes, and what its run measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from localpipe.config.resolved import Resolved
from localpipe.plan.flops import count_flops
from localpipe.results.exported import Description, Network
from localpipe.runs.directory import finished_summary


def card_text(
    run_dir: Path,
    config: Resolved,
    description: Description,
    network: Network,
    step: int,
    files: Sequence[str],
) -> str:
    """Return the card as Markdown. Figures are of the run's summary, and only where it is of the exported step."""
    summary = finished_summary(run_dir, step)
    sections = [
        _what(config, description, network),
        _use(config, description, files),
        _measured(config, description, summary, step),
        _training(config, summary, step),
    ]
    return "\n\n".join(sections) + "\n"


def _what(config: Resolved, description: Description, network: Network) -> str:
    stages, ends = config.pipeline.stages, description.exit
    part = (
        "the whole network"
        if ends is None
        else f"stages 0..{ends} of {stages}, with the {_exit(description)}"
    )
    height, width = _size(config)
    channels, classes = len(_channels(config.data.mean)), config.model.num_classes
    return (
        f"# {config.model.name} on {config.data.name}\n\n"
        f"{part[0].upper()}{part[1:]}; {sum(p.numel() for p in network.parameters()):,} parameters, "
        f"{_macs(network, (channels, height, width)) / 1e6:.2f} million multiply-accumulates an image of "
        f"{channels} x {height} x {width}, {classes} classes. Trained with localpipe in {stages} gradient-isolated "
        f"stage{'s' if stages != 1 else ''}."
    )


def _use(config: Resolved, description: Description, files: Sequence[str]) -> str:
    mean, std = (
        "[" + ", ".join(f"{value:.6f}" for value in _channels(given)) + "]"
        for given in (config.data.mean, config.data.std)
    )
    lines = ["## Use", ""]
    for name in files:
        if name.endswith(".pt2"):
            lines.append(
                f"- `{name}` runs without localpipe: `torch.export.load({name!r}).module()` takes uint8 images "
                "(B, C, H, W), normalises them itself, and gives logits (B, classes). The batch is free, the image size is not."
            )
        else:
            read = "safetensors.torch.load_file" if name.endswith(".safetensors") else "torch.load"
            adapters = description.config["method"]["context"]["mode"] != "none"
            added = " and ".join(
                ["the adapters"] * adapters + ["the exit"] * (description.exit is not None)
            )
            what = (
                "the plain network's state_dict"
                if description.is_plain
                else f"a state_dict with {added}"
            )
            lines.append(
                f"- `{name}` is {what} (`{read}({name!r})`). A network that takes it wants images in 0..1, "
                f"less mean {mean}, over deviation {std}, per channel. `localpipe.load({name!r})` is the network itself; "
                "it takes these floats, or uint8 images."
            )
    return "\n".join(lines)


def _measured(
    config: Resolved, description: Description, summary: Mapping[str, Any] | None, step: int
) -> str:
    head = "## Measured\n\n"
    if summary is None:
        return f"{head}Nothing yet: the run had not ended at step {step}, from where these weights are."
    where = f"test images of {config.data.name}, one run, seed {config.run.seed}"
    per_stage = summary["test_accuracy_per_stage"]
    if description.exit is None:
        best = summary["best_test_accuracy"]
        chosen = "held-out training images" if config.data.validation else "these test images"
        told = (
            f"Accuracy {_percent(summary['test_accuracy'])} after the last step (these weights); {where}. The run's best "
            f"was {_percent(best)} in epoch {summary['best_epoch']}, chosen on {chosen}."
        )
    else:
        found = summary["probe_accuracy_per_stage"] if description.probe else per_stage
        told = (
            f"Accuracy {_percent(found[description.exit])} ({_exit(description)}); {where}. The whole network has "
            f"{_percent(summary['test_accuracy'])}."
        )
    rows = [f"| {stage} | {_percent(accuracy)} |" for stage, accuracy in enumerate(per_stage)]
    table = "\n".join(["| stage | accuracy of its own exit |", "|---|---|", *rows])
    arithmetic = (
        ""
        if config.run.precision == "fp32"
        else f" Measured with {config.run.precision} arithmetic."
    )
    return f"{head}{told}{arithmetic} Nothing else was measured: no other data, no calibration.\n\n{table}"


def _training(config: Resolved, summary: Mapping[str, Any] | None, step: int) -> str:
    method, optim = config.method, config.optim
    options = ", ".join(
        f"{key} {value}" for key, value in method.objective.items() if key != "name"
    )
    rows = [
        ("local loss", f"{method.objective['name']}{f' ({options})' if options else ''}"),
        ("context", method.context.mode),
        ("reconciliation", _reconciliation(config)),
        ("cut", f"{config.pipeline.stages} stages, {_cuts(config)}"),
        (
            "optimizer",
            f"{optim.name}, peak rate {optim.lr:g}, {optim.schedule}, weight decay {optim.weight_decay:g}",
        ),
        (
            "length",
            f"up to epoch {optim.epochs}, batches of {config.data.batch_size}; these weights are of step {step}",
        ),
        ("augmentation", config.data.augment),
        (
            "arithmetic",
            f"{config.run.precision}, deterministic: {str(config.run.deterministic).lower()}",
        ),
    ]
    if summary is not None:
        speed = summary["train_samples_per_s"]
        rate = "" if speed is None else f", {speed:.0f} images/s"
        rows += [
            ("time", f"{summary['wall_s']:.0f} s with {summary['processes']} processes{rate}"),
            ("made with", f"localpipe {summary['localpipe']}, torch {summary['torch']}"),
            ("weights_sha256 of the run", f"`{summary['weights_sha256']}`"),
        ]
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
    return f"## Training\n\n{table}"


def _exit(description: Description) -> str:
    return (
        f"linear probe of stage {description.exit}"
        if description.probe
        else f"exit of stage {description.exit}"
    )


def _reconciliation(config: Resolved) -> str:
    reconcile = config.method.reconcile
    return (
        reconcile.distance
        if reconcile.distance == "none"
        else f"{reconcile.distance}, weight {reconcile.weight:g}"
    )


def _cuts(config: Resolved) -> str:
    cuts = config.pipeline.cuts
    return cuts if isinstance(cuts, str) else f"after blocks {', '.join(map(str, cuts))}"


def _channels(values: Any) -> tuple[float, ...]:
    assert isinstance(values, tuple), "decided before the run began"
    return values


def _size(config: Resolved) -> tuple[int, int]:
    size = config.data.image_size
    assert not isinstance(size, str)
    return size if isinstance(size, tuple) else (size, size)


def _macs(network: Network, image: tuple[int, int, int]) -> int:
    with count_flops() as counter, torch.no_grad():
        network(torch.zeros(1, *image))
    return int(counter.get_total_flops()) // 2


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.2f} %"
