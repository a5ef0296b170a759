"""What a source asks of TensorRT, read from its syntax tree.

Every attribute has a receiver.  The module ``trt`` and variables of a name in `OBJECTS` are TensorRT's.  What comes
from a literal, another module, a class or function of this package, or a parameter of a declared type is not.  Whatever
is left could be a TensorRT object in disguise and is `UNKNOWN`: give it a name of `OBJECTS`.

Beside that, `names` lists all attribute names, whatever has them.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from typing import NamedTuple

from trt_guards import guards

# Where TensorRT is imported, a variable (or private attribute) of such a name holds an object of that class only.
OBJECTS = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "layer": "ILayer",
    "logger": "ILogger",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "parser_error": "ParserError",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "severity": "ILogger",
    "tensor": "ITensor",
}
OTHER, UNKNOWN, MODULE = "other", "unknown", "trt"
# pycuda's context, which comes from a function that cannot declare its type: pycuda is imported lazily.
NOT_TENSORRT = {"primary"}
# Builtins that hand on what they are given.
PASSING = {
    "dict",
    "enumerate",
    "filter",
    "iter",
    "list",
    "max",
    "min",
    "next",
    "reversed",
    "set",
    "sorted",
    "tuple",
    "zip",
}
# Modules, classes and objects whose functions make something of their own of what they are given, unlike copy.copy.
MAKING = {"Capabilities", "cuda", "hashlib", "json", "np", "self"}
# Functions that take the name of an attribute or of a module as text.
BY_TEXT = {"attrgetter", "methodcaller", "getattr", "setattr", "hasattr", "delattr"}
IMPORTING = {"import_module", "__import__"}
# Annotations that do not tell what is behind them.
_TELLS_NOTHING = re.compile(r"\b(Any|object|trt\.\w+|tensorrt\.\w+)\b|^(list|dict|tuple|set|Iterable|Iterator)$")


class Use(NamedTuple):
    """``Class.member``, ``function`` or, of an unknown receiver, ``unknown.member``; its text; and the attributes that
    are known to be true there, a capability among them."""

    name: str
    line: int
    text: str
    guards: frozenset[str]


def imports_tensorrt(tree: ast.AST) -> bool:
    """Whether a source imports TensorRT, in whatever way."""
    nodes = [*ast.walk(tree)]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [text for node in nodes for text in _texts(node, IMPORTING)]
    return any(name.split(".")[0] == "tensorrt" for name in names)


def opaque_names(tree: ast.AST) -> set[str]:
    """Functions, properties and fields that do not declare what they are: it may be TensorRT's."""
    nodes = [*ast.walk(tree)]
    functions = {f.name for f in nodes if isinstance(f, ast.FunctionDef) and not _declares(f.returns)}
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    fields = [field for one in classes for field in one.body if isinstance(field, ast.AnnAssign)]
    return functions | {
        field.target.id for field in fields if isinstance(field.target, ast.Name) and not _declares(field.annotation)
    }


def names(source: str) -> Iterator[Use]:
    """Every attribute of a source, given as text too, whatever has it; and TensorRT imported under another name."""
    tree = ast.parse(source)
    known = guards(tree)
    for node in ast.walk(tree):
        found = [node.attr] if isinstance(node, ast.Attribute) else _texts(node, BY_TEXT)
        for name in found:
            yield Use(name.rpartition(".")[2], node.lineno, ast.unparse(node), known[id(node)])


def _declares(annotation: ast.expr | None) -> bool:
    """Whether an annotation says that something is not TensorRT's."""
    text = ast.unparse(annotation).strip("\"'") if annotation is not None else "Any"
    return not _TELLS_NOTHING.search(text)


