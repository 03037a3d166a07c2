"""The page of a comparison, in a real browser where there is one."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from left_trainer.comparison.page import write_page
from left_trainer.comparison.summary import summarize
from page_summary import ARABIC, COLUMNS, FAILED, METHODS, SCRIPT, TASKS, make_summary
from run_results import ODD, sized

SUMMARY = make_summary()
DIRECTIONS = {key: better for key, _, _, better, _ in COLUMNS}
CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="needs chromium and chromedriver: apt-get install chromium chromium-driver"
)
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Every visible text that stands out from its background by less than 4.5:1, with the ratio.
LOW_CONTRAST = """
const channels = (colour) => {
  const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number);
  return { rgb: [r, g, b], a };
};
const luminance = (rgb) => rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const background = (element) => {
  const { rgb, a } = channels(getComputedStyle(element).backgroundColor);
  return a === 1 || !element.parentElement ? rgb : background(element.parentElement);
};
const ratio = (element, colour) => {
  const [low, high] = [luminance(channels(colour).rgb), luminance(background(element))].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const found = [];
let seen = 0;
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.textContent.trim() || !element.checkVisibility()) continue;
  if (element.closest("script, option")) continue;
  seen += 1;
  const style = getComputedStyle(element);
  const value = ratio(element, element instanceof SVGElement ? style.fill : style.color);
  if (value < 4.5) found.push([walker.currentNode.textContent, element.className, value]);
}
for (const input of document.querySelectorAll("input[type=search]")) {
  const value = ratio(input, getComputedStyle(input, "::placeholder").color);
  if (value < 4.5) found.push([input.placeholder, "placeholder", value]);
}
return [seen, found];
"""
# Pairs of labels in a chart that cover each other.
OVERLAPS = """
const boxes = (selector) => [...document.querySelectorAll(selector)].map((text) => text.getBoundingClientRect());
const apart = (a, b) => a.right < b.left + 1 || b.right < a.left + 1 || a.bottom < b.top + 1 || b.bottom < a.top + 1;
return [".label text", ".curve text"].flatMap((selector) => boxes(selector).flatMap((a, i, all) =>
  all.slice(i + 1).filter((b) => !apart(a, b)).map((b) => [selector, a, b])));
"""
WIDTHS = "return [...document.querySelectorAll('#matrix tbody .bar span')].map((bar) => bar.style.width)"


class Elements(HTMLParser):
    """The start tags of a page, and the text of its data element, as a browser would read them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][1].get("id") == "data":
            self.data += data


def written(tmp_path: Path, summary: dict[str, Any]) -> str:
    write_page(summary, tmp_path / "index.html")
    return (tmp_path / "index.html").read_text(encoding="utf-8")


def samples_of(file: Path) -> Any:
    return json.loads(file.read_text().removeprefix("showSamples(").rstrip().removesuffix(")"))


def test_the_data_travel_whole(tmp_path):
    data = json.loads(Elements(written(tmp_path, SUMMARY)).data.strip())
    for row, whole in zip(data["rows"], SUMMARY["rows"], strict=True):
        assert samples_of(tmp_path / "samples" / row.pop("samples")) == whole["samples"]
        curves = [[[step, float(f"{loss:.4g}")] for step, loss in curve] for curve in whole["curves"]]
        rest = {name: value for name, value in whole.items() if name != "samples"}
        assert row == {**rest, "curves": curves}
    assert {**data, "rows": SUMMARY["rows"]} == SUMMARY


def test_samples_of_rows_that_are_gone_are_removed_and_others_left_alone(tmp_path):
    written(tmp_path, SUMMARY)
    files = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "samples").iterdir()}
    written(tmp_path, {**SUMMARY, "rows": SUMMARY["rows"][:2]})
    left = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "samples").iterdir()}
    assert len(left) == 2
    assert left.items() <= files.items()


def test_a_long_curve_is_thinned_and_keeps_its_end(tmp_path):
    row = {**SUMMARY["rows"][1], "curves": [[[step, 1 / (step + 1)] for step in range(1000)]]}
    (drawn,) = json.loads(Elements(written(tmp_path, {**SUMMARY, "rows": [row]})).data.strip())["rows"][0]["curves"]
    assert len(drawn) <= 61
    assert (drawn[0], drawn[-1]) == ([0, 1.0], [999, 0.001])


