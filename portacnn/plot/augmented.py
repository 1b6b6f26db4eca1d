"""What augmentation does to images: a row per image, the original and some variants of it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from portacnn.arguments import whole
from portacnn.augment import Transform, apply
from portacnn.augment.applying import checked
from portacnn.errors import ShapeError
from portacnn.plot.style import figure
from portacnn.runtime import Array, HostArray, backend_of, describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST = 24  # images or variants in a picture
_CELL = 1.1  # inches


def augmented(
    images: Array,
    augment: Sequence[Transform] | Transform | str,
    *,
    variants: int = 7,
    seed: int = 0,
    input_range: tuple[float, float] | None = None,
) -> "Figure":
    """Return a picture of images and their variants: each row has an image and what it becomes in
    the first epochs of a training run with this seed.

        augmented(x_train[:4], [Rotation(15), Shift(2)]).savefig("augmented.png")

    Args:
        images: (N, C, H, W), at most 24, floating point or uint8. Of images with other numbers of
            channels than 1 and 3, the mean over channels is shown.
        augment: transforms of ``portacnn.augment``, or words for them, such as "standard".
        variants: the number of variants, at most 24.
        input_range: the values of black and white. The default is (0, 255) for uint8 images, (0, 1)
            for images within it, and otherwise the smallest and largest value.

    Raises:
        DependencyError: if matplotlib is not installed.
        ShapeError, ArgumentError: if an argument does not fit.
    """
    variants = min(whole("variants", variants, 1), _MOST)
    backend = backend_of(images)
    if images.ndim != 4 or not 1 <= images.shape[0] <= _MOST:
        raise ShapeError(f"expected 1 to {_MOST} images (N, C, H, W), got {describe(images)}")
    transforms = checked(augment, tuple(images.shape[1:]))
    original = backend.to_host(images)
    if input_range is None:
        low, high = float(original.min()), float(original.max())
        input_range = (0.0, 1.0) if low >= 0.0 and high <= 1.0 else (low, high)
        if original.dtype.kind == "u":
            input_range = (0.0, 255.0)
    rows, made = int(images.shape[0]), [original]
    for epoch in range(variants):
        options: dict[str, Any] = {"seed": seed, "epoch": epoch, "input_range": input_range}
        made.append(backend.to_host(apply(transforms, images, **options).images))
    drawn = figure(_CELL * (variants + 1), _CELL * rows + 0.35)
    axes = drawn.subplots(rows, variants + 1, squeeze=False)
    for column, batch in enumerate(made):
        axes[0, column].set_title("original" if not column else f"epoch {column}", fontsize=8)
        for row in range(rows):
            axes[row, column].imshow(
                _shown(batch[row], *input_range), cmap="gray", vmin=0.0, vmax=1.0
            )
            axes[row, column].set_axis_off()
    return drawn


def _shown(image: HostArray, black: float, white: float) -> HostArray:
    """Return an image (C, H, W) as matplotlib takes it: (H, W) or (H, W, 3), in 0..1."""
    scaled = ((image.astype("float64") - black) / ((white - black) or 1.0)).clip(0.0, 1.0)
    return scaled.transpose(1, 2, 0) if len(scaled) == 3 else scaled.mean(axis=0)
