"""What training imports or makes once per process, for the process from which ranks are forked.

It starts no thread, for none would live on in the forks.
"""

import gc
import importlib
import os

# Triton asks when it is imported whether its own functions will be compiled or interpreted; no rank compiles any
os.environ["TRITON_INTERPRET"] = "1"

import torch
from nvidia.dali._utils import dali_trace

import pipeline.run.loop  # noqa: F401
from pipeline.config.data import DataConfig
from pipeline.data.augment import make_pipeline
from pipeline.engine.zero import deepspeed
from pipeline.measure.peak import device_peak

deepspeed()
for name in (  # early or late, or at ZeRO-3 and under FSDP2 only
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_config",
    "encodings.idna",
    "numpy.ctypeslib",
    "nvidia.dali.fn",
    "pipeline.elastic.vit",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "pipeline.engine.fully_shard",
    "pipeline.engine.zero3",
    "tensorboard.summary.writer.event_file_writer",
):
    importlib.import_module(name)
dali_trace.set_tracing(enabled=False)  # where each operator was asked for: half of what a graph takes
# DALI rewrites the code of the graph, once per process; nothing is built or run
make_pipeline(DataConfig(train="-", batch_size=1), lambda number: ((), (), ()), device_id=None, half=False)
torch.set_num_threads(1)  # as each rank does
device_peak(torch.device("cpu"), torch.float32)
del os.environ["TRITON_INTERPRET"]
gc.collect()
gc.freeze()  # or each fork looks for garbage among a million objects, and copies the memory that they lie in
