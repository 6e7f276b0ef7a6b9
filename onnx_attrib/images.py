"""Files to arrays: images, .npy and .npz, fitted to a model's input.

A picture is turned the right way up, converted to the input's channels, resized to its height and
width, and scaled: value = (pixel · scale − mean) / std, with pixels from 0 to 255.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from onnx_attrib.errors import OptionError, RuntimeMissingError
from onnx_attrib.feeds import Port, show_shape

Array = npt.NDArray[Any]
Layout = Literal["nchw", "nhwc"]
LARGEST = 4096
"""Pixels along the longer side of a picture for a model that takes any size."""


@dataclass(frozen=True)
class Scaling:
    """value = (pixel · ``scale`` − ``mean``) / ``std``, with one mean and std, or one a channel."""

    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    name: str = ""

    def __call__(self, pixels: Array) -> Array:
        """Scale pixels of shape [H, W, C]; OptionError if C fits neither mean nor std."""
        channels = pixels.shape[-1]
        for what, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise OptionError(
                    f"{what} has {len(values)} values, but the model takes {channels} channel"
                    + ("s" if channels > 1 else "")
                )
        if not all(self.std):
            raise OptionError("std must not be zero")
        scaled = pixels.astype(np.float64) * self.scale - np.array(self.mean)
        return np.asarray(scaled / np.array(self.std))

    def override(
        self,
        scale: float | None,
        mean: tuple[float, ...] | None,
        std: tuple[float, ...] | None,
    ) -> Scaling:
        """This scaling with the given parts replaced."""
        given = {"scale": scale, "mean": mean, "std": std}
        changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        return replace(self, **changes, name="") if changes else self

    def __str__(self) -> str:
        if self.name:
            return self.name
        scale = f"1/{1 / self.scale:g}" if 0 < self.scale < 1 else f"{self.scale:g}"
        mean, std = (",".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
        return f"scale {scale}, mean {mean}, std {std}"


PRESETS = {
    "imagenet": Scaling(1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "imagenet"),
    "zero-one": Scaling(1 / 255, name="zero-one"),
    "minus-one-one": Scaling(1 / 127.5, (1.0,), name="minus-one-one"),
    "raw": Scaling(name="raw"),
}
# ONNX's own metadata for image models (docs/MetadataProps.md).
_NOMINAL = {
    "NominalRange_0_255": "raw",
    "Normalized_0_1": "zero-one",
    "Normalized_1_1": "minus-one-one",
}


@dataclass(frozen=True)
class Geometry:
    """How an input holds pictures: sizes are None where the model takes any.

    ``flat``: the input is [N, H·W·C] without axes for them.
    """

    layout: Layout
    height: int | None
    width: int | None
    channels: int
    rank: int
    flat: bool = False

    def place(self, pixels: Array) -> Array:
        """[H, W, C] in the input's layout, with a batch axis where the input has one."""
        if self.rank == 3 and self.channels == 1:
            return pixels[None, ..., 0]
        if self.layout == "nchw":
            pixels = pixels.transpose(2, 0, 1)
        if self.flat:
            return pixels.reshape(1, -1)
        return pixels[None] if self.rank == 4 else pixels

    def pictures(self, batch: Array) -> Array:
        """A batch of the input's shape (or of its attribution) as [N, H, W, C]."""
        if self.rank == 3 and self.channels == 1:
            return batch[..., None]
        if self.flat:
            sizes = (self.channels, self.height or 1, self.width or 1)
            batch = batch.reshape(-1, *(sizes if self.layout == "nchw" else sizes[1:] + sizes[:1]))
        if batch.ndim == 3:
            batch = batch[None]
        return batch.transpose(0, 2, 3, 1) if self.layout == "nchw" else batch


