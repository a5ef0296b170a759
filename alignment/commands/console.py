"""What the commands share: consoles, options, progress bars, and errors as one line."""

from __future__ import annotations

import io
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from typer.core import TyperGroup

from alignment.errors import AlignError
from alignment.results import Alignment
from alignment.storage import require_folder, writing
from alignment.variant import PLAIN, Variant, resized, with_quantization

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)
#: Characters of a line where no terminal limits it.
_UNLIMITED = 100_000

VariantName = Annotated[str, typer.Argument(help="name of a variant of the zoo, or YAML file")]
Data = Annotated[
    Path | None,
    typer.Option(
        help="folder in COCO layout, for variants on COCO, or of DOTA's tiles, for rotated boxes; default: $ALIGN_DATA"
    ),
]
Images = Annotated[int | None, typer.Option(min=1, help="only the first so many images")]
Size = Annotated[
    str | None,
    typer.Option(metavar="HxW", help="another input size, such as 416 or 384x640; default: the variant's own"),
]
Policy = Annotated[
    str | None,
    typer.Option(help="where quantizers go, in place of the variant's own: tensorrt, conv-only or full"),
]
Plain = Annotated[
    bool, typer.Option("--plain", help="nothing that the recipe keeps in float, no weights or biases searched for")
]
Workers = Annotated[int, typer.Option(min=1, help="processes that share the work")]
Scheduler = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="of a Dask cluster that sees the same files, in their place")
]
Golden = Annotated[Path | None, typer.Option(help="folder of golden values; default: the packaged one")]


class Commands(TyperGroup):
    """The commands of `align`, whose wrong usage is one line too."""

    def main(self, args: Any = None, prog_name: Any = None, **extra: Any) -> Any:  # type: ignore[override]
        """Runs one, and ends the process by its status; letters that the output has not are written as escapes."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        if not extra.pop("standalone_mode", True):
            return super().main(args, prog_name, standalone_mode=False, **extra)
        try:
            status = super().main(args, prog_name, standalone_mode=False, **extra)
        except typer.Abort:
            raise SystemExit(1) from None
        except Exception as error:
            # Typer has click's exceptions, or its own of the same names.
            if not hasattr(error, "format_message"):
                raise
            said, place = error.format_message(), getattr(error, "ctx", None)
            if "\n" in said:  # the help of a command that was given nothing
                out.print(said, markup=False)
            elif said:
                path = place.command_path if place else "align"
                err.print(one_line(f"align: {said.rstrip('.')}: see `{path} --help`"), markup=False)
            raise SystemExit(error.exit_code) from None  # type: ignore[attr-defined]
        raise SystemExit(status if isinstance(status, int) else 0)


def reported(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turns an AlignError, and what the file system refuses, into one line on stderr and exit status 2."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            with warnings.catch_warnings():
                # NumPy's, of numbers that are not finite: what is made of them says so.
                warnings.simplefilter("ignore", RuntimeWarning)
                # Of libraries, on sizes that no model has: what comes of them is said below.
                warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|mmengine|mmdet|mmcv)\.")
                # matplotlib's, of letters that its fonts have not: SVG holds text, which others draw.
                warnings.filterwarnings("ignore", "Glyph .* missing from")
                return command(*args, **kwargs)
        except AlignError as error:
            err.print(one_line(f"align: {error}"), markup=False)
            raise typer.Exit(2) from None
        except MemoryError as error:
            said = f"align: not enough memory: {error or 'of this machine'}: take a smaller input, or --batch 1"
            err.print(one_line(said), markup=False)
            raise typer.Exit(2) from None
        except BrokenPipeError:  # whoever reads the output has had enough of it
            raise
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            err.print(one_line(f"align: {where}{error.strerror or error}"), markup=False)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            err.print("align: interrupted; nothing half-written was left", markup=False)
            raise typer.Exit(130) from None

    return run


def one_line(text: str) -> str:
    """What is said of bad input, which may hold anything: on one line, printable, and with its end where it is long."""
    plain = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in " ".join(text.split()))
    return plain if len(plain) <= 1200 else f"{plain[:700]} ... {plain[-400:]}"


def recipe_changes(plain: bool, policy: str | None) -> dict[str, Any]:
    """What ``--plain`` and ``--policy`` change in a variant's recipe."""
    return {**(PLAIN if plain else {}), **({"policy": policy} if policy else {})}


