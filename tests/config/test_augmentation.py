"""data.augment as a list: its spelling, what is refused, and how a run goes on with it."""

from __future__ import annotations

from typing import Any

import pytest

from localpipe import config as configs
from localpipe import data
from localpipe.config import registry
from localpipe.config.augmentation import fits_auto, read_words
from localpipe.config.keys import Config, Data
from localpipe.config.load import as_resolved, to_dict, update
from localpipe.config.resume import (
    ADDED_KEYS,
    OLD_BORDERS,
    add_later_keys,
    flatten,
    join_recorded,
)
from localpipe.data import npz, torchvision_sets
from localpipe.data.folders.image_folder import IMAGE_FOLDER, IMAGENET
from localpipe.errors import UserError
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.plan.resolve_here import resolve_here


def given(**keys: Any) -> Config:
    sections = {
        "model": {"name": "resnet8"},
        "data": {"name": "synthetic", "samples": 24, "image_size": 8, "batch_size": 8, **keys},
        "optim": {"epochs": 1},
        "run": {"device": "cpu"},
    }
    return configs.parse(sections, "test")


def resolved(**keys: Any) -> Any:
    config = given(**keys)
    return resolve_here(config, data.load(config.data, 0))


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("crop_flip", "crop_flip"),
        (["crop_flip"], "crop_flip"),
        ([], "none"),
        ("crop,mixup:0.8", ("crop", "mixup:0.8")),
        (["auto", {"mixup": 0.8}], ("auto", "mixup:0.8")),
        ({"erasing": 0.5}, "erasing:0.5"),
        ("randaugment, colour ,cutout", ("randaugment:9", "colour:0.4", "cutout:16")),
        (["erasing:0.250", "cutmix"], ("erasing:0.25", "cutmix:1")),
    ],
)
def test_words_have_one_spelling(written: Any, read: Any) -> None:
    config = given(augment=written)
    assert config.data.augment == read
    again = configs.parse(to_dict(config), "test")
    assert again.data.augment == read


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("crp", "did you mean crop?"),
        ("crop:3", "must be one of"),
        ("mixup:x", "must be one of"),
        (3, "or a list of them"),
        ("mixup,crop", "set data.augment=[crop,mixup:0.2]"),
        ("none,crop", "has none beside other words"),
        ("crop,crop_flip", "has both crop and crop_flip"),
        ("auto,crop", "has both auto and crop"),
        ("mixup,mixup:0.8", "has mixup twice"),
        ("mixup:0", "an alpha above 0"),
        ("mixup:nan", "an alpha above 0"),
        ("cutout:2.5", "a side in whole pixels"),
        ("randaugment:31", "a whole magnitude from 0 to 30"),
        ("erasing:2", "a probability above 0 and at most 1"),
    ],
)
def test_what_is_no_augmentation_is_refused(written: Any, text: str) -> None:
    with pytest.raises(UserError) as caught:
        given(augment=written)
    line = str(caught.value)
    assert line.startswith("config: data.augment") and text in line and "\n" not in line


def test_words_are_read_by_what_they_do() -> None:
    found = read_words(("crop_flip", "randaugment:9", "cutout:4", "mixup:0.8", "cutmix:1"))
    assert found.crop == "crop_flip" and found.flips and found.blends
    assert found.changes == (("randaugment", 9.0), ("cutout", 4.0))
    assert found.mixtures == (("mixup", 0.8), ("cutmix", 1.0))
    assert not read_words("crop").flips and not read_words("cutmix:1").blends


def test_auto_in_a_list_stands_for_the_words_of_the_data_set() -> None:
    for name, words in (("digits", ("crop", "colour:0.4")), ("synthetic", "colour:0.4")):
        config = given(name=name, augment="auto,colour", image_size="auto")
        assert data.load(config.data, 0).augment == words


def test_mixtures_make_probabilities_and_mixup_makes_floats() -> None:
    for augment, dtype, targets in (
        ("none", "uint8", "index"),
        ("cutmix", "uint8", "probabilities"),
        ("mixup", "float32", "probabilities"),
    ):
        config = resolved(augment=augment)
        assert (config.inputs.name, config.inputs.dtype) == ("image", dtype)
        assert config.task.targets == targets


