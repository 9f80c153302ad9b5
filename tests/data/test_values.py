import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from pipeline.cli import main
from pipeline.config import DataConfig, parse_config
from pipeline.data.augment import make_pipeline
from pipeline.data.catalog import Pixels, open_catalog
from pipeline.data.check import stats, verify
from pipeline.data.draws import P, parameters
from pipeline.data.eval_images import EvalImages
from pipeline.data.images import BadImage, Header
from pipeline.data.intake import Intake, settle_values
from pipeline.data.loader import Loader
from pipeline.data.shards import build, index
from pipeline.data.values import decode_values, measure_values, scaled
from pipeline.errors import UserError

LIMIT = 10**6
FOUR = (np.random.default_rng(0).random((40, 30, 4)) * 4095).astype(np.uint16)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def tif(array: np.ndarray, **options: object) -> bytes:
    """One picture with its channels side by side."""
    file = io.BytesIO()
    one = array.shape[2] == 1
    tifffile.imwrite(file, array[..., 0] if one else array, planarconfig=None if one else "contig", **options)
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "<f4", ">f8", "<i2", "<f2"])
@pytest.mark.parametrize("channels", [1, 2, 4, 16])
def test_values_are_what_was_stored(dtype: str, channels: int) -> None:
    image = (np.arange(20 * 30 * channels).reshape(20, 30, channels) % 201).astype(dtype)
    files = (
        [npy(image), npy(np.asfortranarray(image)), npy(image.transpose(2, 0, 1))] if channels < 16 else [npy(image)]
    )
    if np.dtype(dtype).itemsize < 8:
        files += [tif(image), tif(image, compression="zlib")]
    for data in files:
        pixels, header = decode_values(data, LIMIT, channels)
        assert np.array_equal(pixels, image)
        assert header.size == (20, 30)
    if channels == 1:
        assert np.array_equal(decode_values(npy(image[..., 0]), LIMIT)[0], image)


def test_a_codec_that_does_not_load_is_no_fault_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """This compression is read by it alone."""
    file = io.BytesIO()
    Image.fromarray(FOUR[..., 0]).save(file, "tiff", compression="tiff_lzw")
    assert np.array_equal(decode_values(file.getvalue(), LIMIT)[0][..., 0], FOUR[..., 0])
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
    with pytest.raises(ImportError):
        decode_values(file.getvalue(), LIMIT)


def test_pictures_have_the_channels_that_are_wanted(encoded: Callable[..., bytes]) -> None:
    grey, colours = Image.new("L", (3, 2), 50), Image.new("RGBA", (3, 2), (10, 20, 30, 40))
    deep = Image.fromarray(np.full((2, 3), 3000, np.uint16))
    for image, channels, expected in (
        (grey, 1, [50]), (grey, 3, [50] * 3), (colours, 4, [10, 20, 30, 40]), (colours, 3, [10, 20, 30]),
        (colours, 1, [round(0.299 * 10 + 0.587 * 20 + 0.114 * 30)]), (deep, 1, [3000]), (deep, 3, [3000] * 3),
    ):  # fmt: skip
        assert decode_values(encoded(image), LIMIT, channels)[0][1, 2].tolist() == expected
    with pytest.raises(BadImage, match="channels"):
        decode_values(encoded(grey), LIMIT, 4)


def test_damaged_values_have_a_reason() -> None:
    good, tiff = npy(FOUR), tif(FOUR)
    cases = [
        (b"", "empty"), (good[:-1], "truncated"), (good[:20], "header"), (tiff[:-1], "truncated"),
        (b"GIF89a", "format"),
        (npy(np.zeros((3, 3), complex)), "precision"), (npy(np.zeros((2, 2, 2, 2))), "header"),
        (npy(np.zeros((20, 20, 17))), "channels"), (good.replace(b"<u2", b"|O8"), "precision"),
        (npy(np.zeros((2000, 1000, 1), np.uint8)), "huge"), (npy(FOUR[..., :3]), "channels"), (tiff[:9], "decode"),
    ]  # fmt: skip
    for data, reason in cases:
        with pytest.raises(BadImage, match=f"^{reason}$"):
            decode_values(data, LIMIT, 4)


def test_range_becomes_nought_to_one_and_holes_its_low_end() -> None:
    assert scaled(np.array([[[0, 4095, 65535]]], np.uint16), (0, 4095)).tolist() == [[[0, 1, 1]]]
    holes = np.array([[[np.nan, np.inf, -np.inf, 15.0]]], np.float32)
    assert scaled(holes, (10, 20)).tolist() == [[[0, 1, 0, 0.5]]]


def test_twelve_bits_in_sixteen_are_not_black() -> None:
    found = measure_values([npy(FOUR)])
    assert found
    settled = found.scaled(None)
    assert settled["value_range"] == (0, 4095)
    assert np.allclose(settled["mean"], FOUR.mean((0, 1)) / 4095)
    assert np.allclose(settled["std"], FOUR.std((0, 1)) / 4095)
    normal = (scaled(FOUR, (0, 4095)) - settled["mean"]) / settled["std"]
    assert np.allclose(normal.mean((0, 1)), 0, atol=1e-4)


