"""Imports and decorates while the compiler is deferred, then uses what came of it; prints what was seen."""

import inspect
import json
import sys

import torch

from pipeline.elastic.compiler import compiler_deferred

SEEN = {}


def there() -> bool:
    return "torch._dynamo" in sys.modules


own = torch.compile, torch.compiler.disable
with compiler_deferred():
    import torchvision.ops

    @torch.compile(backend="eager")
    def compiled(x):
        return torch.compiler.is_compiling(), x + 1

    @torch.compiler.disable
    def not_compiled():
        return torch.compiler.is_compiling()

    SEEN["disabled before"] = not_compiled()
    SEEN["imported within"] = there()
SEEN["restored"] = (torch.compile, torch.compiler.disable) == own and "torch._dynamo.utils" not in sys.modules
SEEN["imported after"] = there()
SEEN["name"] = compiled.__name__
compiling, two = compiled(torch.ones(1))
SEEN["compiled"] = [compiling, two.item(), there()]
SEEN["disabled in what is compiled"] = torch.compile(
    lambda: (not_compiled(), torch.compiler.is_compiling()), backend="eager"
)()
roi_align = inspect.unwrap(torchvision.ops.roi_align)
stand_in = sys.modules[roi_align.__module__].is_compile_supported
SEEN["asked"] = stand_in("cpu") == torch._dynamo.utils.is_compile_supported("cpu")
with compiler_deferred():
    SEEN["nothing to defer"] = (torch.compile, torch.compiler.disable) == own
print(json.dumps(SEEN))