def geometry(shape: Sequence[int | str | None], layout: Layout | None = None) -> Geometry | None:
    """How an input of this declared shape holds pictures; None if it does not look like it.

    [N, C, H, W] and [N, H, W, C] are told apart by where 1, 3 or 4 stands; [N, H, W], [C, H, W],
    [H, W, C] and the flattened [N, H·W] and [N, 3·H·W] of square pictures are known too.
    """
    size = [dim if isinstance(dim, int) else None for dim in shape]
    if len(size) == 4:
        if layout is None:
            first, last = (size[i] in (1, 3, 4) for i in (1, 3))
            layout = "nhwc" if last and not first else "nchw"
        height, width, channels = (
            (size[2], size[3], size[1]) if layout == "nchw" else (size[1], size[2], size[3])
        )
        return Geometry(layout, height, width, 3 if channels is None else channels, 4)
    if len(size) == 3:
        if size[0] in (3, 4) and layout != "nhwc":
            return Geometry("nchw", size[1], size[2], size[0] or 3, 3)
        if size[2] in (3, 4) and layout != "nchw":
            return Geometry("nhwc", size[0], size[1], size[2] or 3, 3)
        return Geometry(layout or "nchw", size[1], size[2], 1, 3)
    if len(size) == 2 and size[1] is not None:
        for channels in (1, 3):
            side = math.isqrt(size[1] // channels)
            if side > 4 and side * side * channels == size[1]:
                return Geometry(layout or "nchw", side, side, channels, 2, flat=True)
    return None


def default_scaling(port: Port, metadata: Mapping[str, str], channels: int) -> Scaling:
    """The preset that a model asks for, or else the usual one for its kind of input.

    A model says so by ONNX's ``Image.NominalPixelRange``. Else integers are taken raw, colour
    pictures as on ImageNet, and gray ones from 0 to 1.
    """
    told = _NOMINAL.get(metadata.get("Image.NominalPixelRange", ""))
    if told is not None:
        return PRESETS[told]
    if port.dtype is not None and port.dtype.kind in "iu":
        return PRESETS["raw"]
    return PRESETS["imagenet" if channels == 3 else "zero-one"]


@dataclass(frozen=True)
class Picture:
    """An image file, ready for a model: ``value`` as fed, ``pixels`` [H, W, C] as shown."""

    value: Array
    pixels: Array
    scaling: Scaling
    geometry: Geometry


def load_picture(
    path: Path,
    port: Port,
    layout: Layout | None = None,
    scaling: Scaling | None = None,
    metadata: Mapping[str, str] | None = None,
    crop: bool = False,
) -> Picture:
    """Read an image file for an input.

    ``scaling`` None: :func:`default_scaling`. ``crop`` cuts the picture to the input's aspect ratio
    around its centre instead of stretching it. Raises OptionError for a file that is no image or an
    input that takes none, RuntimeMissingError without Pillow.
    """
    form = geometry(port.shape, layout)
    if form is None or form.channels not in (1, 3, 4):
        raise OptionError(
            f"input '{port.name}' {show_shape(port.shape)} does not look like a picture; give its "
            "values as .npy or .npz" + ("" if layout else ", or name the axes with --layout")
        )
    pixels = read_pixels(path, form.channels, form.height, form.width, crop)
    scaling = scaling or default_scaling(port, metadata or {}, form.channels)
    value = form.place(scaling(pixels)).astype(np.float32)
    if port.dtype is not None and port.dtype.kind in "iu":
        limits = np.iinfo(port.dtype)
        value = np.clip(np.rint(value), limits.min, limits.max)
    return Picture(value.astype(port.dtype or np.float32), pixels, scaling, form)


def read_pixels(
    path: Path,
    channels: int = 3,
    height: int | None = None,
    width: int | None = None,
    crop: bool = False,
) -> Array:
    """An image file as pixels from 0 to 255, [H, W, C], resized where a size is given.

    Transparent parts become white. ``channels``: 1 (gray), 3 (RGB) or 4 (RGBA).
    """
    image_module, ops = _pillow()
    try:
        with image_module.open(path) as opened:
            image = ops.exif_transpose(opened)
            image.load()
    except FileNotFoundError:
        raise OptionError(f"cannot read '{path}': No such file or directory") from None
    except image_module.UnidentifiedImageError:
        raise OptionError(f"'{path}' is not an image, .npy or .npz that can be read") from None
    except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
        message = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise OptionError(f"cannot read the image '{path}': {message}") from None
    if image.mode.startswith(("I", "F")):
        # 16 bits and more: Pillow clips these where it should scale.
        deep = np.asarray(image, np.float64)
        top = 65535 if deep.max() > 255 else 255
        image = image_module.fromarray((deep.clip(0, top) * (255 / top)).round().astype(np.uint8))
    if channels < 4 and ("A" in image.getbands() or "transparency" in image.info):
        image = image.convert("RGBA")
        white = image_module.new("RGBA", image.size, (255, 255, 255, 255))
        image = image_module.alpha_composite(white, image)
    image = image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
    if height is None and width is None and max(image.size) > LARGEST:
        image.thumbnail((LARGEST, LARGEST))
    size = (width or image.width, height or image.height)
    if size != image.size:
        method = image_module.Resampling.BILINEAR
        image = ops.fit(image, size, method) if crop else image.resize(size, method)
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _pillow() -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise RuntimeMissingError(
            "reading an image needs Pillow: pip install onnx-attrib[plot]"
        ) from None
    return Image, ImageOps


def load_arrays(path: Path) -> Array | dict[str, Array]:
    """Read a .npy (an array) or .npz (arrays by name); OptionError if it is neither."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("it is neither .npy nor .npz")
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except OSError as error:
        raise OptionError(f"cannot read '{path}': {error.strerror or _line(error)}") from None
    except Exception as error:  # damaged archives raise several kinds
        raise OptionError(f"cannot read '{path}' as .npy or .npz: {_line(error)}") from None


def is_array_file(path: Path) -> bool:
    """Whether the file's name says .npy or .npz."""
    return path.suffix.lower() in (".npy", ".npz")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
