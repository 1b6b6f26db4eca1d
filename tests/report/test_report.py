"""The page of ``portacnn report``, read by html.parser: it is whole, loads nothing, and no name
becomes markup."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from portacnn import report, run_folder
from portacnn.layers import Conv2d, Flatten, LeakyReLU, Linear
from portacnn.models import Model, ModelInfo
from portacnn.report.drawing import lines, nice, png
from portacnn.report.in_page import NotInPageError, network
from support.runs import HOSTILE, write_run

VOID = {"meta", "link", "img", "input", "br", "line", "polyline", "circle", "rect"}


class Page(HTMLParser):
    """The elements of a page, their text, and whether they are nested as they should be."""

    def __init__(self, html):
        super().__init__()
        self.html, self.open, self.elements, self.texts = html, [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, text):
        self.texts.append((self.open[-1] if self.open else "", text))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self):
        return " ".join(t for tag, t in self.texts if tag not in ("script", "style"))

    @property
    def data(self):
        return json.loads(next(t for tag, t in self.texts if tag == "script"))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a <b>run"
    made = write_run(folder)
    path = report.write(folder)
    assert path == folder / "report.html"
    return (folder, *made, Page(path.read_text("utf-8")))


def sections(page):
    return [attributes["id"] for attributes in page.all("section")]


def test_every_part_is_there(ran):
    page = ran[-1]
    expected = ["curves", "confusion", "classes", "errors", "filters", "pad", "network"]
    assert sections(page) == [*expected, "settings", "environment"]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    curves = [a["aria-label"] for a in page.all("svg") if a.get("role") == "img"]
    begins = ["loss by", "accuracy by", "learning rate by", "loss of each step by", "seconds"]
    assert [label.startswith(b) for label, b in zip(curves, begins, strict=True)] == [True] * 5
    assert "training: 0.25 at first, 0.5 at last; test: 0.125 at first" in curves[1]
    assert all(a.get("alt") for a in page.all("img"))
    text = page.text()
    for word in ("61.0 s", "3 MiB", "0.3750", "2026-01-02 03:04:05", "numpy 2.0"):
        assert word in text
    assert "torch" not in text


def test_it_loads_nothing(ran):
    page = ran[-1]
    for _, attributes in page.elements:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", page.html)
    policy = next(a["content"] for a in page.all("meta") if "http-equiv" in a)
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy


def test_names_are_text(ran):
    """Class names, the folder's name and settings: no element, no attribute, no end of a script."""
    page = ran[-1]
    assert [tag for tag, _ in page.elements if tag in ("i", "b")] == []
    assert len(page.all("script")) == 2
    assert not [a for _, a in page.elements if any(name.startswith("on") for name in a)]
    assert "onerror" in page.html
    for name in (*HOSTILE, "a <b>run", "<i>net</i>"):
        assert name in page.text()
    assert page.data["names"] == list(HOSTILE)
    assert page.html.count("</script") == 2


def test_the_figures_of_the_classes(ran):
    _, model, x, t, page = ran
    said = model.predict(x).argmax(1)
    cells = [a["data-value"] for a in page.all("td") if "data-value" in a]
    table = page.html.partition('id="by-class"')[2].partition("</table>")[0]
    found = np.array(re.findall(r'data-value="([^"]+)"', table), float).reshape(3, 5)
    for index, (images, errors, precision, recall, f1) in enumerate(found):
        hits = int(((said == index) & (t == index)).sum())
        assert (images, errors) == ((t == index).sum(), (t == index).sum() - hits)
        assert np.isclose(recall, hits / max((t == index).sum(), 1))
        assert np.isclose(precision, hits / max((said == index).sum(), 1))
        assert np.isclose(f1, 2 * hits / ((t == index).sum() + (said == index).sum()))
    assert cells
    wrong = int((said != t).sum())
    assert page.html.count('class="name wrong"') == min(wrong, 24)


