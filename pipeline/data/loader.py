"""Batches of augmented crops as torch tensors; the whole state is one integer."""

from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from kernels.colours import WIDTH, Normalisation, colour
from pipeline.config import DataConfig
from pipeline.data.augment import make_pipeline, undecodable
from pipeline.data.draws import GLOBAL_CROPS, colour_table, parameters
from pipeline.data.images import Header
from pipeline.data.intake import CHANNELS, Intake
from pipeline.data.mixing import WHOLE, Segment
from pipeline.data.reader import Dataset
from pipeline.data.reading import Reading
from pipeline.data.stream import Skip

_READ_AHEAD = 4  # batches whose bytes and parameters are prepared before the pipeline asks for them
_DTYPES = (torch.float32, torch.float16)


class Batch(NamedTuple):
    """Crops of B images, image-major: global crop g of image b is row 2b + g, local crop j is row Lb + j."""

    global_crops: torch.Tensor
    local_crops: torch.Tensor


class _Prepared(NamedTuple):
    """What the pipeline needs for a batch (files, or values), and what had to be left out of it."""

    positions: np.ndarray
    encoded: list[np.ndarray]
    parameters: np.ndarray
    records: list[int]
    headers: list[Header]
    rejected: list[tuple[int, int, str]]
    colours: torch.Tensor | None


