"""What the data pipeline delivers, and where its CPU time goes."""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pipeline.config import DataConfig
from pipeline.data.augment import P, decode_pipeline, make_pipeline, parameters
from pipeline.data.intake import CHANNELS, Intake
from pipeline.data.loader import Loader
from pipeline.data.reader import Picked
from pipeline.data.reading import Reading

_WARM_UP = 3  # batches; the first ones build operators and fill the queue


def benchmark(data: DataConfig, *, device: str = "cpu", batches: int = 10, channels: int = CHANNELS) -> dict[str, Any]:
    """Measure the loader as training uses it, then its stages one by one on images in memory.

    The stages are differences between runs of the one graph with operations switched off by their parameters, so they
    add up to `cpu_ms_per_image` of a loader that does nothing else.

    Returns:
        `images_per_second` and `cpu_ms_per_image` of the loader; both again in `coloured_by_kernels`, where
        `kernels.colours` does what follows the resizing (on a CPU its eager twin); `stages_cpu_ms_per_image` by stage
        (on a GPU: what is left to the CPU); `threads`, `cpus`, `batch_size`, `images`.

    Raises:
        UserError: see `Loader`.
    """
    kernels = "triton" if device.startswith("cuda") else "eager"
    device_id = 0 if device.startswith("cuda") else None
    return {
        **_measure_loader(data, device, batches, None, channels),
        "coloured_by_kernels": _measure_loader(data, device, batches, kernels, channels),
        "stages_cpu_ms_per_image": _measure_stages(data, batches, device_id, Intake.of(data, channels)),
        "threads": data.threads,
        "cpus": os.cpu_count(),
        "batch_size": data.batch_size,
        "images": batches * data.batch_size,
    }


def _measure_loader(
    data: DataConfig, device: str, batches: int, colours: str | None, channels: int
) -> dict[str, float]:
    loader = Loader(data, device=device, colours=colours, channels=channels)
    for _ in range(_WARM_UP):
        next(loader)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(batches):
        next(loader)
    if loader.device_id is not None:
        torch.cuda.synchronize(loader.device_id)
    images = batches * data.batch_size
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    loader.close()
    return {"images_per_second": images / wall, "cpu_ms_per_image": 1e3 * cpu / images}


def _measure_stages(data: DataConfig, batches: int, device_id: int | None, intake: Intake) -> dict[str, float]:
    reading = Reading(data, intake=intake)
    picked: list[Picked] = []

    def prepare() -> None:
        picked[:] = reading.pick(range(data.batch_size))
        parameters(data, 0, [p.header for p in picked], intake.channels)

    read = _cpu_ms(prepare, batches) / data.batch_size
    reading.close()
    images = [np.frombuffer(p.data, np.uint8) if intake.is_rgb else p.data for p in picked]
    drawn = parameters(data, 0, [p.header for p in picked], intake.channels)
    plain, sharp = drawn.copy(), drawn.copy()
    sharp[..., [P.SIGMA, P.SOLARIZE]] = 0
    plain[..., [P.SIGMA, P.SOLARIZE, P.HUE]] = 0
    plain[..., [P.SATURATION, P.CONTRAST, P.BRIGHTNESS]] = 1

    def run(rows: np.ndarray) -> float:
        positions = np.arange(data.batch_size)[:, None]
        pipeline = make_pipeline(
            data, lambda _: (images, list(rows), positions), device_id=device_id, half=False, intake=intake
        )
        return _cpu_ms(pipeline.run, batches) / data.batch_size

    totals, names = [run(plain), run(sharp), run(drawn)], ["crop and normalise", "colour", "blur and solarise"]
    if not intake.is_rgb:
        return {"read, decode and draw": read, **dict(zip(names, np.diff(totals, prepend=0).tolist(), strict=True))}
    decode = decode_pipeline(lambda _: images, data.batch_size, data.threads, device_id)
    totals, names = [_cpu_ms(decode.run, batches) / data.batch_size, *totals], ["decode", *names]
    return {"read and draw": read, **dict(zip(names, np.diff(totals, prepend=0).tolist(), strict=True))}


def _cpu_ms(work: Callable[[], Any], repeats: int) -> float:
    """CPU time of this process per call, without the first ones."""
    for _ in range(_WARM_UP):
        work()
    began = time.process_time()
    for _ in range(repeats):
        work()
    return 1e3 * (time.process_time() - began) / repeats
