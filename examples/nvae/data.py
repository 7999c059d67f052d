"""Images from scikit-learn's digits, from MNIST-format files or from a folder, as whole numbers.

All of them come out as one type; what is wrong with them is said here, before any training.
"""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
GREY, WIDE = ("1", "L"), ("I;16", "I;16B", "I;16L", "I", "F")  # Pillow's modes
IDX_BYTES = 0x08  # the type code of unsigned bytes, and so of every MNIST-like set


class DataError(ValueError):
    """The user can put this right; the message says how."""


@dataclass(frozen=True)
class Images:
    """``train`` and ``test`` (N, C, H, W), uint8 in 0 .. levels - 1. H = W."""

    name: str
    train: Tensor
    test: Tensor
    levels: int

    @property
    def channels(self) -> int:
        return self.train.shape[1]

    @property
    def size(self) -> int:
        return self.train.shape[2]


def binarise(images: Tensor, levels: int) -> Tensor:
    """A fresh draw of binary pixels whose chance of 1 is their grey value (Salakhutdinov and
    Murray 2008: "dynamic binarisation")."""
    return torch.bernoulli(images.float() / (levels - 1))


def load(path: Path | None, size: int | None = None, seed: int = 0) -> Images:
    """Digits where ``path`` is None; else a folder of images or of MNIST-format files, or one
    MNIST-format file (``*-ubyte``, also ``.gz``).

    Args:
        size: height and width to bring images of a folder to [default: that of the first].
        seed: of the split into training and test images, where there is none already.

    Raises:
        DataError: nothing usable there, or unequal images.
    """
    if size is not None and size < 1:
        raise DataError(f"--size must be at least 1; got {size}")
    if size is not None and (path is None or path.is_file()):
        raise DataError(
            f"--size is for a folder of images; {path or 'the set of digits'} has its own"
        )
    if path is None:
        return _digits(seed)
    if path.is_file():
        return _split(path.name, _read_idx(path), 256, seed)
    if not path.is_dir():
        raise DataError(f"--data {path} does not exist")
    idx = sorted(
        p for p in path.iterdir() if "ubyte" in p.name and "images" in p.name and p.is_file()
    )
    if idx and size is not None:
        raise DataError(f"--size is for a folder of images; {path} has MNIST-format files")
    if idx:
        return _mnist(path, idx, seed)
    return _folder(path, size, seed)


def _digits(seed: int) -> Images:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise DataError(
            "the digits come with scikit-learn: pip install 'fastattn[examples]'"
        ) from None
    images = torch.from_numpy(load_digits().images).to(torch.uint8)[:, None]
    return _split("digits", images, 17, seed, test=297)


def _split(name: str, images: Tensor, levels: int, seed: int, test: int | None = None) -> Images:
    """A seeded sixth for testing, unless the number is given."""
    test = max(1, len(images) // 6) if test is None else test
    if len(images) <= test:
        raise DataError(f"{name} has {len(images)} images; at least 2 are needed")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images = images[order]
    return Images(name, images[:-test], images[-test:], levels)


def _mnist(folder: Path, files: list[Path], seed: int) -> Images:
    def one(start: tuple[str, ...]) -> Path | None:
        found = [f for f in files if f.name.lower().startswith(start)]
        if len(found) > 1:
            raise DataError(f"{folder} has {found[0].name} and {found[1].name}: keep one of them")
        return found[0] if found else None

    train, test = one(("train",)), one(("t10k", "test"))
    if train is None or test is None:
        if len(files) == 1:
            return _split(folder.name, _read_idx(files[0]), 256, seed)
        raise DataError(f"{folder} has image files, but none named train-images*-ubyte[.gz]")
    images = Images(folder.name, _read_idx(train), _read_idx(test), 256)
    if images.train.shape[1:] != images.test.shape[1:]:
        raise DataError(f"{train.name} and {test.name} have images of different sizes")
    return images


def _read_idx(path: Path) -> Tensor:
    """(N, 1, S, S) of a file of N images in the IDX format, padded with 0 to a multiple of 8."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"can't read {path}: {error}") from error
    if len(raw) < 16 or raw[:2] != b"\0\0" or raw[2] != IDX_BYTES or raw[3] != 3:
        raise DataError(
            f"{path} is no IDX file of images: it must start with the bytes 0 0 8 3 and three sizes"
        )
    count, height, width = struct.unpack(">III", raw[4:16])
    if len(raw) != 16 + count * height * width:
        raise DataError(
            f"{path} says {count} images of {height} x {width}, which takes "
            f"{16 + count * height * width} bytes; it has {len(raw)}"
        )
    if not count * height * width:
        raise DataError(f"{path} has no pixels: {count} images of {height} x {width}")
    pixels = np.frombuffer(raw, np.uint8, offset=16).reshape(count, 1, height, width)
    side = -(-max(height, width) // 8) * 8
    top, left = (side - height) // 2, (side - width) // 2
    padded = np.zeros((count, 1, side, side), np.uint8)
    padded[:, :, top : top + height, left : left + width] = pixels
    return torch.from_numpy(padded)


def _mode(path: Path) -> str:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            mode = image.mode
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"can't read the image {path}: {error}") from error
    if mode in WIDE:
        raise DataError(f"{path} has more than 8 bits a pixel ({mode}): convert it to 8 bits")
    return mode


def _folder(folder: Path, size: int | None, seed: int) -> Images:
    from PIL import Image, UnidentifiedImageError

    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(
            f"{folder} has neither images ({', '.join(SUFFIXES)}) nor MNIST-format files "
            "(*-images*-ubyte[.gz])"
        )
    images = []
    mode = "L" if all(_mode(path) in GREY for path in files) else "RGB"
    for path in files:
        try:
            with Image.open(path) as image:
                size = size or max(8, min(image.size) // 8 * 8)
                side = min(image.size)
                left, top = (image.width - side) // 2, (image.height - side) // 2
                square = image.convert(mode).crop((left, top, left + side, top + side))
                resized = square.resize((size, size), Image.Resampling.BOX)
                images.append(np.array(resized).reshape(size, size, -1))
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"can't read the image {path}: {error}") from error
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return _split(folder.name, stacked, 256, seed)
