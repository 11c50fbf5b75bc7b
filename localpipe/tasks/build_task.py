"""Builds the task that a configuration names: one of localpipe's, or a user's own class."""

from __future__ import annotations

import dataclasses
from typing import Any

from localpipe.config import registry
from localpipe.config.keys import TaskKeys
from localpipe.config.user_code import call_user_code, is_user_code
from localpipe.errors import UserError
from localpipe.tasks.task import Task


def build_task(
    keys: TaskKeys,
    num_classes: int,
    sample: tuple[int, ...],
    evaluation_sample: tuple[int, ...] | None = None,
) -> Task:
    """Return the task of a configuration, without a grid.

    keys: the section `task`, its name decided. sample: the shape of an input. evaluation_sample: in
    an evaluation, None where it is the same. A user's class is imported, and gets an instance of
    its `Options` made of task.args. Raises UserError for an unknown name, for a class that is no
    subclass of `localpipe.Task`, and for what it raises.
    """
    task = _build_task(keys, num_classes, sample)
    if evaluation_sample is None:
        return task
    return dataclasses.replace(task, evaluation_sample=evaluation_sample)


def _build_task(keys: TaskKeys, num_classes: int, sample: tuple[int, ...]) -> Task:
    cls = registry.find_task_class(keys.name, "config: task.name")
    if not is_user_code(keys.name):
        task: Task = cls(num_classes, None, sample, keys)
        return task
    if not (isinstance(cls, type) and issubclass(cls, Task)):
        raise UserError(f"task: {keys.name} is no task; expected a subclass of localpipe.Task")
    return call_user_code(
        f"task: {keys.name} cannot be built",
        lambda: cls(num_classes, None, sample, _build_options(cls, keys)),
    )


def _build_options(cls: Any, keys: TaskKeys) -> Any:
    """Return an instance of the Options of a user's class, or task.args where it has none."""
    options = getattr(cls, "Options", None)
    if not dataclasses.is_dataclass(options):
        return keys.args
    return options(**keys.args)  # type: ignore[operator]
