import base64
import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from pipeline.cli import main
from pipeline.data.check import stats
from pipeline.data.shards import index


def pictures(page: str) -> list[Image.Image]:
    found = re.findall(r"data:image/png;base64,([^\"]+)", page)
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in found]


def test_sheet_shows_crops_masks_and_channels_of_the_first_images(
    experiment: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Six flat images of four channels: a channel's picture is grey and flat."""
    files = {}
    for i in range(6):
        file = io.BytesIO()
        np.save(file, np.full((40, 40, 4), [100 * i, 1000, 2000 + 10 * i, 4000], np.uint16))
        files[f"field{i}.npy"] = file.getvalue()
    shard = tmp_path / "train-000000.tar"
    with tarfile.open(shard, "w") as tar:
        for name, data in {**files, "cut.npy": files["field0.npy"][:-1]}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index(str(shard))
    stats(str(shard))
    tree = experiment(model={"in_chans": 4}, data={"train": str(shard), "batch_size": 6, "val": None})
    (tmp_path / "fields.yaml").write_text(yaml.safe_dump(tree))
    out = tmp_path / "sheet.html"
    assert main(["shards", "show", str(tmp_path / "fields.yaml"), "--out", str(out)]) == 0
    page = out.read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("<h3>field") >= 3 * 5
    assert "4 channels" in page
    assert "cut" in page
    local = tree["data"]["local_crops"]["count"]
    shown = pictures(page)
    assert len(shown) == 6 * (2 + local) + 6 * 2 + 6 * 4
    for channel in shown[-4 * 6 :]:
        pixels = np.asarray(channel)
        assert np.ptp(pixels) <= 2, "flat and grey"
    covered = np.stack([np.asarray(picture).max(-1) for picture in shown[6 * (2 + local) :][: 2 * 6]])
    shares = [int(share) for share in re.findall(r"(\d+)%", page.split("from epoch")[1].split("</p>")[0])]
    dark = (covered < covered.max((1, 2), keepdims=True) / 2).mean((1, 2))
    assert np.allclose(dark, np.array(shares) / 100, atol=0.01)
    assert max(shares) > 0
