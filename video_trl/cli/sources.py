"""
Options of a configuration, read from its source: importing one imports torch, which takes seconds that neither help
nor a misspelt option should cost.

What is read is a stand-in: a dataclass of the same name with the same fields, types, defaults and help. Where a source
cannot be read so, the reader says so with `None`, and the class itself has to be imported.
"""

import ast
import builtins
import importlib.util
import typing
from collections.abc import Iterator, Mapping
from dataclasses import field, make_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any


class _Unreadable(Exception):
    """The source says it in a way that is not understood here."""


def read_config(trainer: str) -> type[Any] | None:
    """
    The configuration of a trainer.

    Args:
        trainer (`str`): `module:Class` of the trainer.

    Returns:
        A stand-in for its `config_class`, whose bases are stand-ins too; `None` if its source cannot be read.
    """
    try:
        module, node = _class(*trainer.split(":", 1))
        name = _class_value(module, node, "config_class")
        return _stand_in(*_class_named(module, name))
    except (_Unreadable, SyntaxError, OSError, ValueError):
        return None


def read_dataclass(path: str) -> type[Any] | None:
    """A stand-in for a dataclass, by its `module:Class`; `None` if its source cannot be read."""
    try:
        return _stand_in(*_class(*path.split(":", 1)))
    except (_Unreadable, SyntaxError, OSError, ValueError):
        return None


def read_attribute(path: str, name: str) -> Any:
    """
    A constant of a class or of its bases.

    Args:
        path (`str`): `module:Class`.
        name (`str`): Of the attribute.

    Returns:
        Its value; `None` if it cannot be read.
    """
    try:
        module, node = _class(*path.split(":", 1))
        return module.value(_class_value(module, node, name))
    except (_Unreadable, SyntaxError, OSError, ValueError):
        return None


