"""The RUN folder and its page: nothing lost on the way, nothing let in from outside."""

from __future__ import annotations

import json
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from alignment.errors import AlignError
from alignment.report import html, shown
from alignment.report.gather import beside
from alignment.report.markdown import to_markdown
from alignment.report.run_folder import json_schema, merge, read_run, write_run
from alignment.results import (
    SCHEMA_VERSION,
    Alignment,
    Box,
    CaseId,
    CaseResult,
    Check,
    ErrorStats,
    Scores,
    StageResult,
    TensorResult,
    Timing,
    WorstImage,
)

INJECTION = "\"><script>document.title='owned'</script><img src=x onerror=alert(1)>'{{ 7 * 7 }}.jpg"


def png(width: int = 8, height: int = 6, grey: int = 90) -> bytes:
    """A PNG of one grey."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = (b"\0" + bytes([grey]) * width) * height
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def stats(largest: float) -> ErrorStats:
    return ErrorStats(
        count=100,
        max_abs=largest,
        mean_abs=largest / 9,
        p99_abs=largest / 2,
        cosine=1 - 3e-8,
        sqnr_db=None,
        nonfinite=1,
    )


def worst(picture: str | None, file_name: str = "000000000139.jpg") -> WorstImage:
    def box(x: float, matched: bool, name: str = "person") -> Box:
        return Box(xyxy=(x, 10, x + 80, 200), score=0.2612, label=0, label_name=name, matched=matched)

    return WorstImage(
        image_id=139,
        file_name=file_name,
        width=640,
        height=480,
        picture=picture,
        box_difference=2.934,
        score_difference=0.01234,
        agreement=0.9531,
        reference=[box(20, True), box(300, False, INJECTION)],
        subject=[box(21, True), box(float("inf"), False)],
    )


def case(identity: str, status: str, **more: object) -> CaseResult:
    variant, backend, precision = identity.split("-")
    identified = CaseId(id=identity, variant=variant, backend=backend, precision=precision)
    return CaseResult.model_validate({"case": identified, "status": status, "reason": f"why {identity}", **more})


def failing() -> CaseResult:
    """A case that fails, with everything that a case can hold."""
    tensor = TensorResult(
        name="boxes", unit="px", difference=stats(2.5), reference_error=stats(2.1e-5), subject_error=stats(float("inf"))
    )
    checks = [
        Check(name="boxes", value=2.5, limit="<= 0.01", ok=False, origin=INJECTION),
        Check(name="scores", value=2.1e-5, limit="<= 0.001", ok=True, origin="measured"),
    ]
    return case(
        "yolov8_n-tensorrt-fp16",
        "fail",
        reference="yolov8_n-torch-fp32",
        first_difference="decoded",
        wrong_side="subject",
        replayed=True,
        images=128,
        stages=[
            StageResult(name="decoded", status="fail", checks=checks, tensors=[tensor]),
            StageResult(name="map", status="not_checked", note="no ground truth"),
        ],
        scores=Scores(reference_ap=0.3712, subject_ap=0.3698, subject_ap50=0.52),
        timing=Timing(inference_s=1.6, images=128),
        worst=[worst("pictures/a.png", INJECTION), worst("pictures/missing.png"), worst(None), worst("../secret.png")],
        warnings=[INJECTION],
        provenance={"tensorrt": "10.3.0", "flags": ["fp16", INJECTION], "build": {"opset": 17, "strict": False}},
    )


@pytest.fixture
def alignment() -> Alignment:
    return Alignment(
        created="2025-06-01T12:00:00+00:00",
        command=f"align run {INJECTION}",
        machine={"gpu": None, INJECTION: [1, 2]},
        dataset={"name": "embedded", "images": 128},
        timing={"images_s": 12.3},
        cases=[
            case("rtmdet_t-onnxruntime-fp32", "pass", scores=Scores(subject_ap=0.4, subject_ap50=0.6)),
            failing(),
            case(
                "yolov8_n-onnxruntime-fp32", "pass", timing=Timing(inference_s=0.5, images=128), worst=[worst("b.png")]
            ),
            case("yolox_n-tensorrt-int8", "skip"),
        ],
    )


@pytest.fixture
def folder(tmp_path: Path, alignment: Alignment) -> Path:
    """A RUN folder, with a picture beside it that no page may take."""
    run = tmp_path / "run"
    (run / "pictures").mkdir(parents=True)
    (run / "pictures/a.png").write_bytes(png(grey=90))
    (run / "b.png").write_bytes(png(grey=120))
    (tmp_path / "secret.png").write_bytes(png(grey=200))
    write_run(alignment, run)
    return run


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_round_trip_keeps_everything(folder: Path, alignment: Alignment) -> None:
    assert read_run(folder) == alignment


def test_json_is_strict_and_pretty(folder: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    text = (folder / "alignment.json").read_text(encoding="utf-8")
    content = json.loads(text, parse_constant=refuse)
    assert content["schema_version"] == SCHEMA_VERSION
    assert text.startswith('{\n  "schema_version"')
    assert text.endswith("}\n")


def test_schema_describes_the_file(folder: Path) -> None:
    schema = json_schema()
    content = json.loads((folder / "alignment.json").read_text(encoding="utf-8"))
    json.dumps(schema)
    assert set(content) == set(schema["properties"])
    assert set(content["cases"][1]) == set(schema["$defs"]["CaseResult"]["properties"])
    assert schema["properties"]["schema_version"]["const"] == SCHEMA_VERSION


def test_a_failed_write_leaves_the_old_run(folder: Path, alignment: Alignment, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}

    def broken(path: Path, text: str, encoding: str, errors: str) -> None:
        path.write_bytes(text.encode(encoding)[:20])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", broken)
    with pytest.raises(OSError, match="disk full"):
        write_run(alignment, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "does not exist"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[]", "has no schema_version"),
        (b'{"schema_version": 2}', "has schema_version 2"),
        (b'{"schema_version": 1, "created": "", "command": "", "cases": [{"case": 1}]}', r"cases\.0\.case"),
    ],
)
def test_errors_name_the_file_and_the_mend(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    if content is not None:
        (tmp_path / "alignment.json").write_bytes(content)
    with pytest.raises(AlignError, match=complaint) as caught:
        read_run(tmp_path)
    assert str(tmp_path / "alignment.json") in caught.value.what
    assert caught.value.mend


def test_a_field_of_a_later_release_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "alignment.json").write_text('{"schema_version": 1, "created": "x", "command": "", "later": 1}')
    assert read_run(tmp_path).created == "x"


def test_merge_orders_cases_and_keeps_the_last() -> None:
    first = Alignment(
        created="1",
        command="a",
        dataset={"b": {"images": 4}},
        timing={"x": 1, "y": 1},
        cases=[case("b-torch-fp32", "fail")],
    )
    second = Alignment(
        created="2",
        command="b",
        dataset={"a": {"images": 8}},
        timing={"y": 2},
        cases=[case("b-torch-fp32", "pass"), case("a-torch-fp32", "skip")],
    )
    merged = merge([first, second])
    assert [(c.case.id, c.status) for c in merged.cases] == [("a-torch-fp32", "skip"), ("b-torch-fp32", "pass")]
    assert (merged.created, merged.command, merged.dataset) == ("1", "a", {"b": {"images": 4}, "a": {"images": 8}})
    assert merged.timing == {"x": 1, "y": 2}
    assert first.timing == {"x": 1, "y": 1}


def test_merge_of_nothing_is_an_error() -> None:
    with pytest.raises(AlignError, match="no results"):
        merge([])


def test_every_case_has_its_part_and_links_to_it(page: Page, alignment: Alignment) -> None:
    """From the verdicts, from the list, and from the variant's own tables: no link leads nowhere."""
    expected = [result.case.id for result in alignment.cases]
    assert sorted(article["id"] or "" for article in page.all("article")) == sorted(expected)
    links = [link["href"] for link in page.all("a")]
    assert all(links.count(f"#{identity}") >= 2 for identity in expected)
    identities = {attributes["id"] for _, attributes in page.elements if attributes.get("id")}
    assert {(link or "").removeprefix("#") for link in links} <= identities