def test_the_weights_in_the_page(ran):
    _, model, x, t, page = ran
    held = page.data
    weights = np.frombuffer(base64.b64decode(held["weights"]), "<f4")
    layer = next(each for each in held["layers"] if each["path"] == "fc2")
    own = weights[layer["weight"] :][:15].reshape(3, 5)
    assert np.array_equal(own, model.state_dict()["fc2.weight"])
    kinds = [each["kind"] for each in held["layers"]]
    order = "conv norm relu max conv relu mean global flatten linear norm linear"
    assert kinds == order.split()
    assert [e["label"] for e in held["examples"]] == t[:20].tolist()
    pixels = np.frombuffer(base64.b64decode(held["examples"][3]["pixels"]), "u1")
    assert np.array_equal(pixels, x[3].ravel())


def test_where_the_data_have_moved(tmp_path):
    write_run(tmp_path)
    (tmp_path / "data.npz").unlink()
    page = Page(report.write(tmp_path).read_text("utf-8"))
    assert "The data:" in page.text()
    assert "data.npz" in page.text()
    assert sections(page) == ["curves", "filters", "pad", "network", "settings", "environment"]
    assert page.data["examples"] == []
    (tmp_path / run_folder.HISTORY).write_text("{")
    (tmp_path / run_folder.PARAMS).write_bytes(b"no")
    page = Page(report.write(tmp_path, tmp_path / "x.html").read_text("utf-8"))
    assert sections(page) == ["settings"]
    assert page.data is None
    (tmp_path / run_folder.SETTINGS).unlink()
    (tmp_path / run_folder.HISTORY).unlink()
    (tmp_path / run_folder.PARAMS).unlink()
    with pytest.raises(FileNotFoundError, match="is not the folder of a run"):
        report.write(tmp_path)


def test_colour_images_have_no_pad(tmp_path):
    write_run(tmp_path, channels=3)
    page = Page(report.write(tmp_path, images=10).read_text("utf-8"))
    assert "no drawing pad: one draws images of one channel" in page.text()
    assert "the first 10 test images" in page.text()
    assert page.data is None


def test_what_a_page_cannot_compute():
    def refused(shape=(1, 6, 6), **layers):
        model = Model(**layers).build(shape, device="cpu")
        with pytest.raises(NotInPageError) as error:
            network(model)
        return str(error.value)

    def flat(count=3):
        return {"flatten": Flatten(), "fc": Linear(None, count)}

    assert "act (LeakyReLU)" in refused(conv=Conv2d(1, 2, 3), act=LeakyReLU(), **flat())
    assert "conv (Conv2d)" in refused(conv=Conv2d(1, 2, 3, padding_mode="reflect"), **flat())
    assert "2.5 MB, more than 2 MB" in refused((1, 250, 250), **flat(10))
    assert "no output for each class" in refused(conv=Conv2d(1, 2, 3))


def test_another_task(tmp_path):
    model, *_ = write_run(tmp_path)
    model.info = ModelInfo(task="regression")
    model.save(tmp_path / run_folder.PARAMS)
    page = Page(report.write(tmp_path).read_text("utf-8"))
    assert "the run's task is regression" in page.text()
    assert "confusion" not in sections(page)


def test_a_png_is_one():
    PIL = pytest.importorskip("PIL.Image")
    import io

    for shape in ((3, 5), (3, 5, 3), (3, 5, 4)):
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype="uint8")
        with PIL.open(io.BytesIO(png(pixels))) as image:
            assert np.array_equal(np.asarray(image), pixels)


def test_round_numbers():
    assert np.allclose(nice(0.13, 0.92), [0, 0.2, 0.4, 0.6, 0.8, 1.0])
    for low, high in ((0.001, 0.001), (0, 0), (-3, 1e6), (0.99991, 0.99995)):
        ticks = nice(low, high)
        assert ticks[0] <= low + 1e-12
        assert high <= ticks[-1] + 1e-12
        assert 2 <= len(ticks) <= 8
        assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])
    assert lines("x", {"a": [float("nan")]}) == ""
    assert "<polyline" in lines("x", {"a": [1.0]})
