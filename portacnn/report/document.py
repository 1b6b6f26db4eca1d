"""The page: the sections of a report, put into the template with its styles and scripts."""

import base64
import hashlib
from collections.abc import Iterator, Mapping
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

from portacnn.errors import PortacnnError
from portacnn.models.summary import rows as layer_rows
from portacnn.plot.classes import Classified
from portacnn.plot.curves import label_of, panels_of
from portacnn.plot.network import kernels_of
from portacnn.plot.style import shown as pixels_of
from portacnn.report.contents import Contents
from portacnn.report.drawing import heat, in_bytes, lines, mosaic, png
from portacnn.report.in_page import NotInPageError, network
from portacnn.report.markup import data_uri, json_text, pairs, section, table, text
from portacnn.text import class_names
from portacnn.version import VERSION

_SCRIPTS = ("sort.js", "network.js", "pad.js")
_MOST_CELLS = 24  # classes of a confusion matrix that is a table of numbers
_MOST_ERRORS, _MOST_KERNELS, _MOST_PAIRS, _MOST_ROWS = 24, 64, 8, 30


def document(found: Contents) -> str:
    """Return the page about a run as HTML."""
    made = {name: (files(__package__) / "page" / name).read_text("utf-8") for name in _page_files()}
    script = "\n".join(made[name] for name in _SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    pad, held = _pad(found)
    parts = [
        _problems(found),
        _curves(found),
        _by_class(found),
        _errors(found),
        _filters(found),
        pad,
        _layers(found),
        _tables(found),
    ]
    kind = type(found.model).__name__ if found.model is not None else "a run"
    return Template(made["template.html"]).substitute(
        title=text(f"{kind}: {found.folder.resolve().name}"),
        heading=text(kind),
        subtitle=_subtitle(found),
        tiles=_tiles(found),
        body="\n".join(filter(None, parts)),
        version=text(VERSION),
        style=made["style.css"],
        script=script,
        script_hash=f"sha256-{digest}",
        data=json_text(held),
    )


def _page_files() -> tuple[str, ...]:
    return ("template.html", "style.css", *_SCRIPTS)


# --- the head -------------------------------------------------------------------------------------


def _environment(found: Contents) -> dict[str, Any]:
    return found.history["environment"] if found.history else {}


def _subtitle(found: Contents) -> str:
    settings, ran = found.settings or {}, _environment(found)
    said = [str(found.folder.resolve().name)]
    said += [f"data: {settings['data']}"] if "data" in settings else []
    said += [f"on {ran['backend']}"] if "backend" in ran else []
    said += [str(ran["date"]).replace("T", " ").partition("+")[0]] if "date" in ran else []
    return " · ".join(map(text, said))


def _tiles(found: Contents) -> str:
    """Return the figures that matter most."""
    told: dict[str, str] = {}
    history = found.history["history"] if found.history else {}
    panels = panels_of(history)
    for what, parts in panels.items():
        if what != "lr" and "test" in parts:
            told[f"test {label_of(what)}"] = _figure(parts["test"][-1])
    if found.classified is not None:
        share = float((found.classified.predicted == found.classified.labels).mean())
        if told.get("test accuracy") != f"{share:.4f}":  # early stopping keeps the best weights
            told["accuracy of these weights"] = f"{share:.4f}"
    if panels:
        told["epochs"] = str(max(len(v) for parts in panels.values() for v in parts.values()))
    if found.model is not None:
        count = sum(int(np.prod(a.shape)) for a in found.model.named_parameters().values())
        told["parameters"] = f"{count:,}"
    ran = _environment(found)
    if isinstance(ran.get("seconds"), int | float):
        told["training time"] = _duration(ran["seconds"])
    if isinstance(ran.get("peak_memory"), int | float):
        told["peak memory"] = _memory(ran["peak_memory"])
    return "".join(f"<div><dt>{text(n)}</dt><dd>{text(v)}</dd></div>" for n, v in told.items())


def _figure(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _memory(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def _problems(found: Contents) -> str:
    if not found.problems:
        return ""
    items = "".join(f"<li><b>{text(n)}:</b> {text(why, 500)}</li>" for n, why in found.problems)
    return (
        '<aside id="problems" role="note"><p>Some of this report is left out, because it could '
        f"not be had:</p><ul>{items}</ul></aside>"
    )


# --- the training ---------------------------------------------------------------------------------


def _curves(found: Contents) -> str:
    if not found.history:
        return ""
    history = found.history["history"]
    named = {"train": "training", "test": "test"}
    panels = [
        lines(label_of(what), {named[part]: values for part, values in parts.items()})
        for what, parts in panels_of(history).items()
        if what != "lr" or len({*parts["train"]}) > 1
    ]
    steps = [_number(value) for value in found.history["step_losses"]]
    if len(steps) > 1:
        panels.append(lines("loss of each step", {"training": _thinned(steps)}, _step_axis(steps)))
    seconds = [_number(value) for value in history.get("seconds", [])]
    if seconds:
        panels.append(lines("seconds of each epoch", {"seconds": seconds}))
    drawn = "".join(panels)
    return section("curves", "Training", f'<div class="curves">{drawn}</div>') if drawn else ""


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


_MOST_POINTS = 400


def _stride(values: list[float]) -> int:
    return -(-len(values) // _MOST_POINTS)


def _thinned(values: list[float]) -> list[float]:
    """Return the means of runs of values, at most 400 of them."""
    each = _stride(values)
    parts = [values[i : i + each] for i in range(0, len(values), each)]
    return [sum(part) / len(part) for part in parts]


def _step_axis(values: list[float]) -> str:
    each = _stride(values)
    return "step" if each == 1 else f"mean of each {each} steps"


# --- errors ---------------------------------------------------------------------------------------


def _by_class(found: Contents) -> str:
    said = found.classified
    if said is None:
        return ""
    counts = said.confusion
    some = f"the first {len(said.labels):,}" if found.left_out else f"{len(said.labels):,}"
    note = f"<p>Of {some} test images. Rows are true classes, columns predicted ones.</p>"
    matrix = _matrix(counts, said.names) if len(said.names) <= _MOST_CELLS else _heat(counts, said)
    return section("confusion", "Confusion matrix", note, matrix, _confused(counts, said.names)) + (
        section("classes", "Classes", _class_table(counts, said.names))
    )


def _matrix(counts: Any, names: list[str]) -> str:
    totals = np.maximum(counts.sum(axis=1), 1)
    long = any(len(name) > 3 for name in names)
    turned = ' class="turned"' if long else ""
    head = "".join(
        f'<th scope="col"{turned}><span title="{text(n)}">{text(n)}</span></th>' for n in names
    )
    body = []
    for index, row in enumerate(counts.tolist()):
        cells = []
        for column, count in enumerate(row):
            share = count / totals[index]
            kind = ("hit" if index == column else "miss") + (" strong" if share > 0.55 else "")
            title = f"{names[index]} taken for {names[column]}: {count} ({share:.1%})"
            style = f' style="--share:{100 * share:.0f}%"' if count else ""
            cells.append(f'<td class="{kind}"{style} title="{text(title)}">{count or ""}</td>')
        name = (
            f'<th scope="row"><span title="{text(names[index])}">{text(names[index])}</span></th>'
        )
        body.append(f"<tr>{name}{''.join(cells)}</tr>")
    return (
        '<div class="scroll" tabindex="0"><table class="matrix"><caption>Images by true and '
        f"predicted class</caption><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(body)}"
        "</tbody></table></div>"
    )


def _heat(counts: Any, said: Classified) -> str:
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    right = float(np.trace(counts)) / max(int(counts.sum()), 1)
    alt = f"Confusion matrix of {len(said.names)} classes; {right:.1%} lie on the diagonal"
    uri = data_uri(png(heat(shares)), "image/png")
    return f'<figure><img class="heat" src="{uri}" alt="{alt}"></figure>'


def _confused(counts: Any, names: list[str]) -> str:
    """Return the pairs that are most often taken for each other."""
    wrong = counts * (1 - np.eye(len(names), dtype=counts.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_PAIRS]
    places = [divmod(int(i), len(names)) for i in order]
    rows = [
        (names[a], names[b], int(wrong[a, b]), _share(wrong[a, b] / max(counts[a].sum(), 1)))
        for a, b in places
        if wrong[a, b]
    ]
    if not rows:
        return "<p>No image was classified wrongly.</p>"
    heads = ("class", "taken for", "images", "share of the class")
    return table("confused", heads, rows, numbers=(2, 3), caption="Most frequent errors")


def _share(value: float) -> tuple[float, str]:
    return float(value), f"{value:.1%}"


def _class_table(counts: Any, names: list[str]) -> str:
    rows = []
    for index, name in enumerate(names):
        hits, images, predicted = (
            int(n) for n in (counts[index, index], counts[index].sum(), counts[:, index].sum())
        )
        precision, recall = hits / max(predicted, 1), hits / max(images, 1)
        both = 2 * hits / max(images + predicted, 1)
        rows.append((name, images, images - hits, *map(_share, (precision, recall, both))))
    heads = ("class", "images", "errors", "precision", "recall", "F1")
    caption = "Figures by class; press a heading to sort"
    numbers = (1, 2, 3, 4, 5)
    return table("by-class", heads, rows, numbers=numbers, sorts=True, caption=caption)


def _errors(found: Contents) -> str:
    said = found.classified
    if said is None:
        return ""
    worst = said.worst(_MOST_ERRORS)
    if not len(worst):
        return section("errors", "Worst errors", "<p>There are no errors.</p>")
    files = getattr(found.test, "files", None)
    shown = "".join(_error(found, said, int(i), files) for i in worst)
    note = (
        "<p>Images that were classified wrongly, those first in which the network was surest.</p>"
    )
    return section("errors", "Worst errors", note, f'<div class="images">{shown}</div>')


def _error(found: Contents, said: Classified, index: int, files: Any) -> str:
    image = in_bytes(pixels_of(found.test.images[index, ...]))
    true, predicted = said.names[int(said.labels[index])], int(said.predicted[index])
    what = said.names[predicted] if predicted >= 0 else "NaN"
    sure = f"({said.probabilities[index].max():.0%})" if predicted >= 0 else ""
    where = str(files[index]) if files else f"test image {index}"
    alt = f"{where}: is {true}, predicted {what} {sure}"
    return (
        f'<figure><img src="{data_uri(png(image), "image/png")}" alt="{text(alt)}" '
        f'title="{text(where)}"><figcaption><span class="name">{text(true)}</span> '
        f'<span class="name wrong">{text(what)} {sure}</span></figcaption></figure>'
    )


# --- the network ----------------------------------------------------------------------------------


def _filters(found: Contents) -> str:
    if found.model is None:
        return ""
    try:
        path, kernels = kernels_of(found.model)
    except PortacnnError:
        return ""
    some = kernels[:_MOST_KERNELS]
    tiles = some.transpose(0, 2, 3, 1) if some.shape[1] == 3 else some[:, 0]
    size = "x".join(map(str, kernels.shape[2:]))
    scale = max(1, round(40 / max(kernels.shape[2:])))
    said = f"{len(some)} of {len(kernels)} kernels of {size} of {path}"
    uri = data_uri(png(mosaic(tiles, 10, scale)), "image/png")
    figure = (
        f'<figure><img class="filters" src="{uri}" alt="{text(said)}">'
        f"<figcaption>{text(said)}; gray is 0</figcaption></figure>"
    )
    return section("filters", "Filters of the first convolution", figure)


def _pad(found: Contents) -> tuple[str, Any]:
    """Return the section of the drawing pad, and the data for its script, None without a pad."""
    if found.model is None:
        return "", None
    names = found.classified.names if found.classified else found.model.info.class_names
    if not names and len(found.model.output_shape) == 1:
        names = class_names(None, found.model.output_shape[0])
    try:
        held = network(found.model, found.test if found.classified else None, names)
    except NotInPageError as why:
        note = f"<p>This page has no drawing pad: {text(why)}.</p>"
        return section("pad", "Try it", note), None
    markup = (files(__package__) / "page" / "pad.html").read_text("utf-8")
    return section("pad", "Try it", markup), held


def _layers(found: Contents) -> str:
    if found.model is None:
        return ""
    rows = [
        (r.path, r.kind, "x".join(map(str, r.output)), *((n, f"{n:,}") for n in r[3:5]))
        for r in layer_rows(found.model, found.model.input_shape)
    ]
    heads = ("layer", "class", "output", "parameters", "multiply-adds")
    caption = f"Layers, for one sample of {'x'.join(map(str, found.model.input_shape))}"
    made = table("layers", heads, rows, numbers=(3, 4), caption=caption)
    if len(rows) > _MOST_ROWS:
        made = f"<details><summary>{len(rows)} layers</summary>{made}</details>"
    return section("network", "Network", made)


def _tables(found: Contents) -> str:
    parts = []
    if found.settings is not None:
        parts.append(section("settings", "Settings", pairs(_flat(found.settings))))
    if _environment(found):
        ran = {n: v for n, v in _environment(found).items() if n not in ("seconds", "peak_memory")}
        parts.append(section("environment", "Environment", pairs(_flat(ran))))
    return "".join(parts)


def _flat(values: Mapping[str, Any]) -> dict[str, str]:
    """Return names and values for people, without what is not there."""
    return dict(_pairs(values))


def _pairs(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        said = str(name).replace("_", " ")
        if isinstance(value, Mapping):
            some = [f"{n} {v}" for n, v in value.items() if v is not None]
            if some:
                yield said, ", ".join(some)
        elif isinstance(value, list):
            yield said, ", ".join(map(str, value)) or "none"
        elif value is not None:
            yield said, {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
