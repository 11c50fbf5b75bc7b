"""A configuration is checked: a mistake is one line, and a right one reads back unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from localpipe import config as configs
from localpipe.config import reference
from localpipe.config.keys import Config, Optim
from localpipe.config.load import to_yaml, update
from localpipe.config.resolve import auto_milestones
from localpipe.config.resolved import count_stages
from localpipe.config.resume import FREE_KEYS, OPEN_SCHEDULES, flatten, join_recorded, read_recorded
from localpipe.errors import UserError
from localpipe.pipeline.stages.learning_rate import LearningRateSchedule
from tests import ROOT


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str, *words: str) -> Config:
    return configs.load(write(folder, text), words)


def refusal(path: Path, *words: str) -> str:
    """Return the one line with which load refuses a file and overrides."""
    with pytest.raises(UserError) as caught:
        configs.load(path, words)
    text = str(caught.value)
    assert text.startswith(("config: ", "command line: ")), text
    assert "\n" not in text and not text.endswith(".")
    return text


# --- Mistakes

WRONG_KEYS = [
    (["pipline.depth=2"], ["pipline is not a known key", "did you mean pipeline?"]),
    (["seed=1"], ["seed is not a known key", "did you mean run.seed?"]),
    (["zzz=1"], ["zzz is not a known key", "choose one of", "run"]),
    (["pipeline.depht=2"], ["pipeline.depht is not a known key", "did you mean pipeline.depth?"]),
    (["optim.learning_rate=1"], ["optim.learning_rate is not a known key", "optim.lr"]),
    (["method.contxt=none"], ["method.contxt is not a known key", "did you mean method.context?"]),
    (
        ["method.context.mod=none"],
        ["method.context.mod is not a known key", "did you mean method.context.mode?"],
    ),
]

WRONG_VALUES = [
    ("optim.lr=fast", ["optim.lr must be auto or a number at least 0", "got 'fast'"]),
    ("optim.lr=-1", ["optim.lr must be auto or a number at least 0", "got -1"]),
    ("optim.lr=true", ["optim.lr must be", "got true"]),
    ("optim.lr=.nan", ["optim.lr must be", "got nan"]),
    ("optim.weight_decay=.inf", ["optim.weight_decay must be a number at least 0", "got inf"]),
    ("optim.epochs=2.5", ["optim.epochs must be a whole number at least 1", "got 2.5"]),
    ("optim.epochs=0", ["optim.epochs must be a whole number at least 1", "got 0"]),
    ("optim.epochs='3'", ["optim.epochs must be a whole number", "got '3'"]),
    ("optim.nesterov=1", ["optim.nesterov must be true or false", "got 1"]),
    (
        "optim.schedule=cosine",
        [
            "optim.schedule must be one of cosine_epoch, cosine_epoch_from_0, cosine_step",
            "got 'cosine'",
        ],
    ),
    ("optim.name=adam", ["optim.name must be one of sgd, adamw", "got 'adam'"]),
    ("pipeline.stages=0", ["pipeline.stages must be a whole number at least 1 or null", "got 0"]),
    ("pipeline.depth=0", ["pipeline.depth must be a whole number at least 1", "got 0"]),
    (
        "pipeline.cuts=halves",
        [
            "pipeline.cuts must be one of equal, layerwise, memory, time or a list of whole",
            "got 'halves'",
        ],
    ),
    ("pipeline.cuts=[1,[2]]", ["pipeline.cuts must be", "got [1, [2]]"]),
    ("pipeline.cuts=-1", ["pipeline.cuts must be", "at least 0", "got [-1]"]),
    ("data.mean=grey", ["data.mean must be auto or a list of numbers", "got 'grey'"]),
    ("data.image_size=0", ["data.image_size must be auto or a whole number at least 1", "got 0"]),
    ("data.test=1", ["data.test must be a number above 0 and below 1 or null", "got 1"]),
    ("data.test=.nan", ["data.test must be a number above 0 and below 1 or null", "got nan"]),
    ("data.range=5", ["data.range must be a list of 2 numbers or null", "got [5]"]),
    ("data.range=[0,1,2]", ["data.range must be a list of 2 numbers or null", "got [0, 1, 2]"]),
    (
        "data.background=[0,0,256]",
        ["text or a list of 3 whole numbers at least 0 and at most 255", "got [0, 0, 256]"],
    ),
    ("data.background=808080", ["data.background must be text", "got 808080; put it in quotes"]),
    (
        "data.background=null",
        ["data.background must be text", "got null; a text that begins with # needs quotes"],
    ),
    ("run.device=tpu", ["run.device must be one of auto, cpu, cuda", "got 'tpu'"]),
    ("run.timeout_s=0", ["run.timeout_s must be a number above 0", "got 0"]),
    ("run.precision=fp8", ["run.precision must be one of fp32, tf32, bf16, fp16", "got 'fp8'"]),
    (
        "pipeline.wire_dtype=fp8",
        ["pipeline.wire_dtype must be one of fp32, bf16, fp16, int8, int4", "got 'fp8'"],
    ),
    ("run.deterministic=maybe", ["run.deterministic must be auto or true or false", "got 'maybe'"]),
    ("run.dir=[7]", ["run.dir must be text", "got [7]"]),
    ("model.args=3", ["model.args must be a mapping", "got 3"]),
    ("optim=3", ["optim must be a mapping of keys", "got 3"]),
    ("method=3", ["method must be a mapping of keys", "got 3"]),
    ("method.objective=3", ["method.objective must be a mapping", "got 3"]),
]

WRONG_TOGETHER = [
    (
        ["pipeline.cuts=3,7", "pipeline.stages=4"],
        ["pipeline.cuts [3, 7] makes 3 stages", "pipeline.stages is 4"],
    ),
    (["pipeline.cuts=7,3"], ["pipeline.cuts must rise", "got [7, 3]"]),
    (["pipeline.cuts=3,3"], ["pipeline.cuts must rise", "got [3, 3]"]),
    (
        ["pipeline.stages=2", "pipeline.processes=3"],
        ["pipeline.processes is 3", "2 stages", "at most 2"],
    ),
    (
        ["pipeline.cuts=3,7", "pipeline.processes=4"],
        ["pipeline.processes is 4", "3 stages", "at most 3"],
    ),
    (["pipeline.replicas=3"], ["pipeline.replicas 3 does not divide", "another number"]),
    (
        ["optim.accumulate=3"],
        ["optim.accumulate 3 does not divide data.batch_size 128", "choose a divisor"],
    ),
    (
        ["optim.accumulate=64"],
        ["optim.accumulate 64 leaves 2 of 128 images", "at least 3", "lower optim.accumulate"],
    ),
    (
        ["optim.accumulate=32", "pipeline.replicas=4"],
        ["leaves 4 of 128 images", "at least 15 with 4 replicas"],
    ),
    (
        ["data.batch_size=60", "optim.accumulate=3", "pipeline.replicas=3"],
        ["does not divide a message of 20 images"],
    ),
    (
        ["run.capture=graphs", "method.reconcile=cosine"],
        ["run.capture graphs does not go with method.reconcile"],
    ),
    (
        ["run.capture=compile", "method.reconcile=cosine"],
        ["run.capture compile does not go with method.reconcile"],
    ),
    (
        ["run.capture=compile", "run.checkpointing=block"],
        ["does not go with run.checkpointing", "run.capture=none"],
    ),
    (
        ["run.capture=graphs", "optim.accumulate=2"],
        ["run.capture graphs does not go with optim.accumulate"],
    ),
    (
        ["run.recover=stage", "pipeline.replicas=2"],
        ["run.recover stage replaces a worker alone", "set pipeline.replicas=1"],
    ),
    (
        ["run.recover=stage", "pipeline.backend=nccl"],
        ["pipeline.backend is nccl", "set pipeline.backend=gloo"],
    ),
    (
        ["run.recover=stage", "pipeline.replay=9", "optim.accumulate=2"],
        ["pipeline.replay is 9, expected at least 10", "set pipeline.replay=10"],
    ),
    (
        ["run.checkpointing=block", "method.reconcile=cosine"],
        ["run.checkpointing saves nothing with method.reconcile"],
    ),
    (["optim.momentum=0"], ["optim.nesterov needs a momentum above 0", "optim.nesterov=false"]),
    (["data.batch_size=1"], ["data.batch_size must be at least 2", "got 1"]),
    (["data.std=0,1,1"], ["data.std must be above 0 in every channel", "got [0.0, 1.0, 1.0]"]),
    (["data.range=1,1"], ["data.range must be two finite numbers", "got [1.0, 1.0]"]),
    (["data.range=[0, .inf]"], ["data.range must be two finite numbers", "got [0.0, inf]"]),
    (["data.range=[-1.7e308, 1.7e308]"], ["data.range must be two finite numbers"]),
    (["data.background=whit"], ["data.background has no colour 'whit'", "did you mean white?"]),
    (
        ["data.background='#12'"],
        [
            "data.background has no colour '#12'",
            "expected a name, as white, or '#rrggbb' in quotes",
        ],
    ),
    (
        ["data.background='#11223344'"],
        ["data.background '#11223344' is transparent itself", "expected a name"],
    ),
    (["optim.stages={0: {lr: 1}}"], ["optim.stages is reserved"]),
    (["run.stop_when=loss<1"], ["run.stop_when", "reserved"]),
    (["data.name=cifar"], ["data.name has no 'cifar'", "did you mean cifar10"]),
    (
        ["model.name=resent32"],
        ["model.name has no 'resent32'", "did you mean resnet32", "package.module:function"],
    ),
    (["method=dgll"], ["method has no 'dgll'", "did you mean dgl?"]),
    (
        ["method.objective.name=gredy"],
        ["method.objective.name", "has no 'gredy'", "did you mean greedy?"],
    ),
    (
        ["method=dgl", "method.objective.haed=mlp"],
        ["method.objective.haed is not a known key", "objective.head?"],
    ),
    (
        ["method=greedy", "method.objective.head=mlp"],
        ["method.objective.head is not a known key", "greedy has no"],
    ),
    (
        ["method=infopro", "method.objective.image_weight=[5,0.5,1]"],
        [
            "method.objective.image_weight must be auto or a list of 2 numbers at least 0",
            "got [5, 0.5, 1]",
        ],
    ),
    (
        ["method=infopro", "method.objective.task_weight=-5,1"],
        ["a list of 2 numbers at least 0", "got '-5,1'"],
    ),
    (
        ["method=infopro", "method.objective.task_weight=[.nan,1]"],
        ["a list of 2 numbers at least 0", "got [nan, 1]"],
    ),
    (
        ["method=dgl", "method.objective.head=9c9f"],
        ["method.objective.head must be one of mlp, 0c1f", "got '9c9f'"],
    ),
]


@pytest.mark.parametrize(("words", "parts"), WRONG_KEYS)
def test_unknown_key_is_refused_with_the_nearest_one(
    tmp_path: Path, words: list[str], parts: list[str]
) -> None:
    text = refusal(write(tmp_path, ""), *words)
    assert all(part in text for part in parts), text
    assert "mine.yaml" in text


@pytest.mark.parametrize(("word", "parts"), WRONG_VALUES, ids=[word for word, _ in WRONG_VALUES])
def test_wrong_value_is_refused_with_what_was_expected_and_got(
    tmp_path: Path, word: str, parts: list[str]
) -> None:
    text = refusal(write(tmp_path, ""), word)
    assert all(part in text for part in parts), text
    assert "mine.yaml" in text


@pytest.mark.parametrize(("words", "parts"), WRONG_TOGETHER)
def test_impossible_combination_is_refused_with_what_to_do(
    tmp_path: Path, words: list[str], parts: list[str]
) -> None:
    text = refusal(write(tmp_path, ""), *words)
    assert all(part in text for part in parts), text


def test_a_mistake_in_the_file_is_refused_like_one_on_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, "pipeline: {depht: 2}")
    assert refusal(path) == refusal(write(tmp_path, ""), "pipeline.depht=2")


def test_only_a_name_with_a_colon_is_taken_for_a_function(tmp_path: Path) -> None:
    assert load(tmp_path, "", "model.name=mine:net").model.name == "mine:net"
    assert "model.name has no 'mine'" in refusal(write(tmp_path, ""), "model.name=mine")


@pytest.mark.parametrize("word", ["optim.lr", "optim..lr=1", "=1", ".=1", "--lr"])
def test_word_without_key_and_equals_sign_is_no_override(tmp_path: Path, word: str) -> None:
    text = refusal(write(tmp_path, ""), word)
    assert text == f"command line: {word!r} is not an override; expected section.key=value"


def test_override_whose_value_is_no_yaml_is_refused(tmp_path: Path) -> None:
    assert "the value of run.dir is not YAML: '[1'" in refusal(write(tmp_path, ""), "run.dir=[1")


def test_override_below_a_plain_value_is_refused(tmp_path: Path) -> None:
    assert "run.dir.x goes below a key that is no section" in refusal(
        write(tmp_path, ""), "run.dir.x=1"
    )


def test_key_given_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    assert "mine.yaml line 3" in refusal(write(tmp_path, "optim:\n  lr: 1\n  lr: 2\n"))
    assert "key lr is given twice" in refusal(write(tmp_path, "optim: {lr: 1, lr: 2}"))
    assert "key data is given twice" in refusal(write(tmp_path, "data: {}\ndata: {}\n"))


@pytest.mark.parametrize(
    "text", ["a: b: c", "optim: {lr: 1", "\ta: 1", "a: *nowhere", "a: !!python/name:os.system x"]
)
def test_file_that_is_no_yaml_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    assert "mine.yaml line 1 is not YAML" in refusal(write(tmp_path, text))


def test_file_that_cannot_be_read_is_refused_by_its_path(tmp_path: Path) -> None:
    assert "cannot read" in refusal(tmp_path / "gone.yaml") and "gone.yaml" in refusal(
        tmp_path / "gone.yaml"
    )
    assert f"cannot read {tmp_path}" in refusal(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    assert "not UTF-8 text" in refusal(tmp_path / "binary.yaml")


@pytest.mark.parametrize("text", ["- optim", "hello", "3"])
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    assert "must be a mapping of sections" in refusal(write(tmp_path, text))


@pytest.mark.parametrize("text", ["- optim", "hello"])
def test_file_that_is_no_mapping_is_refused_with_overrides_too(tmp_path: Path, text: str) -> None:
    assert "must be a mapping of sections" in refusal(write(tmp_path, text), "optim.lr=1")


def test_a_list_as_a_key_is_refused(tmp_path: Path) -> None:
    assert "not YAML" in refusal(write(tmp_path, "optim: {[lr]: 1}"))


def test_a_control_character_is_refused_in_one_line(tmp_path: Path) -> None:
    assert "not YAML" in refusal(write(tmp_path, "run: {dir: \x07}"))


@pytest.mark.parametrize(("text", "key"), [("1: {}", "1"), ("optim: {1: 2}", "optim.1")])
def test_a_number_as_a_key_is_refused_by_its_name(tmp_path: Path, text: str, key: str) -> None:
    assert f"config: {key} is not a known key" in refusal(write(tmp_path, text))


# --- What is right


def test_defaults_are_those_of_the_documentation(tmp_path: Path) -> None:
    config = load(tmp_path, "")
    assert (config.optim.name, config.optim.momentum, config.optim.nesterov) == ("sgd", 0.9, True)
    assert (config.optim.weight_decay, config.optim.epochs, config.optim.max_steps) == (
        1e-4,
        160,
        None,
    )
    assert (config.optim.lr, config.optim.schedule, config.optim.warmup_epochs) == (
        "auto",
        "cosine_epoch",
        "auto",
    )
    assert (config.pipeline.depth, config.pipeline.cuts, count_stages(config)) == (
        2,
        "equal",
        4,
    )
    assert (config.run.checkpoint_every_s, config.run.timeout_s, config.run.resume) == (
        60,
        120,
        "auto",
    )
    assert (config.data.drop_last, config.data.validation, config.data.train_subset) == (
        False,
        0,
        None,
    )
    assert config.run.dir == "runs/mine"  # named after the file


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E-4", 1e-4), ("5e+1", 50), ("2.5e3", 2500), (".5e1", 5), ("1", 1)],
)
def test_exponent_without_a_dot_is_a_number(tmp_path: Path, text: str, value: float) -> None:
    assert load(tmp_path, f"optim: {{weight_decay: {text}}}").optim.weight_decay == value
    assert load(tmp_path, "", f"optim.weight_decay={text}").optim.weight_decay == value


def test_text_that_only_looks_like_an_exponent_stays_text(tmp_path: Path) -> None:
    assert load(tmp_path, "", "run.dir=1e4b").run.dir == "1e4b"
    assert load(tmp_path, "", "run.dir=e4").run.dir == "e4"


def test_overrides_apply_in_order_over_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, "optim: {lr: 1, epochs: 5}", "optim.lr=2", "optim.lr=3", "run.dir=a=b")
    assert (config.optim.lr, config.optim.epochs, config.run.dir) == (3, 5, "a=b")


def test_override_reaches_a_section_that_the_file_leaves_empty(tmp_path: Path) -> None:
    assert load(tmp_path, "optim:\n", "optim.lr=2").optim.lr == 2


@pytest.mark.parametrize(
    "word", ["pipeline.cuts=3,7,10", "pipeline.cuts=3, 7, 10", "pipeline.cuts=[3, 7, 10]"]
)
def test_cuts_on_the_command_line_need_no_brackets(tmp_path: Path, word: str) -> None:
    config = load(tmp_path, "", word)
    assert config.pipeline.cuts == (3, 7, 10) and count_stages(config) == 4


def test_a_single_cut_is_a_list_of_one(tmp_path: Path) -> None:
    config = load(tmp_path, "", "pipeline.cuts=3")
    assert config.pipeline.cuts == (3,) and count_stages(config) == 2


def test_explicit_cuts_agree_with_stages_that_match(tmp_path: Path) -> None:
    assert load(tmp_path, "pipeline: {cuts: [1, 2], stages: 3}").pipeline.cuts == (1, 2)


def test_channels_on_the_command_line_need_no_brackets(tmp_path: Path) -> None:
    assert load(tmp_path, "", "data.mean=0.5,0.25,1").data.mean == (0.5, 0.25, 1.0)


# --- Method


@pytest.mark.parametrize("name", ["dgl", "greedy"])
def test_method_as_a_word_is_the_axes_written_out(tmp_path: Path, name: str) -> None:
    written_out = load(
        tmp_path,
        f"method: {{objective: {{name: {name}}}, context: {{mode: none}}, "
        "reconcile: {distance: none}}",
    )
    assert load(tmp_path, f"method: {name}").method == written_out.method
    assert load(tmp_path, "", f"method={name}").method == written_out.method
    assert (
        load(tmp_path, f"method: {{objective: {name}, context: none}}").method == written_out.method
    )
    assert load(tmp_path, "", f"method.objective={name}").method == written_out.method
    assert written_out.method.objective["name"] == name


def test_an_objective_shows_its_own_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "method: dgl").method.objective == {"name": "dgl", "head": "mlp"}
    assert load(tmp_path, "method: greedy").method.objective == {"name": "greedy"}


def test_another_objective_drops_the_old_options(tmp_path: Path) -> None:
    text = "method: {objective: {name: dgl, head: 1c2f}}"
    assert load(tmp_path, text, "method.objective.name=greedy").method.objective == {
        "name": "greedy"
    }
    back = load(tmp_path, text, "method.objective.name=greedy", "method.objective.name=dgl")
    assert back.method.objective == {"name": "dgl", "head": "mlp"}


def test_the_same_objective_keeps_its_options(tmp_path: Path) -> None:
    text = "method: {objective: {name: dgl, head: 1c2f}}"
    assert load(tmp_path, text, "method.objective.name=dgl").method.objective["head"] == "1c2f"


def test_a_preset_drops_nothing_that_is_said_beside_it(tmp_path: Path) -> None:
    words = ["method.context=R1E", "method.objective.task=contrast", "method=infopro"]
    method = load(tmp_path, "", *words).method
    assert method.context.mode == "R1E" and method.objective["task"] == "contrast"


def test_a_preset_overrides_a_whole_method(tmp_path: Path) -> None:
    text = "method: {objective: {name: dgl, head: 1c2f}}"
    assert load(tmp_path, text, "method=dgl").method.objective == {"name": "dgl", "head": "mlp"}


# --- Written down and read back

FULL = """
model: {name: resnet20, num_classes: 7}
method: {objective: {name: dgl, head: 1c2f}}
pipeline: {cuts: [1, 4], processes: 2, depth: 3}
data: {name: synthetic, batch_size: 16, mean: [0.5, 0.5, 0.25], std: [0.1, 1, 1],
  image_size: [8, 12]}
