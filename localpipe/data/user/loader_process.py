"""A loader process: it reads items of a user's data set, or image files, as it is asked to.

It calls the user's function itself, and answers requests in their order.

It dies with the process that started it, and ends when the other end of its socket is closed.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Mapping

import numpy as np
import torch

from localpipe.data.folders.file_loader import read_files
from localpipe.data.scenes.scene_loader import read_scenes
from localpipe.data.user.items import ItemFormat, check_mask, check_probabilities, check_values
from localpipe.data.user.splits import UserSplits, call_function, describe_splits, named_item
from localpipe.data.user.wire import ArrayFormat, ArrayWriter, Content, Progress, Wire
from localpipe.environment import loader_handles
from localpipe.errors import RunError, UserError, first_line

# Makes the content of the answer to a request, and writes its arrays.
Answerer = Callable[[UserSplits, Content, ArrayWriter], Content]


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

    writer = ArrayWriter()
    splits: UserSplits | None = None
    while True:
        try:
            request, _ = wire.receive()
        except EOFError:
            return 0
        try:
            if request["kind"] in _OWN_READERS:
                content = _OWN_READERS[request["kind"]](request, writer, progress)
            else:
                if splits is None:
                    splits = call_function(request["name"], progress)
                content = _ANSWERS[request["kind"]](splits, request, writer)
        except (UserError, RunError) as error:
            wire.send({"error": str(error)})
        except (OSError, MemoryError) as error:
            wire.send({"error": f"data: a loader process has failed: {first_line(error)}"})
        else:
            writer.send(wire, content)


def describe(splits: UserSplits, request: Content, writer: ArrayWriter) -> Content:
    """Return what a run has to know of the splits, and write their labels as arrays."""
    content, labels = describe_splits(splits, request["vocabulary"])
    formats = {split: ArrayFormat(known.shape, "int64") for split, known in labels.items()}
    arrays = writer.allocate(formats)
    for split, known in labels.items():
        arrays[split][...] = known
    return content


def read_batch(splits: UserSplits, request: Content, writer: ArrayWriter) -> Content:
    """Write the arrays `input` and `target` of the items at `indices` of `split`.

    classes: of targets that are class indices, vocabulary: of tokens, to check them. None for no
    check.
    """
    split, indices = request["split"], request["indices"]
    form = ItemFormat.from_json(request["format"])
    formats = {
        "input": form.input.of_batch(len(indices)),
        "target": form.target.of_batch(len(indices)),
    }
    arrays = writer.allocate(formats)
    for row, index in enumerate(indices):
        with named_item(split, index):
            item = splits.read_item(split, index, request["seed"], split, request["epoch"])
            form.check(item)
            check_values(item, request["classes"], request["vocabulary"])
            if request["is_mask"]:
                check_mask(item, request["classes"], request["ignored"])
            if request["is_soft"]:
                check_probabilities(item)
        arrays["input"][row] = item[0]
        arrays["target"][row] = item[1]
    return {}


def count_values(splits: UserSplits, request: Content, writer: ArrayWriter) -> Content:
    """Write `counts` (C, 256): how often every value is in the images at `indices` of train."""
    form = ItemFormat.from_json(request["format"])
    arrays = writer.allocate({"counts": ArrayFormat((form.input.shape[0], 256), "int64")})
    counts = arrays["counts"]
    counts[...] = 0
    for index in request["indices"]:
        with named_item("train", index):
            item = splits.read_item("train", index, 0, "train", 0)
            form.check(item)
        for channel, values in enumerate(item[0]):
            counts[channel] += np.bincount(values.ravel(), minlength=256)
    return {}


# Reads localpipe's own data, without a user's function.
_OWN_READERS: Mapping[str, Callable[[Content, ArrayWriter, Progress], Content]] = {
    "files": read_files,
    "scenes": read_scenes,
}
_ANSWERS: Mapping[str, Answerer] = {
    "describe": describe,
    "batch": read_batch,
    "count": count_values,
}
