"""Values that no configuration has on purpose are refused in one line, or taken as they are."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from localpipe import config as configs
from localpipe.config.keys import LARGEST
from localpipe.config.load import parse
from localpipe.errors import UserError
from localpipe.output import escape_what_cannot_be_encoded
from localpipe.plan.cluster.machines import load_cluster
from localpipe.plan.whole_plan import make_plan
from localpipe.results.export import load as load_exported
from localpipe.runs.directory import RunDirectory

OWN = "tests.fuzz.own_code"
ALIASES = ", ".join(["*a{}"] * 10)


def refusal(folder: Path, text: str, *words: str) -> str:
    """Return the line with which the text of a file and overrides are refused."""
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        configs.load(path, words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- The code of a user


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("RefusesOptions", "ValueError: scale 1.0"),
        ("OddAnnotation", "NameError: name 'NoSuchName' is not defined"),
        ("OddDefault", "PydanticSerializationError"),
    ],
)
def test_an_error_of_a_users_options_is_one_line(tmp_path: Path, name: str, reason: str) -> None:
    line = refusal(tmp_path, "", f"method.objective.name={OWN}:{name}")
    assert line.startswith(f"objective: {OWN}:{name} cannot be configured: {reason}")


@pytest.mark.parametrize("method", ["resolved", "is_cross_entropy", "needs_image", "is_over_pairs"])
def test_an_error_of_a_users_static_method_is_one_line(tmp_path: Path, method: str) -> None:
    (tmp_path / f"{method}.py").write_text(
        "from tests.fuzz.own_code import Sound\n"
        "class Mine(Sound):\n"
        "    @staticmethod\n"
        f"    def {method}(*_):\n"
        "        raise ValueError('mine')\n"
    )
    words = ["data.batch_size=16", "optim.accumulate=2", "method.reconcile.distance=l2"]
    words.append(f"method.objective.name={tmp_path}/{method}.py:Mine")
    with pytest.raises(UserError, match=r"Mine cannot be configured: ValueError: mine"):
        make_plan(configs.load("demo", words)).print()


def test_a_script_that_leaves_while_it_is_imported_is_one_line(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import argparse\nargparse.ArgumentParser().parse_args(['--x'])\n")
    line = refusal(tmp_path, "", f"method.objective.name={script}:Mine")
    assert "SystemExit: 2; correct it" in line


@pytest.mark.parametrize("name", ["raises", "leaves"])
def test_a_network_that_raises_or_leaves_is_one_line(name: str) -> None:
    given = configs.load("demo", [f"model.name={OWN}:{name}"])
    with pytest.raises(UserError, match=rf"model: {OWN}:{name} cannot be called: "):
        make_plan(given)


# --- YAML


@pytest.mark.parametrize("key", ["model", "method", "data", "other"])
def test_aliases_that_stand_for_a_billion_values_are_refused(tmp_path: Path, key: str) -> None:
    lines = [f"{key}:", "  a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for level in range(1, 10):
        lines.append(f"  a{level}: &a{level} [{ALIASES.replace('{}', str(level - 1))}]")
    line = refusal(tmp_path, "\n".join(lines))
    assert line.endswith("is not YAML: it stands for more than 1000000 values")


# --- Numbers


@pytest.mark.parametrize(
    "word", ["data.batch_size", "run.seed", "optim.max_steps", "data.samples", "run.log_every"]
)
def test_numbers_that_overflow_are_refused(tmp_path: Path, word: str) -> None:
    line = refusal(tmp_path, "", f"{word}={10 * LARGEST}")
    assert line.startswith(f"config: {word} must be a")
    assert line.endswith("got 10000000000000; give at most 1000000000000")


def test_numbers_that_are_large_are_accepted() -> None:
    values = {"data": {"batch_size": LARGEST}, "run": {"seed": -LARGEST}}
    config = parse(values, "test")
    assert (config.data.batch_size, config.run.seed) == (LARGEST, -LARGEST)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model.name=chain", "model.args.blocks=1000000000"], "at most 2000"),
        (["model.name=vit_tiny", "model.args.depth=1000000"], "at most 2000"),
        (["pipeline.depth=1000000000"], "at most 1000"),
        (["pipeline.stages=1000000000000"], "at most 2000"),
        (["pipeline.replicas=20000", "data.batch_size=40000"], "at most 10000"),
    ],
)
def test_what_is_built_one_by_one_has_a_limit(words: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        make_plan(configs.load("demo", words))


def test_shapes_beyond_64_bits_are_one_line() -> None:
    words = ["model.name=vit_tiny", "model.args.width=900000000000"]
    with pytest.raises(UserError) as caught:
        make_plan(configs.load("demo", words))
    line = str(caught.value)
    assert line.startswith("model: vit_tiny has no shapes for images (3, 32, 32) and 10 classes: ")
    assert "\n" not in line and line.endswith("model.num_classes or model.args")


# --- Texts


@pytest.mark.parametrize("key", [" data ", "", "a b", "a\nb"])
def test_an_odd_key_is_named_in_quotes(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError) as caught:
        parse({key: {}}, "test")
    assert str(caught.value).startswith(f"config: {key!r} is not a known key".replace("\n", "\\n"))


@pytest.mark.parametrize("name", ["caf\udce9", "a\nb", "\x1b[31m"])
def test_a_path_on_the_command_line_may_have_any_signs(name: str) -> None:
    assert configs.load("demo", [f"data.root={name}"]).data.root == name


@pytest.mark.parametrize("key", ["run.dir", "data.root", "run.init_from"])
def test_a_null_byte_is_in_no_path(tmp_path: Path, key: str) -> None:
    section, _, name = key.partition(".")
    line = refusal(tmp_path, f'{section}: {{{name}: "a\\0b"}}')
    assert line.startswith(f"config: {key} must be text") and line.endswith("got 'a\\x00b'")


def test_the_home_of_nobody_is_a_path_like_others() -> None:
    assert RunDirectory("~no_such_user/x").path == Path("~no_such_user/x")
    with pytest.raises(UserError, match="there is no ~no_such_user/x"):
        load_exported("~no_such_user/x")
    with pytest.raises(UserError, match="cannot read ~no_such_user/x"):
        load_cluster("~no_such_user/x")


def test_a_name_that_is_no_text_is_printed_with_question_marks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(file, "utf-8"))
    escape_what_cannot_be_encoded()
    print("caf\udce9", flush=True)
    assert file.getvalue() == b"caf\\udce9\n"
