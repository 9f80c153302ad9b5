"""Takes another function than torchvision does from the compiler while it is deferred; prints where it is from."""

from pipeline.elastic.compiler import compiler_deferred

with compiler_deferred():
    from torch._dynamo.utils import counters

import torch._dynamo.utils

print(counters is torch._dynamo.utils.counters, torch._dynamo.utils.__file__)
