"""The vision transformers: DeiT's shapes, and every axis on tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from localpipe.config.keys import Config
from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.methods.auglocal import AugLocal
from localpipe.methods.context import Adapter, Source
from localpipe.methods.predsim import Predictor, pool_kernel
from localpipe.networks.layers import pool_to
from localpipe.networks.user_network import user_blueprint
from localpipe.networks.vit import EncoderLayer, PatchEmbedding, vit_blueprint
from localpipe.pipeline.channels.message import Message
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.plan.costs import StageCost, count_costs
from localpipe.plan.saved_bytes import SavedBytes
from localpipe.tasks.layout import Grid
from tests import harness
from tests.harness import digests, settings
from tests.methods.test_axes import COMBINATIONS, OBJECTIVES, check_isolation, combined
from tests.pipeline.stages.test_stage import batch, stages_of

WIDTH = 24
SMALL: dict[str, Any] = {
    "model": {"name": "vit_tiny", "args": {"patch": 4, "depth": 3, "width": WIDTH}}
}
TINY = 192  # the width that vit_tiny has by itself
LAYER = 12 * TINY**2 + 13 * TINY  # parameters of an encoder layer


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- The networks


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("vit_tiny", 5_717_416), ("vit_small", 22_050_664), ("vit_base", 86_567_656)],
)
def test_the_networks_have_the_published_parameters(name: str, parameters: int) -> None:
    blueprint = vit_blueprint(name, (3, 224, 224), 1000)
    assert len(blueprint.blocks) == 13
    parts = blueprint.build_meta(range(14))
    assert sum(p.numel() for part in parts for p in part.parameters()) == parameters


def torchvisions(name: str) -> str:
    """Return the name that torchvision's vision transformer has for a parameter."""
    for localpipe_name, torchvision_name in {
        "^cls_token": "class_token", "^pos_embed": "encoder.pos_embedding",
        "^patch_embed.proj": "conv_proj", "^norm": "encoder.ln", "^head": "heads.head",
        "^blocks.": "encoder.layers.encoder_layer_", "norm([12])": "ln_\\1",
        "attn.qkv.": "self_attention.in_proj_", "attn.proj": "self_attention.out_proj",
        "fc1": "0", "fc2": "3",
    }.items():  # fmt: skip
        name = re.sub(localpipe_name, torchvision_name, name)
    return name


def test_the_network_computes_what_torchvisions_computes(tmp_path: Path) -> None:
    resolved = settings(tmp_path, **SMALL, pipeline={"stages": 3})
    stages, message = stages_of(resolved), batch(resolved)
    weights = {
        name: w
        for stage in stages
        for name, w in stage.weights().items()
        if not name.startswith("aux.")
    }
    plain = torchvision.models.VisionTransformer(8, 4, 3, 3, WIDTH, 4 * WIDTH, num_classes=10)
    plain.load_state_dict({torchvisions(name): tensor for name, tensor in weights.items()})
    images = stages[0].entry(message.fields["image"])
    for stage in stages:
        h = stage.forward(message)
        message = Message(message.header, dict(stage.outgoing(message, h)))
    logits = stages[-1].objective.exit(h)
    assert logits is not None and torch.allclose(logits, plain(images), atol=1e-5)


def test_linear_layers_and_positions_start_from_a_narrow_normal_distribution() -> None:
    embedding, layer = vit_blueprint("vit_tiny", (3, 8, 8), 10, patch=4, depth=1).build([0, 1], 0)
    for name, tensor in {**embedding.state_dict(), **layer.state_dict()}.items():
        if name.endswith(
            ("qkv.weight", "fc1.weight", "attn.proj.weight", "pos_embed", "cls_token")
        ):
            assert float(tensor.std()) == pytest.approx(0.02, rel=0.15), name
        if name.endswith("bias") and "patch_embed" not in name:
            assert not tensor.any(), name


def plan_of(
    stages: int, method: Any, name: str = "vit_tiny", side: int = 32, **args: int
) -> list[StageCost]:
    data = {"name": "synthetic", "image_size": side, "mean": [0.5] * 3, "std": [0.2] * 3}
    model = {"name": name, "num_classes": 10, "args": {"patch": 4, **args}}
    sections = {"model": model, "method": method, "data": data, "pipeline": {"stages": stages}}
    config = harness.resolved(sections, (3, side, side))
    return count_costs(*build_plans(config), config)


