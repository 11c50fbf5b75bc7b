"""The package's source as scopes: which names a function sees, and which functions call which."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TypeVar

from tests import ROOT

PACKAGE = "localpipe"
Function = ast.FunctionDef | ast.AsyncFunctionDef
_N = TypeVar("_N", bound=ast.AST)


@dataclass(eq=False)
class Scope:
    """A module's top level or one function, with the nodes that belong to it alone.

    name: dotted, as `config.load._check`. parent: None for a module. owner: the class of a method.
    """

    name: str
    module: str
    file: str
    node: ast.Module | Function
    parent: Scope | None = None
    owner: str | None = None
    nodes: list[ast.AST] = field(default_factory=list)

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters, `self` and `cls` left out."""
        if isinstance(self.node, ast.Module):
            return ()
        arguments = self.node.args
        names = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
        names += [each.arg for each in arguments.kwonlyargs]
        return tuple(name for name in names if name not in ("self", "cls"))

    @cached_property
    def defaults(self) -> dict[str, ast.expr]:
        """The default values of the parameters that have one."""
        if isinstance(self.node, ast.Module):
            return {}
        arguments = self.node.args
        positional = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
        values = dict(zip(reversed(positional), reversed(arguments.defaults), strict=False))
        for each, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            if value is not None:
                values[each.arg] = value
        return values

    @cached_property
    def _places(self) -> dict[int, tuple[_Place, ...]]:
        """The place of every node: the blocks around it from outside, with its index in each."""
        places: dict[int, tuple[_Place, ...]] = {}

        def visit(node: ast.AST, path: tuple[_Place, ...]) -> None:
            places[id(node)] = path
            for _, value in ast.iter_fields(node):
                is_block = isinstance(value, list) and value and isinstance(value[0], ast.stmt)
                children = value if isinstance(value, list) else [value]
                for index, child in enumerate(children):
                    if isinstance(child, ast.AST):
                        inner = _Place(id(value), index, _ends(value[-1])) if is_block else None
                        visit(child, (*path, inner) if inner else path)

        visit(self.node, ())
        return places

    def select_reaching(self, values: list[_N], user: ast.AST) -> list[_N]:
        """Return those assigned values of a variable that it can still have at a node.

        A later assignment in a block around the node replaces earlier ones. What a block assigns
        that ends the function does not reach a node outside it.
        """
        if id(user) not in self._places:
            return values
        path = self._places[id(user)]
        reaching: list[_N] = []
        others: list[_N] = []
        for value in sorted(values, key=_line):
            place = self._places.get(id(value), ())
            if any(step.ends and step.block not in [p.block for p in path] for step in place):
                continue
            last = place[-1] if place else None
            if isinstance(value, ast.expr) and last in path:  # `x = f(x)`
                continue
            others.append(value)
            if reaching and _line(value) > _line(user):
                continue
            for step in path:
                if last and last.block == step.block and last.index < step.index:
                    reaching = []
            reaching.append(value)
        return reaching or others


@dataclass(frozen=True)
class _Place:
    """A statement's place: its block, its index there, whether the block ends the function."""

    block: int
    index: int
    ends: bool


def _line(node: ast.AST) -> int:
    if isinstance(node, ast.comprehension):
        return node.target.lineno
    return int(getattr(node, "lineno", 0))


