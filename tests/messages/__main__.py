"""Prints every error and line that the project can print, by package.

python -m tests.messages            all of them, with the file and line that makes each
python -m tests.messages --advice   only those that say what to do
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tests.messages.listing import list_messages


def main(words: Sequence[str] | None = None) -> None:
    """Print the messages. words: of the command line, None for those of this process."""
    parser = argparse.ArgumentParser(prog="python -m tests.messages", description=__doc__)
    parser.add_argument("--advice", action="store_true", help="only those that say what to do")
    arguments = parser.parse_args(words)
    package = ""
    for message in list_messages():
        if arguments.advice and not message.advice:
            continue
        if message.package != package:
            package = message.package
            print(f"\n{package}")
        text = message.text.replace("\n", "\\n")
        print(f"  {message.file}:{message.line}  {message.kind}  {text}")


if __name__ == "__main__":
    main()
