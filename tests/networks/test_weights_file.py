"""Files of weights: what is read, what is looked through, what fits a network, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from localpipe.errors import UserError
from localpipe.networks.blueprint import Blueprint
from localpipe.networks.user_network import user_blueprint
from localpipe.networks.weights.weights_file import match_weights, read_weights
from tests.sample_networks import small

State = dict[str, Tensor]
NAME = "tests.sample_networks:small"


def blueprint(num_classes: int = 10) -> Blueprint:
    return user_blueprint(NAME, (3, 8, 8), num_classes, {})


@pytest.fixture
def state() -> State:
    """The state_dict of the small network."""
    return small().state_dict()


def written(folder: Path, content: Any) -> Path:
    path = folder / "weights.pt"
    torch.save(content, path)
    return path


WRAPPERS: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}},
    "model": lambda state: {"model": state, "best": 0.5},
    "module": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "all": lambda state: {
        "model": {"state_dict": {f"module.module.{name}": each for name, each in state.items()}}
    },
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_looked_through(tmp_path: Path, state: State, wrapper: str) -> None:
    file = read_weights(written(tmp_path, WRAPPERS[wrapper](state)))
    assert list(file.tensors) == list(state)
    assert all(torch.equal(file.tensors[name], tensor) for name, tensor in state.items())
    match = match_weights(blueprint(), file)
    assert match.taken == state.keys() and match.total == len(state)
    assert match.initialised == match.unused == ()


def test_safetensors_are_the_same_weights(tmp_path: Path, state: State) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    file = read_weights(path)
    assert file.tensors.keys() == state.keys()
    assert all(torch.equal(file.tensors[name], tensor) for name, tensor in state.items())
    assert file.sha256 != read_weights(written(tmp_path, state)).sha256


def test_another_head_stays_as_it_is_initialised(tmp_path: Path, state: State) -> None:
    file = read_weights(written(tmp_path, state))
    match = match_weights(blueprint(num_classes=7), file)
    assert match.initialised == ("5.2.weight", "5.2.bias") and match.unused == ()
    assert match.taken == state.keys() - {"5.2.weight", "5.2.bias"}


def test_a_head_of_other_layers_and_no_head_are_heads_too(tmp_path: Path, state: State) -> None:
    state["5.7.weight"] = state.pop("5.2.weight")
    del state["5.2.bias"]
    match = match_weights(blueprint(), read_weights(written(tmp_path, state)))
    assert (match.initialised, match.unused) == (("5.2.weight", "5.2.bias"), ("5.7.weight",))


def test_counts_may_be_missing_in_old_files(tmp_path: Path, state: State) -> None:
    for name in [name for name in state if name.endswith("num_batches_tracked")]:
        del state[name]
    match = match_weights(blueprint(), read_weights(written(tmp_path, state)))
    assert match.initialised == tuple(f"{block}.2.num_batches_tracked" for block in range(1, 5))


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as refused:
        match_weights(blueprint(), read_weights(path))
    text = str(refused.value)
    assert "\n" not in text and str(path) in text
    return text


def test_the_first_three_that_do_not_fit_are_named(tmp_path: Path, state: State) -> None:
    del state["0.weight"]
    state["1.1.weight"] = torch.zeros(8, 8, 1, 1)
    state["1.2.running_mean"] = torch.zeros(9)
    state["extra"] = torch.zeros(1)
    assert (
        "does not fit tests.sample_networks:small: 0.weight is missing, 1.1.weight has the shape "
        "[8, 8, 1, 1], expected [8, 8, 3, 3], 1.2.running_mean has the shape [9], expected [8], "
        "and 1 more; expected a state_dict"
    ) in refusal(written(tmp_path, state))


def test_other_numbers_are_refused(tmp_path: Path, state: State) -> None:
    state["0.bias"] = torch.zeros(8, dtype=torch.int8)
    state["1.2.running_var"][3] = float("nan")
    text = refusal(written(tmp_path, state))
    assert "0.bias holds int8 numbers, expected float32, 1.2.running_var is not finite; " in text


def test_half_precision_is_the_same_kind_of_numbers(tmp_path: Path, state: State) -> None:
    halves = {
        name: each.half() if each.is_floating_point() else each for name, each in state.items()
    }
    match = match_weights(blueprint(), read_weights(written(tmp_path, halves)))
    assert match.taken == state.keys()


def test_an_unknown_name_is_refused(tmp_path: Path, state: State) -> None:
    state["context.1.adapter.weight"] = torch.zeros(1)
    assert ": context.1.adapter.weight is unknown; " in refusal(written(tmp_path, state))


@pytest.mark.parametrize(
    "content",
    [{"weights": {}, "optimizer": None}, [torch.zeros(1)], {0: torch.zeros(1)}, {}, {"model": 3}],
    ids=["a checkpoint", "a list", "numbers", "empty", "no mapping"],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    assert "holds no state_dict" in refusal(written(tmp_path, content))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.pt")
    for suffix in (".pt", ".safetensors"):
        path = tmp_path / f"broken{suffix}"
        path.write_bytes(b"no weights")
        assert "it is damaged" in refusal(path)
    # A whole pickled module would run code of the file.
    assert "other objects than tensors" in refusal(written(tmp_path, small()))
