"""What surrounds a run: signals, threads, variables, files of the user, limits of the container."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from localpipe import api, environment
from localpipe import config as configs
from localpipe.cli import main
from localpipe.config.load import to_yaml
from localpipe.config.user_code import import_user_code
from localpipe.config.yaml_file import dump_yaml, load_yaml
from localpipe.doctor.cores import check_cores
from localpipe.doctor.doctor import check_machine
from localpipe.environment import (
    add_import_folder,
    cpu_quota,
    foreign_launcher,
    free_group_memory,
    interrupts_end_imports,
    launcher_problem,
)
from localpipe.errors import UserError, first_line
from localpipe.runs.directory import RunDirectory

SMALL = (
    "data.name=synthetic", "data.image_size=8", "data.samples=32", "data.batch_size=16",
    "model.name=resnet8", "pipeline.stages=2", "pipeline.processes=2", "optim.epochs=1",
    "run.threads=1", "run.device=cpu",
)  # fmt: skip
ENOUGH_S = 200.0


def start(words: list[str], **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from localpipe.cli import main; raise SystemExit(main())"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([*command, *words], text=True, **{**pipes, **options})


# --- Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(
    tmp_path: Path, number: signal.Signals
) -> None:
    words = ["train", "demo", *SMALL, "optim.epochs=30", f"run.dir={tmp_path / 'run'}"]
    process = start(words, preexec_fn=lambda: signal.signal(number, signal.SIG_IGN))
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + ENOUGH_S
    while '"train"' not in (metrics.read_text() if metrics.exists() else ""):
        assert process.poll() is None and time.monotonic() < deadline
        process.send_signal(number)
        time.sleep(0.1)
    process.send_signal(number)
    text, _ = process.communicate(timeout=ENOUGH_S)
    assert process.returncode == 0 and "stopped" not in text


def test_a_worker_that_ignores_sigterm_is_stopped_all_the_same(tmp_path: Path) -> None:
    words = ["train", "demo", *SMALL, "optim.epochs=3000", f"run.dir={tmp_path / 'run'}"]
    process = start(words, preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN))
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + ENOUGH_S
    while '"train"' not in (metrics.read_text() if metrics.exists() else ""):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=ENOUGH_S)
    assert process.returncode == 130 and "the same command goes on in" in text


@pytest.mark.parametrize("library", ["pydantic_core", "libtorch_cpu"])
def test_ctrl_c_during_the_imports_ends_at_once(tmp_path: Path, library: str) -> None:
    def take_interrupts() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    words = ["train", "demo", *SMALL, "optim.epochs=3000", f"run.dir={tmp_path / 'run'}"]
    process = start(words, preexec_fn=take_interrupts)
    deadline = time.monotonic() + ENOUGH_S
    while library not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in text


def test_an_import_that_loses_an_interrupt_loses_none_of_ours(tmp_path: Path) -> None:
    """A bare `except` inside an import takes a KeyboardInterrupt. The handler ends the process."""
    (tmp_path / "loses.py").write_text(
        "import os, signal, time\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(5)\n"
        "except BaseException: pass\n"
    )
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from localpipe.environment import interrupts_end_imports\n"
        "with interrupts_end_imports(): import loses\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60)
    assert result.returncode == 130


def test_outside_of_imports_ctrl_c_is_an_exception_and_other_handlers_stay() -> None:
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with interrupts_end_imports(), pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with interrupts_end_imports():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


# --- Threads and variables


def test_train_works_in_another_thread_than_the_main_one(tmp_path: Path) -> None:
    config = configs.load("demo", [*SMALL, f"run.dir={tmp_path / 'run'}"])
    results: list[Any] = []

    def work() -> None:
        results.append(api.train(config))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(ENOUGH_S)
    assert results and results[0]["steps"] == 2


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"RANK": "0", "WORLD_SIZE": "1"}, "without MASTER_ADDR and MASTER_PORT; unset RANK"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x"}, "without MASTER_PORT; unset RANK"),
        (
            {"RANK": "a", "WORLD_SIZE": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
            "but RANK is 'a', expected a number; unset RANK",
        ),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
            "RANK=2 and WORLD_SIZE=2 are set, expected a RANK below WORLD_SIZE; unset RANK",
        ),
    ],
)
def test_variables_of_torchrun_that_were_left_behind_are_one_line(
    variables: dict[str, str],
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "demo"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("localpipe: train: ") and problem in line


def test_another_launcher_is_named_and_torchrun_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert launcher_problem() is None
    note = foreign_launcher()
    assert note is not None and "WORLD_SIZE=2, MASTER_ADDR=h" in note and "unset RANK" in note
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert foreign_launcher() is None


# --- Files of the user


@pytest.mark.parametrize(
    "start_of_command",
    [["-m", "localpipe"], ["-c", "from localpipe.cli import main; raise SystemExit(main())"]],
)
def test_files_named_like_standard_modules_break_nothing(
    tmp_path: Path, start_of_command: list[str]
) -> None:
    names = ("random", "signal", "queue", "string", "calendar", "numbers", "secrets", "json")
    if start_of_command[0] == "-c":  # Python itself looks there first
        start_of_command = [_script(tmp_path)]
    work = tmp_path / "work"
    work.mkdir()
    for name in names:
        (work / f"{name}.py").write_text("raise RuntimeError('a file of the user')\n")
    (work / "net.py").write_text(
        "from torch import nn\n"
        "def small():\n"
        "    layers = [nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 10)]\n"
        "    return nn.Sequential(*layers)\n"
    )
    words = ["train", "demo", *SMALL, "model.name=net.py:small", "run.dir=run"]
    environment_ = {**os.environ, "PYTHONPATH": str(Path(configs.__file__).parents[2])}
    result = subprocess.run(
        [sys.executable, *start_of_command, *words],
        cwd=work,
        env=environment_,
        capture_output=True,
        text=True,
        timeout=ENOUGH_S,
    )
    assert result.returncode == 0, result.stderr


def _script(folder: Path) -> str:
    """Write what the console script of an installation is."""
    script = folder / "localpipe_script"
    script.write_text("from localpipe.cli import main\nraise SystemExit(main())\n")
    return str(script)


def test_a_folder_comes_after_the_standard_library_and_before_the_packages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = ["/first", "/lib/python3.10", "/lib/python3.10/site-packages", "/last"]
    monkeypatch.setattr(sys, "path", [*path])
    add_import_folder("/new")
    add_import_folder("/new")
    assert sys.path == [*path[:2], "/new", *path[2:]]
    monkeypatch.setattr(sys, "path", ["/lib"])
    add_import_folder("/new")
    assert sys.path == ["/lib", "/new"]


# --- The limits of a container


def made_up(folder: Path, lines: str, files: dict[str, str]) -> tuple[Path, Path]:
    """Write a tree of control groups; return its mount and the file that names our groups."""
    for name, text in files.items():
        path = folder / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    (folder / "cgroup").mkdir(exist_ok=True)
    (folder / "membership").write_text(lines)
    return folder / "cgroup", folder / "membership"


def v1_cpu(folder: str, quota: int) -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": str(quota), f"{folder}/cpu.cfs_period_us": "100000"}


def v1_memory(folder: str, limit: int, used: int) -> dict[str, str]:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    return {f"{folder}/{name}": str(n) for name, n in zip(names, (limit, used), strict=True)}


V1 = "12:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n1:name=systemd:/docker/a\n"


@pytest.mark.parametrize(
    ("lines", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2.0),
        ("0::/a/b\n", {"a/b/cpu.max": "300000 100000", "a/cpu.max": "200000 100000"}, 2.0),
        ("0::/../elsewhere\n", {"cpu.max": "50000 100000"}, 0.5),
        ("0::/a\n", {"unified/a/cpu.max": "100000 100000"}, 1.0),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/\n", {"cpu.max": "what is this"}, None),
        ("0::/\n", {}, None),
        ("", {"cpu.max": "100000 100000"}, None),
        (V1, v1_cpu("cpu/docker/a", 100_000), 1.0),
        (V1, v1_cpu("cpu,cpuacct", 250_000), 2.5),
        (V1, v1_cpu("cpu", -1), None),
        (V1, {"memory/cpu.cfs_quota_us": "1", "memory/cpu.cfs_period_us": "1"}, None),
    ],
)  # fmt: skip
def test_the_quota_of_a_container_is_found(
    tmp_path: Path, lines: str, files: dict[str, str], quota: float | None
) -> None:
    assert cpu_quota(*made_up(tmp_path, lines, files)) == quota


def test_a_missing_list_of_groups_is_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path, tmp_path / "none") is None


@pytest.mark.parametrize(
    ("lines", "files", "left"),
    [
        ("0::/a\n", {"a/memory.max": "5000", "a/memory.current": "2000"}, 3000),
        ("0::/a\n", {"a/memory.max": "max", "a/memory.current": "2000"}, None),
        (V1, v1_memory("memory/docker/a", 5000, 6000), 0),
        (V1, v1_memory("memory", 2**63 - 4096, 1), None),
    ],
)  # fmt: skip
def test_the_memory_that_a_container_leaves_is_found(
    tmp_path: Path, lines: str, files: dict[str, str], left: int | None
) -> None:
    assert free_group_memory(*made_up(tmp_path, lines, files)) == left


def test_a_quota_counts_in_auto_and_in_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "affinity_cores", lambda: 8)
    monkeypatch.setattr("localpipe.doctor.cores.affinity_cores", lambda: 8)
    for quota, cores in ((None, 8), (2.5, 2), (0.5, 1), (16.0, 8)):
        monkeypatch.setattr(environment, "cpu_quota", lambda quota=quota: quota)
        monkeypatch.setattr("localpipe.doctor.cores.cpu_quota", lambda quota=quota: quota)
        assert environment.available_cores() == cores
        check = check_cores()
        assert check.figures == {"cores": 8, "quota": quota}
        assert check.status == ("warning" if cores < 8 else "ok")
        assert cores == 8 or f"auto counts {cores};" in check.advice


def test_a_machine_without_shared_memory_is_checked_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr("localpipe.doctor.doctor.shutil.disk_usage", fail)
    checks = {check.name: check for check in check_machine(True, tmp_path)}
    assert "there is no /dev/shm" in checks["shared memory"].found and "disk" in checks


# --- The home directory


def test_a_tilde_is_the_home_directory_wherever_a_path_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    words = [f"{key}=~/x" for key in ("run.dir", "run.init_from", "data.root")]
    config = configs.load("demo", words)
    expected = str(tmp_path / "x")
    assert (config.run.dir, config.run.init_from, config.data.root) == (expected,) * 3
    assert api.configuration({"run": {"dir": "~/x"}}).run.dir == expected
    (tmp_path / "x.yaml").write_text("run: {dir: ~/y}\n")
    assert configs.load("~/x.yaml").run.dir == str(tmp_path / "y")
    assert RunDirectory("~/x").path == tmp_path / "x"
    (tmp_path / "nets_at_home.py").write_text("def f(): ...\n")
    assert import_user_code("~/nets_at_home.py:f", "model.name").__name__ == "f"

    for command in (["eval", "~/x"], ["report", "~/x"], ["export", "~/x", "-o", "~/a.pt"]):
        assert main(command) == 2
        assert f"{tmp_path}/x is not a run directory" in capsys.readouterr().err
    assert main(["doctor", "--dir", "~/none"]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err


# --- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10), ("-010", -10), ("0100", 100), ("09", 9), ("1:30", "1:30"),
        ("1:30.5", "1:30.5"), ("2024-01-01", "2024-01-01"), ("2020-13-45", "2020-13-45"),
        ("20240101", 20240101), ("1e-4", 1e-4), ("1.5", 1.5), (".5", 0.5), ("1.", 1.0),
        ("-.inf", float("-inf")), ("1_000", 1000), ("0x1f", 31), ("0b11", 3),
        ("~", None), ("true", True), ("a", "a"),
    ],
)  # fmt: skip
def test_a_number_is_what_a_person_reads(text: str, value: object) -> None:
    read = load_yaml(text)
    assert read == value and type(read) is type(value)


BAD_YAML = [
    "!!int x", "!!float x", "!!bool x", "!!timestamp x", "!!binary é", "=", "9" * 5000, "[" * 3000,
    "&a [*a]", "{a: &a {b: *a}}", "? [a]", "{a: 1, a: 2}",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_YAML)
def test_what_is_no_yaml_is_one_line_in_a_file_and_on_the_command_line(
    text: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as info:
        configs.load("demo", [f"model.args={text}"])
    assert len(str(info.value).splitlines()) == 1
    (tmp_path / "x.yaml").write_text(f"model:\n  args: {text}\n")
    with pytest.raises(UserError) as info:
        configs.load(tmp_path / "x.yaml")
    assert len(str(info.value).splitlines()) == 1


def test_a_name_of_digits_is_a_name_on_the_command_line_and_asks_for_quotes_in_a_file(
    tmp_path: Path,
) -> None:
    for text in ("20240101", "010", "1e5", "2024-01-01", "true"):
        assert configs.load("demo", [f"run.dir={text}"]).run.dir == text
    (tmp_path / "x.yaml").write_text("run: {dir: 20240101}\n")
    with pytest.raises(UserError, match="run.dir must be text .* got 20240101; put it in quotes"):
        configs.load(tmp_path / "x.yaml")


def test_a_word_that_begins_with_a_hash_is_no_comment_on_the_command_line(tmp_path: Path) -> None:
    assert configs.load("demo", ["data.background=#808080"]).data.background == "#808080"
    (tmp_path / "x.yaml").write_text("data: {background: '#808080'}\n")
    assert configs.load(tmp_path / "x.yaml").data.background == "#808080"
    (tmp_path / "x.yaml").write_text("data:\n  background: #808080\n")
    with pytest.raises(UserError, match="got null; a text that begins with # needs quotes"):
        configs.load(tmp_path / "x.yaml")


def test_every_text_is_written_so_that_it_is_read_back(tmp_path: Path) -> None:
    texts = ["09", "010", "0o17", "1e5", "1:30", "2024-01-01", "1_000", "~", "yes", "=", ".5", "a"]
    assert load_yaml(dump_yaml(texts)) == texts
    assert yaml.safe_load(dump_yaml(texts)) == texts
    for text in texts:
        config = configs.load("demo", [f"run.dir='{text}'"])
        (tmp_path / "x.yaml").write_text(to_yaml(config))
        assert configs.load(tmp_path / "x.yaml").run.dir == config.run.dir


# --- Files and words that are something else than expected


@pytest.mark.parametrize("text", ["[1]", "3", "null", '"x"', "{", "[" * 5000])
def test_a_summary_that_is_no_mapping_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    directory = RunDirectory(tmp_path)
    with pytest.raises(UserError, match="summary.json.*; remove it, or train again with"):
        directory.summary()
    assert directory.finished_summary(3) is None


def test_records_that_are_none_are_left_out_and_other_text_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('[1]\n3\n{"kind": "start"}\n{"step": 1}\nnull\n{"kind": "tr')
    assert list(RunDirectory(tmp_path).records()) == [{"kind": "start"}]
    file.write_bytes(b'{"kind": "start"}\n\xff\n')
    with pytest.raises(UserError, match="cannot read .*metrics.jsonl: not UTF-8 text; mend it"):
        list(RunDirectory(tmp_path).records())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--foo", "train", "x.yaml"], "command line: --foo stands before the command; see"),
        (
            ["configs", "demo", "other", "nonsense=1"],
            "configs prints one configuration; got 'other'",
        ),
    ],
)
def test_words_that_no_command_takes_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("section", ["x", 3, [1]])
def test_a_section_that_is_no_mapping_is_a_mistake_of_the_user(section: object) -> None:
    with pytest.raises(UserError, match="run must be a mapping of keys"):
        api.configuration({"run": section})


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError(""), "RuntimeError"),
        (RuntimeError("\n"), "RuntimeError"),
        (RuntimeError("\n a\nb"), "a"),
        (ValueError("a\nb"), "a"),
    ],
)
def test_the_first_line_of_an_error_exists(error: Exception, line: str) -> None:
    assert first_line(error) == line
