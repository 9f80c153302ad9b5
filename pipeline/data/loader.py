"""Batches of augmented crops as torch tensors; the whole state is one integer."""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
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
from pipeline.data.repair import Repair, as_announced, pixels, stand_in
from pipeline.data.stream import DECODE, Skip

_log = logging.getLogger(__name__)

_PIXELS = "pixels"
APART = (DECODE, _PIXELS)
"""Why batches are made beside the pipeline: a substitute for what does not decode is in them, or too many pixels."""
_DTYPES = (torch.float32, torch.float16)


class Batch(NamedTuple):
    """Crops of B images, image-major: global crop g of image b is row 2b + g, local crop j is row Lb + j."""

    global_crops: torch.Tensor
    local_crops: torch.Tensor


@dataclass(frozen=True)
class Tally:
    """What a rank's loader has handed out since it began; it counts on.

    Attributes:
        used: samples by name of their source.
        apart: batches that were made on the CPU beside the pipeline, by reason, one of `APART`.
    """

    used: Counter[str] = field(default_factory=Counter)
    apart: Counter[str] = field(default_factory=Counter)


class _Prepared(NamedTuple):
    """What the pipeline needs for a batch (files, or values), and what had to be left out of it.

    Attributes:
        apart: why it is not for the pipeline, one of `APART`; None if it is.
    """

    positions: np.ndarray
    encoded: list[np.ndarray]
    parameters: np.ndarray
    records: list[int]
    headers: list[Header]
    rejected: list[tuple[int, int, str]]
    colours: torch.Tensor | None
    apart: str | None


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
        tally: what this rank was handed out so far.
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
        self.tally = Tally()
        self._reported: set[int] = set()
        self._handed_out: Any = None
        self._repair = Repair(data, **self._look)
        self._in_use: deque[tuple[torch.cuda.Event, Any]] = deque()
        self._pool = ThreadPoolExecutor(data.read_ahead, thread_name_prefix="poa-reader")
        self._reading.want(start_sample)
        self._start_pipeline()

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        self._release_buffers()
        prepared, crops = self._made()
        self._prepared.pop(self.next_sample)
        self._report(prepared)
        self.next_sample += self._stride
        self._reading.want(self.next_sample)  # not what is read ahead: this batch may still be on its way
        self.tally.used.update(self.dataset.source(record).name for record in prepared.records)
        crops = [group.flatten(0, 1) for group in crops]
        if prepared.colours is not None:
            crops = self._coloured(crops, prepared)
        elif self._dtype == torch.bfloat16:  # which DALI cannot write
            crops = [group.to(self._dtype) for group in crops]
        if len(crops) == 1:
            size = self.data.local_crops.size
            crops.append(crops[0].new_empty(0, self.intake.channels, size, size))
        return Batch(*crops)

    def learn(self, skips: Iterable[Skip]) -> None:
        """Take over what other ranks, or an earlier start, found of samples; none of these is reported again."""
        for skip in skips:
            record = self.dataset.record(skip.shard, skip.sample)
            if record is not None:
                self._stream.reject(record, skip.reason)
                self._reported.add(record)

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
    def _look(self) -> dict[str, Any]:
        half = self._dtype == torch.float16
        return {"half": half, "coloured": not self._colours, "intake": self.intake}

    @property
    def _stride(self) -> int:
        return self.data.batch_size * self.world_size

    def _start_pipeline(self) -> None:
        """(Re)start at `next_sample`."""
        self._has_failed = False
        self._prepared: dict[int, Future[_Prepared]] = {}
        start = self.next_sample

        def source(number: int) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
            wanted = start + number * self._stride
            for ahead in range(wanted, wanted + self.data.read_ahead * self._stride, self._stride):
                if ahead not in self._prepared:
                    self._prepared[ahead] = self._pool.submit(self._prepare, ahead)
            prepared = self._prepared[wanted].result()
            if prepared.apart:
                return stand_in(self.data, self.intake, int(prepared.positions[0]))
            return prepared.encoded, list(prepared.parameters), prepared.positions[:, None]

        self._pipeline = make_pipeline(self.data, source, device_id=self.device_id, **self._look)

    def _prepare(self, sample: int) -> _Prepared:
        positions = self._reading.positions(sample)
        numbers = positions.tolist()
        picked = self._reading.pick(numbers)
        headers = [p.header for p in picked]
        drawn = parameters(self.data, positions, headers, self.intake.channels)
        colours = colour_table(drawn, self.data.hue) if self._colours else None
        if colours is not None and self.device_id is not None:
            colours = colours.pin_memory()
        rejected = [(number, *verdict) for number, p in zip(numbers, picked, strict=True) for verdict in p.rejected]
        return _Prepared(
            positions,
            [np.frombuffer(p.data, np.uint8) if self.intake.is_rgb else p.data for p in picked],
            drawn,
            [p.record for p in picked],
            headers,
            rejected,
            colours,
            self._why_apart(headers, rejected),
        )

    def _why_apart(self, headers: list[Header], rejected: list[tuple[int, int, str]]) -> str | None:
        if pixels(headers) > self._repair.most:
            return _PIXELS
        # where the CPU makes it to the bit as the pipeline does, known damage costs nothing
        on_gpu = self.device_id is not None
        return DECODE if on_gpu and any(reason == DECODE for *_, reason in rejected) else None

    def _made(self) -> tuple[_Prepared, list[torch.Tensor]]:
        """The next batch and its crops `[B, crops, ...]`; a substitute takes the place of what does not decode."""
        self._handed_out = None
        outputs, failure = None, RuntimeError("an image has another size than its header")
        try:
            outputs = self._pipeline.run()
        except RuntimeError as error:
            failure = error
        prepared = self._prepared[self.next_sample].result()
        if outputs is not None:
            positions = np.asarray(outputs[0].as_tensor()).ravel()
            assert (positions == prepared.positions[: len(positions)]).all(), "the pipeline lost a batch"
            if not prepared.apart and as_announced(outputs[1], prepared.headers):
                self._handed_out = outputs
                return prepared, [torch.from_dlpack(output.as_tensor()) for output in outputs[2:]]
        if not prepared.apart:
            try:
                prepared = self._without_undecodable(prepared, self.device_id, failure)
            except RuntimeError:
                if not self._has_failed:
                    raise
                self._start_pipeline()  # which has not survived that
                return self._made()
        self._has_failed = outputs is None
        return self._repaired(prepared)

    def _repaired(self, prepared: _Prepared) -> tuple[_Prepared, list[torch.Tensor]]:
        """A batch that is made beside the pipeline, and what it was made of in the end."""
        if prepared.apart == _PIXELS and not self.tally.apart[_PIXELS]:
            largest = max(range(len(prepared.headers)), key=lambda i: pixels(prepared.headers[i : i + 1]))
            record = prepared.records[largest]
            text = (
                "a batch of %d pixels, more than data.batch_pixels, is made on the CPU; its largest image is %s of %s"
            )
            _log.warning(text, pixels(prepared.headers), self.dataset.key(record), self.dataset.shard(record))
        self.tally.apart[prepared.apart or DECODE] += 1
        while True:
            failure = RuntimeError("an image decodes to another size than on its own")
            try:
                crops = self._repair.crops(prepared.encoded, prepared.parameters, prepared.headers)
                if crops is not None:
                    device = "cpu" if self.device_id is None else f"cuda:{self.device_id}"
                    return prepared, [group.to(device) for group in crops]
            except RuntimeError as error:
                failure = error
            prepared = self._without_undecodable(prepared, None, failure)

    def _without_undecodable(self, prepared: _Prepared, device_id: int | None, failure: RuntimeError) -> _Prepared:
        """The same batch with substitutes; raises what was the failure if there is nothing in it to replace."""
        culprits = undecodable(prepared.encoded, prepared.headers, device_id) if self.intake.is_rgb else []
        if not culprits:
            raise failure
        for i in culprits:
            self._stream.reject(prepared.records[i], DECODE)
        return self._prepare(self.next_sample)

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
                shard, sample = str(dataset.shard(record)), dataset.sample(record)
                self.on_skip(Skip(dataset.key(record), shard, reason, position, sample))
            self._reported.add(record)


def _three(values: tuple[float, ...]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


def _device_id(device: torch.device) -> int | None:
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        raise ValueError(f"device {device}: expected cpu or cuda:N")
    return device.index or 0
