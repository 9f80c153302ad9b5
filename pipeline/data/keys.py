"""Keys of a data set's samples, all at once."""

from pathlib import Path

from pipeline.data.indexes import has_index, read_index
from pipeline.data.names import escape
from pipeline.data.reader import Dataset
from pipeline.data.tars import walk


def keys_of(dataset: Dataset) -> list[str]:
    """By record, on one line each; of a shard on a disk by one look at its index."""
    keys: list[str] = []
    for path, samples in zip(dataset.paths, dataset.shard_sizes.tolist(), strict=True):
        if isinstance(path, Path):
            found = read_index(path) if has_index(path) else walk(path)
            keys += [escape(sample.key) for sample in found if sample.image]
        else:
            keys += [dataset.key(record) for record in range(len(keys), len(keys) + samples)]
    return keys
