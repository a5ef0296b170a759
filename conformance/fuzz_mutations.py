"""Ways to spoil a file: its bytes, its text, or the tree of values that it holds."""

from __future__ import annotations

import copy
import json
import math
from random import Random
from typing import Any

import yaml

#: No page may come to hold an element of this name.
TAG = "fuzz"
MARKUP = f"</script></style>\"'><{TAG} onload=alert(1)>]]>--><![CDATA[&amp;[red]{{{{7*7}}}}"
#: Values that a field may not expect.
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308),
    *(math.nan, math.inf, -math.inf, "", " ", "0", "-1", "nan", "NaN", "Infinity", "true", "null", "~", "\0", "\n"),
    *("\x1b[31m\x07", "\ufeff", "\u202e", "é" * 50, "x" * 100_000, MARKUP, "*", "[", "**/[", "(" * 200, "%s{0}"),
    *("../../../../etc/passwd", "/etc/passwd", "/dev/zero", "/proc/self/mem", "a/../../b", "C:\\x", "${HOME}"),
    *("${ALIGN_NOWHERE}", "~root", "file:///etc/passwd", "2024-13-45", "\ud800", "\U0001f600"),
    *([], {}, [[]], [{}], {"": ""}, {"a": {"b": {"c": []}}}, [None], ["x", 1, None], [0, 0, 0, 0], [1e308] * 4),
    *([math.nan] * 4, [-5, -5, -5, -5], list(range(2000)), {str(number): number for number in range(500)}),
)
_YAML = (
    "!!python/object/apply:os.system ['touch executed']\n",
    "!!python/name:os.system\n",
    *("&a [*a]\n", "*nowhere\n", "%YAML 9.9\n---\n", "--- 1\n--- 2\n", "\t- x\n", "? [a, b]\n: c\n", "<<: [1]\n"),
    *(
        "2024-13-45\n",
        "!!int x\n",
        "!!float x\n",
        "!!timestamp x\n",
        "!!binary '*'\n",
        "0x\n",
        "1:99:9\n",
        "!!set {a}\n",
    ),
    *("[" * 3000, "{a: " * 3000, "- " * 3000, "&a " * 5, "'" * 3, '"\\x', "!<", "|9\n", "=\n", "!!bool maybe\n"),
    "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{chr(c)}: &{chr(c)} [{', '.join([f'*{chr(c - 1)}'] * 9)}]\n" for c in range(ord("b"), ord("k"))),
)
_JSON = (
    "[" * 100_000,
    '{"a":' * 100_000,
    "[" * 600 + "]" * 600,
    "NaN",
    "1e999",
    "9" * 5000,
    '"\\ud800"',
    "// x",
    "{}{}",
)


