"""From files that are not 8-bit RGB to a model in timm, by the commands that a user types and by nothing else."""

import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image
from safetensors.numpy import load_file

from pipeline.cli import main

ROOT = Path(__file__).parents[2]
SUBNET = "48x3"
MOST = {4: 4095, 1: 255}  # values, by channels
STRANGER = """
import json, sys
sys.meta_path.insert(0, type("Unknown", (), {"find_spec": lambda self, name, *_: sys.exit(f"{name} is within reach")
    if name.split(".")[0] in ("pipeline", "kernels") else None})())
import numpy as np, tifffile
from PIL import Image
found = []
for lines, path in json.load(open(sys.argv[1])):
    scope = {"image": tifffile.imread(path) if path.endswith(".tif") else np.asarray(Image.open(path))}
    exec(lines, scope)
    data = scope["timm"].data.resolve_data_config(scope["model"].pretrained_cfg)
    found.append([data["input_size"], data["mean"], data["std"], scope["features"][0].tolist()])
print(json.dumps(found))
"""


def write_deep_png(path: Path, image: np.ndarray) -> None:
    """16-bit colours with transparency, which Pillow does not write."""
    rows, cols, _ = image.shape
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), image.astype(">u2").reshape(rows, -1).view(np.uint8)], 1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", cols, rows, 16, 6, 0, 0, 0)), (b"IDAT", zlib.compress(lines.tobytes()))]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in (*chunks, (b"IEND", b""))
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def write_images(folder: Path, channels: int) -> dict[str, np.ndarray]:
    """Ten images by name, of four channels of 12 bits in 16, or grey ones of 8."""
    rng, found = np.random.default_rng(channels), {}
    for i in range(10):
        deep, most = channels > 1, MOST[channels]
        image = np.sort(rng.integers(0, most + 1 - 20 * i, (40 + i, 36, channels)), -1)  # each channel has its own mean
        path = folder / f"class{i % 2}" / f"{i}.{'tif' if deep and i % 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        found[str(path.relative_to(folder))] = image
        if not deep:
            Image.fromarray(image[..., 0].astype(np.uint8)).save(path)
        elif i % 2:
            tifffile.imwrite(path, image.astype(np.uint16), planarconfig="contig")
        else:
            write_deep_png(path, image)
    return found


class Trained(NamedTuple):
    """What came of some images: the extracted model, and features of some images by the run itself."""

    mean: np.ndarray
    std: np.ndarray
    model: Path
    features: dict[Path, np.ndarray]


@pytest.fixture
def trained(
    launch: Callable[..., list[str]], experiment: Callable[..., dict[str, Any]], tmp_path: Path
) -> Callable[[int], Trained]:
    def by_commands(channels: int) -> Trained:
        home = tmp_path / f"{channels}"
        images = write_images(home / "images", channels)
        shards, run, features = home / "shards", home / "run", home / "features"
        shard = str(shards / "train-000000.tar")
        assert main(["shards", "build", str(home / "images"), str(shards), "--values"]) == 0
        assert main(["shards", "stats", shard]) == 0
        tree = experiment(model={"in_chans": channels}, data={"train": shard}, run={"dir": str(run), "max_steps": 3})
        (home / "config.yaml").write_text(yaml.safe_dump(tree))
        launch(ROOT / "tests" / "workers" / "train.py", 1, home / "config.yaml")
        assert main(["extract", str(run), "--subnet", SUBNET, "--out", str(home)]) == 0
        assert main(["embed", str(run), shard, "--subnet", SUBNET, "--out", str(features), "--map", "none"]) == 0
        names = dict(line.split("\t") for line in (shards / "sources.tsv").read_text().splitlines())
        keys = json.loads((features / "part-000000.json").read_text())["keys"]
        rows = load_file(features / "part-000000.safetensors")["cls"]
        by_file = {home / "images" / names[key]: row for key, row in zip(keys, rows, strict=True)}
        assert len(by_file) == len(images)
        assert np.ptp(rows, axis=0).max() > 1e-3, "images differ by more than what is allowed"
        mean = np.mean([image.mean((0, 1)) for image in images.values()], 0)  # each image counts alike
        squares = np.mean([(image**2.0).mean((0, 1)) for image in images.values()], 0)
        shown = [path for path in sorted(by_file) if channels == 1 or path.suffix == ".tif"][
            :3
        ]  # no reader of the other
        return Trained(mean, np.sqrt(squares - mean**2), home / SUBNET, {path: by_file[path] for path in shown})

    return by_commands


def test_run_on_other_images_ends_in_a_model_that_timm_alone_loads(
    trained: Callable[[int], Trained], tmp_path: Path
) -> None:
    """What the lines of the card make of a file is what the run makes of its sample."""
    both = {channels: trained(channels) for channels in MOST}
    wanted = []
    for one in both.values():
        lines = (one.model / "README.md").read_text().split("```python")[1].split("```")[0]
        lines = lines.replace("PATH_OF_THIS_DIRECTORY", str(one.model))
        wanted += [(lines, str(path)) for path in one.features]
    (tmp_path / "wanted.json").write_text(json.dumps(wanted))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [sys.executable, "-c", STRANGER, str(tmp_path / "wanted.json")]
    process = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    found = iter(json.loads(process.stdout))
    for channels, one in both.items():
        for row in one.features.values():
            size, mean, std, features = next(found)
            assert size == [channels, 32, 32]
            assert np.allclose(mean, one.mean / MOST[channels], atol=1e-6)
            assert np.allclose(std, one.std / MOST[channels], atol=1e-6)
            assert np.allclose(features, row, atol=1e-5)
