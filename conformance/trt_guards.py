"""What is known to be true where an expression is evaluated: the capabilities that guard a use of TensorRT."""

from __future__ import annotations

import ast

Names = frozenset[str]


def guards(tree: ast.AST) -> dict[int, Names]:
    """By ``id`` of each node, the attribute names (of whatever object) that are true when it is evaluated.

    An ``if``, ``assert``, ``and``, ``or``, a conditional expression or a comprehension's condition tells; so does an
    ``if`` further up that leaves the block.  A name that is only mentioned, or under ``not``, guards nothing.
    """
    found: dict[int, Names] = {}
    _visit(tree, frozenset(), found)
    return found


def implied(test: ast.expr, truth: bool) -> Names:
    """Attribute names that are true when `test` comes out as `truth`."""
    match test:
        case ast.Attribute(attr=name) if truth:
            return frozenset({name})
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return implied(operand, not truth)
        case ast.BoolOp(op=op, values=values):
            parts = [implied(value, truth) for value in values]
            # All of them came out so, or some one did.
            return frozenset.union(*parts) if isinstance(op, ast.And) is truth else frozenset.intersection(*parts)
    return frozenset()


def _visit(node: ast.AST, have: Names, found: dict[int, Names]) -> None:
    found[id(node)] = have
    match node:
        case ast.If(test=test, body=body, orelse=orelse) | ast.IfExp(test=test, body=body, orelse=orelse):
            _visit(test, have, found)
            _block(body, have | implied(test, True), found)
            _block(orelse, have | implied(test, False), found)
        case ast.BoolOp(op=op, values=values):
            for value in values:
                _visit(value, have, found)
                have |= implied(value, isinstance(op, ast.And))
        case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
            for generator in node.generators:
                _visit(generator, have, found)
                have = have.union(*(implied(test, True) for test in generator.ifs))
            rest = [part for part in ast.iter_child_nodes(node) if not isinstance(part, ast.comprehension)]
            _block(rest, have, found)
        case _:
            for _, value in ast.iter_fields(node):
                _block(value, have, found)


def _block(part: object, have: Names, found: dict[int, Names]) -> None:
    """One node, or statements of which each may tell something of those after it."""
    if isinstance(part, ast.AST):
        _visit(part, have, found)
    for statement in part if isinstance(part, list) else []:
        if isinstance(statement, ast.AST):
            _visit(statement, have, found)
        match statement:
            case ast.If(test=test, body=body, orelse=orelse):
                have |= implied(test, False) if _leaves(body) else frozenset()
                have |= implied(test, True) if orelse and _leaves(orelse) else frozenset()
            case ast.Assert(test=test):
                have |= implied(test, True)


def _leaves(body: list[ast.stmt]) -> bool:
    return isinstance(body[-1], ast.Raise | ast.Return | ast.Continue | ast.Break)
