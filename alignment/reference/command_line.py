"""The page of the command line: every command with its arguments and options."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from alignment import cli
from alignment.reference.markdown import code, prose, table

INTRODUCTION = """# Command line

What `align --help` and `align COMMAND --help` say, made from the same source. Exit status: 0 aligned, 1 not aligned
or not reached, 2 wrong usage or input, of which one line names the file and the mend.
"""


def commands() -> dict[str, Any]:
    """The commands of ``align`` by name; one of a group by both names, ``cache ls``."""
    found: dict[str, Any] = {}
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found |= {name: command} if inner is None else {f"{name} {word}": one for word, one in inner.items()}
    return found


def page() -> str:
    """The page as Markdown."""
    functions = dict(_registered())
    index = ", ".join(f"[{name}](#align-{name.replace(' ', '-')})" for name in commands())
    sections = [_section(name, command, functions[name]) for name, command in commands().items()]
    return "\n".join([INTRODUCTION, index + "\n", *sections])


def _registered() -> Iterator[tuple[str, Any]]:
    """The function of every command."""
    groups = [("", cli.app), *((f"{group.name} ", group.typer_instance) for group in cli.app.registered_groups)]
    for before, group in groups:
        for info in group.registered_commands if group else ():
            yield f"{before}{info.name or getattr(info.callback, '__name__', '')}", info.callback


def _section(name: str, command: Any, function: Any) -> str:
    types = get_type_hints(function, include_extras=True)
    usage = [f"align {name}"]
    rows: list[list[str]] = []
    for parameter in command.params:
        argument = parameter.opts[0] == parameter.name
        kind, bounds = _kind(types[parameter.name])
        if argument:
            usage.append(_placed(parameter))
        elif parameter.required:
            usage.append(f"{parameter.opts[0]} {parameter.metavar or parameter.name.upper()}")
        names = [parameter.metavar or parameter.name.upper()] if argument else parameter.opts + parameter.secondary_opts
        rows.append(
            [
                ", ".join(map(code, names)),
                _value(parameter, kind, bounds, argument),
                "required" if parameter.required else _default(parameter.default),
                parameter.help,
            ]
        )
    usage.append("[OPTIONS]" if any(p.opts[0] != p.name for p in command.params) else "")
    text = f"## align {name}\n\n{prose(inspect.cleandoc(command.help))}\n\n```text\n{' '.join(usage).strip()}\n```\n"
    return text + ("\n" + table(["", "value", "default", "meaning"], rows) if rows else "")


def _placed(parameter: Any) -> str:
    """An argument as the usage line has it."""
    shown = parameter.metavar or parameter.name.upper()
    many = "" if parameter.nargs == 1 or "..." in shown or "|" in shown else "..."
    return f"{shown}{many}" if parameter.required or shown.startswith("[") else f"[{shown}{many}]"


def _kind(annotation: Any) -> tuple[Any, tuple[Any, Any]]:
    """The type of one value, and its least and largest."""
    bounds: tuple[Any, Any] = (None, None)
    if get_origin(annotation) is Annotated:
        annotation, info = get_args(annotation)[:2]
        bounds = getattr(info, "min", None), getattr(info, "max", None)
    arms = [arm for arm in get_args(annotation) if arm is not NoneType]
    if get_origin(annotation) is not Literal and arms:
        return _kind(arms[0])[0], bounds
    return annotation, bounds


def _value(parameter: Any, kind: Any, bounds: tuple[Any, Any], argument: bool) -> str:
    """What may be given, in words."""
    words = {int: "integer", float: "number", Path: "path", str: "text", bool: ""}
    if get_origin(kind) is Literal:
        shown = ", ".join(map(code, get_args(kind)))
    else:
        shown = code(parameter.metavar) if parameter.metavar and not argument else words[kind]
    least, most = bounds
    if least is not None:
        shown += f" from {least:g}" + (f" to {most:g}" if most is not None else "")
    several = parameter.multiple or parameter.nargs != 1
    return f"{shown}, several" if several else shown


def _default(value: Any) -> str:
    if value is None or value is False or value in ((), []):
        return ""
    return "on" if value is True else code(value)
