import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from pipeline.data import augment, decoders
from pipeline.data.decoders import check, require_equal_pictures
from pipeline.data.encode import encode
from pipeline.data.images import BadImage, decode, decode_stored

PICTURE = Image.fromarray((np.arange(40 * 60 * 3).reshape(40, 60, 3) % 251).astype(np.uint8))


def without_adobe_marker(jpeg: bytes) -> bytes:
    """The same JPEG without its APP14 segment, by which decoders know that CMYK is stored inverted."""
    at, out = 2, jpeg[:2]
    while jpeg[at + 1] != 0xDA:
        (length,) = struct.unpack_from(">H", jpeg, at + 2)
        out += b"" if jpeg[at + 1] == 0xEE else jpeg[at : at + 2 + length]
        at += 2 + length
    return out + jpeg[at:]


@pytest.mark.parametrize(
    ("format_", "mode"),
    [
        *(("JPEG", mode) for mode in ("L", "RGB", "CMYK")),
        *(("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *(("WEBP", mode) for mode in ("RGB", "RGBA")),
    ],
)
def test_both_decoders_see_the_same_picture(format_: str, mode: str, encoded: Callable[..., bytes]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(PICTURE.convert(mode), format_, exif=exif)
    check(data)
    assert encode(data)[1] == data


def test_cmyk_that_training_would_see_black_is_named_and_stored_anew(encoded: Callable[..., bytes]) -> None:
    odd = without_adobe_marker(encoded(PICTURE.convert("CMYK"), "JPEG", quality=95))
    with pytest.raises(BadImage, match="pixels"):
        check(odd)
    extension, stored = encode(odd)
    assert extension == "png"
    assert np.array_equal(np.asarray(decode(stored)), np.asarray(decode(odd)))
    check(stored)


def test_pictures_differ_by_a_share_of_far_values_or_by_a_little_everywhere(encoded: Callable[..., bytes]) -> None:
    data = encoded(PICTURE)
    pixels = np.asarray(decode_stored(data).stored)
    one, all_a_little, corner, turned = pixels.copy(), pixels.astype(int) + 3, pixels.copy(), pixels.swapaxes(0, 1)
    one[3, 4] ^= 255
    corner[:8, :8] ^= 128
    require_equal_pictures(data, Image.fromarray(one))
    for other in (all_a_little.clip(0, 255).astype(np.uint8), corner, turned):
        with pytest.raises(BadImage, match="pixels"):
            require_equal_pictures(data, Image.fromarray(other.copy()))


def test_the_decoder_held_against_pillow_is_the_one_of_training(encoded: Callable[..., bytes]) -> None:
    from nvidia.dali import fn, pipeline_def, types

    odd = without_adobe_marker(encoded(PICTURE.convert("CMYK"), "JPEG"))
    files = [odd, *(encoded(PICTURE, format_) for format_ in ("JPEG", "PNG", "WEBP"))]

    @pipeline_def(batch_size=len(files), num_threads=1, device_id=None)
    def graph() -> object:
        arrays = [np.frombuffer(data, np.uint8) for data in files]
        return augment._decode(fn.external_source(lambda _: arrays, batch=True, dtype=types.UINT8, ndim=1), None)

    (images,) = graph().run()
    for i, data in enumerate(files):
        assert np.array_equal(np.asarray(images.at(i)), decoders._decode(data))