def _ends(node: ast.stmt) -> bool:
    return isinstance(node, ast.Return | ast.Raise | ast.Continue)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a function of the package: its scope, its node."""

    scope: Scope
    node: ast.Call

    def argument(self, callee: Scope, name: str) -> ast.expr | None:
        """Return what the call gives for a parameter, its default, or None."""
        for keyword in self.node.keywords:
            if keyword.arg == name:
                return keyword.value
        index = callee.parameters.index(name)
        if index < len(self.node.args):
            value = self.node.args[index]
            return None if isinstance(value, ast.Starred) else value
        return callee.defaults.get(name)


class Source:
    """All modules of a package, parsed."""

    def __init__(self, folder: Path = ROOT / PACKAGE) -> None:
        self.scopes: list[Scope] = []
        self.modules: dict[str, Scope] = {}
        self.classes: dict[str, tuple[Scope, ast.ClassDef]] = {}
        self._functions: dict[str, Scope] = {}
        self._methods: dict[str, list[Scope]] = defaultdict(list)
        self._imports: dict[str, dict[str, str]] = {}
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            name = ".".join(parts).removesuffix(".__init__")
            tree = ast.parse(path.read_text(encoding="utf-8"))
            scope = Scope(name, name, path.relative_to(folder.parent).as_posix(), tree)
            self.modules[name] = scope
            self._imports[name] = _read_imports(tree)
            self._add(scope, tree.body, None)

    def _add(self, scope: Scope, body: list[ast.stmt], owner: str | None) -> None:
        """Add a scope, then those of the functions inside it."""
        self.scopes.append(scope)
        waiting: list[tuple[ast.AST, str | None]] = [(node, owner) for node in body]
        while waiting:
            node, cls = waiting.pop(0)
            if isinstance(node, Function):
                self._add_function(scope, node, cls)
                waiting += [(each, cls) for each in node.decorator_list]
                continue
            if isinstance(node, ast.ClassDef):
                self.classes[f"{scope.module}.{node.name}"] = (scope, node)
                cls = node.name
            scope.nodes.append(node)
            waiting += [(child, cls) for child in ast.iter_child_nodes(node)]

    def _add_function(self, parent: Scope, node: Function, owner: str | None) -> None:
        path = [parent.name] + [owner] * (owner is not None) + [node.name]
        name = ".".join(str(part) for part in path)
        scope = Scope(name, parent.module, parent.file, node, parent, owner)
        self._functions[name] = scope
        if owner is not None:
            self._methods[node.name].append(scope)
        self._add(scope, node.body, None)

    def resolve(self, name: str, scope: Scope | None) -> str | None:
        """Return the dotted name in the package of a dotted name in a scope, None for others."""
        first, _, rest = name.partition(".")
        while scope is not None:
            if f"{scope.name}.{first}" in self._functions:
                return f"{scope.name}.{name}"
            if f"{scope.module}.{first}" in self.classes or self._has(scope, first):
                return f"{scope.module}.{name}"
            imported = self._imports[scope.module].get(first)
            if imported is not None:
                return self._follow(f"{imported}.{rest}" if rest else imported)
            scope = scope.parent
        return None

    def _has(self, scope: Scope, name: str) -> bool:
        return scope.parent is None and f"{scope.module}.{name}" in self._functions

    def _follow(self, name: str) -> str:
        """Return the name where it is defined: a package may hand on what a module defines."""
        module, _, last = name.rpartition(".")
        if module in self._imports and name not in self.modules:
            further = self._imports[module].get(last)
            if further is not None and further != name:
                return self._follow(further)
        return name

    def find_function(self, node: ast.expr, scope: Scope) -> Scope | None:
        """Return the function of the package that an expression names, None where unsure."""
        if isinstance(node, ast.Name | ast.Attribute):
            resolved = self.resolve(ast.unparse(node), scope)
            if resolved in self._functions:
                return self._functions[resolved]
        if not isinstance(node, ast.Attribute):
            return None
        # A method is known by its class, or by a name that no other class has.
        if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            owner = find_owner(scope)
            if owner is not None:
                own = self._functions.get(f"{scope.module}.{owner}.{node.attr}")
                if own is not None:
                    return own
        if isinstance(node.value, ast.Name):
            cls = self._class_of(node.value.id, scope)
            if f"{cls}.{node.attr}" in self._functions:
                return self._functions[f"{cls}.{node.attr}"]
        methods = self._methods[node.attr]
        return methods[0] if len(methods) == 1 else None

    def _class_of(self, name: str, scope: Scope) -> str | None:
        """Return the class of a variable, by its annotation or by the call that made it."""
        for each in enclosing(scope):
            if not isinstance(each.node, ast.Module):
                arguments = each.node.args
                for arg in (*arguments.args, *arguments.kwonlyargs):
                    if arg.arg == name and arg.annotation is not None:
                        return self.resolve(ast.unparse(arg.annotation), scope)
            for node in each.nodes:
                if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
                    continue
                if ast.unparse(node.targets[0]) == name:
                    return self.resolve(ast.unparse(node.value.func), scope)
        return None

    def find_callee(self, call: Call) -> Scope | None:
        """Return the function, or the constructor of the class, that a call enters."""
        name = self.resolve(ast.unparse(call.node.func), call.scope)
        return self.constructor(name) or self.find_function(call.node.func, call.scope)

    def list_fields(self, name: str | None) -> list[str]:
        """Return the annotated names of a class of the package, in order; [] for another name."""
        if name not in self.classes:
            return []
        _, node = self.classes[name]
        annotated = [each for each in node.body if isinstance(each, ast.AnnAssign)]
        return [ast.unparse(each.target) for each in annotated]

    def constructor(self, name: str | None) -> Scope | None:
        """Return the constructor of a class of the package, None where it has none of its own."""
        return self._functions.get(f"{name}.__init__")

    @cached_property
    def calls(self) -> Mapping[Scope, list[Call]]:
        """All calls of every function of the package by their names."""
        found: dict[Scope, list[Call]] = defaultdict(list)
        for scope in self.scopes:
            for node in scope.nodes:
                if isinstance(node, ast.Call):
                    call = Call(scope, node)
                    callee = self.find_callee(call)
                    if callee is not None:
                        found[callee].append(call)
        return found

    def find_attribute(self, node: ast.expr, scope: Scope) -> list[tuple[ast.expr, Scope]]:
        """Return what the class of a method assigns to `self.NAME`, each with its scope."""
        owner = find_owner(scope)
        found = []
        for other in self.scopes:
            if owner is None or other.module != scope.module or other.owner != owner:
                continue
            for each in other.nodes:
                if isinstance(each, ast.Assign) and ast.dump(each.targets[0]) == _stored(node):
                    found.append((each.value, other))
        return found

    @cached_property
    def errors(self) -> frozenset[str]:
        """The dotted names of the package's exceptions."""
        names = {f"{PACKAGE}.errors.UserError", f"{PACKAGE}.errors.RunError"}
        while True:
            more = {name for name in self.classes if self._bases(name) & (names | {"Exception"})}
            if more <= names:
                return frozenset(names)
            names |= more

    def _bases(self, name: str) -> set[str]:
        scope, node = self.classes[name]
        bases = {ast.unparse(base) for base in node.bases}
        return bases | {self.resolve(base, scope) or "" for base in bases}


@cache
def read_source() -> Source:
    """Return the source of localpipe, read once."""
    return Source()


def find_owner(scope: Scope | None) -> str | None:
    """Return the class whose method a scope is, or lies in."""
    while scope is not None:
        if scope.owner is not None:
            return scope.owner
        scope = scope.parent
    return None


def enclosing(scope: Scope | None) -> Iterator[Scope]:
    """Yield a scope and those around it."""
    while scope is not None:
        yield scope
        scope = scope.parent


def _stored(node: ast.expr) -> str:
    """Return an attribute's dump as the target of an assignment."""
    return ast.dump(node).removesuffix("ctx=Load())") + "ctx=Store())"


def _read_imports(tree: ast.Module) -> dict[str, str]:
    """Return the dotted name of everything that a module imports, inside functions too."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names
