"""Batches that a rank's pipeline cannot make: made beside it on the CPU, by the same graph, a few images at a time.

What comes of an image is the same, on a GPU to within a level. So that all starts of a run agree to the bit, it is a
matter of its images alone which batch is made here.
"""

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import DataConfig
from pipeline.data.augment import make_pipeline
from pipeline.data.draws import parameters
from pipeline.data.images import Header
from pipeline.data.intake import Intake

_RGB_BYTES = 3
_SIDE = 8  # pixels of the picture that stands in for a batch


class Repair:
    """A small pipeline on the CPU, built when it is first needed.

    Args:
        data, half, coloured, intake: of the pipeline that it stands beside, see `augment.make_pipeline`.

    Attributes:
        most: pixels that are decoded at once: `data.batch_pixels`, or as many as take that memory.
    """

    def __init__(self, data: DataConfig, *, half: bool, coloured: bool, intake: Intake) -> None:
        self.data = data
        self.most = data.batch_pixels * _RGB_BYTES // intake.bytes_per_pixel
        self._options: dict[str, Any] = {"half": half, "coloured": coloured, "intake": intake}
        self._given: tuple[list[Any], list[np.ndarray], np.ndarray]
        self._pipeline: Any = None

    def crops(self, images: Sequence[Any], drawn: np.ndarray, headers: Sequence[Header]) -> list[Tensor] | None:
        """Crops of a batch, as the pipeline would give them, but on the CPU; None if a size is not the header's.

        Args:
            images: B of them, as `Intake.open` has them.
            drawn: their `parameters`.
            headers: of each.

        Raises:
            RuntimeError: one cannot be decoded.
        """
        self._pipeline = self._pipeline or make_pipeline(
            self.data, lambda _: self._given, device_id=None, prefetch=1, **self._options
        )
        groups = []
        for part in parts(headers, self.most):
            self._given = [images[i] for i in part], [drawn[i] for i in part], np.array(part)[:, None]
            _, shapes, *crops = self._pipeline.run()
            if not as_announced(shapes, [headers[i] for i in part]):
                return None
            groups.append([torch.from_dlpack(group.as_tensor()).clone() for group in crops])
        return [torch.cat(group) for group in zip(*groups, strict=True)]


def pixels(headers: Sequence[Header]) -> int:
    """Of all images together."""
    return sum(header.rows * header.cols for header in headers)


def parts(headers: Sequence[Header], most: int) -> Iterator[list[int]]:
    """Numbers of consecutive images that have at most so many pixels together; one that has more is alone."""
    part: list[int] = []
    for number in range(len(headers)):
        if part and pixels([headers[i] for i in (*part, number)]) > most:
            yield part
            part = []
        part.append(number)
    yield part


def as_announced(shapes: Any, headers: Sequence[Header]) -> bool:
    """Whether decoded images have the sizes that their headers say."""
    announced = [(header.rows, header.cols) for header in headers]
    return bool((np.asarray(shapes.as_tensor())[:, :2] == announced).all())


def stand_in(data: DataConfig, intake: Intake, position: int) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """A batch of one small picture, for a pipeline that has to be given something."""
    from PIL import Image

    header = Header("jpeg", _SIDE, _SIDE, 1, complete=True, exif_at=())
    image: np.ndarray = np.zeros((_SIDE, _SIDE, intake.channels), np.float32)
    if intake.is_rgb:
        file = io.BytesIO()
        Image.new("RGB", (_SIDE, _SIDE)).save(file, "JPEG")
        image = np.frombuffer(file.getvalue(), np.uint8)
    return [image], list(parameters(data, position, [header], intake.channels)), np.array([[position]])