def kept_float(variant: Variant, patterns: Iterable[str], files: Iterable[Path], asked: dict[str, Any]) -> Variant:
    """The variant by the recipe that was asked for, with other nodes in float; what a file's recipe changes is printed.

    Args:
        variant: to quantize.
        patterns: ONNX nodes, with wildcards.
        files: ``keep_float.yaml`` files, or their folders, which bring the recipe that they were found with.
        asked: fields of the recipe.
    """
    from alignment.export.onnx_export import exported
    from alignment.quantize.keep_float import KEEP_FLOAT, adopted, read_keep_float

    paths = [path / KEEP_FLOAT if path.is_dir() else path for path in files]
    found = {path: read_keep_float(path, exported(variant).onnx) for path in paths}
    changes, lines = adopted(variant.quantization, found, asked)
    for line in lines:
        out.print(line, markup=False)
    nodes = [*patterns, *(name for file in found.values() for name in file.names)]
    return with_quantization(variant, {**changes, **({"keep_float": nodes} if nodes or found else {})})


def sized(variant: Variant, size: str | None) -> Variant:
    """The variant at the size of ``--size``.  Raises AlignError for what is no size."""
    if size is None:
        return variant
    return resized(variant, *size_of(size))


def names_in(text: str) -> tuple[str, ...]:
    """The names in a list with commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def size_of(text: str) -> tuple[int, int]:
    """Height and width of ``--size``.  Raises AlignError for what is no size."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise AlignError(f"--size {text}: not a size in pixels", "give one such as 416 or 384x640")
    return int(sides[0]), int(sides[-1])


def require_folders(named: dict[str, Path | None]) -> None:
    """Finds out before any work is done what could not be written after it."""
    for option, path in named.items():
        if path is not None:
            require_folder(path, option)


def write_report(alignment: Alignment, staging: Path, folder: Path) -> None:
    """Writes a RUN into `folder`.  Pictures leave `staging` only now: what fails on its way leaves nothing behind.

    Ladders that lie there stay: they took trainings.
    """
    from alignment.report.run_folder import RESULTS, read_run, write_run

    if (folder / RESULTS).is_file():
        with suppress(AlignError):  # what cannot be read is written over
            alignment.ladders = alignment.ladders or read_run(folder).ladders
    if (pictures := staging / "pictures").is_dir():
        shutil.copytree(pictures, folder / "pictures", copy_function=_copy, dirs_exist_ok=True)
    write_run(alignment, folder)
    out.print(f"report: {folder / 'report.html'}", markup=False)


def _copy(source: str, target: str) -> None:
    with writing(Path(target)) as temporary:
        shutil.copyfile(source, temporary)


def print_table(table: Table, least: int = 0) -> None:
    """Prints a table of which nothing is cut: as wide as what it holds, in a terminal as wide as that.

    Args:
        table: in a terminal its long words go on in the next line.
        least: characters that it takes in a narrower terminal too.
    """
    for column in table.columns:
        column.overflow = "fold"
    width = max(out.width, least) if out.is_terminal else _UNLIMITED
    Console(width=width, highlight=False, soft_wrap=True).print(table)


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and time left; gives the function that moves it: images done, images in all."""
    with _bar(_Rate()) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def stage_bars(name: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each stage; gives the function that moves one: stage, how many done, how many in all."""
    with _bar() as bar:
        tasks: dict[str, Any] = {}

        def move(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(f"{name} {stage}", total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield move


def _bar(*columns: ProgressColumn) -> Progress:
    shown = (BarColumn(), MofNCompleteColumn(), *columns, TimeElapsedColumn(), TimeRemainingColumn())
    text = TextColumn("{task.description}")
    # Where there is no terminal a bar is a blank line before the one of an error.
    return Progress(text, *shown, console=err, transient=True, disable=not err.is_terminal)


class _Rate(ProgressColumn):
    """Images a second."""

    def render(self, task: Task) -> str:
        """``12.3 images/s``."""
        return f"{task.speed:.1f} images/s" if task.speed else ""
