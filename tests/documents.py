"""The pages of the documentation: their blocks, each with a mark that says how it is tried.

```sh            every line runs as it is pasted
```sh short      the same, but every `train` makes two steps (SHORT)
```sh install    makes an environment out of the network: .ci/run does it
```sh two-nodes  test_launch.py runs it
```sh cluster    takes several machines: test_pages.py checks its programs, files and keys
```usage         forms of commands, with words that stand for others: commands and flags are checked
```text          a drawing, or what is printed: no line of it is a command
```python        runs; with `# NAME.py` as its first line it is that file
```yaml          a file: test_forecast.py compares it
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from tests import ROOT

PAGES = sorted(
    str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
)
MARKS = (
    "sh", "sh short", "sh install", "sh two-nodes", "sh cluster", "usage", "text", "python", "yaml",
)  # fmt: skip
# Commands that a page names in passing and that take longer: the sweep runs them, not the tests.
SLOW = re.compile(r"torchrun|localpipe (bench|plan imagenet|doctor)")
SHORT = ("optim.max_steps=2", "run.threads=1")
PROGRAMS = ("localpipe", "torchrun", "python", "pip", "make", "docker", "sbatch", "kubectl")
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PLACEHOLDER = re.compile(r"\b[A-Z_]{3,}\b|\bN\b|\[|\.\.\.")


@dataclass(frozen=True)
class Block:
    """One block of a page: its mark and its text."""

    page: str
    mark: str
    text: str

    @property
    def lines(self) -> list[str]:
        """The lines without comments, and without those that hold nothing else."""
        lines = [re.sub(r"(^|\s+)#.*", "", line) for line in self.text.splitlines()]
        return [line for line in lines if line.strip()]


def read_blocks(page: str) -> list[Block]:
    """Return the blocks of a page in their order."""
    return [Block(page, mark, text) for mark, text in FENCE.findall(_read(page))]


def list_commands(page: str) -> Iterator[str]:
    """Yield the whole commands that a page names in passing, in backquotes: those without gaps.

    test_papers.py has the rows of papers.
    """
    for span in re.findall(r"`([^`]+)`", FENCE.sub("", _read(page))):
        command = " ".join(span.split())
        words = command.split()
        if words[:1] not in (["localpipe"], ["torchrun"]):
            continue
        # A command without its configuration or run is a name.
        is_whole = len(words) > 2 or words[1:] in (["doctor"], ["configs"])
        is_row = " ".join(words[1:3]).startswith("train papers/")
        if is_whole and not is_row and not PLACEHOLDER.search(re.sub(r"\S+=\S+", "", command)):
            yield command


def shorten_command(command: str) -> list[str]:
    """Return the words of a command, with smaller keys for `train` and `bench`."""
    words = shlex.split(command)
    if "train" in words and "--keys" not in words:
        return [*words, *SHORT]
    if "bench" in words and "--memory" not in words:
        return [*words, "--windows", "1", "--window-s", "0.02"]
    return words


def _read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")
