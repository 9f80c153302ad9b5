from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pipeline.data import tars
from pipeline.data.encode import encode
from pipeline.data.images import BadImage, inspect


def outcome(content: bytes) -> tuple[str, bytes] | str:
    try:
        return encode(content)
    except BadImage as error:
        return error.reason


def test_one_look_at_a_plain_file_ends_as_two_do(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = odd / "images-000000.tar"
    data = shard.read_bytes()
    images = [sample.image for sample in tars.walk(shard)]
    files = [data[image.offset : image.offset + image.size] for image in images if image]
    quick = [outcome(content) for content in files]
    monkeypatch.setattr("pipeline.data.encode._plain_format", lambda content: None)
    thorough = [outcome(content) for content in files]
    differ = [i for i, (one, other) in enumerate(zip(quick, thorough, strict=True)) if one != other]
    assert differ == []
    assert sum(isinstance(one, tuple) for one in quick) > len(files) / 3


def test_plain_is_what_no_decoder_can_see_otherwise(encoded: Callable[..., bytes]) -> None:
    picture = Image.new("RGB", (9, 9), "red")
    for image, format_, plain in (
        (picture, "JPEG", True), (picture.convert("L"), "JPEG", True), (picture.convert("CMYK"), "JPEG", False),
        (picture, "PNG", True), (picture.convert("P"), "PNG", False), (picture.convert("RGBA"), "PNG", False),
        (picture.convert("1"), "PNG", False), (picture, "WEBP", False),
    ):  # fmt: skip
        assert inspect(encoded(image, format_), 10**6).plain == plain, (image.mode, format_)
    assert not inspect(encoded(picture, "PNG", gamma=0.5, icc_profile=b"x" * 200), 10**6).plain
    rgb = encoded(picture, "JPEG", keep_rgb=True)
    assert not inspect(rgb, 10**6).plain
