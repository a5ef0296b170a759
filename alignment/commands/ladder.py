"""``align ladder``."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Column, Table

from alignment.case import BACKENDS
from alignment.commands.console import (
    Data,
    Images,
    Plain,
    Policy,
    VariantName,
    kept_float,
    names_in,
    out,
    print_table,
    recipe_changes,
    require_folders,
    stage_bars,
)
from alignment.errors import AlignError
from alignment.storage import writing
from alignment.variant import Variant, load_variant, with_quantization

if TYPE_CHECKING:
    from alignment.ladder import Step
    from alignment.results import Ladder


def ladder(
    variant: VariantName,
    out_dir: Annotated[Path, typer.Option("--out", help="RUN folder; what is made for a rung lies in it too")],
    until: Annotated[Literal["ptq", "partial", "qat"], typer.Option(help="the highest kind of rung")] = "qat",
    partial: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="a keep_float.yaml of `align partial`, or its folder; default: OUT/partial, found where absent",
        ),
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="of a search for it: so many nodes stay float")] = 6,
    qat: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="a NAME_qat.yaml of `align qat`, or its folder; repeatable; default: OUT/qat and OUT/qat_partial, "
            "trained where absent",
        ),
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="where it trains")] = "cpu",
    backend: Annotated[str, typer.Option(help="comma-separated: torch, onnxruntime, tensorrt")] = ",".join(BACKENDS),
    policy: Policy = None,
    plain: Plain = False,
    images: Images = None,
    data: Data = None,
) -> None:
    """Score a variant in FP32, quantized, partly quantized and trained, on every backend, in one report with a plot.

    What lies in OUT is taken as it is: rungs, and scores of the same graph and images, wherever they were measured. So
    it goes on where it was interrupted, and a folder that comes from a machine without a GPU gets TensorRT's scores on
    one that has it. Cases of `align run` in the same folder stay in its report.
    """
    backends = _backends(backend)
    _require_used(until, partial, qat)
    require_folders({"--out": out_dir})
    from alignment.data.samples import open_samples
    from alignment.ladder import measure
    from alignment.report.ladder import to_markdown
    from alignment.report.pareto import require_matplotlib
    from alignment.report.run_folder import REPORT, RESULTS, merge, read_run, write_run
    from alignment.session import new_alignment, require_available

    require_matplotlib()
    start = load_variant(variant)
    require_available(start, data)
    run = new_alignment(shlex.join(["align", *sys.argv[1:]]))
    before = [read_run(out_dir)] if (out_dir / RESULTS).is_file() else []

    def write(now: Ladder) -> None:
        write_run(merge([run, *before, run.model_copy(update={"ladders": [now]})]), out_dir)

    with stage_bars(start.name) as show:
        making = _Making(out_dir, layers, device, images, data, show)
        steps = _steps(start, until, partial, qat, recipe_changes(plain, policy), making)
        known = next((one for part in before for one in part.ladders if one.variant == start.name), None)
        found = measure(steps, open_samples(start, data, images), backends, known, data, show, write)
    write(found)
    with writing(out_dir / "ladder.md") as file:
        file.write_text(to_markdown(found), encoding="utf-8")
    _print(found)
    for name in (REPORT, RESULTS, "ladder.md"):
        out.print(f"wrote {out_dir / name}", markup=False)


def _backends(text: str) -> tuple[str, ...]:
    names = names_in(text)
    if wrong := [name for name in names if name not in BACKENDS]:
        raise AlignError(f"--backend {wrong[0]}: no such backend", f"choose from {', '.join(BACKENDS)}")
    if not names:
        raise AlignError(f"--backend {text!r}: none", f"choose from {', '.join(BACKENDS)}")
    return names


def _require_used(until: str, partial: Path | None, qat: list[Path] | None) -> None:
    """Raises AlignError for the path of a rung that is above the highest."""
    for option, given, lowest in (("--partial", partial, ("partial", "qat")), ("--qat", qat, ("qat",))):
        if given and until not in lowest:
            raise AlignError(
                f"{option}: no such rung with --until {until}", f"leave it out, or give --until {lowest[0]}"
            )


@dataclass(frozen=True)
class _Making:
    """What a rung stands on, made where the folder does not have it, by the defaults of the command that does."""

    folder: Path
    layers: int
    device: str
    images: int | None
    data: Path | None
    show: Callable[[str, int, int], None]

    def keep_float(self, variant: Variant) -> Path:
        """The nodes that stay float: `align partial --layers N`."""
        from alignment.quantize.candidates import Candidates
        from alignment.quantize.keep_float import KEEP_FLOAT
        from alignment.quantize.partial import Goal, partial, swept
        from alignment.quantize.scoring import Scorer

        path = self.folder / "partial" / KEEP_FLOAT
        if not path.is_file():
            candidates, scorer = Candidates(variant, self.data), Scorer(variant, self.data, self.images)
            ranking, goal = swept(candidates, scorer, self.show), Goal("layers", self.layers)
            partial(candidates, scorer, ranking, goal, progress=self._sets).save(path.parent)
        return path

    def trained(self, variant: Variant, name: str) -> Path:
        """The trained variant: `align qat`."""
        from alignment.models.mmyolo_source import require_mmyolo
        from alignment.quantize.qat_files import own_yaml, papers, train_into

        folder = self.folder / name
        path = own_yaml(folder, variant.name)
        if not (path.is_file() and papers(folder, variant.name).is_file()):
            require_mmyolo()
            from alignment.quantize.qat import Options

            train_into(folder, variant, Options(device=self.device), self.data, self.show)
        return path

    def _sets(self, done: int, most: int) -> None:
        self.show("sets, at most", done, most)


def _steps(
    start: Variant,
    until: str,
    partial: Path | None,
    trained: list[Path] | None,
    asked: dict[str, Any],
    making: _Making,
) -> list[Step]:
    """The rungs; a recipe that comes with the nodes to keep in float is that of the whole ladder."""
    from alignment.ladder import Step, trained_from, trained_step

    if start.quantization.trained is not None:
        raise AlignError(f"{start.name}: trained already", "begin with the variant that it was made of")
    if until == "qat" and not start.has_torch:
        raise AlignError(f"{start.name}: a bare ONNX file has no torch model to train", "give --until partial")
    for path in trained or ():
        trained_from(path, start)  # refused before anything is searched for
    base, kept = with_quantization(start, asked), None
    if until != "ptq":
        file = partial or making.keep_float(base)
        kept = kept_float(start, (), [file], asked)
        base = with_quantization(kept, {"keep_float": base.quantization.keep_float})
    run = f"align quantize {start.arguments}{_options(start, base)}"
    steps = [Step("FP32", base, int8=False, how="as it is")]
    # No option takes back what the variant's own recipe keeps in float.
    whole = f"{run} --out DIR" if base.quantization.keep_float == start.quantization.keep_float else ""
    steps.append(Step("PTQ", base, how="quantized after training, by the recipe below", command=whole))
    if kept is not None:
        how = f"the same with {len(kept.quantization.keep_float)} nodes named to stay float"
        steps.append(Step("partial", kept, how=how, command=f"{run} --keep-float {shlex.quote(str(file))} --out DIR"))
    if until == "qat" and kept is not None:
        paths = trained or [making.trained(base, "qat"), making.trained(kept, "qat_partial")]
        steps += [trained_step(path, base, kept) for path in paths]
    names = Counter(step.name for step in steps)
    return [
        replace(step, name=f"{step.name} ({number})") if names[step.name] > 1 else step
        for number, step in enumerate(steps, 1)
    ]


def _options(start: Variant, base: Variant) -> str:
    """What makes `align quantize` follow this recipe in place of the variant's own; nodes in float are not part."""
    own, asked = (variant.quantization.model_dump(exclude={"keep_float", "trained"}) for variant in (start, base))
    words = ""
    for field, value in asked.items():
        option = field.replace("_", "-")
        if value != own[field]:
            words += f" --{'no-' if value is False else ''}{option}" + ("" if isinstance(value, bool) else f" {value}")
    return words


def _print(found: Ladder) -> None:
    from alignment.report.ladder import cell

    heads = ("nodes in float", "MACs in int8", *found.backends)
    title = f"{found.variant}, {found.images} images: AP / against FP32 / agreement with {found.reference}"
    table = Table("rung", *(Column(head, justify="right") for head in heads), title=title)
    for rung in found.rungs:
        scores = [cell(found, rung, backend) for backend in found.backends]
        table.add_row(rung.name, str(rung.float_nodes), f"{rung.int8_macs:.1%}", *scores)
    print_table(table)
    for backend, why in found.missing.items():
        out.print(f"{backend}: not measured: {why}", markup=False)
