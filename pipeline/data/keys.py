"""Keys of a data set's samples, all at once."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.data import contents
from pipeline.data.names import escape
from pipeline.data.reader import Dataset
from pipeline.data.reading import REQUESTS


def keys_of(dataset: Dataset) -> list[str]:
    """By record, on one line each: of a shard on a disk by one look at its index, in a store by many reads at once."""
    keys: list[str] = []
    with ThreadPoolExecutor(REQUESTS) as pool:
        for path, samples in zip(dataset.paths, dataset.shard_sizes.tolist(), strict=True):
            if isinstance(path, Path):
                found = contents.of(path, dataset.wanted(str(path))).samples
                keys += [escape(sample.key) for sample in found if sample.image]
            else:
                keys += pool.map(dataset.key, range(len(keys), len(keys) + samples))
    return keys