def _texts(node: ast.AST, functions: set[str]) -> list[str]:
    """The text arguments of a call of one of `functions`."""
    match node:
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=arguments) if name in functions:
            return [a.value for a in arguments if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return []


def uses(source: str, opaque: set[str] | None = None) -> Iterator[Use]:
    """All that a source asks of TensorRT or of an unknown receiver; `opaque` are such names of other sources."""
    tree = ast.parse(source)
    opaque = opaque_names(tree) | (opaque or set())
    known = guards(tree)
    for owner in tree.body:
        for function in owner.body if isinstance(owner, ast.ClassDef) else [owner]:
            scope = _Scope(tree, owner, function, opaque)
            attributes = [node for node in ast.walk(function) if isinstance(node, ast.Attribute)]
            for node in attributes:
                kind = scope.kind(node.value)
                if kind != OTHER and not node.attr.startswith("__"):
                    name = node.attr if kind == MODULE else f"{kind}.{node.attr}"
                    yield Use(name, node.lineno, ast.unparse(node), known[id(node)])
            for node in ast.walk(function):
                match node:
                    case ast.Call(func=ast.Name(id=name), args=[asked, *_]) if name in BY_TEXT:
                        if scope.kind(asked) != OTHER:
                            yield Use(f"{UNKNOWN}.{name}", node.lineno, ast.unparse(node), frozenset())
                if "tensorrt" in [text.split(".")[0] for text in _texts(node, IMPORTING)]:
                    yield Use(f"{UNKNOWN}.import_module", node.lineno, ast.unparse(node), frozenset())


class _Scope:
    """The variables of one function, and what they may hold."""

    def __init__(self, tree: ast.Module, owner: ast.AST, function: ast.AST, opaque: set[str]) -> None:
        self.opaque = opaque
        self.objects = OBJECTS if imports_tensorrt(tree) else {}
        shared = {name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names}
        self.known = {*dir(builtins), *NOT_TENSORRT, "self", "cls", *_defined(tree.body)} - shared
        self.sources: dict[str, list[ast.AST | None]] = {}
        for node in [*ast.walk(owner)] if isinstance(owner, ast.ClassDef) else [*ast.walk(function)]:
            # Of the other methods only what they put on `self` is seen here.
            for target, value in _bindings(node):
                self.sources.setdefault(target, []).append(value)
        self.visiting: set[str] = set()

    def kind(self, node: ast.AST | None) -> str:
        """`OTHER`, `UNKNOWN`, `MODULE` or the name of a TensorRT class or function."""
        match node:
            case None:
                return UNKNOWN
            case ast.Name(id="trt"):
                return MODULE
            case ast.Name(id=name) if name in self.objects:
                return self.objects[name]
            case ast.Name(id=name):
                return OTHER if name in self.known else self._held(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name):
                if name.lstrip("_") in self.objects:
                    return self.objects[name.lstrip("_")]
                if f"self.{name}" in self.sources:
                    return self._held(f"self.{name}")
                return UNKNOWN if name in self.opaque else OTHER
            case ast.Attribute(value=value, attr=name):
                below = self.kind(value)
                if below == MODULE:
                    return name
                hidden = name in self.opaque or name.lstrip("_") in self.objects
                return OTHER if below == OTHER and not hidden else UNKNOWN
            case ast.Call(func=func, args=arguments):
                return self._returned(func, arguments)
            case ast.Subscript(value=value):
                return self._element(value)
            case ast.Starred(value=value) | ast.NamedExpr(value=value):
                return self.kind(value)
            case _:
                return OTHER if all(self.kind(part) == OTHER for part in _parts(node)) else UNKNOWN

    def _returned(self, func: ast.expr, arguments: list[ast.expr]) -> str:
        match func:
            case ast.Name(id=name) if name in self.opaque:
                return UNKNOWN
            case ast.Name(id=name) if name in PASSING:
                return OTHER if all(self._element(argument) == OTHER for argument in arguments) else UNKNOWN
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if name in self.opaque:
                return UNKNOWN
            case ast.Attribute(value=value, attr=name):
                # trt.Builder(...) is a Builder; what a method of one returns is not known.
                below = self.kind(value)
                if below == MODULE:
                    return name
                making = isinstance(value, ast.Name) and value.id in MAKING
                given = {self.kind(argument) for argument in arguments if not making}
                return OTHER if {below, self._element(value), *given} == {OTHER} else UNKNOWN
        return self.kind(func)

    def _element(self, node: ast.expr) -> str:
        """As `kind`, of what a container holds."""
        name = ast.unparse(node) + "[]"
        return self._held(name) if self.kind(node) == OTHER and name in self.sources else self.kind(node)

    def _held(self, name: str) -> str:
        if name in self.visiting:
            return OTHER
        self.visiting.add(name)
        kinds = {self.kind(value) for value in self.sources.get(name, [None])}
        self.visiting.discard(name)
        return OTHER if kinds <= {OTHER} else UNKNOWN


def _defined(body: list[ast.stmt]) -> set[str]:
    """Names that imports, classes, functions and constants of a module have; those of TensorRT left out."""
    names = set()
    for node in [n for statement in body for n in ast.walk(statement)]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            away = getattr(node, "module", None) or ""
            names |= {
                alias.asname or alias.name.split(".")[0]
                for alias in node.names
                if "tensorrt" not in (away.split(".")[0], alias.name.split(".")[0])
            }
    for statement in body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef):
            names.add(statement.name)
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def _bindings(node: ast.AST) -> Iterator[tuple[str, ast.AST | None]]:
    """Variables that a node binds, each with what it gets; None where nothing tells."""
    pairs: list[tuple[ast.AST, ast.AST | None]] = []
    match node:
        case ast.Assign(targets=targets, value=value):
            pairs = [(target, value) for target in targets]
        case ast.AnnAssign(target=target, value=value) if value is not None:
            pairs = [(target, value)]
        case ast.For(target=target, iter=value) | ast.comprehension(target=target, iter=value):
            pairs = [(target, ast.Subscript(value, ast.Constant(0), ast.Load()))]
        case ast.NamedExpr(target=target, value=value) | ast.AugAssign(target=target, value=value):
            pairs = [(target, value)]
        case ast.withitem(context_expr=value, optional_vars=target) if target is not None:
            pairs = [(target, value)]
        case ast.ExceptHandler(name=str(name)):
            yield name, ast.Constant(None)
        case ast.Call(func=ast.Attribute(value=holder, attr="append" | "add" | "insert"), args=[*_, value]):
            yield ast.unparse(holder) + "[]", value
        case ast.arg(arg=name, annotation=annotation) if name not in ("self", "cls"):
            yield name, ast.Constant(None) if _declares(annotation) else None
    for target, value in pairs:
        for name in _names(target):
            yield name, value


def _names(target: ast.AST) -> Iterator[str]:
    """``x``, ``self.x``, and ``x[]`` for what is put into a container."""
    match target:
        case ast.Name() | ast.Attribute():
            yield ast.unparse(target)
        case ast.Subscript(value=holder):
            yield ast.unparse(holder) + "[]"
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            for part in parts:
                yield from _names(part)
        case ast.Starred(value=value):
            yield from _names(value)


def _parts(node: ast.AST) -> list[ast.expr]:
    """The expressions of which an expression may be one or hold one; operators give something new."""
    match node:
        case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Set(elts=parts):
            return parts
        case ast.Dict(values=parts) | ast.BoolOp(values=parts):
            return parts
        case ast.ListComp(elt=part) | ast.SetComp(elt=part) | ast.GeneratorExp(elt=part) | ast.DictComp(value=part):
            return [part]
        case ast.IfExp(body=body, orelse=orelse):
            return [body, orelse]
    return []
