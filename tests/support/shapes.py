"""A folder of images of three shapes, one folder a class, as a person would have of photos."""

from pathlib import Path

import numpy as np

CLASSES = ("circle", "square", "triangle")


def draw_shape(name: str, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """One dark shape of any hue, size and place, a little tilted, on a light and noisy background:
    uint8 (H, W, 3)."""
    w, h = size
    y, x = np.mgrid[:h, :w].astype("float64")
    radius = rng.uniform(0.2, 0.4) * min(size)
    cx, cy = (rng.uniform(0.4, 0.6) * extent for extent in size)
    turn = rng.uniform(-0.3, 0.3)
    dx, dy = x - cx, y - cy
    corners = {"circle": 0, "square": 4, "triangle": 3}[name]
    inside = dx**2 + dy**2 < radius**2
    for corner in range(corners):  # a polygon: on the inner side of each of its edges
        angle = turn + np.pi / 2 + 2 * np.pi * corner / corners
        inside &= dx * np.cos(angle) + dy * np.sin(angle) < radius * np.cos(np.pi / corners)
    fore, back = rng.uniform(0, 120, 3), rng.uniform(160, 255, 3)
    image = np.where(inside[..., None], fore, back) + rng.normal(0, 10, (h, w, 3))
    return image.clip(0, 255).astype("uint8")


def write_shapes(
    folder: Path, each: int = 200, size: tuple[int, int] = (96, 72), end: str = "jpg", seed: int = 0
) -> Path:
    """Draw ``each`` images of every class below ``folder`` and return it."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(each):
            image = Image.fromarray(draw_shape(name, rng, size))
            image.save(folder / name / f"{name} {number:03}.{end}")
    return folder
