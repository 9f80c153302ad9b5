"""Photographs with exact shapes laid over them, and the masks that say which pixel is which shape's.

A shape is filled with stripes of two colours of the photograph under it, so that neither colour nor brightness tells
what it is: discs are striped along the columns, squares along the rows, triangles are chequered. What lies below is the
background, class 0. A rim of one pixel is `IGNORED`, as where people draw outlines they are not sure of it.

Usage: shapes.py OUT SHARDS..., which writes OUT/NAME.tar with KEY.jpg and KEY.seg.png for every shard. With --digits
before OUT the shards are those of the demo, and the mask of a digit says of its bright pixels which digit they are.
"""

import io
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from scenes import encode, write_tar

CLASSES = ("background", "disc", "square", "triangle")
IGNORED = 255


def overlay(picture: Image.Image, seed: int) -> tuple[Image.Image, np.ndarray]:
    """One to three shapes over a picture, and the mask uint8 `[H, W]`."""
    draw = np.random.default_rng(seed)
    pixels = np.asarray(picture.convert("RGB")).copy()
    height, width = pixels.shape[:2]
    mask = np.zeros((height, width), np.uint8)
    rows, columns = np.mgrid[:height, :width]
    for _ in range(draw.integers(1, 4)):
        kind, radius = int(draw.integers(1, 4)), min(height, width) * draw.uniform(0.15, 0.3)
        y, x = draw.uniform(radius, height - radius), draw.uniform(radius, width - radius)
        dy, dx = rows - y, columns - x
        reach = {1: np.hypot(dy, dx), 2: 1.2 * np.maximum(abs(dy), abs(dx)), 3: np.maximum(1.4 * dy, 2 * abs(dx) - dy)}[
            kind
        ]
        light, dark = (np.percentile(pixels[abs(dy) + abs(dx) < radius], q, axis=0) for q in (90, 10))
        period = max(int(radius / 4), 2)
        stripes = {1: columns // period, 2: rows // period, 3: columns // period + rows // period}[kind] % 2
        inside = reach < radius
        pixels[inside] = np.where(stripes[..., None], light, dark)[inside]
        mask[inside] = kind
        mask[(reach >= radius) & (reach < radius + 1)] = IGNORED
    return Image.fromarray(pixels), mask


def masked(pictures: Iterable[tuple[str, Image.Image]], seed: int) -> Iterator[tuple[str, bytes]]:
    """Members of a tar, by key: the picture and its mask."""
    for number, (key, picture) in enumerate(pictures):
        image, mask = overlay(picture, seed + number)
        yield f"{key}.jpg", encode(image)
        yield f"{key}.seg.png", encode(Image.fromarray(mask), "PNG")


def _pictures(shard: Path) -> Iterator[tuple[str, Image.Image]]:
    with tarfile.open(shard) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            data = tar.extractfile(member)
            if data is not None and extension in ("jpg", "png"):
                yield key, Image.open(io.BytesIO(data.read()))


def digits(shard: Path) -> Iterator[tuple[str, bytes]]:
    """Members of a tar: digits as they are, and which digit their bright pixels are, class 0 being the background."""
    with tarfile.open(shard) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    for name, data in files.items():
        key, _, extension = name.partition(".")
        if extension == "png":
            grey = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
            mask = np.where(grey > 127, 1 + int(files[f"{key}.cls"]), 0).astype(np.uint8)
            yield name, data
            yield f"{key}.seg.png", encode(Image.fromarray(mask), "PNG")


def write_digits(shards: Iterable[str | Path], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for shard in map(Path, shards):
        write_tar(out / shard.name, digits(shard))
    (out / "seg_classes.txt").write_text("background\n" + "".join(f"{digit}\n" for digit in range(10)))


def write_masked(shards: Iterable[str | Path], out: Path) -> None:
    """`OUT/NAME.tar` for each shard, and the names of the classes."""
    out.mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(map(Path, shards)):
        write_tar(out / shard.name, masked(_pictures(shard), 100_000 * number + 50_000 * shard.name.startswith("val")))
    (out / "seg_classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))


if __name__ == "__main__":
    if sys.argv[1] == "--digits":
        write_digits(sys.argv[3:], Path(sys.argv[2]))
    else:
        write_masked(sys.argv[2:], Path(sys.argv[1]))
