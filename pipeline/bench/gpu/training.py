"""Stage e: `poa train` for some steps on JPEG shards through DALI, and its first steps once more by eager code.

Without DALI the same run goes on with random tensors in place of the pictures, and says so.
"""

import io
import os
import statistics
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.bench.gpu.presets import SHORT, experiment
from pipeline.bench.gpu.stage import Stage
from pipeline.config import ExperimentConfig
from pipeline.files import read_json_lines

_SCALES = 5  # of structure in a picture, each twice as fine as the one before


def make_shards(stage: Stage) -> None:
    """JPEGs with structure at many scales and a colour each, in shards as `poa shards build` would cut them."""
    began = time.perf_counter()
    shards, each, side = (2, 32, 64) if stage.tiny else (4, 256, 320)
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        pictures = list(pool.map(partial(picture, side=side), range(shards * each), chunksize=16))
    folder = stage.out / "shards"
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        with tarfile.open(folder / f"train-{shard:06d}.tar", "w") as tar:
            for number in range(shard * each, (shard + 1) * each):
                _add(tar, f"{number:06d}.jpg", pictures[number])
                _add(tar, f"{number:06d}.cls", str(number % 10).encode())
    size = sum(map(len, pictures)) / 2**20
    stage.found["images"] = len(pictures)
    stage.say(f"{len(pictures)} JPEGs of {size:.1f} MiB in {time.perf_counter() - began:.0f} s")


def picture(number: int, side: int) -> bytes:
    """JPEG number `number`, `side` pixels wide and high."""
    from PIL import Image

    random = np.random.default_rng(number)
    pixels = random.normal(128, 40, (1, 1, 3)) + np.zeros((side, side, 3))
    for scale in range(1, _SCALES + 1):
        cells = random.normal(0, 40 / scale, (2**scale, 2**scale, 3))
        places = np.arange(side) * 2**scale // side
        pixels += cells[places[:, None], places[None, :]]
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def run(stage: Stage) -> None:
    """A hundred steps with the kernels of the device."""
    rows = _train(stage, 10 if stage.tiny else 100)
    early, late = ([row["loss"] for row in part] for part in (rows[:10], rows[-10:]))
    half = rows[len(rows) // 2 :]
    speed = statistics.median(row["images_per_second"] for row in half)
    waited = statistics.median(row["data_wait_seconds"] for row in half)
    stage.say(
        f"{len(rows)} steps, loss {statistics.fmean(early):.3f} to {statistics.fmean(late):.3f}, {speed:.0f} images/s, "
        f"{1e3 * waited:.1f} ms a step waiting for data, {rows[-1]['bad_steps']} bad steps"
    )


def run_eager(stage: Stage) -> None:
    """The first steps by eager code, not compiled; their losses against those of the run before."""
    rows = _train(stage, 4 if stage.tiny else 20, "engine.kernels=eager", "engine.compile=false")
    fused = stage.of("training").get("losses", [])
    losses = stage.found["losses"]
    apart = [abs(a - b) / abs(b) for a, b in zip(fused, losses, strict=False)]
    if apart:
        stage.found["relative_difference"] = apart
        stage.say(f"{len(rows)} steps: losses differ by {apart[0]:.2%} at first, {max(apart):.2%} at most")
    else:
        stage.say(f"{len(rows)} steps, nothing to compare with")


def _train(stage: Stage, steps: int, *words: str) -> list[dict[str, Any]]:
    from pipeline.bench.synthetic import TensorTrainer
    from pipeline.run import loop
    from pipeline.run.step import Trainer

    problem = _dali_problem(stage)
    if problem:
        stage.say(f"no DALI ({problem}): tensors in place of pictures")
    directory = stage.out / "runs" / f"{stage.name}-{time.time_ns()}"
    config = _config(stage, directory, steps, *words)
    code = loop.train(config, quiet=True, trainer=TensorTrainer if problem else Trainer)
    rows = list(read_json_lines(directory / "metrics.jsonl"))
    stage.found |= {"dali": problem or True, "exit_code": code, "losses": [row["loss"] for row in rows], "rows": rows}
    stage.save()
    if code or len(rows) != steps:
        raise SystemExit(f"training ended with exit code {code} after {len(rows)} of {steps} steps")
    return rows


def _config(stage: Stage, directory: Path, steps: int, *words: str) -> ExperimentConfig:
    last = len(list((stage.out / "shards").glob("*.tar"))) - 1
    return experiment(
        SHORT,
        stage,
        f"data.train={stage.out}/shards/train-{{000000..{last:06d}}}.tar",
        f"run.dir={directory}",
        f"run.max_steps={steps}",
        "run.log_every_steps=1",
        f"run.checkpoint_every_steps={max(steps // 2, 1)}",
        "metrics.port=0",
        "metrics.tensorboard=false",
        *words,
    )


def _dali_problem(stage: Stage) -> str | None:
    """Why DALI cannot be had; None if it can. Decoding on a GPU is tried, since a build may lack its kernels."""
    try:
        from pipeline.data.augment import decode_pipeline

        encoded = [np.frombuffer(picture(0, 64), np.uint8)]
        decode_pipeline(lambda _: encoded, 1, 1, 0 if stage.device.type == "cuda" else None).run()
    except (ImportError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return None


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