optim: {lr: 1e-3, schedule: step, warmup_epochs: 0.5, max_steps: 9}
run: {seed: 3, dir: somewhere, deterministic: true}
"""


@pytest.mark.parametrize("text", ["", FULL])
def test_configuration_written_as_yaml_reads_back_unchanged(tmp_path: Path, text: str) -> None:
    config = load(tmp_path, text)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert configs.load(path) == config
    assert read_recorded(path) == config
    assert next(iter(yaml.safe_load(path.read_text()).items())) == ("schema", 1)


def test_update_checks_the_result(tmp_path: Path) -> None:
    config = load(tmp_path, "")
    assert update(config, {"optim.lr": 0.5, "data.mean": [0.1, 0.2]}).data.mean == (
        0.1,
        0.2,
    )
    with pytest.raises(UserError, match="optim.lr must be"):
        update(config, {"optim.lr": -1})


def test_every_key_is_listed_with_its_help_in_the_order_of_the_file(tmp_path: Path) -> None:
    rows = reference.list_keys()
    listed = [key for key, _, _, _ in rows]
    written = [key for key in flatten(load(tmp_path, "")) if not key.startswith("method.objective")]
    assert [key for key in listed if key != "method.objective"] == written
    assert all(choices and help_text for _, choices, _, help_text in rows)


# --- Resumed

DECIDED: dict[str, Any] = {
    "model.num_classes": 10,
    "pipeline.stages": 4,
    "pipeline.processes": 4,
    "data.mean": [0.5, 0.5, 0.5],
    "data.augment": "crop",
    "optim.lr": 0.1,
    "optim.warmup_epochs": 10,
    "run.device": "cpu",
    "run.threads": 1,
    "run.deterministic": True,
}


def recorded(folder: Path, *words: str) -> Config:
    """Return what a run would have written: every `auto` decided."""
    return update(load(folder, "", *words), DECIDED)


def test_auto_takes_the_record_on_a_resume(tmp_path: Path) -> None:
    joined = join_recorded(load(tmp_path, ""), recorded(tmp_path), "runs/mine")
    assert joined == recorded(tmp_path)


def test_balanced_class_weights_take_the_record_on_a_resume(tmp_path: Path) -> None:
    given = load(tmp_path, "", "task.class_weights=balanced")
    recorded_run = recorded(tmp_path, "task.class_weights=[0.5,1.5]")
    assert join_recorded(given, recorded_run, "runs/mine") == recorded_run


def test_recorded_value_given_again_is_no_change(tmp_path: Path) -> None:
    given = load(tmp_path, "", "optim.lr=0.1", "pipeline.stages=4", "data.mean=0.5,0.5,0.5")
    assert join_recorded(given, recorded(tmp_path), "runs/mine") == recorded(tmp_path)


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("optim.lr=0.2", "optim.lr"),
        ("optim.epochs=161", "optim.epochs"),
        ("optim.nesterov=false", "optim.nesterov"),
        ("data.batch_size=64", "data.batch_size"),
        ("data.train_subset=64", "data.train_subset"),
        ("data.augment=none", "data.augment"),
        ("model.name=resnet20", "model.name"),
        ("model.num_classes=11", "model.num_classes"),
        ("pipeline.stages=2", "pipeline.stages"),
        ("pipeline.cuts=1,2,3", "pipeline.cuts"),
        ("run.seed=1", "run.seed"),
        ("run.deterministic=false", "run.deterministic"),
        ("method.objective={name: dgl, head: 1c2f}", "method.objective.head"),
        ("method.objective=greedy", "method.objective.name"),
    ],
)
def test_shaping_key_that_differs_is_refused_by_name_on_a_resume(
    tmp_path: Path, word: str, key: str
) -> None:
    with pytest.raises(
        UserError, match=f"config: {key} is .*runs/mine was started with .*run.dir"
    ) as caught:
        join_recorded(load(tmp_path, "", word), recorded(tmp_path), "runs/mine")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("pipeline.processes=2", "pipeline.processes", 2),
        ("pipeline.depth=5", "pipeline.depth", 5),
        ("data.root=elsewhere", "data.root", "elsewhere"),
        ("optim.max_steps=7", "optim.max_steps", 7),
        ("run.dir=moved", "run.dir", "moved"),
        ("run.threads=3", "run.threads", 3),
        ("run.checkpoint_every_s=1", "run.checkpoint_every_s", 1),
        ("run.keep_checkpoints=5", "run.keep_checkpoints", 5),
        ("run.timeout_s=9", "run.timeout_s", 9),
        ("run.log_every=1", "run.log_every", 1),
    ],
)
def test_free_key_may_change_on_a_resume_and_nothing_else_does(
    tmp_path: Path, word: str, key: str, value: object
) -> None:
    joined = flatten(join_recorded(load(tmp_path, "", word), recorded(tmp_path), "runs/mine"))
    before = flatten(recorded(tmp_path))
    assert {name: joined[name] for name in joined if joined[name] != before[name]} == {key: value}


def test_epochs_may_change_where_no_rate_depends_on_them(tmp_path: Path) -> None:
    constant, longer = "optim.schedule=constant", "optim.epochs=161"
    given = load(tmp_path, "", constant, longer)
    joined = join_recorded(given, recorded(tmp_path, constant), "runs/mine")
    assert joined == recorded(tmp_path, constant, longer)  # the warm-up is as it was
    with pytest.raises(UserError, match="cosine_epoch depend on it; .*init_from=runs/mine$"):
        join_recorded(load(tmp_path, "", longer), recorded(tmp_path), "runs/mine")


@pytest.mark.parametrize("schedule", get_args(Optim.model_fields["schedule"].annotation))
def test_schedules_whose_rates_do_not_depend_on_epochs_are_known(schedule: Any) -> None:
    rates = []
    for epochs in (8, 16):
        milestones: tuple[int, ...] = (2, 5)
        if schedule == "step":
            milestones = tuple(auto_milestones(epochs))
        optim = Optim(
            schedule=schedule, epochs=epochs, lr=1.0, warmup_epochs=1, milestones=milestones
        )
        run = LearningRateSchedule(optim, 3)
        rates.append([run.rate(step) for step in range(1, 25)])
    assert (rates[0] == rates[1]) == (schedule in OPEN_SCHEDULES)


def test_a_limit_of_steps_that_is_no_longer_given_is_lifted(tmp_path: Path) -> None:
    joined = join_recorded(load(tmp_path, ""), recorded(tmp_path, "optim.max_steps=7"), "runs/mine")
    assert joined.optim.max_steps is None


def test_free_keys_are_keys(tmp_path: Path) -> None:
    assert flatten(load(tmp_path, "")).keys() >= FREE_KEYS


def test_subset_that_is_no_longer_given_is_refused_on_a_resume(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.train_subset"):
        join_recorded(load(tmp_path, ""), recorded(tmp_path, "data.train_subset=64"), "runs/mine")


# --- Shipped

SHIPPED = [
    path
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
    if {"model", "data"} <= (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).keys()
]


def test_there_are_shipped_configurations() -> None:
    assert ROOT / "configs" / "demo.yaml" in SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_configuration_parses(path: Path) -> None:
    config = configs.load(path)
    assert count_stages(config) >= 1