def test_statistics_of_several_sets_are_those_of_all_images() -> None:
    one = [npy(FOUR[i : i + 5].astype(np.float32)) for i in (0, 5, 10)]
    two = [npy(FOUR[i : i + 5].astype(np.float32) * 3) for i in (15,)]
    joined = Pixels.joined([measure_values(part) for part in (one, two)])  # type: ignore[misc]
    together = measure_values([*one, *two])
    assert together
    assert np.allclose(joined.mean, together.mean)
    assert np.allclose(joined.std, together.std)
    assert joined.range() != (0, 4095), "floats have the range that they have"


def config(shards: str, channels: int, **data: object) -> object:
    crops = {"global_crops": {"size": 16}, "local_crops": {"size": 8, "count": 2}}
    model = {"image_size": 16, "patch_size": 4, "in_chans": channels, "head_dim": 16}
    grid = {"width": {"min": 16, "max": 32, "step": 16}, "depth": {"min": 2, "max": 4, "step": 2}}
    return parse_config(
        {"model": model | grid, "data": {"train": shards, "batch_size": 4, "threads": 1, **crops, **data}}
    )


@pytest.fixture
def satellite(tmp_path: Path) -> str:
    """Six images of 12 bits in 16, four channels, of which two are big-endian, and one that ends early."""
    (tmp_path / "src" / "field").mkdir(parents=True)
    for i in range(6):
        image = np.roll(FOUR, i, 0).astype(">u2" if i % 3 == 0 else "<u2")
        (tmp_path / "src" / "field" / f"{i}.{'tif' if i == 1 else 'npy'}").write_bytes(
            tif(image) if i == 1 else npy(image)
        )
    build(str(tmp_path / "src"), tmp_path / "out", values=True, progress=False)
    return str(tmp_path / "out" / "train-000000.tar")


def test_statistics_are_written_to_the_catalog_and_taken_from_it(satellite: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match=r"no statistics of their values.*poa shards stats"):
        settle_values(config(satellite, 4))  # type: ignore[arg-type]
    assert main(["shards", "stats", satellite]) == 0
    assert "integers from" in capsys.readouterr().out
    listing = open_catalog(Path(satellite).parent)
    assert listing
    assert listing.pixels
    assert listing.pixels.images == 6
    settled = settle_values(config(satellite, 4)).data  # type: ignore[arg-type]
    assert settled.value_range == (0, 4095)
    assert np.allclose(settled.mean, FOUR.mean((0, 1)) / 4095)
    own = settle_values(config(satellite, 4, value_range=[0, 8190])).data  # type: ignore[arg-type]
    assert np.allclose(own.mean, FOUR.mean((0, 1)) / 8190)
    with pytest.raises(UserError, match=r"4 channels, and model.in_chans is 2"):
        settle_values(config(satellite, 2))  # type: ignore[arg-type]
    assert [verdict.problems for verdict in verify(satellite, progress=False)] == [[]]


