"""Decode one image file to uint8 (C, H, W), with the same pixels on every machine.

1. Only the formats in ``FORMATS`` are read, and only images of at most ``max_pixels`` pixels; the
   size is known before anything is decoded. Of an animation, the first image is taken.
2. The rotation that the camera noted in EXIF is applied.
3. Of 16-bit grey images the high byte is taken. 32-bit and floating-point images are refused.
4. Transparent images are laid over white. Palettes, CMYK and other colour spaces become RGB, as
   Pillow converts them; mode "L" is Pillow's grey, (299 R + 587 G + 114 B) / 1000.
5. The image is resized until it just covers H x W, the other side rounded down, by Pillow's
   bilinear filter, which averages where it shrinks. For a square, H = W = S, the short side becomes
   S. (torchvision: ``Resize(S)`` of Pillow images.)
6. The centre H x W is cropped: of h x w pixels from row round((h - H) / 2) and column
   round((w - W) / 2), where a half is rounded to the even number. (torchvision: ``CenterCrop``.)
"""

import errno
import os
from collections.abc import Sequence
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from portacnn.arguments import one_of, pair, whole
from portacnn.errors import DataFormatError, DependencyError
from portacnn.runtime import HostArray

RULE = 1
"""Number of the rule above. Another rule is another number, so that caches are made anew."""

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
_NAMES = ".jpg .jpeg .jpe .jfif .mpo .png .gif .bmp .webp .tif .tiff .ppm .pgm .pbm"
SUFFIXES = frozenset(_NAMES.split(" "))
"""File name extensions of images, in lower case."""

MAX_PIXELS = 1 << 26
"""Largest number of pixels of an image that is decoded, 8192 x 8192."""
LARGEST = 4096
"""Largest size that images are resized to."""

_ROTATION = 0x0112  # EXIF's tag


def pillow() -> Any:
    """Return ``PIL.Image``. Raises DependencyError if Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DependencyError(
            'reading images needs Pillow, which is not installed: pip install "portacnn[data]"'
        ) from error
    Image.init()  # all formats, before threads look for them
    return Image


def read_image(
    image: str | os.PathLike[str] | bytes,
    image_size: int | Sequence[int],
    *,
    mode: Literal["RGB", "L"] = "RGB",
    max_pixels: int = MAX_PIXELS,
) -> HostArray:
    """Return one image as uint8 (C, H, W), with the pixels that ``ImageFolder`` reads: for
    predictions about images from elsewhere.

        image = portacnn.data.read_image("cat.jpg", 64)
        logits = model.predict(image[None])

    Args:
        image: path of a file, or the content of one.
        image_size: H and W, one number or two.
        mode, max_pixels: see ``ImageFolder``.

    Raises:
        DataFormatError: if it is no image, is damaged, or is larger than ``max_pixels``.
        OSError: if the system cannot read the file.
    """
    one_of("mode", mode, "RGB", "L")
    size = pair("image_size", image_size, 1, LARGEST)
    most = whole("max_pixels", max_pixels, 1)
    if isinstance(image, bytes | bytearray | memoryview):
        return decode(BytesIO(image), "the image", size, mode, most)
    if not os.path.exists(image):
        raise FileNotFoundError(f"there is no file {os.fspath(image)}")
    return decode(Path(image), os.fspath(image), size, mode, most)


def decode(
    file: Path | BinaryIO, name: str, size: tuple[int, int], mode: str, max_pixels: int
) -> HostArray:
    """Return an image file as uint8 (C, H, W), by the rule above.

    Args:
        file: its path, or the open file.
        name: what to call it in a message.
        size: H and W.
        mode: "RGB" or "L".
        max_pixels: largest number of pixels that is decoded, and of the resized image.

    Raises:
        DataFormatError: if it is missing, cannot be decoded, or is larger than ``max_pixels``.
        OSError: if the system cannot read it.
    """
    image_class = pillow()
    bombs = (image_class.DecompressionBombError, image_class.DecompressionBombWarning)
    try:
        formats = [name for name in FORMATS if name in image_class.OPEN]  # WebP is optional
        with image_class.open(file, formats=formats) as image:
            _check_size(image.size, size, name, max_pixels)
            image.load()
            upright = _upright(image)
            return _fitted(_in_mode(upright, mode, name), size)
    except (DataFormatError, MemoryError):
        raise
    except OSError as error:
        if error.errno not in (None, errno.ENOENT):  # the system's, not Pillow's
            error.filename = error.filename or name
            raise
        raise _undecodable(name, error) from error
    except bombs as error:
        raise DataFormatError(
            f"{name}: the image has more than max_pixels={max_pixels} ({str(error).rstrip('.')})"
        ) from error
    except Exception as error:  # Pillow raises errors of many types for damaged files
        raise _undecodable(name, error) from error


def _undecodable(name: str, error: Exception) -> DataFormatError:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):  # whose text has the address of an object
        reason = f"it is none of {', '.join(FORMATS)}"
    else:
        reason = f"{type(error).__name__}: {error}"
    return DataFormatError(f"{name}: cannot be decoded as an image ({reason})")


def _check_size(size: tuple[int, int], target: tuple[int, int], name: str, most: int) -> None:
    width, height = size
    if width * height > most:
        raise DataFormatError(
            f"{name}: the image has {width} x {height} pixels, more than max_pixels={most}"
        )
    resized = _covering(size, target) if width and height else (0, 0)
    if prod(resized) > most:
        raise DataFormatError(
            f"{name}: an image of {width} x {height} pixels is too long for its width: resized to "
            f"{resized[0]} x {resized[1]} it would have more than max_pixels={most}"
        )


def _covering(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Return the width and height of an image that just covers ``target`` (H, W)."""
    width, height = size
    high, wide = target
    if width * high <= height * wide:
        return wide, wide * height // width
    return high * width // height, high


def _upright(image: Any) -> Any:
    """Return an image rotated as EXIF says. Damaged EXIF is ignored."""
    from PIL import ImageOps

    try:
        turned = image.getexif().get(_ROTATION, 1) != 1
    except Exception:
        return image
    return ImageOps.exif_transpose(image) if turned else image


def _in_mode(image: Any, mode: str, name: str) -> Any:
    """Return an image as RGB or L, by steps 3 and 4 of the rule."""
    from PIL import Image

    if image.mode.startswith("I;16") or image.mode == "I":
        pixels = np.asarray(image)
        if image.mode == "I" and (pixels.min() < 0 or pixels.max() > 0xFFFF):
            raise DataFormatError(
                f"{name}: the pixels have 32 bits ({pixels.min()}..{pixels.max()}); expected 8 or "
                "16, convert the image first"
            )
        image = Image.fromarray((pixels.astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise DataFormatError(
            f"{name}: the pixels are floating-point numbers; expected 8 or 16 bits, convert the "
            "image first"
        )
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, over).convert("RGB")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return image if image.mode == mode else image.convert(mode)


def _fitted(image: Any, size: tuple[int, int]) -> HostArray:
    """Return an image resized and cropped, by steps 5 and 6 of the rule."""
    from PIL import Image

    resized = _covering(image.size, size)
    if resized != image.size:
        image = image.resize(resized, Image.Resampling.BILINEAR)
    height, width = size
    left, top = round((resized[0] - width) / 2), round((resized[1] - height) / 2)
    pixels = np.asarray(image)[top : top + height, left : left + width]
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(pixels)
