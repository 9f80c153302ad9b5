import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.cli import main
from pipeline.data import tars
from pipeline.data.images import BadImage
from pipeline.data.mask_files import encode_mask
from pipeline.data.shards import build
from pipeline.errors import UserError

CLASSES = np.array([[0, 0, 3, 255], [0, 7, 3, 255], [7, 7, 3, 3]], np.uint8)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_numbers_of_a_mask_survive_whatever_its_file_shows(encoded: Callable[..., bytes]) -> None:
    palette = Image.fromarray(CLASSES, "P")
    palette.putpalette([i * 37 % 256 for i in range(768)])
    sixteen = Image.fromarray(CLASSES.astype(np.uint16))
    for mask, format_ in ((palette, "PNG"), (Image.fromarray(CLASSES), "TIFF"), (sixteen, "PNG"), (palette, "BMP")):
        packed = encode_mask(encoded(mask, format_), (4, 3), None)
        assert Image.open(io.BytesIO(packed)).mode == "L"
        assert np.array_equal(pixels(packed), CLASSES)
    black_and_white = Image.fromarray(CLASSES > 3)
    assert np.array_equal(pixels(encode_mask(encoded(black_and_white), (4, 3), None)), CLASSES > 3)


def test_mask_follows_its_shrunken_image_without_mixing_classes(encoded: Callable[..., bytes]) -> None:
    large = encoded(Image.fromarray(CLASSES.repeat(10, 0).repeat(10, 1)))
    packed = pixels(encode_mask(large, (8, 6), 6))
    assert np.array_equal(packed, CLASSES.repeat(2, 0).repeat(2, 1))


def test_mask_that_is_none_has_a_reason(encoded: Callable[..., bytes]) -> None:
    for image, reason in (
        (Image.new("RGB", (4, 3)), "mask colours"),
        (Image.fromarray(CLASSES.astype(np.uint16) * 9), "mask values"),
        (Image.fromarray(CLASSES.T.copy()), "mask size"),
    ):
        with pytest.raises(BadImage, match=reason):
            encode_mask(encoded(image), (4, 3), None)


@pytest.fixture
def photos_and_masks(tmp_path: Path, encoded: Callable[..., bytes]) -> Path:
    """Four images `a/0.png` ... `a/3.png` with masks for the first three; the mask of `a/2` has another size."""
    for i in range(4):
        for folder, size in (("a", (40, 30)), ("masks/a", (40, 30) if i != 2 else (30, 40))):
            path = tmp_path / "photos" / folder / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if folder == "a" or i < 3:
                path.write_bytes(
                    encoded(Image.new("RGB" if folder == "a" else "L", size, (i,) * 3 if folder == "a" else i))
                )
    return tmp_path / "photos"


def test_masks_are_packed_beside_their_images(
    photos_and_masks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--masks", str(photos_and_masks / "masks"), "--shorter-side", "15"]
    assert main(["shards", "build", str(photos_and_masks), str(out), *words]) == 0
    told = capsys.readouterr().err
    assert "a/3.png (no mask)" in told
    assert "a/2.png (mask size)" in told
    assert "masks (the masks)" in told
    samples = tars.walk(out / "train-000000.tar")
    data = (out / "train-000000.tar").read_bytes()
    assert [[member.extension for member in sample.members] for sample in samples] == [["cls", "png", "seg.png"]] * 2
    for sample in samples:
        image, mask = (pixels(data[m.offset : m.offset + m.size]) for m in (sample.image, sample.mask) if m is not None)
        assert image.shape[:2] == mask.shape == (15, 20)
        assert (image[..., 0] == mask).all(), "another image's mask"


def test_masks_need_a_folder_of_their_own(photos_and_masks: Path, tmp_path: Path) -> None:
    for source, masks, message in (
        (str(photos_and_masks), photos_and_masks, "among the images"),
        (str(photos_and_masks), tmp_path / "nowhere", "no such folder of masks"),
        ("sklearn:digits", photos_and_masks / "masks", "belong to a folder"),
    ):
        with pytest.raises(UserError, match=message):
            build(source, tmp_path / "out", masks=masks, progress=False)
