"""What a step asks of the device and of the network: step_counts.py OUT CONFIG [CONFIG ...], on some ranks.

Writes a list: per configuration and rank, counts of the third step, and in which order things began in it.
"""

import json
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.config import load_config
from pipeline.engine import distributed, zero
from pipeline.engine.flight import Flight
from pipeline.method.tri_branch import Branch
from pipeline.run.step import Trainer

BUCKET = 50_000


class Collectives(TorchDispatchMode):
    """Counts collectives, whoever calls them, and the bytes of the whole vectors that they work on."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function._opname.strip("_")
            self.calls[name] += 1
            self.events.append(name)
            self.bytes[name] += max((x.nbytes for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)), default=0)
        return function(*args, **(kwargs or {}))


READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__", "nonzero")
"""Methods of a tensor by which a host waits for a device."""
EAGER = ("kernels.distillation", "kernels.sinkhorn")
"""Their eager code looks at values; the Triton kernels, which a GPU runs, do not."""


@contextmanager
def waiting(calls: Counter[str]):
    """Count what would wait for a device, were the tensors on one."""

    def counted(name: str):
        original = getattr(Tensor, name)

        def call(tensor: Tensor, *args, **kwargs):
            calls[name] += sys._getframe(1).f_globals["__name__"] not in EAGER
            return original(tensor, *args, **kwargs)

        return call

    from deepspeed.accelerator import get_accelerator

    with ExitStack() as stack:
        for name in READS:
            stack.enter_context(mock.patch.object(Tensor, name, counted(name)))
        synchronize = stack.enter_context(mock.patch.object(get_accelerator(), "synchronize"))
        yield
    calls["synchronize"] += synchronize.call_count


@contextmanager
def ordered(events: list[str], net: Branch):
    """Note when branches begin, backward passes begin and end, gradients are there, and collectives are waited for."""
    forward, backward, land = Branch.forward, Tensor.backward, Flight.land

    def begun(branch: Branch, *args, **kwargs):
        events.append("student" if branch is net else "teacher")
        return forward(branch, *args, **kwargs)

    def passed(loss: Tensor, *args, **kwargs):
        events.append("backward")
        backward(loss, *args, **kwargs)
        events.append("end")

    def landed(flight: Flight, leaving: int = 0):
        if len(flight._under_way) > leaving:
            events.append(f"wait for {len(flight._under_way) - leaving}")
        land(flight, leaving)

    patches = ((Branch, "forward", begun), (Tensor, "backward", passed), (Flight, "land", landed))
    with ExitStack() as stack:
        for thing, name, call in patches:
            stack.enter_context(mock.patch.object(thing, name, call))
        for parameter in net.parameters():
            hook = parameter.register_hook(lambda _: events.append("gradient"))
            stack.callback(hook.remove)
        yield


def sent_early(events: list[str]) -> int:
    """Collectives that begin while a backward pass has still gradients to bring."""
    found, following = 0, False
    for event in reversed(events):
        following = event == "gradient" or (following and event not in ("backward", "end"))
        found += following and event != "gradient" and not event.startswith("wait")
    return found


def counts_of_a_step(config, ranks) -> dict:
    trainer = Trainer(config, ranks)
    trainer.start_data(0)
    net = trainer.engine.branch  # asked for later, it would be waited for
    for step in range(2):  # moments, buffers and ZeRO-3's trace are made by the first ones
        trainer.step(step)
    waits: Counter[str] = Counter()
    read: Counter[str] = Counter()
    events: list[str] = []
    with ordered(events, net), Collectives(events) as collectives, waiting(waits):
        step = trainer.step(2)
    with waiting(read):
        assert not step.report.agreed.bad
    weights = sum(group.spec.numel for group in trainer.engine.groups)
    trainer.close()
    return {
        "waits": dict(+waits),
        "waits afterwards": dict(+read),
        "collectives": dict(collectives.calls),
        "bytes": dict(collectives.bytes),
        "weights": weights,
        "sent early": sent_early(events),
        "events": [event for event in events if event != "gradient"],
    }


def main() -> None:
    out, *configs = sys.argv[1:]
    torch.set_num_threads(1)
    zero.BUCKET = BUCKET
    ranks = distributed.initialize()
    found = [ranks.gather(counts_of_a_step(load_config(path), ranks)) for path in configs]
    if ranks.is_main:
        Path(out).write_text(json.dumps(found))
    distributed.shut_down()


if __name__ == "__main__":
    main()
