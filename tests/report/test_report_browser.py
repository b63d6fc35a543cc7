"""The report in a browser: Debian's Chromium through its driver, or Google's.

Without one the tests are skipped, which is a failure where ``REQUIRE_BROWSER`` is set, as `.ci/run` does.
"""

import os
import shutil
from base64 import b64encode
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from PIL import Image as PillowImage
from recorded_run import MALICIOUS, row, small_run, write_run
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import Select, WebDriverWait

from anomalib_pack.report.document import make_document
from anomalib_pack.report.pictures import Limits, Pictures, make_pictures
from anomalib_pack.report.runs import Image, Run, read_runs

LIMITS = Limits(number=2000, height=128, worst=50, size=50_000_000)
# Of the slider, until counts and layout have followed: some hundred times what it takes on two busy cores.
MOVE_SECONDS = 0.5
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,900")


@pytest.fixture(scope="module")
def driver() -> Iterator[WebDriver]:
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    service = shutil.which("chromedriver")
    if browser is None or service is None:
        message = "needs chromium and chromedriver: apt-get install chromium chromium-driver"
        (pytest.fail if "REQUIRE_BROWSER" in os.environ else pytest.skip)(message)
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(service))
    yield driver
    driver.quit()


@pytest.fixture
def show(driver: WebDriver, tmp_path: Path) -> Iterator[Callable[[str], WebDriver]]:
    """Opens a page; afterwards, that nothing was wrong with it."""

    def opened(content: str) -> WebDriver:
        path = tmp_path / "report.html"
        path.write_text(content, encoding="utf-8")
        driver.get(path.as_uri())
        wait(driver, "html[data-ready]")
        return driver

    yield opened
    assert driver.get_log("browser") == []


@pytest.fixture
def page(show: Callable, tmp_path: Path) -> WebDriver:
    return show(page_of(read_runs([small_run(tmp_path / "run")])))


def wait(page: WebDriver, selector: str) -> None:
    WebDriverWait(page, 60).until(lambda page: page.find_elements(By.CSS_SELECTOR, selector))


def page_of(runs: list[Run]) -> str:
    return make_document(runs, make_pictures(runs, LIMITS), LIMITS)


def figures(page: WebDriver) -> list[str]:
    return [each.text for each in page.find_elements(By.CSS_SELECTOR, ".figure .value")]


def files(page: WebDriver) -> list[str]:
    """Names in the gallery, when it has followed the threshold."""
    page.execute_async_script("setTimeout(arguments[0], 200)")
    return [each.text.split(" · ")[0] for each in page.find_elements(By.CSS_SELECTOR, ".gallery .file")]


def outcomes(page: WebDriver) -> dict[str, int]:
    buttons = page.find_elements(By.CSS_SELECTOR, ".outcomes button:not([hidden])")
    return {name: int(number) for name, number in (button.text.rsplit(" ", 1) for button in buttons)}


def choose(page: WebDriver, name: str, text: str) -> None:
    Select(page.find_element(By.CSS_SELECTOR, f"select[name={name}]")).select_by_visible_text(text)


def press(page: WebDriver, text: str) -> None:
    buttons = page.find_elements(By.CSS_SELECTOR, "button:not(.item)")
    (button,) = (each for each in buttons if each.text.startswith(text))
    button.click()


def move_slider(page: WebDriver, score: float) -> None:
    """As a hand does: the slider's own events, at the position of a score."""
    page.execute_script(
        "const [slider, part] = arguments; slider.value = Math.round(1000 * part);"
        "slider.dispatchEvent(new Event('input', {bubbles: true}));",
        page.find_element(By.CSS_SELECTOR, "input[type=range]"),
        # The scores are 0.1 to 0.9, and the slider ends 2 % of that beyond them.
        (score - 0.084) / 0.832,
    )


def test_counts_follow_the_slider(page: WebDriver) -> None:
    assert figures(page) == ["2", "1", "50.0 %", "0"]
    assert outcomes(page) == {"All": 7, "Missed": 2, "False alarms": 1, "Found": 1, "Passed": 2, "Called normal": 1}
    move_slider(page, 0.35)
    assert figures(page) == ["1", "1", "66.7 %", "0"]
    assert outcomes(page)["Missed"] == 1
    threshold = page.find_element(By.CSS_SELECTOR, ".settings input")
    assert float(threshold.get_property("value")) == pytest.approx(0.35, abs=0.001)
    assert page.find_element(By.CSS_SELECTOR, ".scale").text == "normalised 0.350"
    command = page.find_element(By.CSS_SELECTOR, ".command code").text
    assert f"recalibrate --ckpt_path MODEL.ckpt --threshold {threshold.get_property('value')} " in command
    assert files(page)[:2] == [f"good/{MALICIOUS}", "dent/2.png"]  # the gallery follows
    threshold.send_keys(Keys.CONTROL, "a")
    threshold.send_keys("0.95", Keys.ENTER)
    assert figures(page) == ["3", "0", "50.0 %", "0"]
    press(page, "Reset")
    assert figures(page) == ["2", "1", "50.0 %", "0"]