@pytest.mark.parametrize("stages", [1, 3])
def test_multiplications_are_those_of_linear_layers_and_the_patches_not_attentions_own(
    stages: int,
) -> None:
    found = plan_of(stages, "greedy", depth=4)
    assert sum(cost.macs for cost in found) == 64 * 48 * TINY + 4 * 65 * 12 * TINY**2 + 10 * TINY
    if stages == 1:
        attention = 4 * 2 * 65**2 * TINY
        # The images need no gradient. The fused kernel computes the scores once more in the
        # backward pass.
        expected = 3 * found[0].macs - 64 * 48 * TINY + (1 + 2.5) * attention
        assert found[0].train_macs == pytest.approx(expected, rel=1e-6)


def test_the_planned_bytes_are_those_that_autograd_holds_on_the_device(tmp_path: Path) -> None:
    resolved = settings(
        tmp_path, **SMALL, pipeline={"stages": 2}, data={"samples": 64, "batch_size": 64}
    )
    for stage, cost in zip(
        stages_of(resolved),
        count_costs(*build_plans(resolved), resolved),
        strict=True,
    ):
        if stage.plan.is_first:
            message = batch(resolved)
        saved = SavedBytes([*stage.parameters(), *stage.weights().values()])
        with saved_tensors_hooks(saved.hold, lambda holder: holder.tensor):
            h = stage.forward(message)
            stage.local_loss(message, h).backward()
        assert saved.peak // 64 == pytest.approx(cost.activation_bytes_per_sample, rel=0.005)
        message = Message(message.header, dict(stage.outgoing(message, h)))


@pytest.mark.parametrize(
    ("name", "args", "text"),
    [
        (
            "vit_tiny",
            {"pach": 4},
            r"model.args.pach is not a known key \(vit_tiny\); did you mean model.args.patch\?",
        ),
        ("vit_tiny", {"patch": 0}, "model.args.patch must be a whole number at least 1 .*; got 0"),
        (
            "vit_tiny",
            {"depth": "deep"},
            "model.args.depth must be a whole number at least 1 .*; got 'deep'",
        ),
        ("vit_tiny", {"patch": 4, "heads": 5}, "cannot share a width of 192 between 5 heads"),
        ("vit_tiny", {"patch": 3}, "cannot cut images of 8x8 into patches of 3x3"),
        (
            "resnet8",
            {"depth": 3},
            "model.args.depth is not a known key .*; resnet8 has no options of its own",
        ),
    ],
)
def test_arguments_that_a_network_does_not_take_are_refused(
    tmp_path: Path, name: str, args: dict[str, Any], text: str
) -> None:
    with pytest.raises(UserError, match=text) as caught:
        stages_of(settings(tmp_path, model={"name": name, "args": args}))
    assert "\n" not in str(caught.value)


# --- Tokens and their grid


def test_folding_drops_the_class_token_and_keeps_the_rows() -> None:
    grid = Grid(2, 3, prefix=1)
    tokens = torch.arange(7.0).view(1, 7, 1).expand(2, 7, 4)
    assert grid.fold(tokens)[0, 0].tolist() == [[1, 2, 3], [4, 5, 6]]
    back = grid.unfold(grid.fold(tokens))
    assert torch.equal(back[:, 1:], tokens[:, 1:]) and not back[:, 0].any()


def test_the_patches_lie_as_the_embedding_makes_them() -> None:
    image = torch.zeros(1, 3, 8, 12)
    image[:, :, 4:, 8:] = 1  # the last patch
    blueprint = vit_blueprint("vit_tiny", (3, 8, 12), 10, patch=4, depth=1)
    (embedding,) = blueprint.build([0], 0)
    assert isinstance(embedding, PatchEmbedding) and blueprint.task.grid is not None
    with torch.no_grad():
        embedding.pos_embed.zero_()
        maps = blueprint.task.grid.fold(embedding(image))
    assert maps.shape == (1, TINY, 2, 3)
    assert torch.allclose(maps, embedding.patch_embed(image))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_exit_reads_the_class_token_but_auglocals_layers_attend_to_it(
    tmp_path: Path, objective: str
) -> None:
    resolved = settings(tmp_path, **SMALL, method={"objective": OBJECTIVES[objective]})
    message = batch(resolved)
    stage = stages_of(resolved)[1]
    h = torch.randn(16, 5, WIDTH, requires_grad=True)
    stage.local_loss(message, h).backward()
    assert h.grad is not None
    assert all(h.grad[:, token].any() for token in range(1, 5)), "every patch counts"
    assert bool(h.grad[:, 0].any()) == (objective == "auglocal")