def read_arguments(module: str) -> dict[str, bool]:
    """Options of a module that fills an `argparse` parser, without their dashes, and whether a value follows each."""
    options = {}
    for node in ast.walk(_module(module).tree):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".add_argument")):
            continue
        words = [word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
        actions = [ast.unparse(keyword.value).strip("'") for keyword in node.keywords if keyword.arg == "action"]
        for word in words:
            if word.startswith("--") and "help" not in actions:
                options[word[2:].replace("-", "_")] = not any(action.startswith("store_") for action in actions)
    return options


class _Module:
    """A source file, and where each name at its top level comes from."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        # Of several definitions, as under `if TYPE_CHECKING`, the last one holds at run time.
        self.names = dict(_definitions(self.tree.body))

    def find(self, name: str) -> "tuple[_Module, ast.AST]":
        """Where a name is defined, through imports."""
        if name not in self.names:
            raise _Unreadable(name)
        origin = self.names[name]
        if not isinstance(origin, ast.ImportFrom):
            return self, origin
        parents = self.package.split(".")
        base = ".".join(parents[: len(parents) - origin.level + 1]) if origin.level else ""
        module = ".".join(filter(None, (base, origin.module)))
        original = next(alias.name for alias in origin.names if (alias.asname or alias.name) == name)
        return _module(module).find(original)

    def value(self, node: ast.AST, scope: Mapping[str, ast.AST] | None = None) -> Any:
        """What an expression of constants, containers and types stands for."""
        match node:
            case ast.Constant():
                return node.value
            case ast.Tuple() | ast.List():
                values: list[Any] = []
                for item in node.elts:
                    if isinstance(item, ast.Starred):
                        values += self.value(item.value, scope)
                    else:
                        values.append(self.value(item, scope))
                return tuple(values) if isinstance(node, ast.Tuple) else values
            case ast.Dict():
                return _mapping(self, node, scope or {})
            case ast.UnaryOp(op=ast.USub()):
                return -self.value(node.operand, scope)
            case ast.BinOp(op=ast.BitOr()):
                return self.value(node.left, scope) | self.value(node.right, scope)
            case ast.Subscript():
                return self.value(node.value, scope)[self.value(node.slice, scope)]
            case ast.Name():
                return self._named(node.id, scope or {})
        raise _Unreadable(ast.dump(node))

    def _named(self, name: str, scope: Mapping[str, ast.AST]) -> Any:
        if name in scope:
            return self.value(scope[name], scope)
        origin = self.names.get(name)
        if isinstance(origin, ast.ImportFrom) and origin.module == "typing":
            return vars(typing)[name]
        if origin is None and name in vars(builtins):
            return vars(builtins)[name]
        module, node = self.find(name)
        return _choices(module, node) if isinstance(node, ast.ClassDef) else module.value(node)


def _definitions(body: list[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    for node in body:
        match node:
            case ast.ImportFrom():
                yield from ((alias.asname or alias.name, node) for alias in node.names)
            case ast.ClassDef():
                yield node.name, node
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                yield name, value
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                yield name, value
            case ast.If():
                yield from _definitions([*node.body, *node.orelse])


@cache
def _module(name: str) -> _Module:
    top, *rest = name.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        raise _Unreadable(name)
    path = Path(spec.origin)
    if rest:
        stem = path.parent.joinpath(*rest)
        path = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
    return _Module(name, path)


def _class(module: str, name: str) -> tuple[_Module, ast.ClassDef]:
    where, node = _module(module).find(name)
    if not isinstance(node, ast.ClassDef):
        raise _Unreadable(name)
    return where, node


def _class_named(module: _Module, node: ast.AST) -> tuple[_Module, ast.ClassDef]:
    if not isinstance(node, ast.Name):
        raise _Unreadable(ast.dump(node))
    where, found = module.find(node.id)
    return _class(where.name, found.name if isinstance(found, ast.ClassDef) else node.id)


def _class_value(module: _Module, node: ast.ClassDef, name: str) -> ast.AST:
    """The expression that a class, or the nearest of its bases, assigns to a name."""
    own = dict(_definitions(node.body))
    if name in own:
        return own[name]
    for base in node.bases:
        try:
            return _class_value(*_class_named(module, base), name)
        except _Unreadable:
            continue
    raise _Unreadable(name)


def _choices(module: _Module, node: ast.ClassDef) -> type[Any]:
    """An enumeration of the same values, or `str` for a class that is none, whose values the parser cannot check."""
    members = {name: value.value for name, value in _definitions(node.body) if isinstance(value, ast.Constant)}
    is_enum = any("Enum" in ast.unparse(base) for base in node.bases)
    return Enum(node.name, members) if is_enum and members else str  # type: ignore[return-value]


def _stand_in(module: _Module, node: ast.ClassDef) -> type[Any]:
    bases = tuple(_stand_in(*_class_named(module, base)) for base in node.bases)
    scope: dict[str, ast.AST] = {}
    own = []
    for statement in node.body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            scope |= dict(_definitions([statement]))
        elif not ast.unparse(statement.annotation).startswith("ClassVar"):
            value = _field(module, statement.value, scope)
            own.append((statement.target.id, module.value(statement.annotation, scope), value))
    return make_dataclass(node.name, own, bases=bases)


def _field(module: _Module, node: ast.expr | None, scope: Mapping[str, ast.AST]) -> Any:
    if not isinstance(node, ast.Call):
        return field() if node is None else field(default=module.value(node, scope))
    if ast.unparse(node.func) not in {"field", "dataclasses.field"}:
        raise _Unreadable(ast.dump(node))
    options = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg is not None}
    values: dict[str, Any] = {}
    factory = options.pop("default_factory", None)
    values |= {name: module.value(value, scope) for name, value in options.items()}
    if isinstance(factory, ast.Lambda):  # of a value
        made = module.value(factory.body, scope)
        values["default_factory"] = lambda: made
    elif factory is not None:
        values["default_factory"] = module.value(factory, scope)
    return field(**values)


def _mapping(module: _Module, node: ast.Dict, scope: Mapping[str, ast.AST]) -> dict[str, Any]:
    """A mapping without the entries that are computed: of a field's metadata, the help is what counts."""
    content: dict[str, Any] = {}
    for key, item in zip(node.keys, node.values, strict=True):
        try:
            content |= module.value(item, scope) if key is None else {module.value(key): module.value(item, scope)}
        except _Unreadable:
            continue
    return content
