"""Can what the shards hold be fetched: rights, a range, and how much in a few seconds?"""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor

from pipeline.config import ExperimentConfig
from pipeline.data.reader import Dataset
from pipeline.data.reading import REQUESTS
from pipeline.data.remote.patience import WEATHER
from pipeline.plan.check import Check

_SECONDS = 10.0  # for all sources together
_MOST = 2000  # images of a source


def check_sources(config: ExperimentConfig) -> Check:
    """Read images from all over each source for a few seconds.

    Raises:
        UserError: one cannot be read; the first range of a source says so at once.
    """
    with WEATHER.for_a_look():
        dataset = Dataset(config.data.train, image=config.data.image)
        seconds = _SECONDS / len(dataset.sources)
        found = [_try(dataset, number, seconds) for number in range(len(dataset.sources))]
    slow = [text for text, images in found if not images]
    finding = "; ".join(text for text, _ in found)
    if slow:
        return Check("sources", "warn", finding, "look for a nearer store, or copy the shards to a disk")
    return Check("sources", "pass", finding)


def _try(dataset: Dataset, number: int, seconds: float) -> tuple[str, int]:
    """What was read of a source, in words, and how many images beyond the first."""
    source = dataset.sources[number]
    step = max(source.samples // _MOST, 1)
    records = iter(range(source.first, source.first + source.samples, step))
    dataset.image(next(records))
    images = size = 0
    began = time.monotonic()
    with ThreadPoolExecutor(REQUESTS if dataset.is_remote else 1) as pool:
        while time.monotonic() - began < seconds and (batch := list(itertools.islice(records, REQUESTS))):
            for data in pool.map(dataset.image, batch):
                images += 1
                size += len(data)
    took = max(time.monotonic() - began, 1e-6)
    name = f"{source.name}: " if source.name else ""
    return f"{name}{images} images at {images / took:.0f}/s, {size / took / 1e6:.1f} MB/s", images