def test_failing_cases_come_first_and_open(page: Page) -> None:
    assert page.all("article")[0]["id"] == "yolov8_n-onnxruntime-fp32"  # of the variant that fails
    assert page.all("section")[0]["id"] == "model-yolov8_n"
    rows = [body for body in page.all("tbody") if "data-status" in body]
    assert [row["data-status"] for row in rows] == ["fail", "pass", "pass", "skip"]
    opened = page.elements.index(("article", {"class": "case fail", "id": "yolov8_n-tensorrt-fp16"})) + 1
    assert page.elements[opened] == ("details", {"open": None})


def test_page_needs_nothing_from_outside(folder: Path, page: Page) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert re.sub(r"http://www\.w3\.org/[\w/]+", "", text).find("://") == -1
    sources = [attributes.get(name) for _, attributes in page.elements for name in ("src", "href")]
    assert all(source.startswith(("#", "data:")) for source in sources if source)
    assert "@import" not in text
    assert "url(" not in text


def test_text_from_results_stays_text(page: Page) -> None:
    assert len(page.all("script")) == 1
    assert not page.all("img")
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_pictures_are_embedded_once_and_only_from_the_run_folder(page: Page) -> None:
    embedded = {picture["id"]: picture["href"] or "" for picture in page.all("image")}
    assert len(embedded) == 2
    assert all(uri.startswith("data:image/png;base64,") for uri in embedded.values())
    assert {use["href"] for use in page.all("use")} == {f"#{name}" for name in embedded}


