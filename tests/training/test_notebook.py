"""What models and trainers show in a notebook: HTML that is whole, and that text cannot break out
of."""

from html.parser import HTMLParser

import pytest

import portacnn
from portacnn.layers import Flatten, Linear
from portacnn.training import progress
from portacnn.training.notebook import page
from support.nets import patches, small_net
from support.small_trainings import trainer


class Reader(HTMLParser):
    """Collects the cells of tables and the points of curves; checks that all tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.rows, self.curves, self.words = [], set(), [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "polyline":
            self.curves.append([p.split(",") for p in dict(attributes)["points"].split()])

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


ALLOWED = {"p", "table", "thead", "tbody", "tfoot", "tr", "td", "th", "svg", "path", "polyline"}
ALLOWED |= {"text"}


def test_a_model_shows_its_summary():
    model = small_net()
    model.freeze("fc1")
    shown, lines = Reader(model._repr_html_()), model.summary().splitlines()
    # the same cells as in the text, which has two titles before and rules between
    text = [line.split() for line in lines if "  " in line]
    assert [" ".join(row).split() for row in shown.rows] == text
    assert shown.words[0] == "; ".join(lines[:2])
    assert lines[-1].startswith("trainable parameters")
    assert shown.words[-1] == lines[-1]
    assert shown.tags <= ALLOWED


def test_text_stays_text():
    layers = {"<script>alert(1)</script>": Flatten(), "a&b": Linear(None, 2)}
    model = portacnn.Model(**layers)
    assert model._repr_html_() is None  # not built: its repr is shown
    shown = Reader(model.build((1, 4, 4), device="cpu", seed=0)._repr_html_())
    assert shown.rows[1][0] == "<script>alert(1)</script>"
    assert shown.tags <= ALLOWED
    shown = Reader(page("<b>&", {"train_<i>x": [1.0, 2.0], '"><img src=x>': [1.0, 2.0]}))
    assert shown.tags <= ALLOWED
    assert shown.words[0] == "<b>&"
    assert shown.rows[0][1:] == ["train <i>x", '"><img src=x>']


def test_a_trainer_shows_its_curves_and_its_last_epochs():
    run = trainer(small_net(), epochs=7)
    assert not Reader(run._repr_html_()).rows  # nothing yet
    run.train()
    shown = Reader(run._repr_html_())
    assert shown.words[0] == repr(run)
    assert shown.tags <= ALLOWED
    assert [row[0] for row in shown.rows] == ["epoch", "3", "4", "5", "6", "7"]
    place = shown.rows[0].index("test accuracy")
    assert float(shown.rows[-1][place]) == pytest.approx(run.test_acc_list[-1], rel=1e-3)
    assert [len(curve) for curve in shown.curves] == [7] * 4  # loss and accuracy, of both sets
    # heights are linear in the values, over both curves of a picture
    heights = [float(y) for curve in shown.curves[:2] for _, y in curve]
    values = run.epoch_loss_list + run.test_loss_list
    low, high = min(values), max(values)
    for height, value in zip(heights, values, strict=True):
        assert (130 - height) / 108 == pytest.approx((value - low) / (high - low), abs=1e-3)


def test_figures_that_cannot_be_drawn_are_left_out():
    nan, inf = float("nan"), float("inf")
    shown = Reader(
        page("", {"train_loss": [1.0, nan, 2.0], "test_loss": [inf, nan, nan], "train_m": [[1]]})
    )
    assert [len(curve) for curve in shown.curves] == [2]
    assert shown.rows[-1] == ["3", "2", "nan"]
    assert Reader(page("", {"train_loss": [3.0, 3.0]})).curves == [
        [["52.0", "76.0"], ["292.0", "76.0"]]
    ]
    long = Reader(page("", {"train_loss": [float(n) for n in range(10_000)]}))
    assert len(long.curves[0]) < 400
    assert len(long.rows) == 6


@pytest.mark.parametrize("widgets", [False, True])
def test_the_bar_in_a_notebook(capsys, monkeypatch, widgets):
    """Without ipywidgets it is text in the same stream as the lines; one of 80 columns."""
    pytest.importorskip("tqdm")
    monkeypatch.setattr(progress, "in_notebook", lambda stream: True)
    monkeypatch.setattr(progress, "is_watched", lambda stream: True)
    monkeypatch.setattr(progress, "find_spec", lambda name: object() if widgets else None)
    portacnn.Trainer(small_net(), *patches(50), epochs=2, batch_size=20).train()
    out, err = capsys.readouterr()
    assert ("6/6" in err, "6/6" in out) == (widgets, not widgets)
    assert out.count("\nepoch 2: loss") + out.count("\repoch 2: loss") == 1
    assert all(len(line) <= 80 for line in out.replace("\n", "\r").split("\r"))
