"""A loader process: it calls the user's function itself, and answers requests in their order.

It dies with the process that started it, and ends when the other end of its socket is closed.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Mapping

import numpy as np
import torch

from localpipe.data.user.items import ItemFormat, check_values
from localpipe.data.user.splits import UserSplits, call_function, describe_splits, named_item
from localpipe.data.user.wire import (
    ArrayFormat,
    Content,
    Progress,
    Wire,
    allocate_arrays,
)
from localpipe.environment import loader_handles
from localpipe.errors import UserError, first_line

# What a request gives: JSON, the formats of arrays, and the open file in which they lie.
Answer = tuple[Content, Mapping[str, ArrayFormat], int]


def main() -> int:
    """Answer requests until the other end is closed, and return 0."""
    # The process that started this one decides its end. Its standard output is the command's.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    end, shared = loader_handles()
    wire, progress = Wire(socket.socket(fileno=end)), Progress(shared)
    os.close(shared)

    splits: UserSplits | None = None
    while True:
        try:
            request, _ = wire.receive()
        except EOFError:
            return 0
        try:
            if splits is None:
                splits = call_function(request["name"], progress)
            content, formats, file = _ANSWERS[request["kind"]](splits, request)
        except UserError as error:
            wire.send({"error": str(error)})
        except (OSError, MemoryError) as error:
            wire.send({"error": f"data: a loader process has failed: {first_line(error)}"})
        else:
            arrays = {name: [form.shape, form.dtype] for name, form in formats.items()}
            wire.send({**content, "arrays": arrays}, file)
            os.close(file)


def describe(splits: UserSplits, request: Content) -> Answer:
    """Return what a run has to know of the splits, and their labels as arrays."""
    content, labels = describe_splits(splits, request["vocabulary"])
    formats = {split: ArrayFormat(known.shape, "int64") for split, known in labels.items()}
    file, arrays = allocate_arrays(formats)
    for split, known in labels.items():
        arrays[split][...] = known
    return content, formats, file


def read_batch(splits: UserSplits, request: Content) -> Answer:
    """Return the arrays `input` and `target` of the items at `indices` of `split`.

    classes: of targets that are class indices, vocabulary: of tokens, to check them. None for no
    check.
    """
    split, indices = request["split"], request["indices"]
    form = ItemFormat.from_json(request["format"])
    formats = {
        "input": form.input.of_batch(len(indices)),
        "target": form.target.of_batch(len(indices)),
    }
    file, arrays = allocate_arrays(formats)
    inputs, targets = torch.from_numpy(arrays["input"]), arrays["target"]
    try:
        for row, index in enumerate(indices):
            with named_item(split, index):
                item = splits.read_item(split, index, request["seed"], split, request["epoch"])
                form.check(item)
                check_values(item, request["classes"], request["vocabulary"])
            inputs[row] = torch.from_numpy(item[0])
            targets[row] = item[1]
    except BaseException:
        os.close(file)
        raise
    return {}, formats, file


def count_values(splits: UserSplits, request: Content) -> Answer:
    """Return `counts` (C, 256): how often every value is in the images at `indices` of train."""
    form = ItemFormat.from_json(request["format"])
    formats = {"counts": ArrayFormat((form.input.shape[0], 256), "int64")}
    file, arrays = allocate_arrays(formats)
    counts = arrays["counts"]
    try:
        for index in request["indices"]:
            with named_item("train", index):
                item = splits.read_item("train", index, 0, "train", 0)
                form.check(item)
            for channel, values in enumerate(item[0]):
                counts[channel] += np.bincount(values.ravel(), minlength=256)
    except BaseException:
        os.close(file)
        raise
    return {}, formats, file


_ANSWERS: Mapping[str, Callable[[UserSplits, Content], Answer]] = {
    "describe": describe,
    "batch": read_batch,
    "count": count_values,
}
