"""The model card beside exported weights: what the network is, how to use it, what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from localpipe.config.resolved import Resolved
from localpipe.plan.flops import count_flops
from localpipe.results.exported import Description, Network
from localpipe.runs.directory import RunDirectory
from localpipe.runs.recorded_run import read_best, read_last, read_metric, read_probes
from localpipe.tasks.metric import Metric


def card_text(
    run_dir: Path,
    config: Resolved,
    description: Description,
    network: Network,
    step: int,
    files: Sequence[str],
) -> str:
    """Return the card as Markdown, with a newline at its end.

    files: names of the files to describe, .pt2 as a program and others as weights. step: that of
    the exported weights. Figures come from the run's summary, and only where that is of this step.
    A missing or damaged summary is no error. It runs `network` once on a zero image, to count
    multiply-accumulates.
    """
    summary = RunDirectory(run_dir).finished_summary(step)
    sections = [
        _introduce(config, description, network),
        *_list_classes(config),
        _explain_use(config, description, files),
        _list_measurements(config, description, summary, step),
        _list_training(config, summary, step),
    ]
    return "\n\n".join(sections) + "\n"


def _introduce(config: Resolved, description: Description, network: Network) -> str:
    stages = config.stages
    part = "The whole network"
    if description.exit is not None:
        exit_name = _name_exit(description)
        part = f"Stages 0..{description.exit} of {stages}, with the {exit_name}"
    noun = "an image" if config.data.dtype is None else "an input"
    size = " x ".join(map(str, network.sample))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    macs = _count_macs(network, config) / 1e6
    plural = "s" if stages != 1 else ""
    return (
        f"# {config.model.name} on {config.data.name}\n\n"
        f"{part}; {parameters:,} parameters, "
        f"{macs:.2f} million multiply-accumulates {noun} of "
        f"{size}, {config.model.num_classes} classes. "
        f"Trained with localpipe in {stages} gradient-isolated stage{plural}."
    )


def _list_classes(config: Resolved) -> list[str]:
    """Return the section with the names of the classes, or nothing where they have none."""
    if config.data.classes is None:
        return []
    # JSON in an indented block shows every name as it is, line breaks and backquotes too.
    names = json.dumps(config.data.classes, ensure_ascii=False)
    return [f"## Classes\n\nIn the order of the logits:\n\n    {names}"]


def _explain_use(config: Resolved, description: Description, files: Sequence[str]) -> str:
    lines = ["## Use", ""]
    for name in files:
        if name.endswith(".pt2"):
            lines.append(
                f"- `{name}` runs without localpipe: `torch.export.load({name!r}).module()` takes "
                f"{_describe_inputs(config)}. The batch is free, the size of an input is not."
            )
        else:
            lines.append(_explain_weights(config, description, name))
    return "\n".join(lines)


def _explain_weights(config: Resolved, description: Description, name: str) -> str:
    reader = "safetensors.torch.load_file" if name.endswith(".safetensors") else "torch.load"
    content = "the plain network's state_dict"
    if not description.is_plain:
        additions = []
        if description.config["method"]["context"]["mode"] != "none":
            additions.append("the adapters")
        if description.exit is not None:
            additions.append("the exit")
        content = f"a state_dict with {' and '.join(additions)}"
    return (
        f"- `{name}` is {content} (`{reader}({name!r})`). {_explain_inputs(config, name)}"
        f"{_explain_class(config, description, name)}"
    )


def _describe_inputs(config: Resolved) -> str:
    """Return what a program takes and gives."""
    if config.data.dtype is None:
        return "uint8 images (B, C, H, W), normalises them itself, and gives logits (B, classes)"
    size = ", ".join(map(str, config.sample))
    return f"{config.data.dtype} inputs (B, {size}), and gives the task's outputs"


def _explain_inputs(config: Resolved, name: str) -> str:
    """Return what a network that takes the weights wants."""
    if config.data.dtype is not None:
        return (
            f"`localpipe.load({name!r})` is the network itself; it takes "
            f"{config.data.dtype} inputs as they are."
        )
    mean, std = _list_channels(config.data.mean), _list_channels(config.data.std)
    return (
        "A network that takes it wants images in "
        f"0..1, less mean {mean}, over deviation {std}, per channel. `localpipe.load({name!r})` is "
        "the network itself; it takes these floats, or uint8 images."
    )


def _explain_class(config: Resolved, description: Description, name: str) -> str:
    """Return how to get the class of a recorded network, where the weights fit it."""
    if config.model.blocks is None or not description.is_plain:
        return ""
    text = f" With `original=True` it is the network of `{config.model.name}` itself."
    if config.model.library is not None:
        text += f" It was trained with {config.model.library}."
    if config.model.untie:
        text += (
            " Weights that its class ties are untied here, so turn its tying off before loading "
            "the state_dict (in transformers: tie_word_embeddings=False)."
        )
    return text


def _list_measurements(
    config: Resolved, description: Description, summary: Mapping[str, Any] | None, step: int
) -> str:
    if summary is None:
        return (
            "## Measured\n\nNothing yet: the run had not ended "
            f"at step {step}, from where these weights are."
        )
    # The accuracy of what was exported, then every stage's own.
    accuracy = _describe_accuracy(config, description, summary)
    arithmetic = _describe_arithmetic(config)
    metric = Metric.from_json(summary)
    lines = [f"| stage | {metric.words} of its own exit |", "|---|---|"]
    for stage, value in enumerate(read_metric(summary)):
        lines.append(f"| {stage} | {_format_metric(metric, value)} |")
    table = "\n".join(lines)
    return (
        f"## Measured\n\n{accuracy}{arithmetic} Nothing else was measured: "
        f"no other data, no calibration.\n\n{table}"
    )


def _describe_arithmetic(config: Resolved) -> str:
    """Return what was computed in less than fp32 when the accuracy was measured."""
    parts = []
    if config.run.precision != "fp32":
        parts.append(f"{config.run.precision} arithmetic")
    if config.pipeline.wire_dtype != "fp32":
        parts.append(f"{config.pipeline.wire_dtype} activations between the stages")
    if not parts:
        return ""
    codec = ""
    if config.pipeline.wire_dtype in ("int8", "int4"):
        codec = " and codes nothing between its stages"
    return (
        f" Measured with {' and '.join(parts)}. The network in these files computes in fp32"
        f"{codec}, so single predictions may differ."
    )


def _describe_accuracy(
    config: Resolved, description: Description, summary: Mapping[str, Any]
) -> str:
    metric, noun = Metric.from_json(summary), "images" if config.data.dtype is None else "samples"
    name = metric.words.capitalize()
    images = f"test {noun} of {config.data.name}, one run, seed {config.run.seed}"
    network_value = _format_metric(metric, read_last(summary))
    if description.exit is None:
        best = _format_metric(metric, read_best(summary))
        chosen_on = f"held-out training {noun}" if config.data.validation else f"these test {noun}"
        return (
            f"{name} {network_value} after the last step (these weights); {images}. The run's best "
            f"was {best} in epoch {summary['best_epoch']}, chosen on {chosen_on}."
        )
    values = read_probes(summary) if description.probe else read_metric(summary)
    value = _format_metric(metric, values[description.exit])
    return (
        f"{name} {value} ({_name_exit(description)}); {images}. "
        f"The whole network has {network_value}."
    )


def _list_training(config: Resolved, summary: Mapping[str, Any] | None, step: int) -> str:
    method, optim, run = config.method, config.optim, config.run
    rows = {
        "local loss": _describe_objective(method.objective),
        "context": method.context.mode,
        "reconciliation": _describe_reconciliation(config),
        **_describe_feedback(config),
        "cut": f"{config.stages} stages, {_describe_cuts(config)}",
        "optimizer": _describe_optimizer(config),
        "length": f"up to {_describe_length(config)}, batches of {config.data.batch_size}; "
        f"these weights are of step {step}",
        "augmentation": config.data.augment,
        "arithmetic": f"{run.precision}, deterministic: {str(run.deterministic).lower()}",
    }
    if optim.ema is not None:
        rows["weights"] = (
            f"a moving average of the trained parameters, decay {optim.ema:g}, with the last "
            "step's buffers"
        )
    # What only a finished run can tell.
    if summary is not None:
        time = f"{summary['wall_s']:.0f} s with {summary['processes']} processes"
        if summary["train_samples_per_s"] is not None:
            noun = "images" if config.data.dtype is None else "samples"
            time += f", {summary['train_samples_per_s']:.0f} {noun}/s"
        rows["time"] = time
        rows["made with"] = f"localpipe {summary['localpipe']}, torch {summary['torch']}"
        rows["weights_sha256 of the run"] = f"`{summary['weights_sha256']}`"
        if optim.ema is not None:
            rows["ema_sha256 of the run"] = f"`{summary['ema_sha256']}`"
    lines = ["| | |", "|---|---|"]
    for name, value in rows.items():
        lines.append(f"| {name} | {value} |")
    return "## Training\n\n" + "\n".join(lines)


def _describe_optimizer(config: Resolved) -> str:
    optim = config.optim
    parts = [optim.name, f"peak rate {optim.lr:g}", optim.schedule]
    decay = f"weight decay {optim.weight_decay:g}"
    if optim.decay == "matrices":
        decay += " on matrices"
    parts.append(decay)
    if optim.clip is not None:
        parts.append(f"gradients clipped at a norm of {optim.clip:g} a stage")
    return ", ".join(parts)


def _describe_length(config: Resolved) -> str:
    if config.optim.epochs is None:
        return f"step {config.optim.max_steps}"
    return f"epoch {config.optim.epochs}"


def _describe_objective(objective: Mapping[str, Any]) -> str:
    options = [f"{key} {value}" for key, value in objective.items() if key != "name"]
    if not options:
        return str(objective["name"])
    return f"{objective['name']} ({', '.join(options)})"


def _describe_feedback(config: Resolved) -> dict[str, str]:
    """Return a row on what came back from later stages, empty where nothing did."""
    if not config.feeds_back:
        return {}
    feedback = config.method.feedback
    text = f"{feedback.mode}, every {feedback.every} steps, {feedback.lag} late"
    if feedback.mode == "block":
        text += f", momentum {feedback.momentum:g} a step, {feedback.combine}"
    return {"feedback": text}


def _describe_reconciliation(config: Resolved) -> str:
    reconcile = config.method.reconcile
    if reconcile.distance == "none":
        return reconcile.distance
    return f"{reconcile.distance}, weight {reconcile.weight:g}"


def _describe_cuts(config: Resolved) -> str:
    cuts = config.pipeline.cuts
    return cuts if isinstance(cuts, str) else f"after blocks {', '.join(map(str, cuts))}"


def _name_exit(description: Description) -> str:
    kind = "linear probe" if description.probe else "exit"
    return f"{kind} of stage {description.exit}"


def _list_channels(values: Sequence[float]) -> str:
    numbers = ", ".join(f"{value:.6f}" for value in values)
    return f"[{numbers}]"


def _count_macs(network: Network, config: Resolved) -> int:
    dtype = torch.int64 if config.data.dtype == "int64" else torch.float32
    with count_flops() as counter, torch.no_grad():
        network(torch.zeros(1, *network.sample, dtype=dtype))
    return int(counter.get_total_flops()) // 2


def _format_metric(metric: Metric, value: float | None) -> str:
    return metric.format(value, digits=2, missing="none")
