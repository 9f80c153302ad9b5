"""Segmentation on frozen maps of features: counts by hand, a model that sees colours alone, and what is refused."""

import io
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scenes import encode, write_tar
from torch import Tensor, nn

from pipeline.config import parse_config
from pipeline.data.masked_images import IGNORED, MaskedImages
from pipeline.errors import UserError
from pipeline.evaluate import segmentation
from pipeline.evaluate.dense import DenseFeatures, cell_counts, confusion, feature_map, quality
from pipeline.evaluate.segmentation import LEARNING_RATES, Probe, Segmentation
from pipeline.evaluate.targets import Candidate, Target
from pipeline.models.loading import RunModels

SIDE = 16
PREPROCESSING = {"input_size": (3, SIDE, SIDE), "interpolation": "bicubic", "crop_pct": 0.5, "mean": (0.5,) * 3}
PREPROCESSING |= {"std": (0.25,) * 3}
PALETTE = np.array([[200, 40, 40], [40, 190, 60], [50, 60, 200]], np.uint8)


class Colours(nn.Module):
    """Mean colours of cells of 4 x 4 pixels, as timm's models give maps."""

    def forward_intermediates(self, x: Tensor, **_: object) -> list[Tensor]:
        return [nn.functional.avg_pool2d(x, 4)]


def png(pixels: np.ndarray) -> bytes:
    return encode(Image.fromarray(pixels), "PNG")


def blocks(seed: int, classes: int = 3) -> np.ndarray:
    """A mask of blocks of 8 pixels, of 32 x 24; one block is `IGNORED`."""
    mask = np.random.default_rng(seed).integers(0, classes, (4, 3)).astype(np.uint8)
    mask[seed % 4, seed % 3] = IGNORED
    return np.kron(mask, np.ones((8, 8), np.uint8))


