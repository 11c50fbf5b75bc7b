"""What a text of the source can become: its words, and a field for each value it holds.

A small abstract interpreter of expressions. It follows variables, conditions, loops over literals,
and calls of the package's own functions. What it cannot follow is a field.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from tests.messages.source import Call, Scope, Source, enclosing

_DEEPEST = 6  # calls
_MOST = 200  # texts of one expression
_MOST_OF_A_PART = 40
# Where a text is not changed but for blanks, or becomes a list of itself.
_KEPT = ("strip", "lstrip", "rstrip", "capitalize", "removesuffix", "removeprefix")
_LISTS = ("list", "tuple", "sorted", "reversed", "set", "filter", "iter", "dict.fromkeys", "next")


@dataclass(frozen=True)
class Field:
    """A value in a text, named as the source names it."""

    name: str


@dataclass(frozen=True)
class Template:
    """A text with fields."""

    parts: tuple[str | Field, ...]

    def __str__(self) -> str:
        return "".join(part if isinstance(part, str) else f"{{{part.name}}}" for part in self.parts)

    def __add__(self, other: Template) -> Template:
        return Template(self.parts + other.parts)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """What it looks like in a record of the tests, where every number is N."""
        parts = []
        for part in self.parts:
            fixed = isinstance(part, str)
            parts.append(re.escape(_normalise(str(part))) if fixed else ".*")
        return re.compile("".join(parts))

    @cached_property
    def words(self) -> str:
        """Only what is fixed."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def has_words(self) -> bool:
        """Whether it says something, and is not a value alone."""
        return bool(re.search(r"[A-Za-z]{3}", self.words))

    @property
    def is_phrase(self) -> bool:
        """Whether it is a part of a sentence, or names a key, and no single word."""
        text = "".join(part if isinstance(part, str) else "X" for part in self.parts)
        return len(self.words.split()) > 2 or bool(re.search(r"; |[a-z]\.[a-zX_]", text))


Texts = tuple[Template, ...]


@dataclass(frozen=True, eq=False)
class Frame:
    """A scope, and the call that entered it where one is looked at alone."""

    scope: Scope
    call: Call | None = None
    caller: Frame | None = None

    @cached_property
    def key(self) -> tuple[int, ...]:
        """The calls that lead here, the innermost first."""
        if self.call is None or self.caller is None:
            return ()
        return (id(self.call.node), *self.caller.key)


