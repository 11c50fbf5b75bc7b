"""The messages: every text that leaves the package as an error, or as a printed line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.messages.source import Call, Scope, Source, read_source
from tests.messages.texts import Frame, Interpreter, Template

_OUTPUT = "localpipe/output.py"  # prints what others say
_PRINTERS = ("say", "warn", "print")
_SIGNALS = ("StopRequested", "NoRoom")  # exceptions without a text
_CARRIED = ("note", "notes", "line", "found", "advice", "bottleneck", "suggestions")
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
    """Return the messages of a source, localpipe's by default, sorted by file and line."""
    interpreter = Interpreter(source or read_source())
    found: dict[tuple[str, str, str], Message] = {}
    for scope in interpreter.source.scopes:
        if scope.file == _OUTPUT:
            continue
        for node in scope.nodes:
            messages: Iterator[Message] = iter(())
            if isinstance(node, ast.Call):
                messages = _read_call(interpreter, scope, node)
            elif isinstance(node, ast.JoinedStr):
                messages = _read_note(interpreter, scope, node)
            for message in messages:
                found.setdefault((message.file, message.kind, message.text), message)
    return sorted(found.values())


def _read_note(interpreter: Interpreter, scope: Scope, node: ast.JoinedStr) -> Iterator[Message]:
    """Yield the notes that a text is, wherever it is handed on to."""
    first = node.values[0] if node.values else None
    if not isinstance(first, ast.Constant) or not str(first.value).startswith("note: "):
        return
    for frame in interpreter.frames(scope):
        for template in interpreter.texts(node, frame):
            yield Message(scope.file, node.lineno, "note", str(template), template)


def _read_call(interpreter: Interpreter, scope: Scope, node: ast.Call) -> Iterator[Message]:
    """Yield the messages that a call makes, if it makes any."""
    for kind, argument in _find_arguments(interpreter.source, scope, node):
        for frame in interpreter.frames(scope):
            for template in _templates(interpreter, frame, node, kind, argument):
                text = str(template)
                if text.strip() and (kind.endswith("Error") or template.has_words):
                    yield Message(scope.file, node.lineno, kind, text, template)


def _find_arguments(source: Source, scope: Scope, node: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    """Yield the kind and the expression of every argument of a call that is a message."""
    name = ast.unparse(node.func)
    last = name.rpartition(".")[2]
    resolved = source.resolve(name, scope)
    if node.args and resolved in source.errors and resolved.rpartition(".")[2] not in _SIGNALS:
        yield resolved.rpartition(".")[2], node.args[0]
    elif node.args and last in _QUOTED:
        yield "reason", node.args[0]
    elif node.args and (name in _PRINTERS or name.endswith("console.print")):
        yield "line", node.args[0]
    elif last == "put" and len(node.args) == 2 and ast.unparse(node.args[0]) == "ABORT":
        yield "abort", node.args[1]
    # The fields of objects, such as the notes of a data set and the advice of a check.
    if last == "replace" or resolved in source.classes:
        fields = dict(zip(source.list_fields(resolved), node.args, strict=False))
        fields.update({each.arg: each.value for each in node.keywords if each.arg})
        for field_name, value in fields.items():
            if field_name in _CARRIED:
                yield "note", value


def _templates(
    interpreter: Interpreter, frame: Frame, node: ast.Call, kind: str, argument: ast.expr
) -> Iterator[Template]:
    """Yield the texts of a message in one frame."""
    resolved = interpreter.source.resolve(ast.unparse(node.func), frame.scope)
    init = interpreter.source.constructor(resolved)
    if init is not None and kind.endswith("Error"):  # an error that makes its text of several
        inner = Frame(init, Call(frame.scope, node), frame)
        for each in init.nodes:
            if isinstance(each, ast.Call) and ast.unparse(each.func) == "super().__init__":
                yield from interpreter.texts(each.args[0], inner)
        return
    texts = interpreter.texts(argument, frame)
    if kind in ("line", "note") and not any(text.has_words for text in texts):
        texts = interpreter.elements(argument, frame) or texts
    yield from texts
