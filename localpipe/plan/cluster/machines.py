"""Machines that need not be here: nodes, their devices, and the wires between them, read from a small strict YAML.

devices: {h100: {memory_bytes: 85e9, flop_per_s: {fp32: 67e12, bf16: 989e12}, achievable: 0.4}}
wires: {nvlink: {bytes_per_s: 360e9, latency_s: 5e-6}, ethernet: {bytes_per_s: 11e9, latency_s: 30e-6}}
nodes: {rack: {device: h100, count: 8, wire: nvlink, copies: 4}}
links: [{between: all, wire: ethernet}]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from localpipe.config import shipped
from localpipe.config.yaml_file import read_yaml
from localpipe.errors import UserError, suggest

Positive = Annotated[int, Field(ge=1)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Pair = Annotated[
    tuple[str, str],
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Device(_Part):
    """An accelerator, or a processor: what it holds and how fast it computes."""

    memory_bytes: AboveZero = Field(description="memory that one worker may fill")
    flop_per_s: dict[Literal["fp32", "bf16"], AboveZero] = Field(
        description="peak of dense arithmetic, by run.precision"
    )
    achievable: Annotated[float, Field(gt=0, le=1)] = Field(
        description="share of the peak that training reaches"
    )
    jitter: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="a step takes its mean, 1 +- this at most"
    )
    mtbf_s: AboveZero | None = Field(
        None, description="mean seconds between failures of one device"
    )


class ClusterLink(_Part):
    """A kind of link, one direction of it; both directions work at once."""

    bytes_per_s: AboveZero = Field(description="bandwidth that a large message reaches")
    latency_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        description="seconds one way"
    )


class Node(_Part):
    """A machine, or `copies` equal ones, with `count` equal devices."""

    device: str = Field(description="a name among devices")
    count: Positive = Field(1, description="devices in it")
    wire: str | None = Field(None, description="what joins its devices; a name among wires")
    copies: Positive = Field(1, description="equal machines of this name")


class Link(_Part):
    """What joins two nodes (twice the same name: its copies), or all."""

    between: Literal["all"] | Pair = Field(description="all, or two names among nodes")
    wire: str = Field(description="a name among wires")


class Cluster(_Part):
    """Nodes, devices and links."""

    name: str = Field(description="how it is called in a table")
    devices: dict[str, Device] = Field(min_length=1)
    wires: dict[str, ClusterLink] = Field({})
    nodes: dict[str, Node] = Field(min_length=1)
    links: list[Link] = Field([])
    restart_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        60.0, description="seconds from a failure to the first step after it"
    )

    @property
    def places(self) -> tuple[ClusterDevice, ...]:
        """Every device, in the order of the file: the devices of a node are neighbours."""
        return tuple(
            ClusterDevice(
                name, copy, index, node.device, f"{name}.{copy}" if node.copies > 1 else name
            )
            for name, node in self.nodes.items()
            for copy in range(node.copies)
            for index in range(node.count)
        )

    def device(self, place: ClusterDevice) -> Device:
        """Return the device at a place."""
        return self.devices[place.device]

    def wire(self, one: ClusterDevice, other: ClusterDevice) -> ClusterLink | None:
        """Return the wire between two devices, None where there is none."""
        name = self.wire_name(one, other)
        return None if name is None else self.wires[name]

    def wire_name(self, one: ClusterDevice, other: ClusterDevice) -> str | None:
        """Return the name of the wire between two devices: a node's own, the pair's, or the one between all."""
        if (one.name, one.copy) == (other.name, other.copy):
            return self.nodes[one.name].wire
        for link in self.links:
            if link.between != "all" and sorted(link.between) == sorted((one.name, other.name)):
                return link.wire
        return next((link.wire for link in self.links if link.between == "all"), None)


@dataclass(frozen=True)
class ClusterDevice:
    """One device of one node; `node` is the node's name with its copy's number."""

    name: str
    copy: int
    index: int
    device: str
    node: str


def load_cluster(path: str | Path) -> Cluster:
    """Read and check a cluster file, or one that ships, as `clusters/h100_nvlink_8`; raises UserError in one line."""
    shipping = None if Path(path).exists() else shipped.path_of(str(path))
    data = read_yaml(shipping or Path(path), "cluster")
    if not isinstance(data, dict):
        raise UserError(
            f"cluster: {path} must be a mapping with name, devices, wires, nodes, links; got {data!r}"
        )
    try:
        cluster = Cluster.model_validate(data)
    except ValidationError as error:
        raise UserError(f"cluster: {_explain(dict(error.errors()[0]))} ({path})") from None
    _check_names(cluster, str(path))
    return cluster


def _check_names(cluster: Cluster, source: str) -> None:
    """Raise where a part names another part that is not there."""

    def check(where: str, name: str, known: dict[str, Any]) -> None:
        if name not in known:
            advice = suggest(name, known) if known else "there are none yet"
            raise UserError(
                f"cluster: {where} names {name!r}, which is not in the file ({source}); {advice}"
            )

    for name, node in cluster.nodes.items():
        check(f"nodes.{name}.device", node.device, cluster.devices)
        if node.wire is not None:
            check(f"nodes.{name}.wire", node.wire, cluster.wires)
    for i, link in enumerate(cluster.links):
        check(f"links.{i}.wire", link.wire, cluster.wires)
        for end in () if link.between == "all" else link.between:
            check(f"links.{i}.between", end, cluster.nodes)


_MODELS: dict[str, type[BaseModel]] = {
    "devices": Device,
    "wires": ClusterLink,
    "nodes": Node,
    "links": Link,
}


def _explain(error: dict[str, Any]) -> str:
    """Turn one of pydantic's errors into a clause with the key, what was expected and what came."""
    where = [
        str(part)
        for part in error["loc"]
        if not str(part).startswith(("tuple[", "literal[", "function-"))
    ]
    key = ".".join(where)
    if error["type"] == "extra_forbidden":
        known: type[BaseModel] = Cluster if len(where) == 1 else _MODELS[where[0]]
        prefix = ".".join([*where[:-1], ""])
        return f"{key} is not a known key; {suggest(where[-1], known.model_fields, prefix)}"
    if error["type"] == "missing":
        return f"{key} is missing; add it"
    expected = str(error["msg"]).removeprefix("Input should be ")
    shown = repr(error["input"])
    return f"{key} must be {expected}; got {shown if len(shown) <= 60 else shown[:57] + '...'}"
