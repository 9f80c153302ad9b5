"""Join the other ranks, sum their numbers, and print the sum and gloo's interface."""

import os

import torch
import torch.distributed as dist

from pipeline.engine import distributed

ranks = distributed.initialize(60)
value = torch.tensor([float(ranks.rank + 1)])
dist.all_reduce(value)
print(f"{value.item():.0f} {os.environ.get('GLOO_SOCKET_IFNAME')}", flush=True)
distributed.shut_down()
assert "GLOO_SOCKET_IFNAME" not in os.environ