class Loader:
    """Endless iterator over batches of this rank.

    Rank r of R takes the r-th slice of the next R * B positions of the stream, sorted by lane (see `order`), so R ranks
    with batches of B see what one rank sees with batches of R * B, and a loader started at another's `next_sample`
    continues it bit for bit.

    Args:
        data: shards, crops and augmentation.
        rank, world_size: this process among those that share the stream.
        start_sample: samples consumed so far by all ranks together.
        device: `cpu` or `cuda:N`; decides where images are decoded and augmented and where tensors live.
        dtype: torch.float32 or torch.float16; torch.bfloat16 with `colours` alone, for DALI cannot write it.
        colours: `impl` of `kernels.colours`, which then does what follows the resizing; None leaves it to DALI.
        on_skip: called once per sample left out, with its key, shard, reason and first position.
        dataset: `data.train` in pieces of `data.piece_mb`, if it is open already.
        segment: of the run, if its sources or weights have changed.
        channels: of the images, `model.in_chans`.

    Attributes:
        next_sample: samples consumed by all ranks together, the `start_sample` that resumes.
        used: samples handed out by this rank so far, by name of their source.
        skipped: how often a sample was left out so far, by reason.
        samples: samples per epoch of the stream.

    Raises:
        UserError: see `Dataset`; also from `next()` if too many samples in a row are unusable.
        ValueError: another dtype or device.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        start_sample: int = 0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        colours: str | None = None,
        on_skip: Callable[[Skip], None] | None = None,
        dataset: Dataset | None = None,
        segment: Segment = WHOLE,
        channels: int = CHANNELS,
    ) -> None:
        dtypes = (*_DTYPES, torch.bfloat16) if colours else _DTYPES
        if dtype not in dtypes:
            raise ValueError(f"dtype {dtype}: expected one of {dtypes}")
        self.data, self.rank, self.world_size, self.on_skip = data, rank, world_size, on_skip
        self.intake = Intake.of(data, channels)
        self._colours = colours if self.intake.is_rgb else None
        self.device_id, self._dtype = _device_id(torch.device(device)), dtype
        self._reading = Reading(data, rank, world_size, dataset, segment, self.intake)
        self._stream, self.dataset = self._reading.stream, self._reading.dataset
        self.samples, self.next_sample = len(self.dataset), start_sample
        self.skipped: Counter[str] = Counter()
        self.used: Counter[str] = Counter()
        self._reported: set[int] = set()
        self._handed_out: Any = None
        self._in_use: deque[tuple[torch.cuda.Event, Any]] = deque()
        self._pool = ThreadPoolExecutor(_READ_AHEAD, thread_name_prefix="poa-reader")
        self._reading.want(start_sample)
        self._start_pipeline()

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        self._release_buffers()
        outputs = self._handed_out = self._run()
        prepared = self._prepared.pop(self.next_sample).result()
        positions = np.asarray(outputs[0].as_tensor()).ravel()
        assert (positions == prepared.positions).all(), "the pipeline lost a batch"
        self._report(prepared)
        self.next_sample += self._stride
        self._reading.want(self.next_sample)  # not what is read ahead: this batch may still be on its way
        self.used.update(self.dataset.source(record).name for record in prepared.records)
        crops = [torch.from_dlpack(output.as_tensor()).flatten(0, 1) for output in outputs[2:]]
        if prepared.colours is not None:
            crops = self._coloured(crops, prepared)
        elif self._dtype == torch.bfloat16:  # which DALI cannot write
            crops = [group.to(self._dtype) for group in crops]
        if len(crops) == 1:
            size = self.data.local_crops.size
            crops.append(crops[0].new_empty(0, self.intake.channels, size, size))
        return Batch(*crops)

    def _coloured(self, crops: list[torch.Tensor], prepared: _Prepared) -> list[torch.Tensor]:
        """Crops as the network takes them."""
        assert self._colours is not None
        assert prepared.colours is not None
        rows = prepared.colours.to(crops[0].device, non_blocking=True)
        look = Normalisation(_three(self.intake.mean), _three(self.intake.std))
        coloured = []
        for group, row in zip(crops, (rows[:, :GLOBAL_CROPS], rows[:, GLOBAL_CROPS:]), strict=False):
            looked_up, kept = row.flatten(0, 1).tensor_split([WIDTH], 1)
            x = colour(group, looked_up, look, dtype=self._dtype, impl=self._colours)
            coloured.append(x * kept[..., None, None].to(x.dtype) if self.data.channel_drop else x)
        return coloured

    def close(self) -> None:
        """Stop the reading threads and free the pipeline; tensors handed out stay valid."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._reading.close()
        del self._pipeline

    @property
    def _stride(self) -> int:
        return self.data.batch_size * self.world_size

    def _start_pipeline(self) -> None:
        """(Re)start at `next_sample`."""
        self._prepared: dict[int, Future[_Prepared]] = {}
        start = self.next_sample

        def source(number: int) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
            wanted = start + number * self._stride
            for ahead in range(wanted, wanted + _READ_AHEAD * self._stride, self._stride):
                if ahead not in self._prepared:
                    self._prepared[ahead] = self._pool.submit(self._prepare, ahead)
            prepared = self._prepared[wanted].result()
            return prepared.encoded, list(prepared.parameters), prepared.positions[:, None]

        self._pipeline = make_pipeline(
            self.data,
            source,
            device_id=self.device_id,
            half=self._dtype == torch.float16,
            coloured=not self._colours,
            intake=self.intake,
        )

    def _prepare(self, sample: int) -> _Prepared:
        positions = self._reading.positions(sample)
        numbers = positions.tolist()
        picked = self._reading.pick(numbers)
        headers = [p.header for p in picked]
        drawn = parameters(self.data, positions, headers, self.intake.channels)
        colours = colour_table(drawn, self.data.hue) if self._colours else None
        if colours is not None and self.device_id is not None:
            colours = colours.pin_memory()
        return _Prepared(
            positions,
            [np.frombuffer(p.data, np.uint8) if self.intake.is_rgb else p.data for p in picked],
            drawn,
            [p.record for p in picked],
            headers,
            [(number, *verdict) for number, p in zip(numbers, picked, strict=True) for verdict in p.rejected],
            colours,
        )

    def _run(self) -> Any:
        """Run the pipeline; where an image turns out undecodable, repeat the same batch with a substitute."""
        while True:
            failure = None
            try:
                outputs = self._pipeline.run()
            except RuntimeError as error:
                failure = error
            prepared = self._prepared[self.next_sample].result()
            if not failure and _shapes_as_announced(outputs[1], prepared.headers):
                return outputs
            if not self.intake.is_rgb:
                raise failure or RuntimeError("an image has another size than its header")
            culprits = undecodable(prepared.encoded, prepared.headers, self.device_id)
            if not culprits:
                raise failure or RuntimeError("an image decodes to another size than on its own")
            for i in culprits:
                self._stream.reject(prepared.records[i], "decode")
            self._start_pipeline()

    def _release_buffers(self) -> None:
        """Give GPU buffers back to DALI only when the kernels enqueued on them are done: torch does not tell it."""
        if self.device_id is None or self._handed_out is None:
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device_id))
        self._in_use.append((event, self._handed_out))
        while self._in_use and self._in_use[0][0].query():
            self._in_use.popleft()

    def _report(self, prepared: _Prepared) -> None:
        for position, record, reason in prepared.rejected:
            self.skipped[reason] += 1
            if record not in self._reported and self.on_skip:
                dataset = self._stream.dataset
                self.on_skip(Skip(dataset.key(record), str(dataset.shard(record)), reason, position))
            self._reported.add(record)


def _shapes_as_announced(shapes: Any, headers: list[Header]) -> bool:
    announced = [(header.rows, header.cols) for header in headers]
    return bool((np.asarray(shapes.as_tensor())[:, :2] == announced).all())


def _three(values: tuple[float, ...]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


def _device_id(device: torch.device) -> int | None:
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        raise ValueError(f"device {device}: expected cpu or cuda:N")
    return device.index or 0