@pytest.mark.parametrize("side", [(4, 4), (2, 5), (16, 3)])
def test_pools_that_do_not_divide_are_torchs_adaptive_ones(side: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 14, 14)
    assert torch.allclose(pool_to(x, side), nn.functional.adaptive_avg_pool2d(x, side), atol=1e-6)


def test_predsim_sees_every_patch_also_where_its_pool_does_not_divide_the_grid() -> None:
    assert pool_kernel((TINY, 14, 14)) == (8, 8)
    predictor = Predictor((TINY, 14, 14), 10)
    h = torch.randn(2, TINY, 14, 14, requires_grad=True)
    predictor(h).sum().backward()
    assert h.grad is not None and h.grad.abs().sum((0, 1)).all()


def adapter(*sources: Source) -> Adapter:
    return Adapter(
        sources, {"image": (3, 8, 8), "ctx.0": (5, WIDTH)}, (5, WIDTH), Grid(2, 2, prefix=1)
    )


def test_the_image_adds_to_patch_tokens_only_and_tokens_add_to_all() -> None:
    h = torch.randn(4, 5, WIDTH)
    fields = {"image": torch.randn(4, 3, 8, 8), "ctx.0": torch.randn(4, 5, WIDTH)}
    for source in (Source("image", True), Source("image", False)):
        added = adapter(source)(h, fields) - h
        assert not added[:, 0].any() and added[:, 1:].abs().sum((0, 2)).all()
    merged = adapter(Source("ctx.0", False))
    assert (merged(h, fields) - h).abs().sum((0, 2)).all()
    layers = list(merged.get_submodule("r_ctx_0").children())
    assert [type(layer) for layer in layers] == [nn.LayerNorm, nn.Linear]