def test_thresholds_without_mistakes(page: WebDriver) -> None:
    press(page, "No misses")
    assert figures(page)[:2] == ["0", "2"]
    press(page, "No false alarms")
    assert figures(page)[:2] == ["2", "0"]


def test_the_slider_by_keyboard(page: WebDriver) -> None:
    page.find_element(By.CSS_SELECTOR, "input[type=range]").send_keys(Keys.HOME)
    assert figures(page)[:2] == ["0", "3"]


def test_filters_and_order(page: WebDriver) -> None:
    assert files(page) == [
        *("dent/2.png", f"good/{MALICIOUS}", "scratch/1.png"),  # mistakes, the farthest first; then the nearest
        *("new/0.png", "good/1.png", "good/0.png", "scratch/0.png"),
    ]
    choose(page, "group", "scratch")
    assert sorted(files(page)) == ["scratch/0.png", "scratch/1.png"]
    assert figures(page) == ["1", "1", "60.0 %"]  # against all normal images
    choose(page, "group", "all groups")
    choose(page, "sort", "Highest score")
    assert files(page)[:2] == ["scratch/0.png", f"good/{MALICIOUS}"]
    press(page, "Passed")
    assert files(page) == ["good/1.png", "good/0.png"]


def test_runs_beside_each_other(show: Callable, tmp_path: Path) -> None:
    """Each has its own threshold; filters are for all."""
    other = [row("good/0.png", 0.8, 0, category="nut"), row("good/1.png", 0.1, 0), row("scratch/0.png", 0.3, 1)]
    page = show(page_of(read_runs([small_run(tmp_path / "a"), write_run(tmp_path / "b", other)])))
    assert [each.text for each in page.find_elements(By.CSS_SELECTOR, ".panel h3")] == ["a", "b"]
    assert figures(page) == ["2", "1", "50.0 %", "0", "1", "1", "33.3 %"]
    page.find_elements(By.CSS_SELECTOR, "input[type=range]")[1].send_keys(Keys.HOME)
    assert figures(page) == ["2", "1", "50.0 %", "0", "0", "2", "33.3 %"]
    assert outcomes(page)["Missed"] == 2
    choose(page, "run", "b")
    assert figures(page) == ["0", "2", "33.3 %"]
    assert files(page)[0] == "good/0.png"
    assert len(page.find_elements(By.CSS_SELECTOR, ".curves path")) == 2 * 2  # the curve, and its sample
    choose(page, "category", "nut")
    assert figures(page) == ["0", "1", "0.0 %"]
    assert files(page) == ["good/0.png"]


def test_decisions_that_the_score_does_not_explain(show: Callable, tmp_path: Path) -> None:
    """Specks that were dropped stay normal; a score that equals the threshold is what the run called it."""
    rows = [
        row("dropped.png", 0.8, 0, pred_label=0),
        row("equal.png", 0.5, 1, pred_label=1),
        row("low.png", 0.1, 0),
        row("high.png", 0.9, 1),
    ]
    page = show(page_of(read_runs([write_run(tmp_path / "run", rows)])))
    assert figures(page) == ["0", "0", "100.0 %"]
    assert (
        "1 image has a label that the score alone does not explain" in page.find_element(By.CSS_SELECTOR, ".note").text
    )
    page.find_element(By.CSS_SELECTOR, "input[type=range]").send_keys(Keys.HOME)
    assert figures(page) == ["0", "1", "75.0 %"]


def test_a_prediction_without_labels(show: Callable, tmp_path: Path) -> None:
    rows = [row("a.png", 0.9, None), row("b.png", 0.2, None), row("c.png", float("nan"), None, pred_label="")]
    page = show(page_of(read_runs([write_run(tmp_path / "run", rows)])))
    assert figures(page) == ["1"]
    assert outcomes(page) == {"All": 3, "Called anomalous": 1, "Called normal": 1, "No score": 1}
    assert files(page) == ["b.png", "a.png", "c.png"]
    assert len(page.find_elements(By.CSS_SELECTOR, ".curves path")) == 0


def test_curves(page: WebDriver) -> None:
    """By hand: of 9 pairs of a normal and an anomalous image 6 are in order; precision is 1, 2/3 and 3/5."""
    legends = [each.text for each in page.find_elements(By.CSS_SELECTOR, ".curves .legend li")]
    assert legends == [f"AUROC {6 / 9:.3f}", f"AP {(1 + 2 / 3 + 3 / 5) / 3:.3f}"]