class Interpreter:
    """Evaluates the expressions of a source."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._stack: list[tuple[object, ...]] = []
        self._known: dict[tuple[object, ...], Texts] = {}

    def texts(self, node: ast.expr, frame: Frame) -> Texts:
        """Return what an expression can be as text, at least one template."""
        return self._look(node, frame, False) or _unknown(node)

    def elements(self, node: ast.expr, frame: Frame) -> Texts:
        """Return what the elements of a list, a dict's keys or an iterator can be as texts."""
        return self._look(node, frame, True)

    def frames(self, scope: Scope) -> list[Frame]:
        """Return a frame for every call of a function, or one alone where nothing calls it."""
        calls = self.source.calls.get(scope, ())
        return [Frame(scope, call, Frame(call.scope)) for call in calls] or [Frame(scope)]

    def _look(self, node: ast.expr, frame: Frame, several: bool) -> Texts:
        """Evaluate a node once, and not again inside itself."""
        mark = (id(node), frame.key, several)
        if mark in self._known:
            return self._known[mark]
        if mark in self._stack or len(frame.key) > _DEEPEST:
            return ()
        self._stack.append(mark)
        method = self._elements if several else self._texts
        found = _unique(method(node, frame))
        self._stack.pop()
        self._known[mark] = found if len(found) <= _MOST else ()
        return self._known[mark]

    # -- one text -------------------------------------------------------------------------------

    def _texts(self, node: ast.expr, frame: Frame) -> Iterable[Template]:
        match node:
            case ast.Constant(value=None):
                return ()
            case ast.Constant(value=value):
                return (Template((str(value),)),)
            case ast.JoinedStr(values=values):
                parts = {ast.unparse(value): self._part(value, frame) for value in values}
                return _join([ast.unparse(value) for value in values], parts)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                sides = {"left": self.texts(left, frame), "right": self.texts(right, frame)}
                return _join(["left", "right"], sides)
            case ast.IfExp(body=body, orelse=other):
                return (*self._texts(body, frame), *self._texts(other, frame))
            case ast.BoolOp(values=values):
                return [text for value in values for text in self._texts(value, frame)]
            case ast.NamedExpr(value=value):
                return self._texts(value, frame)
            case ast.Name():
                return self._variable(node, frame, False) or _unknown(node)
            case ast.Attribute():
                return self._attribute(node, frame)
            case ast.Subscript(value=value):
                return self._subscript(node, value, frame)
            case ast.Call():
                return self._call(node, frame)
        return _unknown(node)

    def _part(self, node: ast.expr, frame: Frame) -> Texts:
        """Return the texts of a part of an f-string: a field stays one unless it is a phrase."""
        if not isinstance(node, ast.FormattedValue):
            return self.texts(node, frame)
        if node.conversion == ord("r"):
            return (Template((Field(f"{ast.unparse(node.value)}!r"),)),)
        found = self.texts(node.value, frame)
        if len(found) <= _MOST_OF_A_PART and any(text.is_phrase for text in found):
            return found
        return _unknown(node.value)

    def _attribute(self, node: ast.Attribute, frame: Frame) -> Iterable[Template]:
        function = self.source.find_function(node, frame.scope)
        if function is not None:  # a property
            return self._returns(function, Frame(function)) or _unknown(node)
        resolved = self.source.resolve(ast.unparse(node), frame.scope)
        if resolved is not None:
            return self._constant(resolved, False) or _unknown(node)
        return _unknown(node)

    def _subscript(self, node: ast.expr, value: ast.expr, frame: Frame) -> Iterable[Template]:
        found = [text for each in self._literals(value, frame) for text in each]
        match node:
            case ast.Subscript(value=ast.Call() as call, slice=ast.Constant(value=int(index))):
                found += self._results(call, index, frame)
        return found or _unknown(node)

    def _results(self, call: ast.Call, index: int, frame: Frame) -> Iterator[Template]:
        """Yield the texts of one of the results of a function that returns several."""
        function = self.source.find_function(call.func, frame.scope)
        if function is None:
            return
        inner = Frame(function, Call(frame.scope, call), frame)
        for node in function.nodes:
            match node:
                case ast.Return(value=ast.Tuple(elts=items)) if len(items) > index:
                    yield from self.texts(items[index], inner)

    def _literals(self, node: ast.AST, frame: Frame) -> Iterator[Texts]:
        """Yield the values of the dict that an expression names, as texts."""
        if isinstance(node, ast.Dict):
            for value in node.values:
                yield self.texts(value, frame)
        elif isinstance(node, ast.Name):
            for mapping, other in self._values(node.id, frame, node):
                if isinstance(mapping, ast.Dict):
                    yield from self._literals(mapping, other)

    def _call(self, node: ast.Call, frame: Frame) -> Iterable[Template]:
        function = self.source.find_function(node.func, frame.scope)
        if function is not None:
            inner = Frame(function, Call(frame.scope, node), frame)
            return self._returns(function, inner) or _unknown(node)
        if isinstance(node.func, ast.Attribute):
            if node.func.attr == "join" and node.args:
                return self.elements(node.args[0], frame) or _unknown(node)
            if node.func.attr in _KEPT:
                return self._texts(node.func.value, frame)
            if node.func.attr == "get" and node.args:
                return self._subscript(node, node.func.value, frame)
        if isinstance(node.func, ast.Name):
            if node.func.id == "next" and node.args:
                return self.elements(node.args[0], frame) or _unknown(node)
            if node.func.id == "str" and node.args:
                return self._texts(node.args[0], frame)
        return self._called(node.func, frame) or _unknown(node)

    def _called(self, node: ast.AST, frame: Frame) -> Iterable[Template]:
        """Return what the functions return that an expression can be."""
        if isinstance(node, ast.Lambda):
            return self.texts(node.body, frame)
        if isinstance(node, ast.For):
            return self._called(node.iter, frame)
        if isinstance(node, ast.Tuple | ast.List):
            return [text for each in node.elts for text in self._called(each, frame)]
        if isinstance(node, ast.Name | ast.Attribute):
            function = self.source.find_function(node, frame.scope)
            if function is not None:
                return self._returns(function, Frame(function))
            if isinstance(node, ast.Name):
                values = self._values(node.id, frame, node)
                return [text for value, other in values for text in self._called(value, other)]
            kept = self.source.find_attribute(node, frame.scope)
            return [text for value, other in kept for text in self._called(value, Frame(other))]
        return ()

    def _returns(self, function: Scope, frame: Frame) -> list[Template]:
        """Return what a function can return as text."""
        found: list[Template] = []
        for node in function.nodes:
            if isinstance(node, ast.Return) and node.value is not None:
                found += self._look(node.value, frame, False)
        return found

    # -- several texts --------------------------------------------------------------------------

    def _elements(self, node: ast.expr, frame: Frame) -> Iterable[Template]:
        match node:
            case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
                return [text for item in items for text in self._item(item, frame)]
            case ast.Dict(keys=keys):
                return [text for key in keys if key for text in self.texts(key, frame)]
            case ast.ListComp(elt=item) | ast.GeneratorExp(elt=item) | ast.SetComp(elt=item):
                return self.texts(item, frame)
            case ast.BinOp(left=left, right=right):
                return (*self.elements(left, frame), *self.elements(right, frame))
            case ast.IfExp(body=body, orelse=other):
                return (*self.elements(body, frame), *self.elements(other, frame))
            case ast.BoolOp(values=values):
                return [text for value in values for text in self.elements(value, frame)]
            case ast.Name():
                return self._variable(node, frame, True)
            case ast.Attribute():
                function = self.source.find_function(node, frame.scope)
                if function is not None:
                    return self._yields(function, Frame(function))
                resolved = self.source.resolve(ast.unparse(node), frame.scope)
                return self._constant(resolved, True) if resolved else ()
            case ast.Subscript(value=value):
                return self.elements(value, frame)
            case ast.Call():
                return self._call_elements(node, frame)
        return ()

    def _item(self, node: ast.expr, frame: Frame) -> Texts:
        if isinstance(node, ast.Starred):
            return self.elements(node.value, frame)
        if isinstance(node, ast.Tuple) and node.elts:
            return self.texts(node.elts[0], frame)
        return self.texts(node, frame)

    def _call_elements(self, node: ast.Call, frame: Frame) -> Iterable[Template]:
        function = self.source.find_function(node.func, frame.scope)
        if function is not None:
            return self._yields(function, Frame(function, Call(frame.scope, node), frame))
        if ast.unparse(node.func) in _LISTS and node.args:
            return self.elements(node.args[-1], frame)
        if isinstance(node.func, ast.Attribute):
            if node.func.attr in ("items", "keys", "copy"):
                return self.elements(node.func.value, frame)
            if node.func.attr == "values":
                return [text for each in self._literals(node.func.value, frame) for text in each]
            if node.func.attr == "splitlines":
                return self.texts(node.func.value, frame)
        return ()

    def _yields(self, function: Scope, frame: Frame) -> list[Template]:
        """Return the elements that a function returns or yields."""
        found: list[Template] = []
        for node in function.nodes:
            if isinstance(node, ast.Return) and node.value is not None:
                found += self.elements(node.value, frame)
            elif isinstance(node, ast.Yield) and node.value is not None:
                found += self.texts(node.value, frame)
            elif isinstance(node, ast.YieldFrom):
                found += self.elements(node.value, frame)
        return found

    # -- variables ------------------------------------------------------------------------------

    def _variable(self, node: ast.expr, frame: Frame, several: bool) -> list[Template]:
        """Return the texts, or the elements, of a variable that a frame sees at a node."""
        name = ast.unparse(node).rpartition(".")[2]
        look = self.elements if several else self.texts
        found: list[Template] = []
        for value, other in self._values(name, frame, node):
            if isinstance(value, ast.For | ast.comprehension):
                found += () if several else self._target(name, value, other)
            else:
                found += look(value, other)
        for scope in enclosing(frame.scope):
            found += self._additions(name, Frame(scope, frame.call, frame.caller), several, found)
        return found

    def _target(self, name: str, loop: ast.For | ast.comprehension, frame: Frame) -> Texts:
        """Return what a loop's variable can be."""
        if isinstance(loop.target, ast.Name):
            return self.elements(loop.iter, frame)
        names = [ast.unparse(each) for each in getattr(loop.target, "elts", ())]
        if names and names[0] == name:
            return self.elements(loop.iter, frame)
        literal: ast.AST = loop.iter
        match literal:
            case ast.Call(func=ast.Attribute(value=mapping, attr="items")) if names[-1] == name:
                values = self._literals(mapping, frame)
                return tuple(text for each in values for text in each)
        if isinstance(literal, ast.Name):
            lists = [value for value, _ in self._values(literal.id, frame, literal)]
            literal = lists[0] if lists else literal
        found: list[Template] = []
        for item in getattr(literal, "elts", ()):
            if isinstance(item, ast.Tuple) and name in names and len(item.elts) == len(names):
                found += self.texts(item.elts[names.index(name)], frame)
        return tuple(found)

    def _values(
        self, name: str, frame: Frame, user: ast.AST
    ) -> list[tuple[ast.expr | ast.For | ast.comprehension, Frame]]:
        """Return what a variable can hold at a node: expressions or loops, each with its frame."""
        for scope in enclosing(frame.scope):
            inner = Frame(scope, frame.call, frame.caller) if scope is not frame.scope else frame
            values = scope.select_reaching(_assigned(scope, name), user)
            found = [(value, inner) for value in values]
            if not found and name in scope.parameters:
                return list(self._arguments(scope, name, inner))
            if found:
                return found
        resolved = self.source.resolve(name, frame.scope)
        if resolved is None:
            return []
        module, _, last = resolved.rpartition(".")
        if module not in self.source.modules:
            return []
        top = self.source.modules[module]
        return [(value, Frame(top)) for value in _assigned(top, last)]

    def _arguments(self, scope: Scope, name: str, frame: Frame) -> Iterator[tuple[ast.expr, Frame]]:
        """Yield what calls give for a parameter: that of the frame, else all of the package."""
        if frame.call is not None and frame.caller is not None:
            callee = self.source.find_callee(frame.call)
            if callee is scope:
                value = frame.call.argument(scope, name)
                if value is not None:
                    yield value, frame.caller
                return
        for call in self.source.calls.get(scope, ()):
            value = call.argument(scope, name)
            if value is not None:
                yield value, Frame(call.scope)

    def _constant(self, resolved: str, several: bool) -> list[Template]:
        module, _, last = resolved.rpartition(".")
        if module not in self.source.modules:
            return []
        node = ast.Name(last)
        return self._variable(node, Frame(self.source.modules[module]), several)

    def _additions(
        self, name: str, frame: Frame, several: bool, before: list[Template]
    ) -> list[Template]:
        """Return what `+=`, `append` and `extend` add to a variable."""
        found: list[Template] = []
        for node in frame.scope.nodes:
            match node:
                case ast.AugAssign(target=ast.Name(id=target), value=value) if target == name:
                    if several:
                        found += self.elements(value, frame)
                    else:
                        added = self.texts(value, frame)
                        found += [text + more for text in before for more in added]
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id=target), attr=method), args=[value]
                ) if target == name and several:
                    if method in ("append", "add"):
                        found += self._item(value, frame)
                    elif method == "extend":
                        found += self.elements(value, frame)
        return found


