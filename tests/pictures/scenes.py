"""Small colour pictures with the statistics of photographs, rendered at test time.

"Dead leaves": opaque shapes of all sizes (radius r with density ~ 1/r^3) hide one another, which gives edges and flat
regions at every scale, as photographs have them (Lee, Mumford and Huang 2001). Over them lie a texture whose amplitude
falls with the frequency, light from one side, gamma and the noise of a sensor. A class is a palette, a kind of shape
and a backdrop, so neighbours in pixels are of one class more often than not, and not always.
"""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDES = ((96, 128), (128, 96), (112, 112), (160, 120), (120, 160), (90, 150))  # width and height
PER_SHARD = 120
SHARDS = {"train": 3, "val": 2}


class Scene(NamedTuple):
    """A class of pictures: hue of the shapes and of the backdrop in turns of the wheel, and the shapes' form."""

    hue: float
    backdrop: float
    form: str


CLASSES = (
    Scene(0.30, 0.58, "disc"),
    Scene(0.05, 0.12, "bar"),
    Scene(0.60, 0.95, "triangle"),
    Scene(0.95, 0.35, "disc"),
    Scene(0.12, 0.60, "box"),
    Scene(0.75, 0.20, "bar"),
)
SHARES = (0.26, 0.20, 0.17, 0.15, 0.12, 0.10)  # unbalanced, as real sets are


def colours(generator: np.random.Generator, hue: float, count: int) -> np.ndarray:
    """Colours `[count, 3]` near a hue; few are vivid, as outdoors."""
    hues = (hue + 0.07 * generator.normal(size=(count, 1))) % 1
    saturation, value = generator.beta(2, 3, (count, 1)), generator.uniform(0.15, 1, (count, 1))
    wheel = np.clip(np.abs((hues * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return (255 * value * (1 + saturation * (wheel - 1))).astype(int)


def leaves(generator: np.random.Generator, form: str, size: tuple[int, int], count: int) -> np.ndarray:
    """Corners of shapes, `[count, corners, 2]`."""
    radius = 0.45 * min(size) / np.sqrt(1 + 60 * generator.uniform(size=(count, 1)))  # density ~ 1/r^3
    corners, squeeze = {"disc": (14, 0.9), "bar": (4, 0.2), "triangle": (3, 1.0), "box": (4, 0.8)}[form]
    angles = generator.uniform(0, 2 * np.pi, (count, 1)) + np.linspace(0, 2 * np.pi, corners, endpoint=False)
    turn = np.exp(1j * generator.uniform(0, np.pi, (count, 1)))
    points = turn * (np.cos(angles) + 1j * squeeze * np.sin(angles)) * radius
    return np.stack([points.real, points.imag], -1) + generator.uniform(0, 1, (count, 1, 2)) * size


def texture(generator: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Noise `[H, W]` of deviation about 1 whose amplitude halves with every doubling of the frequency."""
    total = np.zeros(size[::-1], np.float32)
    for octave in range(6):
        cells = generator.normal(size=(2 + 2**octave, 2 + 2**octave)).astype(np.float32)
        total += np.asarray(Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)) / 2**octave
    return total


def render(seed: int, label: int, size: tuple[int, int] | None = None) -> Image.Image:
    """Picture number `seed` of class `label`, RGB; `size` is width and height."""
    generator = np.random.default_rng([seed, label])
    scene = CLASSES[label]
    size = size or SIDES[generator.integers(len(SIDES))]
    image = Image.new("RGB", size, tuple(colours(generator, scene.backdrop, 1)[0].tolist()))
    draw, count = ImageDraw.Draw(image), int(generator.integers(30, 90))
    fills = colours(generator, scene.hue, count).tolist()
    for corners, fill in zip(leaves(generator, scene.form, size, count), fills, strict=True):
        draw.polygon(corners.ravel().tolist(), fill=tuple(fill))
    image = image.filter(ImageFilter.GaussianBlur(0.6))  # a lens
    light = np.add.outer(np.linspace(*generator.uniform(0.5, 1.1, 2), size[1]), np.linspace(-0.2, 0.2, size[0]))
    linear = (np.asarray(image, np.float32) / 255) ** 2.2 * light[..., None].clip(0.2)
    linear *= np.exp(0.3 * texture(generator, size))[..., None]
    levels = 255 * linear.clip(0, 1) ** (1 / 2.2) + generator.normal(0, 2, (*size[::-1], 3))
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, format_: str = "JPEG", **options: object) -> bytes:
    """The picture as a file's bytes; JPEG at quality 90 unless told."""
    file = io.BytesIO()
    image.save(file, format_, **({"quality": 90} if format_ == "JPEG" else {}) | options)
    return file.getvalue()


def write_tar(path: Path, members: Iterator[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_labelled(directory: Path) -> None:
    """Write `train-*.tar` and `val-*.tar`, members `KEY.jpg` and `KEY.cls`."""
    for split, shards in SHARDS.items():
        for shard in range(shards):
            write_tar(directory / f"{split}-{shard:06d}.tar", _labelled(split, shard))


def _labelled(split: str, shard: int) -> Iterator[tuple[str, bytes]]:
    first = (10_000 if split == "val" else 0) + shard * PER_SHARD
    for seed in range(first, first + PER_SHARD):
        label = int(np.random.default_rng(seed).choice(len(CLASSES), p=SHARES))
        yield f"{split}_{seed:05d}.jpg", encode(render(seed, label))
        yield f"{split}_{seed:05d}.cls", str(label).encode()
