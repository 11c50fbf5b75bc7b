"""The codecs of a boundary: their values by hand, and one digest for any number of processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from localpipe import config as configs
from localpipe.config.keys import Config
from localpipe.config.resolved import Resolved
from localpipe.fields import Field, Schema
from localpipe.pipeline.channels.channel import MemoryChannel
from localpipe.pipeline.channels.message import (
    Header,
    Kind,
    Message,
    empty_rows,
    replica_rows,
)
from localpipe.pipeline.channels.resharding import RowGather, RowScatter, neighbour_replicas
from localpipe.pipeline.stages.codecs import CODECS
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.plan.costs import count_costs
from localpipe.plan.memory import worker_memory
from localpipe.plan.predict import count_coded_bytes
from localpipe.plan.tables import describe_crossings
from tests.harness import digests, settings
from tests.pipeline.stages.test_recorded_stages import build_stages, first_message
from tests.pipeline.stages.test_stage import batch, stages_of

GROUPED = [CODECS["int8"], CODECS["int4"]]
INF, NAN = math.inf, math.nan


def encode(name: str, *samples: list[float]) -> dict[str, Tensor]:
    x = torch.tensor(samples)
    return CODECS[name].encode(Field("h.0", tuple(x.shape[1:]), "float32"), x)


def decode(name: str, *samples: list[float]) -> list[list[float]]:
    field = Field("h.0", (len(samples[0]),), "float32")
    numbers: list[list[float]] = CODECS[name].decode(field, encode(name, *samples)).tolist()
    return numbers


# --- Values by hand


def test_int8_rounds_half_to_even() -> None:
    coded = encode("int8", [127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [-254.0, 1.0, 3.0, 2.9, 0.0, 254.0])
    assert coded["h.0"].dtype == torch.int8 and coded["h.0.scale"].dtype == torch.float32
    assert coded["h.0.scale"].tolist() == [[1.0], [2.0]]
    assert coded["h.0"].tolist() == [[127, 0, 2, 2, 0, -2], [-127, 0, 2, 1, 0, 127]]
    assert decode("int8", [127.0, 0.5, 1.5]) == [[127.0, 0.0, 2.0]]


def test_int4_packs_two_codes_a_byte_of_a_sample_and_pads_an_odd_one() -> None:
    samples = ([7.0, 0.5, 1.5, -2.5, -7.0], [-3.5, 3.5, 0.0, 0.5, 0.25])
    coded = encode("int4", *samples)
    assert coded["h.0.scale"].tolist() == [[1.0], [0.5]]
    # Codes 7, 0 | 2, -2 | -7 and -7, 7 | 0, 1 | 0, each plus 8, the first one in the low nibble.
    assert coded["h.0"].tolist() == [[0x8F, 0x6A, 0x81], [0xF1, 0x98, 0x88]]
    assert coded["h.0"].dtype == torch.uint8
    assert decode("int4", *samples) == [[7.0, 0.0, 2.0, -2.0, -7.0], [-3.5, 3.5, 0.0, 0.5, 0.0]]


@pytest.mark.parametrize(("name", "limit"), [("int8", 127), ("int4", 7)])
def test_the_last_group_may_be_short_and_has_a_scale_of_its_own(name: str, limit: int) -> None:
    sample = [float(limit)] * 64 + [0.0] * 63 + [3.0 * limit] + [-2.0 * limit]
    coded = encode(name, sample)
    assert coded["h.0.scale"].tolist() == [[1.0, 3.0, 2.0]]
    assert decode(name, sample) == [sample]


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_scale_of_0_decodes_to_0(name: str) -> None:
    assert decode(name, [0.0] * 70) == [[0.0] * 70]
    # A subnormal number whose scale is below the smallest one.
    assert encode(name, [1e-45, -1e-45])["h.0.scale"].tolist() == [[0.0]]
    assert decode(name, [1e-45, -1e-45]) == [[0.0, 0.0]]


def test_an_inexact_scale_never_exceeds_the_codes() -> None:
    """The scale 1.5 x 2^-149 is rounded to 2^-149, so that the largest code would be 190."""
    coded = encode("int8", [190 * 2.0**-149, -190 * 2.0**-149])
    assert coded["h.0"].tolist() == [[127, -127]]
    coded = encode("int4", [10 * 2.0**-149, -10 * 2.0**-149])
    assert coded["h.0"].tolist() == [[0x1F]]


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_group_with_a_number_that_is_not_finite_is_nan_throughout(name: str, bad: float) -> None:
    sample = [1.0] * 64 + [7.0] * 64 + [7.0] * 3
    for spoilt in (5, 64, 130):
        numbers = list(sample)
        numbers[spoilt] = bad
        decoded = torch.tensor(decode(name, numbers, sample))
        group = spoilt // 64
        expected = torch.zeros(131, dtype=torch.bool)
        expected[64 * group : 64 * group + 64] = True
        assert torch.equal(decoded[0].isnan(), expected)
        assert torch.equal(decoded[0][~expected], torch.tensor(sample)[~expected])
        assert decoded[1].tolist() == sample, "another sample is spoilt"
    # One scale says it, whatever was in the group, and its codes say nothing.
    coded = encode(name, [bad, 1.0, 2.0])
    assert coded["h.0.scale"].isnan().all() and decode(name, [bad, 1.0]) != [[0.0, 0.0]]


@pytest.mark.parametrize("codec", GROUPED, ids=str)
@pytest.mark.parametrize("numbers", [1, 2, 63, 64, 65, 127, 128, 1000, 1001])
def test_a_sample_is_coded_alone_and_within_half_a_scale(codec: Any, numbers: int) -> None:
    torch.manual_seed(numbers)
    field = Field("ctx.3", (numbers,), "float32")
    x = torch.randn(5, numbers) * torch.logspace(-20, 20, 5).unsqueeze(1)
    coded = codec.encode(field, x)
    expected = [(f.name, (5, *f.shape), f.dtype) for f in codec.coded_fields(field)]
    got = [(k, tuple(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in coded.items()]
    assert got == expected
    alone = codec.encode(field, x[1:3])
    for name in coded:
        assert torch.equal(alone[name], coded[name][1:3])
    # Whole groups, as large as 64, give the bound.
    scale = coded["ctx.3.scale"].repeat_interleave(64, 1)[:, :numbers]
    decoded = codec.decode(field, coded)
    assert ((decoded - x).abs() <= scale * 0.5001).all()
    assert codec.encode(field, x[:0])["ctx.3.scale"].shape[0] == 0
    assert codec.decode(field, codec.encode(field, x[:0])).shape == (0, numbers)


@pytest.mark.parametrize("codec", CODECS.values(), ids=str)
def test_no_codec_writes_into_its_argument_and_groups_decode_to_a_new_tensor(codec: Any) -> None:
    field = Field("h.0", (3, 25), "float32")
    x = torch.randn(4, 3, 25)
    before = x.clone()
    coded = codec.encode(field, x)
    copies = {name: tensor.clone() for name, tensor in coded.items()}
    decoded = codec.decode(field, coded)
    if codec in GROUPED:
        decoded.fill_(9.0)
    assert torch.equal(x, before)
    assert all(torch.equal(coded[name], copies[name]) for name in coded)


@pytest.mark.parametrize("codec", GROUPED, ids=str)
def test_groups_follow_the_order_in_memory(codec: Any) -> None:
    order = Field("h.0", (4, 5, 6), "float32", (1, 2, 0))
    x = empty_rows(order, 3, "cpu").normal_()
    flat = x.permute(0, 2, 3, 1).reshape(3, 120)
    plain = codec.encode(Field("h.0", (120,), "float32"), flat)
    for tensor in (x, x.contiguous()):
        coded = codec.encode(order, tensor)
        assert all(torch.equal(coded[name], plain[name]) for name in plain)
    decoded = codec.decode(order, plain)
    assert decoded.stride() == order.strides
    assert (decoded - x).abs().max() <= plain["h.0.scale"].max() / 2


# --- What crosses

SGR = {
    "objective": {"name": "dgl"},
    "context": {"mode": "R2"},
    "reconcile": {"distance": "cosine"},
}


def crossing(config: Resolved) -> list[dict[str, tuple[tuple[int, ...], str]]]:
    _, plans = build_plans(config)
    schemas = [plan.sends for plan in plans if plan.sends is not None]
    return [{f.name: (f.shape, f.dtype) for f in schema.fields} for schema in schemas]


def test_codes_and_scales_cross_and_nothing_else_is_coded(tmp_path: Path) -> None:
    config = settings(tmp_path, method=SGR, pipeline={"wire_dtype": "int4"})
    first, second, _ = crossing(config)
    codes, scales = ((256,), "uint8"), ((8,), "float32")
    assert first == {
        "h.0": codes,
        "h.0.scale": scales,
        "target": ((), "int64"),
        "image": ((3, 8, 8), "uint8"),
        "grad.0": codes,
        "grad.0.scale": scales,
    }
    assert set(second) - set(first) == {
        "h.1", "h.1.scale", "grad.1", "grad.1.scale", "ctx.0", "ctx.0.scale",
    }  # fmt: skip
    assert second["ctx.0"] == codes


def test_messages_and_memory_are_counted_in_codes(tmp_path: Path) -> None:
    sizes, buffers = {}, {}
    for name in ("fp32", "int8", "int4"):
        config = settings(tmp_path, method={"objective": "dgl"}, pipeline={"wire_dtype": name})
        blueprint, plans = build_plans(config)
        assert plans[0].sends is not None
        sizes[name] = sum(field.nbytes for field in plans[0].sends.fields) - 8  # the target
        costs = count_costs(blueprint, plans, config)
        memory = worker_memory(plans[1:2], costs[1:2], config)
        buffers[name] = memory.buffers_bytes
        assert memory.activations_bytes > 0
    assert sizes == {"fp32": 2048, "int8": 512 + 32, "int4": 256 + 32}
    line = describe_crossings(plans)[0]
    assert line == "0 -> 1: h.0 256 uint8, h.0.scale 8 float32, target int64 (0.3 KiB a sample)"
    assert buffers["int4"] < buffers["int8"] < buffers["fp32"] / 2


def test_a_prediction_counts_what_a_stage_encodes_and_decodes(tmp_path: Path) -> None:
    """Each of 16 samples has 512 numbers, after stage 2 it has 128. Relaying decodes nothing."""
    config = settings(tmp_path, method=SGR, pipeline={"wire_dtype": "int8"})
    tensor, small = 16 * 512 * 4, 16 * 128 * 4
    counts = [count_coded_bytes(plan, config) for plan in build_plans(config)[1]]
    assert counts == [
        (2 * tensor, 0),
        (3 * tensor, 2 * tensor),
        (tensor + 2 * small, 3 * tensor),
        (0, 2 * tensor + 2 * small),
    ]


def send(stage: Any, message: Message, fields: Any) -> Message:
    channel = MemoryChannel(stage.plan.sends, 1)
    channel.send(message.header, fields)
    received = channel.receive()
    return Message(received.header, {k: v.clone() for k, v in received.fields.items()})


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_relayed_context_goes_on_as_the_bytes_that_came(tmp_path: Path, name: str) -> None:
    """With R4 and five stages, ctx.0 is made by stage 1 and relayed by stages 2 and 3."""
    config = settings(
        tmp_path,
        method={"objective": {"name": "dgl"}, "context": {"mode": "R4E"}},
        pipeline={"stages": 5, "wire_dtype": name},
    )
    stages = stages_of(config)
    message = batch(config)
    made = {}
    for stage in stages[:4]:
        h = stage.forward(message)
        loss = stage.local_loss(message, h)
        merged = stage.boundary.merged
        if stage.plan.stage == 1:
            assert merged is not None
            field = Field("ctx.0", tuple(merged.shape[1:]), "float32")
            made = CODECS[name].encode(field, merged)
        # The sender's own loss reads h itself.
        assert torch.equal(loss, stage.local_loss(message, h.detach().clone()))
        outgoing = stage.outgoing(message, h)
        again = CODECS[name].decode(stage.plan.encoded[0], outgoing)
        assert not torch.equal(again, h)
        message = send(stage, message, outgoing)
    assert set(made) == {"ctx.0", "ctx.0.scale"}
    for key, tensor in made.items():
        assert torch.equal(message.fields[key], tensor)
    assert stages[4].forward(message).isfinite().all()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_next_stage_computes_with_decoded_numbers(tmp_path: Path, name: str) -> None:
    config = settings(
        tmp_path,
        method={"objective": "dgl", "reconcile": {"distance": "cosine"}},
        pipeline={"wire_dtype": name},
    )
    first, second = stages_of(config)[:2]
    message = batch(config)
    h = first.forward(message)
    gradient = first.boundary_gradient(first.local_loss(message, h), h)
    sent = send(first, message, first.outgoing(message, h, gradient))
    codec, shape = CODECS[name], tuple(h.shape[1:])
    plain, field = second.boundary, Field("h.0", shape, "float32")
    decoded = codec.decode(field, codec.encode(field, h.detach()))
    assert torch.equal(plain.read_input(sent.fields, False), decoded)
    field = Field("grad.0", shape, "float32")
    expected = codec.decode(field, codec.encode(field, gradient))
    assert torch.equal(plain.read_gradient(sent.fields), expected)
    assert not torch.equal(expected, gradient)


@pytest.mark.usefixtures("hand_made")
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_several_crossing_tensors_are_coded_each(tmp_path: Path, name: str) -> None:
    stages = build_stages(tmp_path, "hand_skips", pipeline={"wire_dtype": name})
    plan = stages[1].plan
    assert plan.sends is not None
    assert [field.name for field in plan.sends.fields] == [
        "h.1", "h.1.scale", "h.1.1", "h.1.1.scale", "h.1.2", "h.1.3", "target",
    ]  # fmt: skip
    message = first_message()
    for stage in stages[:2]:
        h = stage.forward(message)
        message = send(stage, message, stage.outgoing(message, h))
    main, *companions = plan.encoded
    seen: list[Any] = []
    stages[2].blocks.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    stages[2].forward(message)
    x, skip, places, mask = seen[0]
    assert torch.equal(x, CODECS[name].decode(main, message.fields))
    assert torch.equal(skip, CODECS[name].decode(companions[0], message.fields))
    assert places.dtype == torch.int64 and mask.dtype == torch.bool


# --- One digest


def job(folder: Path, processes: int, **sections: Any) -> Resolved:
    sections["pipeline"] = {"stages": 5, "processes": processes, **sections.get("pipeline", {})}
    sections["optim"] = {"epochs": 1, **sections.get("optim", {})}
    return settings(folder / "run", data={"samples": 40}, **sections)


METHODS: dict[str, dict[str, Any]] = {
    "R4E": {"objective": {"name": "dgl"}, "context": {"mode": "R4E"}},
    "R1E, sgr": {**SGR, "context": {"mode": "R1E"}},
}
DEPTHS = {1: 2, 2: 8, 4: 1}  # by the number of processes


def test_a_codec_is_one_digest_on_1_2_and_4_processes_at_any_depth(tmp_path: Path) -> None:
    names = [(codec, method) for codec in CODECS for method in METHODS]

    def jobs(processes: int) -> list[Config]:
        configurations: list[Config] = []
        for number, (codec, method) in enumerate(names):
            pipeline = {"wire_dtype": codec, "depth": DEPTHS[processes]}
            folder = tmp_path / f"{number}-{processes}"
            each = job(folder, processes, pipeline=pipeline, method=METHODS[method])
            configurations.append(each)
        return configurations

    found = {p: digests(jobs(p), p, tmp_path / f"all-{p}") for p in DEPTHS}
    assert found[1] == found[2] == found[4]
    assert len(set(found[1])) == len(names), "a codec changes nothing"


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_uneven_replicas_get_rows_of_codes(tmp_path: Path, name: str) -> None:
    """The last batch is short, and two replicas share it."""
    pipeline = {"stages": 3, "replicas": [1, 2, 1], "batch_norm": "sync", "wire_dtype": name}
    found = []
    for depth in (1, 8):
        config = job(
            tmp_path / str(depth),
            4,
            pipeline={**pipeline, "depth": depth},
            method={"objective": {"name": "dgl"}, "context": {"mode": "R1"}},
        )
        found += digests([config], 4, tmp_path / f"all-{depth}")
    assert found[0] == found[1]


@pytest.mark.parametrize("codec", GROUPED, ids=str)
@pytest.mark.parametrize("rows", [12, 7])
def test_codes_are_split_and_joined_by_rows(codec: Any, rows: int) -> None:
    field = Field("h.0", (5, 13), "float32")
    schema = Schema(codec.coded_fields(field), rows)
    x = torch.randn(rows, 5, 13)
    whole = codec.encode(field, x)
    edges = {(r, s): MemoryChannel(schema, 4) for r in range(2) for s in range(3)}
    for r in range(2):
        part = replica_rows(rows, r, 2)
        receivers = neighbour_replicas(r, 2, 3)
        scatter = RowScatter({s: edges[r, s] for s in receivers}, r, 2, 3)
        header = Header(Kind.TRAIN, 1, 1, part.stop - part.start, batch=rows)
        scatter.send(header, codec.encode(field, x[part]))
    for s in range(3):
        part = replica_rows(rows, s, 3)
        senders = neighbour_replicas(s, 3, 2)
        message = RowGather([edges[r, s] for r in senders], schema).receive()
        for key, tensor in whole.items():
            assert torch.equal(message.fields[key], tensor[part])


def test_ends_with_other_codecs_have_other_schemas() -> None:
    field = Field("h.0", (3, 5), "float32")
    digests_of = {Schema(codec.coded_fields(field), 4).digest for codec in CODECS.values()}
    assert len(digests_of) == len(CODECS)


def test_the_key_takes_the_five_codecs() -> None:
    assert sorted(CODECS) == ["bf16", "fp16", "fp32", "int4", "int8"]
    for name in CODECS:
        given = configs.parse({"pipeline": {"wire_dtype": name}}, "test")
        assert given.pipeline.wire_dtype == name
