"""The messages: every text that leaves the package as an error, or as a printed line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.messages.source import Call, Scope, Source
from tests.messages.texts import Frame, Interpreter, Template

_PRINTERS = ("say", "warn", "print")
_QUOTED = ("ValueError", "YAMLError", "ArgumentTypeError")  # caught, and their text printed


@dataclass(frozen=True, order=True)
class Message:
    """One text that the project can print: where it is made, what it is, and its words."""

    file: str
    line: int
    kind: str
    text: str
    template: Template = field(compare=False)

    @property
    def package(self) -> str:
        """The package of the file, or its module where it lies loose."""
        parts = self.file.split("/")
        return parts[1].removesuffix(".py")

    @property
    def advice(self) -> str:
        """What it says to do: all after the first `; ` that is not `expected` or `got`."""
        for match in re.finditer(r"; |\bdid you mean|\bchoose one of", self.text):
            rest = self.text[match.start() :].removeprefix("; ")
            if not re.match(r"(expected|got)\b", rest):
                return rest
        return ""


def list_messages(source: Source | None = None) -> list[Message]:
    """Return the messages of the package, sorted by file and line."""
    interpreter = Interpreter(source or Source())
    found: dict[tuple[str, str, str], Message] = {}
    for scope in interpreter.source.scopes:
        for node in scope.nodes:
            if isinstance(node, ast.Call):
                for message in _read_call(interpreter, scope, node):
                    found.setdefault((message.file, message.kind, message.text), message)
    return sorted(found.values())


def _read_call(interpreter: Interpreter, scope: Scope, node: ast.Call) -> Iterator[Message]:
    """Yield the messages that a call makes, if it makes any."""
    kind = _kind(interpreter.source, scope, node)
    if kind is None or not node.args:
        return
    for frame in interpreter.frames(scope):
        for template in _templates(interpreter, frame, node, kind):
            text = str(template)
            if text.strip():
                yield Message(scope.file, node.lineno, kind, text, template)


def _kind(source: Source, scope: Scope, node: ast.Call) -> str | None:
    """Return the kind of message that a call makes, None for any other call."""
    name = ast.unparse(node.func)
    resolved = source.resolve(name, scope)
    if resolved in source.errors:
        return resolved.rpartition(".")[2]
    if name.rpartition(".")[2] in _QUOTED:
        return "reason"
    if name in _PRINTERS or name.endswith("console.print"):
        return "line"
    return None


def _templates(
    interpreter: Interpreter, frame: Frame, node: ast.Call, kind: str
) -> Iterator[Template]:
    """Yield the texts of a message's call in one frame."""
    resolved = interpreter.source.resolve(ast.unparse(node.func), frame.scope)
    init = interpreter.source.constructor(resolved)
    if init is not None:  # an error that makes its text of several
        inner = Frame(init, Call(frame.scope, node), frame)
        for each in init.nodes:
            if isinstance(each, ast.Call) and ast.unparse(each.func) == "super().__init__":
                yield from interpreter.texts(each.args[0], inner)
        return
    texts = interpreter.texts(node.args[0], frame)
    if kind == "line" and not any(text.words.strip() for text in texts):
        texts = interpreter.elements(node.args[0], frame) or texts
    yield from texts
