"""The mutants of a module: each is its syntax tree with one node changed."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

_COMPARE: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
_CALLS = {"min": "max", "max": "min", "any": "all", "all": "any"}
_REMOVED = (ast.AugAssign, ast.Raise, ast.Delete, ast.Continue, ast.Break)
_LOGGERS = frozenset({"log", "logger", "_log", "_logger", "LOG"})

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
Node = TypeVar("Node", bound=ast.AST)

Route = tuple[tuple[str, int | None], ...]
"""The way from a statement to a node below it: fields, and places in lists."""

LONGEST = 120
"""Characters of a changed line that are shown."""

_SKIPPED = frozenset({"annotation", "returns", "decorator_list", "targets", "ctx"})


@dataclass(frozen=True)
class Mutant:
    """`function` is the qualified name of the outermost function that holds the change.

    It is "" for a statement of the module itself, whose `name` is then assigned anew.
    """

    path: Path
    function: str
    name: str
    line: int
    before: str
    after: str
    module: ast.Module
    statement: ast.stmt
    route: Route
    changed: ast.AST

    @property
    def text(self) -> str:
        """The change as two lines of a diff."""
        return f"- {self.before}\n+ {self.after}"

    @property
    def tree(self) -> ast.Module:
        """The changed module; it shares nodes with the module."""
        new = _rebuilt(self.statement, self.route, self.changed)
        body = [_swap(node, self.statement, new) for node in self.module.body]
        return ast.fix_missing_locations(ast.Module(body=body, type_ignores=[]))


def mutants_of(path: Path) -> list[Mutant]:
    """All mutants of a module, in the order of its lines."""
    module = ast.parse(path.read_text())
    found: dict[tuple[str, int, str, str], Mutant] = {}
    for statement, function, name in _units(module):
        for route in _places(statement, ()):
            old = _follow(statement, route)
            if not function and _is_number(old):
                continue  # sizes and times are tuned, not decided
            for changed in _changes(old):
                ast.copy_location(changed, old)
                before, after, line = _difference(statement, route, changed)
                mutant = Mutant(
                    path, function, name, line, before, after, module, statement, route, changed
                )
                if before != after:
                    found.setdefault((function or name, line, before, after), mutant)
    return sorted(found.values(), key=lambda mutant: mutant.line)


def _units(module: ast.Module) -> Iterator[tuple[ast.stmt, str, str]]:
    """The functions and methods, and the constants, of a module: node, function, name."""
    for node in module.body:
        if isinstance(node, FunctionNode):
            yield node, node.name, ""
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, FunctionNode):
                    yield inner, f"{node.name}.{inner.name}", ""
        elif name := name_of_constant(node):
            yield node, "", name


def name_of_constant(node: ast.stmt) -> str:
    """The name that a statement of a module assigns; "" for other statements."""
    if isinstance(node, ast.Assign):
        target = node.targets[0]
    elif isinstance(node, ast.AnnAssign) and node.value:
        target = node.target
    else:
        return ""
    return target.id if isinstance(target, ast.Name) else ""


def dependents(module: ast.Module, name: str) -> list[ast.stmt]:
    """The statement that assigns a constant, and all that make other constants from it."""
    names = {name}
    found = []
    for node in module.body:
        assigned = name_of_constant(node)
        if assigned == name or (assigned and names & _read_by(node)):
            names.add(assigned)
            found.append(node)
    return found


def _read_by(node: ast.stmt) -> set[str]:
    return {
        one.id
        for one in ast.walk(node)
        if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load)
    }


def _places(node: ast.AST, route: Route) -> Iterator[Route]:
    yield route
    for name, value in ast.iter_fields(node):
        if name in _SKIPPED or isinstance(node, ast.Assert | ast.JoinedStr | ast.arguments):
            continue
        if isinstance(node, ast.keyword) and node.arg == "strict":
            continue  # an assertion, too: of zip
        if isinstance(value, ast.AST):
            yield from _places(value, (*route, (name, None)))
        elif isinstance(value, list):
            for place, inner in enumerate(value):
                if isinstance(inner, ast.AST):
                    yield from _places(inner, (*route, (name, place)))


def _follow(node: ast.AST, route: Route) -> ast.AST:
    for name, place in route:
        value = getattr(node, name)
        node = value if place is None else value[place]
    return node


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    """The possible replacements of the node."""
    if isinstance(node, ast.expr):
        yield from _changed_expressions(node)
    elif isinstance(node, ast.If | ast.While):
        yield _with(node, test=ast.Constant(value=False))
        if isinstance(node, ast.If):
            yield _with(node, test=ast.Constant(value=True))
    elif isinstance(node, ast.Return):
        if node.value is not None and not _is_none(node.value):
            yield _with(node, value=ast.Constant(value=None))
    elif isinstance(node, ast.Expr):
        if isinstance(node.value, ast.Call | ast.Await) and not _logs(node.value):
            yield ast.Pass()
    elif isinstance(node, _REMOVED) or (
        isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute | ast.Subscript)
    ):
        yield ast.Pass()


def _changed_expressions(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            for other in _COMPARE.get(type(operator), ()):
                ops = list(node.ops)
                ops[place] = other()
                yield _with(node, ops=ops)
    elif isinstance(node, ast.BoolOp):
        yield _with(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        for place in range(len(node.values)):
            rest = node.values[:place] + node.values[place + 1 :]
            yield _with(rest[0]) if len(rest) == 1 else _with(node, values=rest)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield _with(node.operand)
    elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        yield _with(node, op=_ARITHMETIC[type(node.op)]())
    elif isinstance(node, ast.IfExp):
        yield _with(node.body)
        yield _with(node.orelse)
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield ast.Constant(value=not node.value)
        elif isinstance(node.value, int | float):
            yield ast.Constant(value=node.value + 1)
            if node.value:
                yield ast.Constant(value=node.value - 1)
    elif isinstance(node, ast.Set):
        for place in range(len(node.elts)):
            yield _with(node, elts=node.elts[:place] + node.elts[place + 1 :])
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        other_name = _CALLS.get(node.func.id)
        if other_name is not None:
            yield _with(node, func=ast.Name(id=other_name, ctx=ast.Load()))


def _with(node: Node, **fields: object) -> Node:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _is_number(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return _is_number(node.left) and _is_number(node.right)
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _logs(call: ast.expr) -> bool:
    """Whether the call writes a log line."""
    function = call.func if isinstance(call, ast.Call) else None
    owner = function.value if isinstance(function, ast.Attribute) else None
    return isinstance(owner, ast.Name) and owner.id in _LOGGERS


def _swap(node: ast.stmt, old: ast.stmt, new: ast.AST) -> ast.stmt:
    if node is old:
        return new
    if isinstance(node, ast.ClassDef) and old in node.body:
        return _with(node, body=[new if inner is old else inner for inner in node.body])
    return node


def _rebuilt(node: ast.AST, route: Route, changed: ast.AST) -> ast.AST:
    if not route:
        return changed
    (name, place), rest = route[0], route[1:]
    value = getattr(node, name)
    if place is None:
        return _with(node, **{name: _rebuilt(value, rest, changed)})
    items = list(value)
    items[place] = _rebuilt(items[place], rest, changed)
    return _with(node, **{name: items})


def _difference(statement: ast.stmt, route: Route, changed: ast.AST) -> tuple[str, str, int]:
    """The changed line of text, before and after, and its number."""
    node: ast.AST = statement
    inner: ast.stmt = statement
    depth = 0
    for place, (name, index) in enumerate(route, 1):
        value = getattr(node, name)
        node = value if index is None else value[index]
        if isinstance(node, ast.stmt):
            inner, depth = node, place
    old = ast.unparse(inner).splitlines()
    new = ast.unparse(ast.fix_missing_locations(_rebuilt(inner, route[depth:], changed)))
    line = getattr(node, "lineno", inner.lineno)
    for before, after in zip(old, new.splitlines(), strict=False):
        if before != after:
            return (*_shortened(before.strip(), after.strip()), line)
    return (*_shortened(old[0].strip(), new.splitlines()[0].strip()), line)


def _shortened(before: str, after: str) -> tuple[str, str]:
    """Both lines, shortened to the place where they begin to differ."""
    if max(len(before), len(after)) <= LONGEST:
        return before, after
    same = next(
        (place for place, (a, b) in enumerate(zip(before, after, strict=False)) if a != b),
        min(len(before), len(after)),
    )
    start = max(0, same - LONGEST // 2)
    return before[start : start + LONGEST], after[start : start + LONGEST]