def test_numbers_that_json_lacks_become_null(tmp_path):
    summary = make_summary()
    summary["rows"][1]["curves"] = [[[25, math.nan], [50, math.inf]]]
    row = json.loads(Elements(written(tmp_path, summary)).data.strip())["rows"][1]
    assert row["curves"] == [[[25, None], [50, None]]]


def test_markup_in_the_data_stays_data(tmp_path):
    plain = Elements(written(tmp_path, {**SUMMARY, "title": "plain", "rows": [], "failures": []}))
    hostile = Elements(written(tmp_path, {**SUMMARY, "title": f"{SCRIPT} {{{{style}}}} & \\1"}))
    assert hostile.tags == plain.tags
    assert json.loads(hostile.data.strip())["title"] == f"{SCRIPT} {{{{style}}}} & \\1"


def test_nothing_is_loaded(tmp_path):
    page = written(tmp_path, SUMMARY)
    # The name of the SVG namespace, which nothing fetches.
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {"http://www.w3.org/2000/svg"}
    assert [attrs["href"] for _, attrs in Elements(page).tags if "href" in attrs] == ["data:,"]
    assert not any("src" in attrs for _, attrs in Elements(page).tags)
    assert "@import" not in page
    assert "url(" not in page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="comes with the test extra")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Page]]:
    """Opens a page; afterwards the browser must not have asked for anything else nor found anything wrong."""
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.get_log("browser"), browser.get_log("performance")
    path = tmp_path / "index.html"

    def open_page(summary: dict[str, Any] = SUMMARY, view: str = "", width: int = 1280) -> Page:
        write_page(summary, path)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get("about:blank")
        browser.get(path.as_uri() + view)
        return Page(browser)

    yield open_page
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    ours = {request["request"]["url"] for request in requests if request["documentURL"].startswith(path.as_uri())}
    samples = (tmp_path / "samples").as_uri()
    assert {url for url in ours if not url.startswith(("data:", samples))} == {path.as_uri()}


