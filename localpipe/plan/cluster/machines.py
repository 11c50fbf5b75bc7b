"""A described cluster: nodes, their devices and the links between them, read from a strict YAML.

devices: {h100: {memory_bytes: 85e9, flop_per_s: {fp32: 67e12, bf16: 989e12}, achievable: 0.4}}
wires: {nvlink: {bytes_per_s: 360e9, latency_s: 5e-6}, lan: {bytes_per_s: 11e9, latency_s: 30e-6}}
nodes: {rack: {device: h100, count: 8, wire: nvlink, copies: 4}}
links: [{between: all, wire: lan}]

The file's `wires` are kinds of link. Its `links` say which kind joins which nodes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from localpipe.config import shipped
from localpipe.config.yaml_file import read_yaml
from localpipe.errors import UserError, suggest


def _list_to_tuple(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return value


Positive = Annotated[int, Field(ge=1, le=100_000)]  # devices and machines are listed one by one
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Pair = Annotated[tuple[str, str], BeforeValidator(_list_to_tuple)]

_VALUE_WIDTH = 60  # characters of a wrong value that an error shows


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DeviceSpec(_Part):
    """The memory and the speed of a kind of accelerator or processor."""

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
    """The speed of a kind of link, in one direction. Both directions work at once."""

    bytes_per_s: AboveZero = Field(description="bandwidth that a large message reaches")
    latency_s: NotNegative = Field(description="seconds one way")


class Node(_Part):
    """A machine, or `copies` equal ones, with `count` equal devices."""

    device: str = Field(description="a name among devices")
    count: Positive = Field(1, description="devices in it")
    wire: str | None = Field(None, description="what joins its devices; a name among wires")
    copies: Positive = Field(1, description="equal machines of this name")


class Link(_Part):
    """The kind of link between two nodes, between the copies of one node, or between all."""

    between: Literal["all"] | Pair = Field(description="all, or two names among nodes")
    wire: str = Field(description="a name among wires")


class Cluster(_Part):
    """Nodes, devices and links, as the keys of a cluster's file. It cannot be changed.

    pydantic checks the values. Names are checked by `load_cluster` only.
    """

    name: str = Field(description="its name in tables")
    devices: dict[str, DeviceSpec] = Field(min_length=1)
    wires: dict[str, ClusterLink] = Field({})
    nodes: dict[str, Node] = Field(min_length=1)
    links: list[Link] = Field([])
    restart_s: NotNegative = Field(
        60.0, description="seconds from a failure to the first step after it"
    )

    @property
    def all_devices(self) -> tuple[ClusterDevice, ...]:
        """Every device, in the order of the file's nodes, then copies, then devices of a machine.

        The devices of a machine are neighbours.
        """
        devices = []
        for name, node in self.nodes.items():
            for copy in range(node.copies):
                machine = name
                if node.copies > 1:
                    machine = f"{name}.{copy}"
                for index in range(node.count):
                    devices.append(ClusterDevice(name, copy, index, node.device, machine))
        return tuple(devices)

    @property
    def all_specs(self) -> tuple[DeviceSpec, ...]:
        """The memory and the speed of every device, in the order of `all_devices`."""
        return tuple(self.find_spec(device) for device in self.all_devices)

    def find_spec(self, device: ClusterDevice) -> DeviceSpec:
        """Return the memory and the speed of a device. KeyError for one of another cluster."""
        return self.devices[device.kind]

    def find_link(self, first: ClusterDevice, second: ClusterDevice) -> ClusterLink | None:
        """Return the link between two devices, as `find_link_name` chooses it, or None."""
        name = self.find_link_name(first, second)
        if name is None:
            return None
        return self.wires[name]

    def find_link_name(self, first: ClusterDevice, second: ClusterDevice) -> str | None:
        """Return the name among `wires` of the link between two devices, None where there is none.

        Within one machine it is the node's own `wire`, and nothing else. Between machines it is the
        first link of the two nodes, in any order, else the first one between all nodes. Copies of a
        node are different machines.
        """
        if (first.node, first.copy) == (second.node, second.copy):
            return self.nodes[first.node].wire
        pair = sorted((first.node, second.node))
        for link in self.links:
            if link.between != "all" and sorted(link.between) == pair:
                return link.wire
        for link in self.links:
            if link.between == "all":
                return link.wire
        return None


@dataclass(frozen=True)
class ClusterDevice:
    """One device of a cluster.

    `node` is a name among the file's nodes and `kind` one among its devices. `copy` and `index`
    count from 0. `machine` is the node's name, with the number of the copy, as `rack.1`, where the
    node has several.
    """

    node: str
    copy: int
    index: int
    kind: str
    machine: str


def load_cluster(path: str | Path) -> Cluster:
    """Return the cluster of a file, or of one that ships, such as `clusters/h100_nvlink_8`.

    A file that exists comes first. Raises UserError, in one line, for a file that cannot be read, a
    wrong key or value, or a name that is not defined there.
    """
    file = Path(os.path.expanduser(path))
    if not file.exists():
        file = shipped.find_path(str(path)) or file
    data = read_yaml(file, "cluster")
    if not isinstance(data, dict):
        raise UserError(
            f"cluster: {path} must be a mapping with name, devices, wires, nodes, links; "
            f"got {data!r}"
        )
    try:
        cluster = Cluster.model_validate(data)
    except ValidationError as error:
        problem = _describe_error(dict(error.errors()[0]))
        raise UserError(f"cluster: {problem} ({path})") from None
    _check_names(cluster, str(path))
    return cluster


def _check_names(cluster: Cluster, source: str) -> None:
    """Raise UserError for a name that the file does not define."""

    def check(key: str, name: str, choices: Mapping[str, BaseModel]) -> None:
        if name not in choices:
            advice = "there are none yet"
            if choices:
                advice = suggest(name, choices)
            raise UserError(
                f"cluster: {key} names {name!r}, which is not in the file ({source}); {advice}"
            )

    for name, node in cluster.nodes.items():
        check(f"nodes.{name}.device", node.device, cluster.devices)
        if node.wire is not None:
            check(f"nodes.{name}.wire", node.wire, cluster.wires)
    for i, link in enumerate(cluster.links):
        check(f"links.{i}.wire", link.wire, cluster.wires)
        if link.between != "all":
            for name in link.between:
                check(f"links.{i}.between", name, cluster.nodes)


_MODELS: dict[str, type[BaseModel]] = {
    "devices": DeviceSpec,
    "wires": ClusterLink,
    "nodes": Node,
    "links": Link,
}


def _describe_error(error: Mapping[str, Any]) -> str:
    """Return one of pydantic's errors as a clause: the key, what was expected and what came."""
    path = _read_path(error["loc"])
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        model = _MODELS[path[0]] if len(path) > 1 else Cluster
        prefix = key.removesuffix(path[-1])
        return f"{key} is not a known key; {suggest(path[-1], model.model_fields, prefix)}"
    if error["type"] == "missing":
        return f"{key} is missing; add it"
    expected = str(error["msg"]).removeprefix("Input should be ")
    value = repr(error["input"])
    if len(value) > _VALUE_WIDTH:
        value = value[: _VALUE_WIDTH - 3] + "..."
    return f"{key} must be {expected}; got {value}"


def _read_path(location: tuple[str | int, ...]) -> list[str]:
    """Return the keys of pydantic's location, without the types that it tried on the way."""
    keys = []
    for part in location:
        key = str(part)
        if not key.startswith(("tuple[", "literal[", "function-")):
            keys.append(key)
    return keys
