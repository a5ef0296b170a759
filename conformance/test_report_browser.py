"""The report in Chromium: it opens without complaint, sorts, filters, links, prints, and axe-core finds no fault."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_scenes import FAILS, MORE, write_everything, write_heavy

from alignment.variant import golden_dir

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[browser]'")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
if CHROMIUM is None:
    pytest.skip("no chromium, chromium-browser or google-chrome on PATH: apt-get install chromium", True)
#: Pixels of the window: a desktop's, a phone's.
DESKTOP, PHONE = (1440, 900), (390, 844)
MEGABYTES = 5


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with everything in it, and of an engine that a GPU built."""
    from alignment.report.gather import gather
    from alignment.report.html import render

    folder = tmp_path_factory.mktemp("browser") / "run"
    write_everything(folder)
    engine = next((golden_dir() / "engines").glob("yolov6*.engine.json"))
    (folder / "report.html").write_text(render(gather([folder, engine])), encoding="utf-8")
    return folder / "report.html"


class Window:
    """A page that is open, and all that it complains of or asks for outside of its file."""

    def __init__(self, browser: Any, path: Path, size: tuple[int, int] = DESKTOP, scheme: str = "light", at: str = ""):
        self.faults: list[str] = []
        viewport = {"width": size[0], "height": size[1]}
        self.page = browser.new_page(viewport=viewport, color_scheme=scheme)
        self.page.on("console", lambda message: self.faults.append(message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("request", self._asked)
        self.page.goto(path.as_uri() + at)

    def _asked(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:")):
            self.faults.append(request.url)

    def run(self, script: str, value: Any = None) -> Any:
        return self.page.evaluate(script, value)

    def column(self, table: str, place: int) -> list[str]:
        """The text of a column, of the rows that are shown, in their order."""
        rows = f"{table} tbody tr:not(.reason):visible"
        return [row.locator("th, td").nth(place).inner_text() for row in self.page.locator(rows).all()]

    def sort(self, table: str, head: str) -> None:
        self.page.locator(f"{table} thead button", has_text=head).first.click()

    def shows(self, identity: str) -> bool:
        """Whether an element is on the screen, and what it folds away is open."""
        return self.run(
            """(id) => { const one = document.getElementById(id), at = one.getBoundingClientRect();
            return one.querySelector("details").open && at.top < innerHeight && at.bottom > 0; }""",
            identity,
        )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_it_opens_without_complaint_and_fits(browser: Any, report: Path, size: tuple[int, int], scheme: str):
    window = Window(browser, report, size, scheme)
    assert window.faults == []
    assert window.run("document.documentElement.dataset.script") == "ran"
    assert window.run("document.title").startswith("Stopped")
    assert window.run("document.documentElement.scrollWidth") <= size[0]
    background = window.run("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(246, 247, 249)", "dark": "rgb(15, 19, 24)"}[scheme]
    window.page.close()


def test_the_policy_keeps_another_script_out(browser: Any, report: Path):
    """The console does complain, of what is planted: `faults` would tell."""
    text = report.read_text(encoding="utf-8")
    planted = report.with_name("planted.html")
    planted.write_text(text.replace("</body>", "<script>document.title = 'owned'</script></body>"), encoding="utf-8")
    window = Window(browser, planted)
    assert window.run("document.title").startswith("Stopped")
    assert any("Content Security Policy" in fault for fault in window.faults)
    window.page.close()


def test_cases_sort_and_filter(browser: Any, report: Path):
    window, table = Window(browser, report), ".cases table"
    skipped = "<b>other-tensorrt-int8"
    assert window.column(table, 1) == [FAILS, MORE, skipped]
    window.sort(table, "Case")
    assert window.column(table, 1) == [skipped, MORE, FAILS]
    window.sort(table, "Case")
    assert window.column(table, 1) == [FAILS, MORE, skipped]
    assert window.page.locator(f"{table} th[aria-sort=descending]").inner_text().startswith("Case")
    window.sort(table, "ms per image")
    assert window.column(table, 1) == [MORE, FAILS, skipped]  # what has no number comes last
    window.page.locator("[data-choice=fail]").click()
    assert window.column(table, 1) == [FAILS]
    window.page.locator("[data-choice='']").click()
    window.page.locator("select[data-field=backend]").select_option("tensorrt")
    assert window.column(table, 1) == [FAILS, skipped]
    window.page.locator(".toolbar input").first.fill("WHY fp16")
    assert window.column(table, 1) == [FAILS]
    assert window.page.locator(".shown").first.inner_text() == "1 of 3 cases"
    assert window.faults == []
    window.page.close()


def test_other_tables_sort_and_filter_too(browser: Any, report: Path):
    window, table = Window(browser, report), ".layers"
    by_rank = window.column(table, 1)
    assert by_rank[0].startswith("second")
    assert by_rank[1:] == ["third", "first"]
    window.sort(table, "sqnr")
    assert window.column(table, 1) == by_rank
    window.sort(table, "sqnr")
    assert window.column(table, 1) == by_rank[::-1]
    window.page.locator(".filtered:has(.layers) input").fill("thi")
    assert window.column(table, 1) == ["third"]
    assert window.page.locator(".filtered:has(.layers) .shown").inner_text() == "1 of 3 layers"
    window.page.close()


def test_links_open_what_they_lead_to(browser: Any, report: Path):
    window = Window(browser, report, at=f"#{MORE}")
    assert window.shows(MORE)
    window.run("scrollTo(0, 0); document.getElementById(location.hash.slice(1)).querySelector('details').open = false")
    window.page.locator(f".verdicts a[href='#{MORE}']").click()  # the same address again
    assert window.shows(MORE)
    window.page.locator(f".cases a[href='#{FAILS}']").click()
    assert window.shows(FAILS)
    window.page.close()
    named = Window(browser, report, at="#%3Cb%3Eother-tensorrt-int8")
    assert named.shows("<b>other-tensorrt-int8")
    assert Window(browser, report, at="#%E0%A4%A").faults == []  # no escape


def test_all_cases_open_and_close(browser: Any, report: Path):
    window = Window(browser, report)
    count = "document.querySelectorAll('.case > details[open]').length"
    for expected in (4, 0):  # three cases and an explanation
        window.page.locator(".fold").click()
        assert window.run(count) == expected
    window.page.close()


def test_print_has_no_controls_and_cuts_nothing_off(browser: Any, report: Path):
    window = Window(browser, report, scheme="dark")
    window.page.emulate_media(media="print")
    for control in (".toolbar", "nav", ".back"):
        assert not any(one.is_visible() for one in window.page.locator(control).all())
    assert window.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert window.run("getComputedStyle(document.querySelector('.tall')).maxHeight") == "none"
    assert window.page.pdf(prefer_css_page_size=True).startswith(b"%PDF")
    window.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(browser: Any, report: Path, scheme: str):
    window = Window(browser, report, scheme=scheme)
    window.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    # The large drawing has the colours of the small one, which stays in.
    found = axe.Axe().run(window.page, context={"exclude": [["[aria-label='Layers of yolov6_embedded']"]]}).response
    told = [f"{one['impact']}: {one['id']}: {one['nodes'][0]['html']}" for one in found["violations"]]
    assert [line for line in told if line.startswith(("serious", "critical"))] == []
    window.page.close()


def test_axe_finds_what_is_planted(browser: Any, report: Path):
    window = Window(browser, report)
    window.run("document.querySelector('.verdict p').replaceChildren(document.createElement('button'))")
    found = axe.Axe().run(window.page, context={"include": [[".verdict"]]}).response
    assert [one["id"] for one in found["violations"]] == ["button-name"]
    window.page.close()


def test_a_run_of_all_embedded_variants_is_light(browser: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_heavy(tmp_path)
    size = (tmp_path / "report.html").stat().st_size / 1e6
    window = Window(browser, tmp_path / "report.html")
    seconds = window.run("performance.getEntriesByType('navigation')[0].loadEventEnd") / 1000
    with capsys.disabled():
        print(f"\n{len(run.cases)} cases: {size:.1f} MB, open after {seconds:.2f} s")
    assert size < MEGABYTES
    assert window.faults == []
    window.page.close()