def test_statistics_stay_while_the_shards_do(
    satellite: str, make_shard: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(satellite).parent
    found = stats(satellite).values[str(folder)]
    index(satellite)
    assert open_catalog(folder).pixels._asdict() == found  # type: ignore[union-attr]
    assert not caplog.messages
    other = folder / "train-000001.tar"
    make_shard({"a.npy": npy(FOUR)}).replace(other)
    index(str(other))
    assert open_catalog(folder).pixels is None  # type: ignore[union-attr]
    assert caplog.messages == [
        f"{folder}: the statistics were of other shards and are dropped (poa shards stats {folder}/*.tar)"
    ]


def test_damaged_arrays_cost_no_batch(satellite: str, make_shard: Callable[..., Path]) -> None:
    big, cut = npy(FOUR.astype(">u2")), npy(FOUR)[:-9]
    shard = make_shard({"a.npy": npy(FOUR), "b.npy": cut, "c.npy": big, "d.tif": tif(FOUR)})
    index(str(shard))
    stats(str(shard))
    skips: list[str] = []
    settled = settle_values(config(str(shard), 4)).data  # type: ignore[arg-type]
    loader = Loader(settled, channels=4, on_skip=lambda skip: skips.append(skip.reason))
    batches = [next(loader) for _ in range(3)]
    loader.close()
    assert skips == ["truncated"]
    assert batches[0].global_crops.shape == (8, 4, 16, 16)
    assert batches[0].local_crops.shape == (8, 4, 8, 8)
    assert abs(float(batches[0].global_crops.mean())) < 0.5, "neither black nor white"


def test_crops_of_values_are_boxes_of_the_image(
    make_shard: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without colours and blur, of an image whose channels are constant, crops hold these constants."""
    levels = np.array([0.1, 0.4, 0.7, 0.9, 0.5], np.float32)
    shard = make_shard({"a.npy": npy(np.broadcast_to(levels, (30, 20, 5)))})
    index(str(shard))
    true = parameters

    def plain(*arguments: object) -> np.ndarray:
        drawn = true(*arguments)  # type: ignore[arg-type]
        drawn[..., [P.CONTRAST, P.BRIGHTNESS]], drawn[..., P.SIGMA] = 1, 0
        return drawn

    monkeypatch.setattr("pipeline.data.loader.parameters", plain)
    values = {"value_range": [0, 1], "mean": [0.5] * 5, "std": [0.1, 0.2, 0.1, 0.1, 0.1]}
    data = config(str(shard), 5, batch_size=2, channel_drop=0.5, **values).data  # type: ignore[attr-defined]
    loader = Loader(data, channels=5)
    batches = [next(loader) for _ in range(8)]
    loader.close()
    crops = torch.cat([batch.local_crops for batch in batches]).flatten(2)
    expected = torch.from_numpy((levels - 0.5) / np.array(values["std"], np.float32))
    assert ((crops - crops[..., :1]).abs() < 1e-5).all()
    found = crops[..., 0]
    kept = (found - expected).abs() < 1e-4
    assert (kept | (found.abs() < 1e-6)).all(), "a channel is what it was, or its mean"
    assert 0.3 < 1 - kept[:, :4].float().mean() < 0.7
    evaluated = EvalImages(
        str(shard), {"input_size": (5, 8, 8), "mean": [0.5] * 5, "std": values["std"]}, Intake.of(data, 5)
    )
    assert torch.allclose(evaluated.normalize(evaluated.load(0)[None])[0, :, 3, 3], expected, atol=1e-5)


def test_dropped_channels_depend_on_seed_and_position_and_one_is_left() -> None:
    data = DataConfig.model_validate({"channel_drop": 0.9, "local_crops": {"count": 2}})
    headers = [Header("values", 9, 9, 1, True, ())] * 64
    kept = parameters(data, 64, headers, 5)[..., len(P) :]
    assert kept.shape == (64, 4, 5)
    assert kept.sum(-1).min() == 1
    assert 0.1 <= kept.mean() < 0.35
    assert np.array_equal(parameters(data, 65, headers[1:], 5), parameters(data, 64, headers, 5)[1:])
    plain = data.model_copy(update={"channel_drop": 0.0})
    assert np.array_equal(parameters(plain, 64, headers, 5), parameters(data, 64, headers, 5)[..., : len(P)])


def test_turned_values_are_upright_in_training_and_evaluation(encoded: Callable[..., bytes], make_shard) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(np.arange(200, dtype=np.uint8).reshape(10, 20))
    shard = make_shard({"a.png": encoded(picture, exif=exif)})
    images = EvalImages(
        str(shard),
        {"input_size": (1, 20, 10), "crop_pct": 1.0, "crop_mode": "squash", "mean": [0.0], "std": [1.0]},
        Intake(1, (0, 255), (0.0,), (1.0,)),
    )
    upright = np.asarray(picture.transpose(Image.Transpose.ROTATE_270))
    assert np.allclose(images.load(0)[0].numpy() * 255, upright, atol=0.01)


def test_contrast_is_about_the_mean_of_all_channels_and_brightness_comes_after(
    make_shard: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.random.default_rng(1).random((16, 16, 4)).astype(np.float32)
    shard = make_shard({"a.npy": npy(image)})
    index(str(shard))
    true = parameters

    def whole(*arguments: object) -> np.ndarray:
        drawn = true(*arguments)  # type: ignore[arg-type]
        drawn[..., : P.RIGHT + 1], drawn[..., P.SIGMA :] = (0, 0, 16, 16), 0
        drawn[..., P.CONTRAST], drawn[..., P.BRIGHTNESS] = 1.3, 0.8
        return drawn

    monkeypatch.setattr("pipeline.data.loader.parameters", whole)
    values = {"value_range": [0, 1], "mean": [0.5] * 4, "std": [0.25] * 4}
    loader = Loader(config(str(shard), 4, batch_size=2, **values).data, channels=4)  # type: ignore[attr-defined]
    crop = next(loader).global_crops[0]
    loader.close()
    expected = ((image - image.mean()) * 1.3 + image.mean()) * 0.8
    assert torch.allclose(crop.permute(1, 2, 0) * 0.25 + 0.5, torch.from_numpy(expected), atol=1e-5)


def test_graph_for_a_gpu_puts_values_where_they_can_be() -> None:
    """DALI refuses operands on the wrong device when a graph is defined, for which no GPU is needed."""
    data = DataConfig.model_validate({"channel_drop": 0.1, "batch_size": 2, "local_crops": {"count": 1}})
    intake = Intake(4, (0, 1), (0.5,) * 4, (0.5,) * 4)
    make_pipeline(data, lambda _: None, device_id=0, half=False, intake=intake)  # type: ignore[arg-type,return-value]