def test_what_is_missing_is_said(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    for words in ("no such picture in the run folder: pictures/missing.png", "no picture stored", "no ground truth"):
        assert words in text
    assert "no such picture in the run folder: ../secret.png" in text
    assert "(1 box not drawn: not finite)" in text


def test_ids_are_unique_and_tables_have_scopes(page: Page) -> None:
    identities = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identities) == len(set(identities))
    assert all("scope" in head for head in page.all("th"))


@pytest.mark.parametrize(
    ("statuses", "verdict", "summary"),
    [
        (["fail", "pass"], "Not aligned", "1 of 2 cases fails"),
        (["pass", "skip"], "Aligned", "1 of 2 cases passes"),
        (["pass"], "Aligned", "1 of 1 case passes"),
        (["skip"], "Nothing checked", "every case was skipped"),
        ([], "Nothing checked", "the run holds no case"),
    ],
)
def test_headline(statuses: list[str], verdict: str, summary: str, tmp_path: Path) -> None:
    cases = [case(f"m{index}-torch-fp32", status) for index, status in enumerate(statuses)]
    run = Alignment(created="", command="", cases=cases)
    assert html.headline(run) == (verdict, summary)
    assert f"<h1>{verdict}</h1>" in html.render(beside(run, tmp_path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (shown.number(None), "-"),
        (shown.number(0.0), "0"),
        (shown.number(0.01234), "0.0123"),
        (shown.number(2.1e-5), "2.1e-05"),
        (shown.number(-12.34), "-12.3"),
        (shown.number(1234.5), "1234"),
        (shown.number(float("inf")), "inf"),
        (shown.precise(0.01004), "0.01004"),
        (shown.cosine(1 - 3e-8), "1 - 3.0e-08"),
        (shown.cosine(1.0), "1.000000"),
        pytest.param(shown.decibel(None), "-", id="no decibels"),
        (shown.signed(-0.0014), "-0.0014"),
        (shown.signed(-2e-5), "+0.0000"),
        (shown.key(None), ""),
        (shown.share(0.9145), "91.5 %"),
        (shown.megabytes(12_340_000), "12.3 MB"),
        pytest.param(shown.megabytes(None), "-", id="no engine"),
    ],
)
def test_numbers_read_well(text: str, expected: str) -> None:
    assert text == expected


def test_markdown_table():
    """One row a variant that was run; each cell tells the largest error of any check, and the change of AP."""

    def case(backend: str, precision: str, reference: str, ap: float, boxes: float, ok: bool = True) -> CaseResult:
        checks = [Check(name="boxes", value=value, limit="<= 1", ok=ok) for value in (boxes / 2, boxes)]
        return CaseResult(
            case=CaseId(id=f"v-{backend}-{precision}", variant="v", backend=backend, precision=precision),
            status="pass" if ok else "fail",
            reason="",
            reference=reference,
            images=8,
            stages=[StageResult(name="decoded", status="pass", checks=checks)],
            scores=Scores(reference_ap=None if reference == "float64" else 0.5, subject_ap=ap, subject_ap50=0.7),
        )

    skip = CaseResult(
        case=CaseId(id="w-torch-fp32", variant="w", backend="torch", precision="fp32"),
        status="skip",
        reason="no weights",
    )
    cases = [
        case("tensorrt", "fp16", "v-torch-fp32", 0.49, 3.0, ok=False),
        case("onnxruntime", "fp32", "v-torch-fp32", 0.499999, 0.001),
        case("torch", "fp32", "float64", 0.5, 0.0005),
        skip,
    ]
    table = to_markdown(Alignment(created="", command="", cases=cases)).splitlines()
    assert table[2] == "| variant | images | AP | onnxruntime fp32 | tensorrt fp16 |"
    assert table[4:] == ["| v | 8 | 0.5000 | 0.001 / - / +0.0000 | 3 / - / -0.0100 **fails** |"]