def _assigned(scope: Scope, name: str) -> list[ast.expr | ast.For | ast.comprehension]:
    """Return the expressions and loops that give a variable its values in a scope."""
    found: list[ast.expr | ast.For | ast.comprehension] = []
    for node in scope.nodes:
        match node:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    if isinstance(target, ast.Name) and target.id == name:
                        found.append(value)
                    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                        pairs = zip(target.elts, value.elts, strict=False)
                        found += [v for t, v in pairs if ast.unparse(t) == name]
                    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Call):
                        found += _results(value, target, name)
            case ast.AnnAssign(target=ast.Name(id=target), value=ast.expr() as value):
                if target == name:
                    found.append(value)
            case ast.NamedExpr(target=ast.Name(id=target), value=value) if target == name:
                found.append(value)
            case ast.For(target=target) | ast.comprehension(target=target):
                if name in [each.id for each in ast.walk(target) if isinstance(each, ast.Name)]:
                    found.append(node)
    return found


_RESULTS: dict[tuple[int, int], ast.expr] = {}  # so that a node stays the same one


def _results(call: ast.Call, target: ast.Tuple, name: str) -> Iterator[ast.expr]:
    """Yield `call[index]` for a variable that takes one of several results."""
    for index, each in enumerate(target.elts):
        if ast.unparse(each) == name:
            made = ast.Subscript(call, ast.Constant(index))
            yield _RESULTS.setdefault((id(call), index), made)


def _join(order: list[str], parts: dict[str, Texts]) -> Iterable[Template]:
    """Yield every text of parts in an order. A part that stands twice is the same in both."""
    count = 1
    for texts in parts.values():
        count *= len(texts)
    if count > _MOST:  # too many: the longest lists become fields
        for name, texts in parts.items():
            if len(texts) > 12:
                parts[name] = (Template((Field(name),)),)
    for combination in itertools.product(*parts.values()):
        chosen = dict(zip(parts, combination, strict=True))
        text = Template(())
        for name in order:
            text += chosen[name]
        yield text


def _normalise(text: str) -> str:
    return re.sub(r"\d+", "N", "\\n".join(text.split("\n")))


def _unique(texts: Iterable[Template]) -> Texts:
    return tuple(dict.fromkeys(texts))


def _unknown(node: ast.expr) -> Texts:
    return (Template((Field(ast.unparse(node)),)),)