def spoilt_bytes(rng: Random, data: bytes) -> bytes:
    """A file of which something is lost, changed, added, or everything is something else."""
    at, much = rng.randrange(len(data) + 1), 1 + int(2 ** (rng.random() * 12))
    some = bytearray(data)
    match rng.randrange(10):
        case 0 | 1:
            return data[:at]
        case 2 | 3:
            for _ in range(rng.choice((1, 1, 3, 20))):
                if some:
                    some[rng.randrange(len(some))] ^= 1 << rng.randrange(8)
        case 4:
            some[at : at + much] = rng.randbytes(much)
        case 5:
            del some[at : at + much]
        case 6:
            some[at:at] = data[at : at + much] or b"\0"
        case 7:
            some[at : at + much] = rng.choice((b"\0", b"\xff", b"\x80")) * much
        case 8:
            some[at:at] = rng.choice((b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\0", b"\r", MARKUP.encode()))
        case _:
            head = rng.choice(
                (b"", b"\0", b"PK\x03\x04", b"\x80\x04", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"<html>")
            )
            return head + rng.randbytes(rng.choice((0, 1, 100, 5000)))
    return bytes(some)


def spoilt_tree(rng: Random, content: Any) -> Any:
    """A tree of lists, mappings and values, in which one to three are others, gone, doubled or misnamed."""
    root = [copy.deepcopy(content)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        place, key = rng.choice(_places(root)) if rng.random() < 0.5 else _walked(rng, root)
        old = place[key]
        match rng.randrange(8):
            case 0 | 1 | 2 | 3:
                place[key] = copy.deepcopy(rng.choice(HOSTILE))
            case 4:
                place[key] = _other(rng, old)
            case 5 if place is not root:
                del place[key]
            case 6 if isinstance(place, list):
                place[key:key] = [copy.deepcopy(old)] * rng.choice((1, 3))
            case 6:
                place[rng.choice((f"{key}_", MARKUP, "", str(key).upper()))] = place.pop(key)
            case _:
                other_place, other = rng.choice(_places(root))
                place[key] = copy.deepcopy(other_place[other])
    return root[0]


def _other(rng: Random, value: Any) -> Any:
    """What is near to `value`."""
    match value:
        case bool():
            return not value
        case int() if abs(value) > 2**62:
            return str(value)
        case int() | float():
            return rng.choice((-value, value * 1000, str(value), [value], value + 0.5, value * 1e-9, value + 1))
        case str():
            return rng.choice(
                (value * 2, value.upper(), value[:-1], value + "\n", [value], {value: value}, value + "/..")
            )
        case list():
            return rng.choice(
                (value[::-1], value * 2, value[:-1], dict(enumerate(map(str, value))), value[:1], [value])
            )
        case dict():
            return rng.choice((list(value), list(value.values()), {**value, MARKUP: 1}, [value], list(value.items())))
    return [value]


def _walked(rng: Random, root: list[Any]) -> tuple[Any, Any]:
    """A place of a tree, those of a large branch no more likely than others."""
    place: Any = root
    key: Any = 0
    while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.75:
        place = place[key]
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
    return place, key


def _places(content: Any, most: int = 4000) -> list[tuple[Any, Any]]:
    """Places of a tree, each as a list or mapping and the key in it, from the root down."""
    found, level = [], [content]
    while level and len(found) < most:
        following = []
        for holder in level:
            pairs = holder.items() if isinstance(holder, dict) else enumerate(holder)
            for key, value in pairs:
                found.append((holder, key))
                if isinstance(value, dict | list) and value:
                    following.append(value)
        level = following
    return found


def spoilt_yaml(rng: Random, content: Any) -> bytes:
    """YAML of a spoilt tree, or spoilt YAML."""
    match rng.randrange(8):
        case 0:
            return spoilt_bytes(rng, yaml.safe_dump(content).encode())
        case 1:
            text, planted = yaml.safe_dump(content, sort_keys=False), rng.choice(_YAML)
            lines = text.splitlines(keepends=True)
            at = rng.randrange(len(lines) + 1)
            if rng.random() < 0.6 and at < len(lines) and ":" in lines[at]:
                lines[at] = f"{lines[at].partition(':')[0]}: {planted}"
            else:
                lines.insert(at, planted)
            return "".join(lines).encode()
        case 2:
            return rng.choice(_YAML).encode()
    return yaml.safe_dump(spoilt_tree(rng, content), allow_unicode=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def spoilt_json(rng: Random, content: Any) -> bytes:
    """JSON of a spoilt tree, or spoilt JSON."""
    match rng.randrange(8):
        case 0:
            return spoilt_bytes(rng, json.dumps(content).encode())
        case 1:
            text = json.dumps(spoilt_tree(rng, {"planted": content} if rng.random() < 0.1 else content))
            at = rng.choice([place for place, letter in enumerate(text) if letter in ":,["] or [0]) + 1
            return f"{text[:at]}{rng.choice(_JSON)}{text[at:]}".encode("utf-8", "surrogatepass")
        case 2 if rng.random() < 0.3:
            return rng.choice(_JSON).encode()
    return json.dumps(spoilt_tree(rng, content), ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
