"""The report in headless Chromium: drawn whole and fast; by mouse, by keyboard, on a phone, in the dark, in print."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_attack import hostile_facts

from fusechat.layout import Layout
from fusechat.report.compare import compare, compare_page
from fusechat.report.facts import SECTIONS, gather
from fusechat.report.page import TEMPLATES, html_page

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,900",
)  # fmt: skip


class Page:
    """One page in one browser, as a reader has it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, path: Path) -> None:
        self.driver.get(path.resolve().as_uri())
        self.wait("document.documentElement.dataset.charts === 'drawn'")

    def wait(self, condition: str) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 20).until(lambda d: d.execute_script(f"return {condition}"), condition)

    def js(self, code: str) -> Any:
        return self.driver.execute_script(f"return {code}")

    def errors(self) -> list[str]:
        return [line["message"] for line in self.driver.get_log("browser")]

    def emulate(self, **media: str) -> None:
        kind = media.pop("media", "")
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": kind, "features": features})

    def size(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def seconds_of_work(self) -> float:
        metrics = self.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    def keys(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def point_at(self, selector: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        element = self.js(f"document.querySelector({selector!r})")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        ActionChains(self.driver).move_to_element(element).perform()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if BROWSER is None or DRIVER is None:
        pytest.skip("no browser here: Debian's packages are chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, reported_run: Path) -> Page:
    page = Page(browser)
    page.emulate(media="", prefers_color_scheme="light")
    page.size(1280, 900)
    page.open(reported_run / "report.html")
    return page


def test_every_section_is_there_and_every_chart_is_drawn(page: Page) -> None:
    assert page.errors() == []
    assert page.js("[...document.querySelectorAll('main > section')].map(s => s.id)") == list(SECTIONS)
    assert page.js("[...document.querySelectorAll('[data-chart]')].every(e => e.querySelector('svg .mark-group'))")
    assert page.js("document.querySelectorAll('[data-chart]').length") == len(page.js("JSON.parse(charts.textContent)"))
    assert page.js("performance.getEntriesByType('resource').length") == 0, "the page fetched something"
    links = page.js(
        "[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.getAttribute('href')))"
    )
    assert links


def test_it_opens_in_under_a_second(page: Page) -> None:
    # The main thread's own time, which begins anew with the page: others may be using the machine.
    page.driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    page.driver.refresh()
    page.wait("document.documentElement.dataset.charts === 'drawn'")
    assert 0.01 < page.seconds_of_work() < 1


def test_a_chart_says_its_numbers_under_the_pointer(page: Page) -> None:
    page.point_at("[data-chart=coverage] .mark-rect path")
    page.wait("!tip.hidden")
    assert re.search(r"source.*same.*%", page.js("tip.textContent"))


def test_a_token_shows_what_both_models_expected(page: Page) -> None:
    page.point_at(".seg .tok")
    page.wait("!tip.hidden")
    told = page.js("tip.innerText")
    assert "pivot expects" in told
    assert "source expects" in told
    assert len(re.findall(r"\d\.\d{3}", told)) >= 4
    assert page.js("document.querySelectorAll('#tip .gold').length") == 2
    page.point_at("h1")
    page.wait("tip.hidden")


def test_everything_is_reached_by_keyboard(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    page.keys(Keys.TAB)
    assert page.js("document.activeElement.className") == "skip"
    reached = set()
    for _ in range(60):
        page.keys(Keys.TAB)
        reached.add(page.js("document.activeElement.tagName + '.' + document.activeElement.className"))
    assert {"A.", "SUMMARY.", "DIV.scroll", "BUTTON.seg"} <= reached
    page.driver.execute_script("document.querySelector('.seg').focus()")
    first = page.js("tip.innerText")
    page.keys(Keys.ARROW_RIGHT)
    assert page.js("[...document.querySelectorAll('.seg')].indexOf(document.activeElement)") == 1
    assert page.js("tip.innerText") != first
    assert page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keys(Keys.END)
    last = "[...document.activeElement.closest('.tokens').querySelectorAll('.seg')].at(-1) === document.activeElement"
    assert page.js(last)
    assert not page.js("tip.hidden")
    page.keys(Keys.ESCAPE)
    assert page.js("tip.hidden")


def test_a_closed_part_opens_by_key_and_by_pointer(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    closed = "document.querySelector('#sources details')"
    assert not page.js(f"{closed}.open")
    page.driver.execute_script(f"{closed}.querySelector('summary').focus()")
    page.keys(Keys.ENTER)
    assert page.js(f"{closed}.open && {closed}.querySelector('td').offsetHeight > 0")
    page.js(f"{closed}.querySelector('summary')").click()
    assert not page.js(f"{closed}.open")


def test_nothing_scrolls_sideways_on_a_phone(page: Page, reported_run: Path) -> None:
    page.size(360, 780)
    page.open(reported_run / "report.html")
    assert page.js("document.documentElement.scrollWidth") == 360
    assert page.js("[...document.querySelectorAll('.chart svg')].every(s => s.getBoundingClientRect().right <= 360)")
    page.point_at("[data-chart=coverage] .mark-rect path")
    page.wait("!tip.hidden")
    assert page.js("tip.getBoundingClientRect().right") <= 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_marks_stand_out_in_light_and_dark(page: Page, scheme: str) -> None:
    page.emulate(prefers_color_scheme=scheme)
    colours = _colours(page)
    paper = colours["paper"]
    assert (_luminance(paper) < 0.1) == (scheme == "dark")
    for name in ("ink", "muted", "better", "worse"):
        assert _contrast(colours[name], paper) >= 4.5, name
    for name in ("c1", "c2", "c3", "c4", "c5", "c6", "c7", "same", "none"):
        assert _contrast(colours[name], paper) >= 3, name
    # Axis labels are SVG text: they follow the page without being drawn anew.
    drawn = page.js("getComputedStyle(document.querySelector('.role-axis-label text')).fill")
    assert _rgb(drawn) == colours["muted"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("deficiency", ["deuteranopia", "protanopia"])
def test_colours_differ_for_colour_blind_readers(page: Page, scheme: str, deficiency: str) -> None:
    page.emulate(prefers_color_scheme=scheme)
    colours = _colours(page)
    for group in (("better", "worse"), ("same", "coarser", "finer", "none"), ("same", "coarser", "lost")):
        for a, b in itertools.combinations(group, 2):
            seen = [_as_seen(colours[name], deficiency) for name in (a, b)]
            assert sum((x - y) ** 2 for x, y in zip(*seen, strict=True)) ** 0.5 > 45, (a, b)


def test_print_shows_what_was_closed_and_hides_what_needs_a_screen(page: Page) -> None:
    page.emulate(media="print", prefers_color_scheme="dark")
    assert _luminance(_colours(page)["paper"]) > 0.9
    assert page.js("getComputedStyle(document.querySelector('nav')).display") == "none"
    page.driver.execute_script(
        "onbeforeprint = () => { window.seen = document.querySelectorAll('details:not([open])').length }"
    )
    pdf = page.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]
    assert len(pdf) > 50_000
    assert page.js("window.seen") == 0
    assert page.js("document.querySelectorAll('details:not([open])').length") > 0


def test_hostile_text_runs_nowhere_and_is_whole(page: Page, reported_run: Path, tmp_path: Path) -> None:
    facts = hostile_facts(gather(Layout(out=reported_run)))
    (tmp_path / "hostile.html").write_text(html_page(facts), encoding="utf-8")
    page.size(360, 780)
    page.open(tmp_path / "hostile.html")
    page.point_at(".seg .tok")
    page.wait("!tip.hidden")
    assert page.js("window.hacked === undefined && document.images.length === 0")
    assert page.js("document.querySelectorAll('main > section').length") == len(SECTIONS)
    assert page.js("document.documentElement.scrollWidth") == 360
    assert page.errors() == []


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_a_picture_for_a_person_to_look_at(page: Page, tmp_path: Path, width: int, scheme: str) -> None:
    page.size(width, 900)
    page.emulate(prefers_color_scheme=scheme)
    page.driver.refresh()
    page.wait("document.documentElement.dataset.charts === 'drawn'")
    page.size(width, page.js("document.documentElement.scrollHeight"))
    picture = tmp_path / f"report-{width}-{scheme}.png"
    assert page.driver.save_screenshot(str(picture))
    assert picture.stat().st_size > 100_000


def test_a_comparison_draws_too(page: Page, reported_run: Path, tmp_path: Path) -> None:
    shutil.copytree(reported_run, tmp_path / "again")
    path = tmp_path / "compare.html"
    path.write_text(compare_page(compare([reported_run, tmp_path / "again"])), encoding="utf-8")
    for width in (1280, 360):
        page.size(width, 800)
        page.open(path)
        assert page.errors() == []
        assert page.js("document.querySelectorAll('[data-chart] svg').length") == 2  # paired, and to their controls
        assert page.js("document.documentElement.scrollWidth") <= width
    page.point_at("[data-chart=paired] .mark-symbol path")
    page.wait("!tip.hidden")
    assert "again" in page.js("tip.textContent") or "run" in page.js("tip.textContent")


def _rgb(text: str) -> tuple[int, int, int]:
    red, green, blue = map(int, re.findall(r"\d+", text)[:3])
    return red, green, blue


def _colours(page: Page) -> dict[str, tuple[int, int, int]]:
    names = sorted(set(re.findall(r"--([\w]+):", (TEMPLATES / "report.css").read_text(encoding="utf-8"))))
    probe = (
        "(names => { const e = document.createElement('i'); document.body.append(e); const found = names.map(n => {"
        " e.style.color = `var(--${n})`; return getComputedStyle(e).color; }); e.remove(); return found; })"
    )
    return {name: _rgb(text) for name, text in zip(names, page.js(f"{probe}({names})"), strict=True)}


def _linear(channel: float) -> float:
    value = channel / 255
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def _luminance(colour: tuple[int, int, int]) -> float:
    red, green, blue = map(_linear, colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
_SEEN = {
    "protanopia": (
        (0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881),
    ),
}  # fmt: skip


def _as_seen(colour: tuple[int, int, int], deficiency: str) -> list[float]:
    linear = [_linear(channel) for channel in colour]
    mixed = [sum(w * x for w, x in zip(row, linear, strict=True)) for row in _SEEN[deficiency]]
    return [255 * (12.92 * x if x <= 0.0031308 else 1.055 * x ** (1 / 2.4) - 0.055) for x in (max(0, m) for m in mixed)]
