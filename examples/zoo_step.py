"""One step of a library's network at four stages under `greedy`, and its export.

Decoders are tried on tokens, other networks on images.

`python examples/zoo_step.py torchvision:swin_t 32` prints `trains True, exports True`.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from localpipe.config.load import parse
from localpipe.config.resolve import DataFacts, Facts, MachineFacts, resolve
from localpipe.config.resolved import Resolved
from localpipe.networks.library_network import find_library_network
from localpipe.pipeline.channels.message import Header, Kind, Message, Slot
from localpipe.pipeline.stages.stage import Stage, TailLoss, mark_nothing, send_nothing, train_step
from localpipe.pipeline.stages.stage_plan import build_blueprint, build_plans

STAGES = 4
CLASSES = 10
VOCABULARY = 99
BATCH = 2
TOKENS = "next_token"  # the task of decoders


def train_and_export(
    name: str,
    size: int,
    crossing: int = 1,
    task: str = "classification",
    arguments: Mapping[str, Any] | None = None,
) -> tuple[bool, bool]:
    """Return whether a network trains one step in up to four stages, and whether it exports.

    name: LIBRARY:NAME. size: the side of the images, or the number of tokens. task: also
    `segmentation` and `next_token`. arguments: model.args. It trains if every stage's loss is
    finite. It exports if the original class loads the stages' weights with
    strict=True and then gives the stages' own logits, bit for bit. Raises UserError for a network
    that cannot be cut.
    """
    model = {"name": name, "crossing": crossing, "args": dict(arguments or {})}
    config = _configure(model, size, 1, task)
    original = build_blueprint(config).build_original
    if original is None:  # a shipped network; its library's class has the same names
        original = _find_original(name, size)
    blocks = len(build_blueprint(config).blocks)
    config = _configure(model, size, min(STAGES, blocks), task)
    blueprint, plans = build_plans(config)
    stages = [Stage(plan, blueprint, config) for plan in plans]

    trains = all(bool(loss.isfinite()) for loss in _train_step(stages, _make_message(stages[0])))
    network = original().eval()
    weights = OrderedDict(_collect_weights(stages))
    # Some classes load by the version of a state_dict, which an export carries.
    weights._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]
    network.load_state_dict(weights, strict=True)
    logits = _evaluate(stages, _make_message(stages[0], Kind.TEST))
    inputs = stages[0].entry(_make_message(stages[0]).fields[stages[0].plan.input])
    with torch.no_grad():
        expected = network(inputs)
    # Of initial weights some networks give no number in evaluation.
    is_same = torch.allclose(find_main(expected), logits, rtol=0, atol=0, equal_nan=True)
    return trains, is_same


def _configure(model: Mapping[str, Any], size: int, stages: int, task: str) -> Resolved:
    images = {"name": "synthetic", "image_size": size, "batch_size": BATCH}
    tokens = {"name": "tokens", "vocabulary": VOCABULARY, "length": size, "batch_size": BATCH}
    config = parse(
        {
            "task": {"name": task},
            "model": {**model, "crossing_untrained": "allow"},
            "method": "greedy",
            "pipeline": {"stages": stages, "processes": 1},
            "data": tokens if task == TOKENS else images,
            "optim": {"lr": 1e-4},
            "run": {"device": "cpu", "threads": 1},
        },
        "zoo",
    )
    data = DataFacts((3, size, size), CLASSES, (0.5,) * 3, (0.2,) * 3, "none")
    if task == TOKENS:
        data = DataFacts((size,), VOCABULARY, (), (), "none", dtype="int64")
    return resolve(config, Facts(data, MachineFacts(cores=1)))


def _find_original(name: str, size: int) -> Callable[[], nn.Module]:
    library, _, network = name.partition(":")
    return find_library_network(library, network, (3, size, size), CLASSES, {}).build


def _collect_weights(stages: list[Stage]) -> dict[str, Tensor]:
    """Return the weights of the network, without the auxiliary networks'."""
    weights = {}
    for stage in stages:
        for name, tensor in stage.weights().items():
            if not name.startswith("aux."):
                weights[name] = tensor
    return weights


def _make_message(stage: Stage, kind: Kind = Kind.TRAIN) -> Message:
    generator = torch.Generator().manual_seed(0)
    input_field, target_field = stage.plan.receives.fields
    shape = (BATCH, *input_field.shape)
    values = 256 if input_field.dtype == "uint8" else VOCABULARY
    dtype = getattr(torch, input_field.dtype)
    inputs = torch.randint(0, values, shape, dtype=dtype, generator=generator)
    classes = torch.arange(BATCH).view(-1, *[1] * len(target_field.shape))
    targets = classes.expand(BATCH, *target_field.shape).to(getattr(torch, target_field.dtype))
    fields = {input_field.name: inputs, "target": targets}
    return Message(Header(kind, 1, 1, BATCH), fields)


def _train_step(stages: list[Stage], message: Message) -> list[Tensor]:
    """Train every stage on one message, and return the local losses."""
    losses = []
    for stage in stages:
        received = message
        h, loss = train_step(stage, received, 1e-4, send_nothing, mark_nothing)
        losses.append(loss.detach())
        message = _pass_on(stage, received, h)
    return losses


def _evaluate(stages: list[Stage], message: Message) -> Tensor:
    """Return the logits of the whole network, as an evaluation computes them."""
    for stage in stages:
        h = stage.forward(message)
        if stage.plan.is_last:
            assert isinstance(stage.objective, TailLoss), "it has the network's own head"
            with torch.no_grad():
                return stage.objective.exit(h, *stage.companions)
        message = _pass_on(stage, message, h)
    raise AssertionError("there is a last stage")


def _pass_on(stage: Stage, message: Message, h: Tensor) -> Message:
    """Return what the next stage receives, copied as an edge copies it."""
    if stage.plan.sends is None:
        return message
    slot = Slot(stage.plan.sends)
    slot.write(message.header, stage.outgoing(message, h))
    return slot.read()


def find_main(output: Any) -> Tensor:
    """Return the main tensor of a network's output."""
    if isinstance(output, Tensor):
        return output
    for key in ("logits", "out", "last_hidden_state"):
        value = output.get(key) if hasattr(output, "get") else getattr(output, key, None)
        if isinstance(value, Tensor):
            return value
    return next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))


if __name__ == "__main__":
    trained, exported = train_and_export(sys.argv[1], int(sys.argv[2]))
    print(f"trains {trained}, exports {exported}")
