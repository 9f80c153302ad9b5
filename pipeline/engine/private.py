"""All that we use of DeepSpeed's insides, in one place: names that no documentation promises.

`tests/engine/test_private.py` fails by name where a version of DeepSpeed lacks one.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

from torch import Tensor

from pipeline.elastic.compiler import compiler_deferred

OPERATORS = ("__compatible_ops__",)
COMM = ("is_initialized", "destroy_process_group")
ENGINE = ("enable_backward_allreduce",)
FLAT = ("bit16_groups_flat", "single_partition_of_fp32_groups", "_coalesce_grad_reduction")
CUT_UP = (
    "fp16_groups",
    "fp16_partitioned_groups_flat",
    "fp32_partitioned_groups_flat",
    "averaged_gradients",
    "reduce_ready_partitions_and_remove_grads",
    "independent_gradient_partition_epilogue",
    "_pre_step",
    "_partition_all_parameters",
    "_overflow_clean_up",
    "_post_step",
)
PARAMETER = ("ds_tensor", "ds_grad_is_ready")
SHARD = ("ds_numel",)
TEACHER = ("empty_partition_cache",)


def keep_from_compiling(deepspeed: Any) -> None:
    """Let DeepSpeed, just imported, neither build an operator nor import torch's compiler."""
    with compiler_deferred(), suppress(ImportError):
        # it will ask whether the optimizer is this one, whose functions are to be compiled
        import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    # it would run a C compiler to see which of its operators it could build, and build one; none is needed
    deepspeed.ops.__compatible_ops__ = {}


def leave_groups() -> bool:
    """Destroy the process groups by way of DeepSpeed, which holds groups of its own, if it was used."""
    comm = sys.modules.get("deepspeed.comm.comm")
    if comm is None or not comm.is_initialized():
        return False
    comm.destroy_process_group()
    return True


def reduce_nothing(engine: Any) -> None:
    """Let an engine below stage 3 leave the gradients where they are."""
    engine.enable_backward_allreduce = False


def flat_shards(engine: Any) -> tuple[Tensor, Tensor]:
    """The vector of an engine at stage 1 or 2, and this rank's fp32 masters. DeepSpeed reduces nothing any more."""
    zero = engine.optimizer
    reduce_nothing(engine)
    zero._coalesce_grad_reduction = True  # its hooks leave gradients where they are
    (flat,), (master,) = zero.bit16_groups_flat, zero.single_partition_of_fp32_groups
    master.grad = None  # a place for gradients that will not come
    return flat, master


class CutUp:
    """An engine at stage 3, of one parameter group."""

    def __init__(self, engine: Any, offloaded: bool):
        self._zero, self._offloaded = engine.optimizer, offloaded
        (self.master,) = self._zero.fp32_partitioned_groups_flat
        (self.working,) = self._zero.fp16_partitioned_groups_flat
        (self.parameters,) = self._zero.fp16_groups
        if not offloaded:
            self.master.grad = None  # a place for gradients that will not come

    def gradients(self) -> Sequence[Tensor]:
        """Averaged, of this rank's shards of the parameters, one after the other."""
        return [self.master.grad] if self._offloaded else self._zero.averaged_gradients[0]

    def hold_back(self, parameters: Sequence[Any], held: bool) -> None:
        """Whether gradients of these parameters are left where they are."""
        for parameter in parameters:
            parameter.ds_grad_is_ready = not held

    def reduce(self, parameters: Sequence[Any]) -> None:
        """Reduce the gradients of these parameters and all that wait in the bucket."""
        for parameter in parameters:
            self._zero.reduce_ready_partitions_and_remove_grads(parameter)
        self._zero.independent_gradient_partition_epilogue()

    def let_go(self) -> None:
        """Forget what is gathered of the weights, which are about to change."""
        self._zero._partition_all_parameters()

    def forget_gradients(self) -> None:
        """End the step."""
        self._zero._pre_step()
        self._zero._overflow_clean_up(None)

    def gather_small(self) -> None:
        """Gather the small weights, which stay gathered."""
        self._zero._post_step(())


def length_of_shard(parameter: Any) -> int:
    """Elements of a rank's shard of a parameter at stage 3, with padding."""
    return parameter.ds_tensor.ds_numel


def place_shard(parameter: Any, memory: Tensor) -> None:
    """Let a rank's shard of a parameter be this memory."""
    parameter.ds_tensor.data = memory


def forget_gathered(engine: Any) -> None:
    """The same as `CutUp.let_go` for an engine without optimizer."""
    engine.optimizer.empty_partition_cache()
