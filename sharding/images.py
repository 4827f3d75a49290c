"""Encoded images (JPEG, PNG) that stay encoded in the shards: what is read of them, and where they become pixels."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["IMAGE_NAMES", "RGB", "check_depth", "decode_image", "image_size"]

IMAGE_NAMES = ("jpg", "jpeg", "png")  # extensions of members that hold encoded images
RGB = ("R", "G", "B")


def decode_image(data: bytes | bytearray | memoryview) -> NDArray[np.uint8]:
    """uint8 [3, H, W] of an encoded image; grey and palette images become RGB.

    Raises:
        ValueError: the bytes are no image, or it is damaged.
    """
    pixels: NDArray[np.uint8] = _opened(data, lambda image: np.asarray(image.convert("RGB")))
    return pixels.transpose(2, 0, 1)


def image_size(data: bytes | bytearray | memoryview) -> tuple[int, int]:
    """(height, width) from the header alone.

    Raises:
        ValueError: the bytes are no image.
    """
    size: tuple[int, int] = _opened(data, lambda image: image.size[::-1])
    return size


def check_depth(data: bytes | bytearray | memoryview) -> None:
    """
    Raises:
        ValueError: a PNG of 16 bits a channel, which Pillow cuts off at 255 without a word.
    """
    if data[:4] == b"\x89PNG" and data[24] == 16:  # its header's bit depth
        raise ValueError("has 16 bits a channel; Pillow would cut them off at 255: store it as HDF5")


def _opened(data: bytes | bytearray | memoryview, use: Callable[[Any], Any]) -> Any:
    from PIL import Image, UnidentifiedImageError  # training from arrays does without

    try:
        with Image.open(io.BytesIO(data)) as image:
            return use(image)
    except UnidentifiedImageError as error:  # its own text is the address of the bytes
        raise ValueError("no image that can be decoded (of no known format)") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # damaged PNG chunks are SyntaxErrors
        raise ValueError(f"no image that can be decoded ({error})") from error