def shard(path: Path, masks: list[np.ndarray | bytes | None], names: list[str] | None = None) -> str:
    """Pictures whose colours are those of their classes in `blocks`, with these masks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    members = []
    for i, mask in enumerate(masks):
        true = mask if isinstance(mask, np.ndarray) and mask.shape == (32, 24) else blocks(i)
        noise = np.random.default_rng(1000 + i).integers(-20, 20, (*true.shape, 3))
        picture = (PALETTE[np.where(true > 2, 0, true)] + noise).clip(0, 255).astype(np.uint8)
        members.append((f"{i:03d}.png", png(picture)))
        if mask is not None:
            members.append((f"{i:03d}.seg.png", mask if isinstance(mask, bytes) else png(mask)))
    write_tar(path, iter(members))
    if names:
        (path.parent / "seg_classes.txt").write_text("\n".join(names) + "\n")
    return str(path)


def judged(train: str, val: str) -> dict:
    target = Target([Candidate("colours", Colours, 3, 1, 1.0, {})], PREPROCESSING)
    (results,) = Segmentation(train, val).groups(target)
    return results["colours"]


def test_counts_of_a_cell_leave_out_what_is_to_be_ignored():
    mask = torch.tensor([[[0, 0, 1, IGNORED], [0, 2, 1, IGNORED], [2, 2, 2, 2], [2, 2, 0, 0]]], dtype=torch.uint8)
    expected = [[[3, 0, 1], [0, 2, 0]], [[0, 0, 4], [2, 0, 2]]]
    assert cell_counts(mask, 2, 2, 3).tolist() == [expected]
    assert cell_counts(mask, 1, 1, 3).tolist() == [[[[5, 2, 7]]]]


def test_quality_of_a_confusion_by_hand():
    """Class 0: 6 of 6 + 2 + 1 pixels; class 1: 3 of 3 + 1 + 2; class 2 occurs nowhere."""
    found = quality(torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 0]]))
    assert found.iou == [pytest.approx(6 / 9), pytest.approx(3 / 6), None]
    assert found.miou == pytest.approx((6 / 9 + 3 / 6) / 2)
    assert found.accuracy == pytest.approx(9 / 12)


def test_scores_are_judged_at_the_masks_resolution():
    """Between the middles of two cells the scores change places half way."""
    scores = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    mask = torch.zeros(1, 4, 8, dtype=torch.uint8)
    mask[..., 5:] = 1
    mask[:, 0] = IGNORED
    assert confusion(scores, mask).tolist() == [[3 * 4, 3 * 1], [0, 3 * 3]]


def test_masks_are_squeezed_to_their_nearest_pixels(tmp_path):
    mask = blocks(3)
    images = MaskedImages(shard(tmp_path / "a.tar", [mask]), PREPROCESSING)
    sample = images.sample(0)
    assert sample.image.shape == (3, SIDE, SIDE)
    assert (sample.mask.numpy() == mask[1::2][:, np.floor((np.arange(SIDE) + 0.5) * 1.5).astype(int)]).all()
    assert sample.largest == max(mask[mask != IGNORED])


@pytest.mark.parametrize("family", ["vit", "eva", "swin", "resnet"])
def test_maps_are_the_last_features_of_every_family(family, experiment):
    models = RunModels.untrained(parse_config(experiment(family)))
    model = models.module(models.grid.smallest)
    images = torch.randn(2, 3, models.config.model.image_size, models.config.model.image_size)
    with torch.inference_mode():
        features = model.forward_features(images)
    if family in ("vit", "eva"):
        features = features[:, model.num_prefix_tokens :]
    elif family == "resnet":
        features = features.permute(0, 2, 3, 1)
    found = feature_map(model, images)
    assert torch.allclose(found.reshape(features.shape), features, atol=1e-6)
    assert found.shape[1] == found.shape[2] == models.config.model.image_size // models.config.model.stride


def test_classes_that_a_map_tells_apart_are_found_by_both_classifiers(tmp_path, monkeypatch):
    names = ["sky", "tree", "sea"]
    monkeypatch.setattr(segmentation, "LEAST_STEPS", 100)
    train = shard(tmp_path / "t" / "a.tar", [blocks(i) for i in range(24)], names)
    val = shard(tmp_path / "v" / "a.tar", [blocks(100 + i) for i in range(8)], names)
    found = judged(train, val)
    assert found["miou"] > 0.75  # cells at the edges of blocks hold two classes
    assert found["knn_miou"] > 0.75
    assert list(found["iou"]) == names
    assert found["learning_rate"] in LEARNING_RATES
    assert (found["train_images"], found["val_images"], found["map_cells"]) == (24, 8, [4, 4])
    assert judged(train, val) == found
    monkeypatch.setattr(segmentation, "_SIMILARITIES", 1)  # the queries one by one
    assert judged(train, val) == found
    strange = shard(tmp_path / "n" / "a.tar", [png(blocks(500 + i)) for i in range(24)], names)  # masks of others
    assert judged(strange, val)["miou"] < found["miou"] - 0.2


def test_a_linear_layer_is_blind_to_how_its_features_are_mixed(monkeypatch):
    """Features of four directions, of which one says the class, and the same turned, stretched 300-fold and moved."""
    monkeypatch.setattr(segmentation, "LEAST_STEPS", 60)
    draw = torch.Generator().manual_seed(0)
    maps = torch.randn(30, 4, 4, 4, generator=draw)
    cells = (maps[..., 0] > 0.3).to(torch.uint8)
    masks = cells.repeat_interleave(2, 1).repeat_interleave(2, 2)
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=draw))
    mixed = maps * torch.tensor([0.1, 3.0, 30.0, 1.0]) @ turn + 2
    mixed = torch.cat([mixed, mixed[..., :1]], -1)  # a channel twice over, so that a direction holds nothing
    probes = []
    for features in (maps, mixed):
        known = DenseFeatures(features, masks, torch.arange(30), (1, 0), Counter())
        probes.append((Probe(known, 2, None, torch.device("cpu")), features))
    scores = [probe.scores(features) for probe, features in probes]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-2, atol=1e-2)
    assert (scores[1].argmax(-1) == cells).float().mean() > 0.97
    assert probes[0][0].learning_rate == probes[1][0].learning_rate


def test_a_bank_beyond_its_limit_keeps_as_many_cells_of_each_image(tmp_path, monkeypatch):
    train = shard(tmp_path / "t.tar", [blocks(i) for i in range(12)])
    monkeypatch.setattr(segmentation, "BANK", 12 * 5)
    bank, taken = segmentation.Bank, []
    monkeypatch.setattr(segmentation, "Bank", lambda rows, *more: taken.append(len(rows)) or bank(rows, *more))
    judged(train, train)
    known = sum(int((cell_counts(torch.from_numpy(blocks(i))[None], 4, 4, 3).sum(-1) > 0).sum()) for i in range(12))
    assert 0 < taken[0] <= 12 * 5 < known


def refused(tmp_path: Path, masks: list, **more: object) -> str:
    with pytest.raises(UserError) as error:
        judged(
            shard(tmp_path / "t" / "a.tar", [blocks(i) for i in range(8)], **more),
            shard(tmp_path / "v" / "a.tar", masks),
        )
    assert "\n" not in str(error.value)
    return str(error.value)


def test_masks_that_cannot_be_used_are_refused_by_name(tmp_path):
    assert "1 of 3 images have no mask, beginning with 001" in refused(tmp_path, [blocks(0), None, blocks(2)])
    assert "the mask of 000 is 32 x 24 px and its image 24 x 32" in refused(tmp_path, [blocks(0).T.copy()])
    colour = png(np.zeros((32, 24, 3), np.uint8))
    assert "the mask of 000 is of mode RGB" in refused(tmp_path, [colour])
    lossy = io.BytesIO()
    Image.fromarray(blocks(0)).save(lossy, "JPEG")
    eps = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 32\n%ImageData: 24 32 8 1 0 1 1 "x"\n%%EOF\n'
    bomb = bytearray(png(np.zeros((32, 24), np.uint8)))
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    for content in (b"no picture", lossy.getvalue(), eps, bytes(bomb)):
        assert "the mask of 000 cannot be read as a PNG" in refused(tmp_path, [content])
    assert "the validation masks hold no class" in refused(tmp_path, [np.full((32, 24), 255, np.uint8)])


def test_classes_beyond_those_of_training_are_refused(tmp_path):
    far = blocks(0)
    far[0, 0] = 7
    said = refused(tmp_path, [blocks(1), far])
    assert "the mask of 001 holds class 7, and the training masks hold none beyond 2" in said
    said = refused(tmp_path, [blocks(1)], names=["sky", "tree"])
    assert "holds class 2, and seg_classes.txt names 2" in said


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["sky", "sea", "tree"], "class 1 is sea here and tree in the first training shards"),
        (["sky", "tree"], "2 classes here and 3 in the first"),
    ],
)
def test_classes_of_other_names_or_in_another_order_are_refused(tmp_path, names, said):
    train = shard(tmp_path / "t" / "a.tar", [blocks(0)], ["sky", "tree", "sea"])
    val = shard(tmp_path / "v" / "a.tar", [blocks(0)], names)
    with pytest.raises(UserError, match=said):
        judged(train, val)


def test_a_palette_counts_by_its_numbers(tmp_path):
    mask, file = blocks(0), io.BytesIO()
    coloured = Image.fromarray(mask)
    coloured.putpalette([255 - i // 3 for i in range(768)])
    coloured.save(file, "PNG")
    images = MaskedImages(shard(tmp_path / "a.tar", [file.getvalue()]), PREPROCESSING)
    assert torch.equal(
        images.sample(0).mask, MaskedImages(shard(tmp_path / "b.tar", [mask]), PREPROCESSING).sample(0).mask
    )