@pytest.mark.parametrize(
    ("task", "text"),
    [
        ({"targets": "index"}, "task.targets is index"),
        ({"name": "regression"}, "mixes two classes"),
    ],
)
def test_mixtures_are_for_probabilities_of_classes(task: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        configs.parse({"task": task, "data": {"augment": "cutmix"}}, "test")


@pytest.mark.parametrize("objective", ["predsim", {"name": "infopro", "task": "contrast"}])
def test_objectives_that_compare_classes_refuse_mixtures(objective: Any) -> None:
    sections = to_dict(given(augment="mixup")) | {"method": {"objective": objective}}
    config = configs.parse(sections, "test")
    config = resolve_here(config, data.load(config.data, 0))
    blueprint, plans = build_plans(config)
    with pytest.raises(UserError, match="by their classes"):
        Stage(plans[0], blueprint, config)


def test_padding_is_that_of_the_data_set_unless_given() -> None:
    config = resolved(name="digits", image_size="auto")
    assert (config.data.padding, config.data.padding_mode) == (2, "zero")
    config = resolved(name="digits", image_size="auto", padding=3, padding_mode="reflect")
    assert (config.data.padding, config.data.padding_mode) == (3, "reflect")
    dataset = data.load(config.data, 0)
    assert (dataset.padding, dataset.padding_mode) == (3, "reflect")
    assert resolved(augment="crop").data.padding == 4


def test_the_extra_split_is_for_svhn() -> None:
    with pytest.raises(UserError, match=r"data\.extra is for svhn"):
        given(extra=True)
    assert Data(name="svhn", extra=True).extra


def test_a_run_of_an_earlier_version_goes_on_with_its_own_border() -> None:
    """It is compared with a new run as the same, and may name the border that it has."""
    recorded = resolved(name="digits", image_size="auto")
    content = to_dict(recorded)
    for key in ("padding", "padding_mode", "extra"):
        del content["data"][key]
    add_later_keys(content)
    old = as_resolved(configs.parse(content, "old"))
    assert flatten(old) == flatten(recorded)
    for keys in ({}, {"padding": 2}, {"padding_mode": "zero"}):
        joined = join_recorded(given(name="digits", image_size="auto", **keys), old, "run")
        assert (joined.data.padding, joined.data.padding_mode) == (2, "zero")
    with pytest.raises(UserError, match=r"data\.padding"):
        join_recorded(given(name="digits", image_size="auto", padding=3), old, "run")


def test_the_borders_of_earlier_versions_are_those_of_the_recipes() -> None:
    recipes = {name: published.recipe for name, published in torchvision_sets._SETS.items()}
    recipes |= {"npz": npz._RECIPE, "image_folder": IMAGE_FOLDER, "imagenet": IMAGENET}
    for name in ("digits", "synthetic"):
        recipes[name] = registry.find_data_loader(name, "test")(Data(name=name, samples=4)).recipe
    borders = {name: (recipe.padding, recipe.padding_mode) for name, recipe in recipes.items()}
    assert borders == OLD_BORDERS


def test_a_border_that_is_not_recorded_is_the_data_sets_own() -> None:
    assert ADDED_KEYS["data.padding"] is None and ADDED_KEYS["data.padding_mode"] is None
    recorded = resolved(name="digits", image_size="auto")
    unknown = as_resolved(update(recorded, {"data.padding": None, "data.padding_mode": None}))
    dataset = data.load(unknown.data, 0)
    assert (dataset.padding, dataset.padding_mode) == (2, "zero")


def test_a_resumed_run_may_name_auto_in_its_list_again() -> None:
    config = given(name="digits", image_size="auto", augment="auto,mixup")
    recorded = resolve_here(config, data.load(config.data, 0))
    assert recorded.data.augment == ("crop", "mixup:0.2")
    assert join_recorded(config, recorded, "run").data.augment == recorded.data.augment
    same = update(config, {"data.augment": ["crop", "mixup"]})
    assert join_recorded(same, recorded, "run").data.augment == recorded.data.augment
    other = update(config, {"data.augment": ["auto", "cutmix"]})
    with pytest.raises(UserError, match=r"data\.augment"):
        join_recorded(other, recorded, "run")
    assert fits_auto(["auto", "mixup:1"], "mixup:1")
    assert not fits_auto(["crop", "mixup:1"], ["crop", "mixup:1"])


def test_a_resolved_configuration_has_no_auto() -> None:
    values = to_dict(resolved())
    values["data"]["augment"] = ["auto", "mixup:1"]
    with pytest.raises(UserError, match=r"data\.augment"):
        as_resolved(configs.parse(values, "test"))
