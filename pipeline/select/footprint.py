"""What a forward pass occupies and moves, counted without computing: operations, bytes written, peak of activations.

The pass runs on fake tensors, which have shapes and no content, so a network of any size is counted in moments and on
any machine. What a kernel needs within itself is not seen.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.elastic import Backbone, Subnet
from pipeline.elastic.uninitialised import Uninitialised

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Footprint(NamedTuple):
    """Of a forward pass over one batch.

    Attributes:
        operations: that write a tensor of their own; views are none.
        traffic: bytes that they write.
        activations: most bytes alive at a time, inputs and outputs included, weights not.
    """

    operations: float
    traffic: float
    activations: float


class _Counter(TorchDispatchMode):
    """Keeps book of every storage that an operation makes until nothing refers to it any more."""

    def __init__(self, known: Sequence[Tensor], live: int):
        super().__init__()
        self.operations = self.traffic = 0
        self.live = self.peak = live
        self._known = [tensor.untyped_storage() for tensor in known]  # held, lest others get their identities
        self._seen = set(map(id, self._known))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = sum(self._enter(tensor) for tensor in tree_leaves(out) if isinstance(tensor, Tensor))
        self.operations += made > 0
        self.traffic += made
        return out

    def _enter(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if id(storage) in self._seen:
            return 0
        size = storage.nbytes()
        self._seen.add(id(storage))
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._leave, id(storage), size)
        return size

    def _leave(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def footprint(build: Callable[[], nn.Module], image: Sequence[int], batch: int, precision: str = "fp32") -> Footprint:
    """Count a module's forward pass over images of shape `image` [C, H, W].

    Args:
        build: makes the module, on a device without memory.
        image: shape of one image.
        batch: images.
        precision: key of `DTYPES`, of weights and activations.
    """
    dtype = DTYPES[precision]
    with torch.device("meta"), Uninitialised():
        module = build().eval()
    with FakeTensorMode(), torch.inference_mode():
        state = {
            name: torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in chain(module.named_parameters(), module.named_buffers())
        }
        x = torch.empty(batch, *image, dtype=dtype)
        with _Counter([x, *state.values()], live=x.nbytes) as counter:
            functional_call(module, state, x)
    return Footprint(counter.operations, counter.traffic, counter.peak)


class Footprints:
    """Footprints of all sub-networks from few passes.

    Blocks of a stage are alike, so operations and traffic grow by the same amount with each, and the peak is that of
    the largest kind of block: the shallowest network of a width and MLP ratio and those one step deeper
    in one stage tell the rest. (Swin's shifted and unshifted blocks differ a little in traffic: the pair's mean step is
    taken.)

    Args:
        backbone: of the run.
        batch: images of a forward pass.
        precision: key of `DTYPES`.
    """

    def __init__(self, backbone: Backbone, batch: int, precision: str = "fp32"):
        self.backbone, self.batch, self.precision = backbone, batch, precision
        depths = backbone.grid.depths
        self._choices = [sorted(set(stage)) for stage in zip(*depths, strict=True)]
        self._of = cache(self._count)

    def __call__(self, subnet: Subnet) -> Footprint:
        shallow = tuple(choices[0] for choices in self._choices)
        base = self._of(replace(subnet, depths=shallow))
        operations, traffic, peak = base
        for stage, depth in enumerate(subnet.depths):
            if depth == shallow[stage]:
                continue
            probe = self._choices[stage][min(2, len(self._choices[stage]) - 1)]
            deeper = self._of(replace(subnet, depths=(*shallow[:stage], probe, *shallow[stage + 1 :])))
            steps = (depth - shallow[stage]) / (probe - shallow[stage])
            operations += steps * (deeper.operations - base.operations)
            traffic += steps * (deeper.traffic - base.traffic)
            peak = max(peak, deeper.activations)
        return Footprint(operations, traffic, peak)

    def _count(self, subnet: Subnet) -> Footprint:
        import timm

        args = self.backbone.model_args(subnet)
        config = self.backbone.config
        image = (config.in_chans, config.image_size, config.image_size)
        build = lambda: timm.create_model(self.backbone.architecture, **args)  # noqa: E731
        return footprint(build, image, self.batch, self.precision)
