"""The page in headless Chromium: no message in the console, figures, sorting, drawing, and the
network's outputs as ``predict`` computes them."""

import shutil

import numpy as np
import pytest

import portacnn
from portacnn import cli, report
from support.matrix import needs
from support.runs import HOSTILE, write_run

pytestmark = [needs("browser"), pytest.mark.slow]
_ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")


@pytest.fixture(scope="module")
def browser():
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    for argument in (*_ARGUMENTS, "--window-size=1200,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def shown(browser, folder, **options):
    path = report.write(folder, **options)
    browser.get(path.resolve().as_uri())
    assert browser.get_log("browser") == []
    return path


def errors(browser):
    return browser.get_log("browser")


@pytest.mark.parametrize(
    ("pool", "preprocess"), [("global", True), ("global max", False), ("flat", True)]
)
def test_outputs_are_those_of_predict(browser, tmp_path, pool, preprocess):
    model, x, _ = write_run(tmp_path, pool=pool, preprocess=preprocess)
    shown(browser, tmp_path)
    found = browser.execute_script(
        "return portacnn.examples.map(e => {"
        "  const outputs = portacnn.forward(e.pixels);"
        "  return outputs.map(o => [o.layer.path, Array.from(o.y)]); })"
    )
    assert len(found) == 20
    expected = model.predict(x[:20])
    for logits, outputs in zip(expected, found, strict=True):
        assert np.abs(logits - outputs[-1][1]).max() < 1e-4
    for path, values in found[7]:  # each layer's, by which the maps are drawn
        own = model.features(x[7:8], path)[0].ravel()
        assert np.abs(own - values).max() < 1e-4, path
    shares = browser.execute_script("return portacnn.last.shares")
    powers = np.exp(expected[0].astype(float))
    assert np.abs(powers / powers.sum() - shares).max() < 1e-4
    assert errors(browser) == []


def test_the_page_is_whole(browser, tmp_path):
    write_run(tmp_path)
    shown(browser, tmp_path)
    assert browser.execute_script("return document.querySelectorAll('img[onerror]').length") == 0
    images = browser.execute_script(
        "return [...document.images].map(i => [i.complete, i.naturalWidth, i.alt])"
    )
    assert images
    assert all(complete and width and alt for complete, width, alt in images)
    ids = "curves confusion classes errors filters pad network settings environment"
    for name in ids.split():
        box = browser.find_element("id", name).rect
        assert box["height"] > 50, name
    curves = browser.find_elements("css selector", ".curve > svg")
    assert len(curves) == 5
    assert all(each.rect["height"] > 100 for each in curves)
    assert len(browser.find_elements("css selector", "#maps canvas")) == 7


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_and_widths(browser, tmp_path, width, scheme):
    """It follows the reader's colours, with contrast; it fits the screen."""
    write_run(tmp_path, names=("a very_long_name_without_spaces_" * 5, "b", "c"))
    preferred = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": preferred})
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    shown(browser, tmp_path)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    pairs = browser.execute_script(
        "const s = getComputedStyle(document.body);"
        "return [...document.querySelectorAll('h1, .subtitle, caption, dt, .name.wrong, .key')]"
        ".map(e => [getComputedStyle(e).color, s.backgroundColor])"
    )

    def light(color):
        values = np.array([float(v) for v in color[color.index("(") + 1 : -1].split(",")][:3]) / 255
        linear = np.where(values <= 0.03928, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722] + 0.05

    for front, back in pairs:
        ratio = light(front) / light(back)
        assert max(ratio, 1 / ratio) >= 4.5, (front, back)
        assert (light(back) > 0.5) == (scheme == "light")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_table_sorts(browser, tmp_path):
    write_run(tmp_path)
    shown(browser, tmp_path)

    def column(number):
        return browser.execute_script(
            "return [...document.querySelectorAll('#by-class tbody tr')].map(r => "
            f"r.cells[{number}].dataset.value ?? r.cells[{number}].textContent)"
        )

    heads = browser.find_elements("css selector", "#by-class thead button")
    recalls = sorted(map(float, column(4)))
    heads[4].click()
    assert list(map(float, column(4))) == recalls[::-1]
    heads[4].click()
    assert list(map(float, column(4))) == recalls
    sorts = "[...document.querySelectorAll('#by-class th')].map(h => h.getAttribute('aria-sort'))"
    assert browser.execute_script(f"return {sorts}")[:6] == [*[None] * 4, "ascending", None]
    heads[0].click()
    assert sorted(column(0)) == sorted(HOSTILE)
    heads[0].click()
    assert errors(browser) == []


def test_a_stroke_is_classified(browser, tmp_path):
    """Digits drawn with the mouse, by a network that was trained by the command."""
    from selenium.webdriver import ActionChains

    out = tmp_path / "run"
    words = ["train", "--epochs", "4", "--seed", "0", "--quiet", "--out", str(out)]
    assert cli.main(words) == 0
    assert cli.main(["report", str(out)]) == 0
    browser.get((out / "report.html").resolve().as_uri())
    pad = browser.find_element("id", "drawing")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", pad)
    browser.find_element("id", "clear").click()
    assert browser.find_element("id", "answer").text == "Nothing is drawn yet."

    def draw(*points):
        action = ActionChains(browser, duration=20)
        action.move_to_element_with_offset(pad, *points[0]).click_and_hold()
        for point in points[1:]:
            action.move_to_element_with_offset(pad, *point)
        action.release().perform()

    ring = [(60 * np.sin(a), -80 * np.cos(a)) for a in np.linspace(0, 2 * np.pi, 17)]
    for strokes, digit in (
        ([[(12, -80), (0, 0), (-12, 80)]], "1"),
        ([[(round(x), round(y)) for x, y in ring]], "0"),
        ([[(-60, -80), (60, -80), (20, 0), (-20, 85)]], "7"),
    ):
        browser.find_element("id", "clear").click()
        for stroke in strokes:
            draw(*stroke)
        browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 50))")
        assert browser.find_element("id", "answer").text.startswith(f"It is {digit}: ")
        last = browser.execute_script("return portacnn.last")
        image = np.round(last["pixels"]).astype("uint8").reshape(1, 1, 28, 28)
        model = portacnn.load(out / "params.safetensors", device="cpu")
        assert model.predict(image).argmax() == int(digit)
        # MNIST's rule: the centre of mass lies in the middle
        mass = image[0, 0].astype(float)
        assert abs((mass.sum(0) @ np.arange(28)) / mass.sum() - 13.5) < 1.0
        bars = browser.find_elements("css selector", "#bars tbody tr")
        assert len(bars) == 10
    assert browser.get_log("browser") == []