def test_auglocal_copies_as_many_encoder_layers_as_the_pyramid_says() -> None:
    found = plan_of(5, {"objective": {"name": "auglocal", "aux_depth": 3, "pyramid": 1}}, depth=9)
    classifier = 10 * TINY + 10
    depths = [cost.aux_params // LAYER for cost in found]
    assert depths == [3, 2, 2, 1, 0]
    # Batch normalisation of the pooled features where the nominal depth is 1.
    assert [cost.aux_params - d * LAYER for cost, d in zip(found, depths, strict=True)][:-1] == [
        *[classifier] * 3, classifier + 2 * TINY
    ]  # fmt: skip


# --- A user's own tokens, whose places nobody knows


class Mean(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h.mean(1)


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 8, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens


def widening(num_classes: int) -> nn.Sequential:
    """Tokens (4, 8), then (4, 8), (4, 16), (4, 16)."""
    layers = [nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 16)]
    return nn.Sequential(Patches(), *layers, nn.Sequential(Mean(), nn.Linear(16, num_classes)))


def merging(num_classes: int) -> nn.Sequential:
    """Four tokens become two."""
    layers = [nn.Linear(8, 8), nn.Unflatten(1, (2, 2)), nn.Flatten(2), nn.Linear(16, 16)]
    return nn.Sequential(Patches(), *layers, nn.Sequential(Mean(), nn.Linear(16, num_classes)))


def of_ones_own(folder: Path, function: str, method: Any, stages: int = 3) -> Resolved:
    return settings(
        folder, model={"name": f"{__name__}:{function}"}, method=method, pipeline={"stages": stages}
    )


def test_auglocal_copies_tokens_layers_behind_a_linear_adapter(tmp_path: Path) -> None:
    resolved = of_ones_own(
        tmp_path, "widening", {"objective": {"name": "auglocal", "aux_depth": 1}}
    )
    stage = stages_of(resolved)[0]
    assert isinstance(stage.objective, AugLocal)
    copies = list(stage.objective.network)[:-1]
    assert [tuple(layer.weight.shape) for layer in copies if isinstance(layer, nn.Linear)] == [
        (16, 8),
        (16, 16),
    ]
    message = batch(resolved)
    stage.local_loss(message, stage.forward(message)).backward()
    assert all(p.grad is not None for p in stage.parameters())


@pytest.mark.parametrize(
    ("function", "method", "text"),
    [
        ("widening", {"objective": {"name": "dgl", "head": "1c2f"}}, "head 1c2f has no rule"),
        ("widening", {"objective": {"name": "infopro"}}, "infopro has no rule"),
        (
            "widening",
            {"objective": {"name": "greedy"}, "context": {"mode": "R1"}},
            "mode R1 has no rule",
        ),
        ("merging", {"objective": {"name": "auglocal", "aux_depth": 1}}, "auglocal has no adapter"),
    ],
)
def test_tokens_without_a_known_place_are_refused_in_one_line(
    tmp_path: Path, function: str, method: dict[str, Any], text: str
) -> None:
    with pytest.raises(UserError, match=text) as caught:
        stages_of(of_ones_own(tmp_path, function, method))
    assert "\n" not in str(caught.value)


def test_greedy_pools_all_tokens_where_no_grid_is_known() -> None:
    h = torch.randn(2, 4, 8)
    task = user_blueprint(f"{__name__}:widening", (3, 8, 8), 10, {}).task
    assert torch.equal(task.pool(h), h.mean(1)) and task.features((4, 8)) == 8


# --- The three axes on tokens

ENDS = [axes for axes in COMBINATIONS if axes[1:] in (("none", "none"), ("R1E", "cosine"))]


def test_every_combination_gives_one_digest_on_1_and_2_processes(tmp_path: Path) -> None:
    def jobs(processes: int) -> list[Config]:
        pipeline = {"stages": 4, "processes": processes}
        every = [
            combined(tmp_path / f"{i}-{processes}", *axes, **SMALL, pipeline=pipeline)
            for i, axes in enumerate(COMBINATIONS)
        ]
        probed = combined(
            tmp_path / f"probe-{processes}",
            *COMBINATIONS[0],
            **SMALL,
            pipeline=pipeline,
            run={"probe": "linear"},
        )
        return [*every, probed]

    found = {
        processes: digests(jobs(processes), processes, tmp_path / f"all-{processes}")
        for processes in (1, 2)
    }
    names = ["+".join(axes) for axes in COMBINATIONS]
    assert [
        name for name, one, two in zip(names, found[1], found[2], strict=False) if one != two
    ] == []
    assert len(set(found[1])) == len(names), "two combinations computed the same"
    assert found[1][-1] == found[2][-1] == found[1][0], "the probe changes no other weight"


@pytest.mark.parametrize("axes", ENDS, ids="+".join)
def test_the_loss_of_a_stage_moves_its_own_parameters_alone(
    tmp_path: Path, axes: tuple[str, str, str]
) -> None:
    check_isolation(combined(tmp_path, *axes, **SMALL, data={"batch_size": 4}))


@pytest.mark.parametrize("objective", ["greedy", "auglocal"])
def test_the_double_backward_through_attention_agrees_with_finite_differences(
    tmp_path: Path, objective: str
) -> None:
    """In fp64, with the kernels that a reconciled stage chooses for itself."""
    stage = stages_of(combined(tmp_path, objective, "none", "cosine", **SMALL))[1]
    stage.blocks.double()
    stage.objective.double()
    torch.manual_seed(0)
    x, y = torch.randn(3, 5, WIDTH, dtype=torch.float64), torch.tensor([0, 1, 2])
    received = torch.randn(3, 5 * WIDTH, dtype=torch.float64)

    def whole() -> Tensor:
        leaf = x.clone().requires_grad_()
        with stage.precision():
            logits = stage.objective.exit(stage.blocks(leaf))
        assert logits is not None
        loss = nn.functional.cross_entropy(logits, y)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return (
            loss + 0.3 * (1 - nn.functional.cosine_similarity(gradient.flatten(1), received)).mean()
        )

    layer = stage.blocks[0]
    assert isinstance(layer, EncoderLayer)
    for weight in (layer.attn.qkv.weight, layer.mlp.fc1.weight):
        (gradient,) = torch.autograd.grad(whole(), weight)
        direction = torch.randn_like(weight)
        step = 1e-5
        with torch.no_grad():
            weight += step * direction
        above = float(whole().detach())
        with torch.no_grad():
            weight -= 2 * step * direction
        below = float(whole().detach())
        with torch.no_grad():
            weight += step * direction
        assert (above - below) / (2 * step) == pytest.approx(
            float((gradient * direction).sum()), rel=1e-4
        )