class Page:
    """What the tests ask an open page."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser
        self.run = browser.execute_script

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    def open(self, key: str) -> None:
        """Open the panel of a row from the matrix, and wait for its samples."""
        self.one(f"#matrix [data-key='{key}']").click()
        self.wait_for_samples()

    def wait_for_samples(self) -> None:
        for _ in range(100):
            if self.all("#run .sample") or not self.all("#samples"):
                return
            time.sleep(0.05)
        raise AssertionError("the samples did not load")

    def one(self, selector: str) -> Any:
        (element,) = self.all(selector)
        return element

    def texts(self, selector: str) -> list[str]:
        return self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)

    def keys(self, selector: str) -> list[str]:
        return self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.dataset.key)", selector)

    def rows(self, task: str) -> list[str]:
        return self.texts(f"#figures tbody[data-task={task}] tr:not(.group) th")

    def choose(self, select: str, value: str) -> None:
        self.one(f"#{select} option[value='{value}']").click()

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.browser, duration=0).send_keys(*keys).perform()

    def tab_to(self, selector: str) -> None:
        for _ in range(120):
            self.press("\ue004")
            if self.run("return document.activeElement.matches(arguments[0])", selector):
                return
        raise AssertionError(f"{selector} is not reached with Tab")

    def is_open(self) -> bool:
        return self.run("return document.getElementById('run').open")

    def focused(self) -> str | None:
        return self.run("return document.activeElement.dataset.key")


def rows_of(task: str, summary: dict[str, Any] = SUMMARY) -> list[dict[str, Any]]:
    return [row for row in summary["rows"] if row["task"] == task and row["method"] != "base"]


def field(row: dict[str, Any], key: str) -> float | None:
    """A figure of a row under its key on the page."""
    main = next(metrics[0] for task, _, metrics in TASKS if task == row["task"])
    name = main if key == "main" else key.removeprefix("metric:")
    return row["metrics"][name]["mean"] if name in row["metrics"] else row["values"].get(key)


def pareto(rows: list[dict[str, Any]], x: str, y: str) -> set[str]:
    def signed(row: dict[str, Any]) -> list[float]:
        return [field(row, key) * (-1 if DIRECTIONS.get(key, "higher") == "lower" else 1) for key in (x, y)]

    points = {row["id"]: signed(row) for row in rows if None not in (field(row, x), field(row, y))}
    return {
        name for name, a in points.items() if not any(b != a and b[0] >= a[0] and b[1] >= a[1] for b in points.values())
    }


@needs_browser
def test_every_run_has_its_cell(show):
    page = show()
    assert page.texts("#matrix tbody th") == ["base", *METHODS]
    cells = page.run(
        "return [...document.querySelectorAll('#matrix tbody tr')].map((tr) => [...tr.cells].map((c) => c.textContent))"
    )
    lora = next(row for row in SUMMARY["rows"] if row["id"] == "translation/lora")["metrics"]["chrf"]
    half, change = (lora["high"] - lora["low"]) / 2, lora["mean"] - lora["before"]
    assert cells[-1][2] == f"★best {lora['mean']:.1f} ± {half:.1f}+{change:.1f}"
    assert [row[3] for row in cells if row[0] == FAILED[1]] == ["failed"]
    assert page.texts("#failed dt") == [f"p_tuning on dialogue, seed {seed}" for seed in (42, 43)]
    assert "CUDA out of memory" in page.texts("#failed dd")[0]


@needs_browser
def test_figures_carry_their_units(show):
    row = next(row for row in SUMMARY["rows"] if row["id"] == "summarization/lora")
    cells = "#figures tr[data-row='summarization/lora'] td[data-field={}]"
    page = show()
    shown = {key: page.texts(cells.format(key))[0].removeprefix("★best ") for key in row["values"]}
    assert shown["trainable_parameters"] == "1,036,864"
    assert shown["trainable_percent"] == "41.8 %"
    assert shown["adapter_bytes"] == "3.96 MiB"
    assert shown["peak_memory_train_bytes"] == f"{row['values']['peak_memory_train_bytes'] / 2**30:.2f} GiB"
    assert shown["train_steps_per_second"] == f"{row['values']['train_steps_per_second']:.1f}"
    assert (shown["learning_rate"], shown["learning_rate_source"]) == ("2e-4", "tuned")
    assert page.texts("#figures tr[data-row='translation/ia3'] td[data-field=peak_memory_train_bytes]") == ["·"]


@needs_browser
def test_the_best_of_each_task_and_column_is_marked(show):
    page = show()
    starred = page.run(
        "return [...document.querySelectorAll('#figures td')]"
        ".filter((td) => td.querySelector('.best .star')).map((td) => [td.parentElement.dataset.row, td.dataset.field])"
    )
    expected = set()
    secondary = {name for _, _, metrics in TASKS for name in metrics[1:]}
    keys = ["main", *DIRECTIONS, *(f"metric:{name}" for name in secondary)]
    for task, _, _ in TASKS:
        for key in keys:
            direction = DIRECTIONS.get(key, "higher")
            values = {row["id"]: field(row, key) for row in rows_of(task) if field(row, key) is not None}
            if direction and len(set(values.values())) > 1:
                best = (min if direction == "lower" else max)(values.values())
                expected |= {(name, key) for name, value in values.items() if value == best}
    assert {tuple(pair) for pair in starred} == expected


@needs_browser
def test_sorting_by_mouse_and_by_keyboard(show):
    page = show()
    original = page.rows("summarization")
    assert original == ["base", *METHODS]
    by_memory = sorted(rows_of("summarization"), key=lambda row: row["values"]["peak_memory_train_bytes"])
    ascending = [row["method"] for row in by_memory]
    button = "#figures thead button[data-key=peak_memory_train_bytes]"
    state = f"return document.querySelector('{button}').closest('th').getAttribute('aria-sort')"
    page.one(button).click()
    assert (page.rows("summarization"), page.run(state)) == (["base", *ascending], "ascending")
    # A run without a value is last in either direction.
    assert page.rows("translation")[-1] == "ia3"
    page.one(button).click()
    assert (page.rows("summarization"), page.run(state)) == (["base", *reversed(ascending)], "descending")
    assert page.rows("translation")[-1] == "ia3"
    page.one(button).click()
    assert (page.rows("summarization"), page.run(state)) == (original, "none")

    page.tab_to("#figures thead button[data-key=main]")
    page.press("\ue007")
    best_first = sorted(rows_of("translation"), key=lambda row: -row["metrics"]["chrf"]["mean"])
    assert page.rows("translation") == ["base", *(row["method"] for row in best_first)]
    assert page.focused() == "main"
    page.one("#figures thead button[data-key=method]").click()
    assert page.rows("summarization") == ["base", *sorted(METHODS)]


@needs_browser
def test_the_matrix_is_sorted_by_what_a_title_is_chosen_for(show):
    page = show()
    title = "#matrix thead button[data-key='by:translation']"
    page.one(title).click()
    best_first = sorted(rows_of("translation"), key=lambda row: -row["metrics"]["chrf"]["mean"])
    assert page.texts("#matrix tbody th") == ["base", *(row["method"] for row in best_first)]
    page.one("#matrix thead button[data-key='by:dialogue']").click()
    assert page.texts("#matrix tbody th")[-1] == FAILED[1]
    page.one("#matrix thead button[data-key='by:method']").click()
    assert page.texts("#matrix tbody th") == ["base", *sorted(METHODS)]
    page.one("#matrix thead button[data-key='by:method']").click()
    assert page.texts("#matrix tbody th") == ["base", *METHODS]


@needs_browser
def test_a_baseline_stands_beside_the_untrained_model(show):
    summary = make_summary()
    (base,) = [row for row in summary["rows"] if row["id"] == "classification/base"]
    score = {"before": None, "mean": 61.5, "low": None, "high": None, "interval": None}
    name = "majority label"
    changes = {"method": name, "id": f"classification/{name}", "metrics": {"accuracy": score}, "samples": []}
    summary["rows"].insert(summary["rows"].index(base) + 1, {**base, **changes})
    summary["methods"].insert(1, name)
    page = show(summary, view="#task=classification&sort=main&order=ascending")
    assert page.texts("#matrix tbody th")[:2] == ["base", name]
    assert page.rows("classification")[:2] == ["base", name]
    assert f"{name} 61.5" in page.texts("#scatter .tick")
    assert not any(name in key for key in page.keys(".point"))
    page.one(f"#matrix [data-key='classification/{name}']").click()
    assert "61.5" in page.one("#run").text


@needs_browser
def test_settings_of_several_sizes_on_two_models(show):
    page = show(summarize(sized()).to_json())
    assert page.texts("#matrix tbody th") == [
        "base (model m)",
        "base (model n)",
        "teacher",
        "half",
        "own",
        ODD,
        "beaten",
    ]
    assert page.run("return document.getElementById('x').value") == "base_parameters"
    assert {key.split("/", 1)[1] for key in page.keys(".point.on-front")} == {"teacher", "half", "own", ODD}
    assert {"untrained (model m) 5.0", "untrained (model n) 7.0"} <= set(page.texts("#scatter .tick"))
    page.choose("x", "generation_samples_per_second")
    assert {key.split("/", 1)[1] for key in page.keys(".point.on-front")} == {"teacher", "half", "own", ODD}
    assert page.texts("#figures [data-row='summarization/half'] [data-field=teacher_share]") == ["91.7 %"]
    assert page.texts("#figures [data-row='summarization/own'] [data-field=model]") == ["n"]
    widths = dict(zip(page.texts("#matrix tbody th"), page.run(WIDTHS), strict=True))
    assert widths["teacher"] == "100%"
    assert float(widths["own"][:-1]) == pytest.approx(100 * (35 - 7) / (60 - 7))
    page.open(f"summarization/{ODD}".replace("\\", "\\\\"))
    assert page.texts("#run-title") == [f"{ODD} on summarization"]


@needs_browser
def test_what_runs_depend_on_and_their_predictions(show):
    page = show()
    facts = page.one("#facts").text
    for fact in ("test rows: 100", "prompt: summarization: {source}", "12 min 34 s"):
        assert fact in facts
    page.open("translation/lora")
    links = page.all("#run .downloads a")
    assert [link.text for link in links] == ["seed 42", "seed 43", "seed 44"]
    assert links[1].get_dom_attribute("href") == "cells/translation-lora-seed43/predictions.jsonl"
    interval = page.one("#matrix [data-key='translation/lora'] .figure small")
    assert "95 % interval over seeds" in interval.get_attribute("title")


@needs_browser
def test_filters_hold_everywhere_and_in_the_address(show):
    page = show()
    page.one("[data-key='family:soft_prompt']").click()
    page.one("[data-key='task:dialogue']").click()
    page.choose("task", "translation")
    page.choose("x", "trainable_parameters")
    page.one("#figures thead button[data-key=main]").click()
    left = [name for name, (family, *_) in METHODS.items() if family != "soft_prompt"]
    assert page.texts("#matrix tbody th") == ["base", *left]
    assert page.texts("#matrix thead th")[1:] == [
        f"{task}{metrics[0]}, higher is better" for task, _, metrics in TASKS if task != "dialogue"
    ]
    assert sorted(page.rows("summarization")) == sorted(["base", *left])
    assert page.all("#figures tbody[data-task=dialogue]") == []
    assert sorted(page.keys(".point")) == sorted(f"translation/{name}" for name in left)

    address, content = page.run("return location.hash"), page.run("return document.querySelector('main').innerText")
    again = show(view=address)
    assert again.run("return document.querySelector('main').innerText") == content
    again.one("#method").send_keys("ia")
    assert again.texts("#matrix tbody th") == ["base", "ia3"]
    assert show(view="#task=none&x=none&y=none&sort=none&hide=none").texts("#matrix tbody th") == ["base", *METHODS]


@needs_browser
@pytest.mark.parametrize(
    ("task", "x", "y"),
    [
        ("summarization", "peak_memory_train_bytes", "main"),
        ("translation", "peak_memory_train_bytes", "main"),
        ("dialogue", "trainable_parameters", "metric:bleu"),
        ("classification", "generate_samples_per_second", "general_loss_after"),
    ],
)
def test_the_pareto_front_follows_the_axes(show, task, x, y):
    page = show()
    page.choose("task", task)
    page.choose("x", x)
    page.choose("y", y)
    assert set(page.keys(".point.on-front")) == pareto(rows_of(task), x, y)
    drawn = {row["id"] for row in rows_of(task) if None not in (field(row, x), field(row, y))}
    assert set(page.keys(".point")) == drawn
    missing = {row["method"] for row in rows_of(task)} - {name.partition("/")[2] for name in drawn}
    assert all(name in page.texts("#scatter-note")[0] for name in missing)
    assert ("(log)" in page.texts("#scatter .axis-title")[0]) == (x == "trainable_parameters")


@needs_browser
def test_axes_without_a_direction_have_no_front(show):
    page = show(view="#x=total_parameters")
    assert page.all(".on-front") == []
    assert "No Pareto front" in page.texts("#scatter-note")[0]


@needs_browser
def test_a_point_tells_its_figures(show):
    page = show()
    row = next(row for row in SUMMARY["rows"] if row["id"] == "summarization/lora")
    memory = f"Peak memory, training: {row['values']['peak_memory_train_bytes'] / 2**30:.2f} GiB"
    page.tab_to(".point[data-key='summarization/lora']")
    assert memory in page.one(".tip").text
    assert f"rougeL: {row['metrics']['rougeL']['mean']:.1f} ± " in page.one(".tip").text
    assert memory in page.one(".point[data-key='summarization/lora']").get_attribute("aria-label")
    page.press("\ue00d")
    assert page.is_open()
    page.press("\ue00c")
    assert page.focused() == "summarization/lora"


@needs_browser
def test_labels_do_not_cover_each_other(show):
    for width in (375, 1280):
        for task, _, _ in TASKS:
            page = show(view=f"#task={task}", width=width)
            assert page.run(OVERLAPS) == []
            assert len(page.all(".label.on-front")) == len(page.all(".point.on-front"))


@needs_browser
def test_a_runs_panel_by_mouse(show):
    page = show()
    page.open("translation/lora")
    assert page.is_open()
    text = page.one("#run").text
    for fact in ("lora on translation", "tuned: best of 3 learning rates", "1,036,864", "2e-4", "seed 43"):
        assert fact in text
    names = ["Source", "Reference", "Prediction before", "Prediction after"]
    assert page.texts("#run .sample h4") == names * 3
    assert page.run("return getComputedStyle(document.querySelectorAll('#run .sample p')[4]).direction") == "rtl"
    assert page.texts("#run .sample p")[4] == ARABIC
    page.one("#run .close").click()
    assert not page.is_open()


@needs_browser
def test_a_runs_panel_by_keyboard_alone(show):
    page = show()
    page.tab_to("#matrix [data-key='dialogue/ia3']")
    page.press("\ue007")
    assert page.is_open()
    assert page.run("return document.getElementById('run').contains(document.activeElement)")
    assert "ia3 on dialogue" in page.one("#run-title").text
    page.press("\ue00c")
    assert not page.is_open()
    assert page.focused() == "dialogue/ia3"


@needs_browser
def test_what_a_prediction_shares_with_its_reference_is_marked(show):
    summary = make_summary()
    row = next(row for row in summary["rows"] if row["id"] == "translation/lora")
    row["samples"] = [{"source": "s", "reference": "a b  c d e", "before": "x", "after": "b a c\ne f"}]
    page = show(summary)
    page.open("translation/lora")
    assert page.texts("#run .sample p")[3] == "b a c\ne f"
    assert page.texts("#run mark") == ["b", "a", "c", "e"]


@needs_browser
def test_data_are_never_run(show):
    summary = make_summary()
    summary.update(title=SCRIPT, command=SCRIPT)
    summary["columns"][0]["title"] = SCRIPT
    page = show(summary)
    page.open("summarization/ia3")
    assert SCRIPT in page.texts("#run .sample p")[8]
    assert SCRIPT in page.texts("h1")
    assert SCRIPT in page.texts("#failed dd")[0]
    assert page.all("img") == []
    assert page.run("return window.injected === undefined")


@needs_browser
def test_a_phone_scrolls_inside_of_the_tables_only(show):
    page = show(width=375)
    overflow = "const e = document.documentElement; return e.scrollWidth - e.clientWidth"
    assert page.run("return innerWidth") == 375
    assert page.run(overflow) == 0
    assert page.run("const t = document.querySelector('.tall'); return t.scrollWidth > t.clientWidth")
    page.open("summarization/lora")
    assert page.run(overflow) == 0
    assert page.run("const d = document.getElementById('run'); return d.scrollWidth <= d.clientWidth")


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(show, scheme):
    page = show()
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.run("document.querySelector('details').open = true")
    page.tab_to(".point")
    assert page.one(".tip").is_displayed()
    assert page.run("return matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    seen, low = page.run(LOW_CONTRAST)
    assert (seen > 600, low) == (True, [])
    page.open("translation/lora")
    assert page.run(LOW_CONTRAST)[1] == []


def without_values(summary: dict[str, Any]) -> None:
    for row in summary["rows"]:
        row["values"] = dict.fromkeys(row["values"])
        row["curves"] = []


def all_equal(summary: dict[str, Any]) -> None:
    for row in summary["rows"]:
        row["values"]["peak_memory_train_bytes"] = 2**20
        row["metrics"] = {name: {"before": 0, "mean": 0, "low": None, "high": None} for name in row["metrics"]}


def one_run(summary: dict[str, Any]) -> None:
    summary["rows"] = [row for row in summary["rows"] if row["id"] == "summarization/lora"]
    summary["failures"] = []


def nothing(summary: dict[str, Any]) -> None:
    summary["rows"] = []


@needs_browser
@pytest.mark.parametrize(
    ("change", "points", "starred"),
    [(without_values, 6, True), (all_equal, 6, False), (one_run, 1, False), (nothing, 0, False)],
)
def test_thin_data_are_drawn_too(show, change, points, starred):
    summary = make_summary()
    change(summary)
    page = show(summary)
    assert len(page.all(".point")) == points
    assert "NaN" not in page.run("return document.querySelector('main').innerHTML")
    assert bool(page.all("#matrix .star")) == starred
    assert bool(page.all("#failures:not([hidden])")) == bool(summary["failures"])


@needs_browser
def test_a_metric_may_be_better_when_lower(show):
    summary = copy.deepcopy(SUMMARY)
    summary["tasks"][1]["lower_is_better"] = ["chrf"]
    page = show(summary)
    lowest = min(rows_of("translation"), key=lambda row: row["metrics"]["chrf"]["mean"])
    (best,) = page.keys("#matrix td:nth-child(3) .cell:has(.best)")
    assert best == lowest["id"]
    assert "chrf, lower is better" in page.texts("#matrix thead th")[2]
    assert len(page.all("#matrix td:nth-child(3) small.worse")) == len(METHODS)


@needs_browser
def test_a_page_without_its_samples_says_so(show, tmp_path):
    page = show()
    shutil.rmtree(tmp_path / "samples")
    page.one("#matrix [data-key='translation/lora']").click()
    for _ in range(100):
        if "is not beside this page" in page.one("#samples").text:
            break
        time.sleep(0.05)
    assert "is not beside this page" in page.one("#samples").text
    page.browser.get_log("browser")  # which says that the file is not there