def test_one_image_by_keyboard(page: WebDriver) -> None:
    page.find_element(By.CSS_SELECTOR, ".item").send_keys(Keys.ENTER)
    viewer = page.find_element(By.ID, "viewer")
    assert viewer.find_element(By.TAG_NAME, "h2").text == "dent/2.png"
    assert viewer.find_element(By.TAG_NAME, "img").get_property("naturalWidth") == 256
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert viewer.find_element(By.TAG_NAME, "h2").text == f"good/{MALICIOUS}"
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    WebDriverWait(page, 60).until(lambda _: not viewer.get_property("open"))
    # The image that was seen last has the focus, soon after.
    last = "</script><b>bold</b>"
    WebDriverWait(page, 60).until(lambda page: page.switch_to.active_element.text.endswith(last))


def test_names_are_text(page: WebDriver) -> None:
    assert f"good/{MALICIOUS}" in files(page)
    assert page.execute_script("return window.ran") is None
    sources = {each.get_attribute("src")[:16] for each in page.find_elements(By.TAG_NAME, "img")}
    assert sources == {"data:image/webp;"}
    assert page.find_elements(By.CSS_SELECTOR, ".gallery b") == []


@pytest.mark.parametrize(
    ("attempt", "directive"),
    [
        ("fetch('http://127.0.0.1:9/').catch(() => 0)", "connect-src"),
        ("new Image().src = 'http://127.0.0.1:9/'", "img-src"),
        ("document.body.append(Object.assign(document.createElement('script'), {text: '1'}))", "script-src-elem"),
        ("document.body.setAttribute('style', 'color: red')", "style-src-attr"),
    ],
)
def test_the_policy_forbids_what_the_page_does_not_do(driver: WebDriver, tmp_path: Path, attempt, directive) -> None:
    runs = read_runs([small_run(tmp_path / "run")])
    (tmp_path / "report.html").write_text(make_document(runs, Pictures(of_images=[[None] * 7]), LIMITS))
    driver.get((tmp_path / "report.html").as_uri())
    violated = driver.execute_async_script(
        "const say = arguments[0];"
        f"document.addEventListener('securitypolicyviolation', (event) => say(event.violatedDirective));{attempt}"
    )
    driver.get_log("browser")  # which has the violation
    assert violated == directive


def test_light_and_dark(page: WebDriver) -> None:
    def background() -> str:
        return page.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")

    seen = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        wait(page, f"html[data-theme={scheme}]")
        seen[scheme] = background()
    assert len(set(seen.values())) == 2
    page.find_element(By.ID, "theme").click()
    assert background() == seen["light"]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_phone_shows_all_without_scrolling_sideways(page: WebDriver) -> None:
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    WebDriverWait(page, 60).until(
        lambda page: page.execute_script("return document.documentElement.scrollWidth") == 360
    )
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_two_thousand_images(show: Callable, tmp_path: Path) -> None:
    """With pictures of many MB the counts follow the slider at once, and the gallery is drawn in parts."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 2000)
    scores = (labels + random.normal(size=2000)).tolist()
    images = [
        Image(
            f"part/{i:04}.png",
            "screw",
            ("good", "scratch")[label],
            int(label),
            int(score > 0.5),
            score,
            score,
            "",
            None,
        )
        for i, (label, score) in enumerate(zip(labels, scores, strict=True))
    ]
    run = Run("run", tmp_path, {}, images, 0.5, 0.5, None)
    noise = BytesIO()
    PillowImage.fromarray(random.integers(0, 256, (128, 512, 3), dtype=np.uint8)).save(noise, "WEBP", quality=5)
    files_of_images = [(512, 128, b64encode(noise.getvalue()).decode())] * 2000
    content = make_document([run], Pictures(files_of_images, [list(range(2000))]), LIMITS)
    assert 20e6 < len(content) < 50e6
    page = show(content)
    assert len(files(page)) == 12
    press(page, "Show")
    assert len(files(page)) == 60
    seconds = page.execute_script(
        "const slider = document.querySelector('input[type=range]'); const seconds = [];"
        "for (let i = 0; i < 9; i += 1) {"
        "  const start = performance.now(); slider.value = 100 * i;"
        "  slider.dispatchEvent(new Event('input', {bubbles: true})); document.body.getBoundingClientRect();"
        "  seconds.push((performance.now() - start) / 1000); }"
        "return seconds;"
    )
    assert median(seconds) < MOVE_SECONDS
    threshold = float(page.find_element(By.CSS_SELECTOR, ".settings input").get_property("value"))
    missed = sum(score <= threshold for score, label in zip(scores, labels, strict=True) if label)
    assert figures(page)[0] == f"{missed:,}"
