"""Pictures of a report without an imaging library: curves as SVG, which follow the page's colours,
and images as PNG."""

import struct
import zlib
from collections.abc import Mapping, Sequence
from math import ceil, floor, isfinite, log10

import numpy as np

from portacnn.report.markup import text
from portacnn.runtime import HostArray

_WIDTH, _HEIGHT = 360, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 12, 34
_MOST_MARKERS = 40
_CIVIDIS = ((0, 32, 76), (58, 77, 110), (124, 123, 120), (188, 175, 111), (255, 234, 70))


def lines(title: str, values: Mapping[str, Sequence[float]], axis: str = "epoch") -> str:
    """Return a panel with a line for each of at most two sets by number, from 1.

    Values that are not finite interrupt a line.
    """
    finite = [v for series in values.values() for v in series if isfinite(v)]
    if not finite:
        return ""
    count = max(map(len, values.values()))
    ticks = nice(min(finite), max(finite))
    low, high = ticks[0], ticks[-1]
    plot_w, plot_h = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x_of(number: float) -> float:
        return _LEFT + plot_w * (0.5 if count == 1 else (number - 1) / (count - 1))

    def y_of(value: float) -> float:
        return _TOP + plot_h * (1 - (value - low) / (high - low))

    parts = []
    for tick in ticks:
        y = y_of(tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_said(tick, ticks)}</text>'
        )
    for number in _whole_ticks(count):
        place = f'x="{x_of(number):.1f}" y="{_HEIGHT - 18}"'
        anchor = "end" if number == count > 1 else "middle"
        parts.append(f'<text {place} text-anchor="{anchor}">{number}</text>')
    middle = _LEFT + plot_w / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{_HEIGHT - 3}" text-anchor="middle">{text(axis)}</text>'
    )
    for index, series in enumerate(values.values()):
        points = [(x_of(i), y_of(v)) for i, v in enumerate(series, 1) if isfinite(v)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="line s{index % 2}" points="{path}"/>')
        if len(series) <= _MOST_MARKERS:
            parts += [_marker(x, y, index % 2) for x, y in points]
    said = "; ".join(f"{name}: {_range(series)}" for name, series in values.items())
    legend = "".join(
        f'<span class="key"><svg width="30" height="12" aria-hidden="true"><polyline '
        f'class="line s{i % 2}" points="0,6 30,6"/>{_marker(15, 6, i % 2)}</svg>{text(name)}</span>'
        for i, name in enumerate(values)
        if len(values) > 1
    )
    return (
        f'<figure class="curve"><figcaption>{text(title)}{legend}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{text(title)} by '
        f'{text(axis)}. {text(said)}">{"".join(parts)}</svg></figure>'
    )


def nice(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers that span low..high, at least two."""
    if high - low < 1e-12 * max(abs(high), 1e-30):
        margin = abs(high) * 0.1 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / most
    power = 10.0 ** floor(log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * (1 - 1e-9))
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def _said(tick: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0]
    most = max(abs(ticks[0]), abs(ticks[-1]))
    if abs(tick) < step / 2:
        return "0"
    if most < 1e-2 or most >= 1e5:
        return f"{tick:.1e}".replace("e-0", "e-").replace("e+0", "e")
    places = max(0, ceil(-log10(step) - 1e-9)) + (1 if f"{step:.1e}".startswith("2.5") else 0)
    return f"{tick:.{places}f}"


def _whole_ticks(count: int) -> list[int]:
    step = next(int(s) for p in range(9) for s in (10**p, 2 * 10**p, 5 * 10**p) if count / s <= 6)
    found = [1, *(n for n in range(step, count + 1, step) if n > 1 + step / 2)]
    return found if count - found[-1] < step * 0.6 else [*found, count]


def _marker(x: float, y: float, kind: int) -> str:
    if kind == 0:
        return f'<circle class="dot s0" cx="{x:.1f}" cy="{y:.1f}" r="2.8"/>'
    return f'<rect class="dot s1" x="{x - 2.6:.1f}" y="{y - 2.6:.1f}" width="5.2" height="5.2"/>'


def _range(series: Sequence[float]) -> str:
    good = [v for v in series if isfinite(v)]
    return f"{good[0]:.4g} at first, {good[-1]:.4g} at last" if good else "no values"


# --- images ---------------------------------------------------------------------------------------


def png(pixels: HostArray) -> bytes:
    """Return uint8 pixels (H, W), (H, W, 3) or (H, W, 4) as a PNG file."""
    height, width = pixels.shape[:2]
    kind = {2: 0, 3: 2, 4: 6}[2 if pixels.ndim == 2 else pixels.shape[2]]
    rows = np.ascontiguousarray(pixels).reshape(height, -1)
    lines = np.zeros((height, rows.shape[1] + 1), np.uint8)  # a zero before each: no filter
    lines[:, 1:] = rows
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


def in_bytes(image: HostArray) -> HostArray:
    """Return an image (H, W) or (H, W, 3) of 0..1 as uint8."""
    return (255.0 * image.clip(0.0, 1.0) + 0.5).astype(np.uint8)


def mosaic(tiles: HostArray, columns: int, scale: int) -> HostArray:
    """Return tiles (N, H, W) or (N, H, W, 3) of 0..1 as one uint8 image (.., .., 4), each cell
    enlarged, on a transparent ground."""
    tiles = in_bytes(tiles if tiles.ndim == 4 else np.repeat(tiles[..., None], 3, axis=3))
    tiles = tiles.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = tiles.shape
    columns = min(columns, count)
    gap = scale
    rows = -(-count // columns)
    whole = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), np.uint8)
    for number, tile in enumerate(tiles):
        y, x = number // columns * (height + gap), number % columns * (width + gap)
        whole[y : y + height, x : x + width, :3] = tile
        whole[y : y + height, x : x + width, 3] = 255
    return whole


def heat(values: HostArray) -> HostArray:
    """Return values 0..1 (H, W) in the colours of cividis, uint8 (H, W, 3)."""
    at = np.linspace(0.0, 1.0, len(_CIVIDIS))
    channels = [np.interp(values, at, [color[i] for color in _CIVIDIS]) for i in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)
