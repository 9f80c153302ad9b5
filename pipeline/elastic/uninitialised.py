"""Networks whose weights are loaded next, or never wanted."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_DRAWING = {
    *(Tensor.normal_, Tensor.uniform_),
    *(Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_),  # timm's truncated normal
    *(nn.init.normal_, nn.init.uniform_, nn.init.trunc_normal_, nn.init.kaiming_normal_, nn.init.kaiming_uniform_),
}


class Uninitialised(TorchFunctionMode):
    """While it is open, modules are made without drawing their parameters: these are whatever the memory held.

    Drawing takes longer than loading (86 million weights: 0.9 against 0.2 seconds of a core), and on the meta device,
    where there is nothing to draw, it imports torch's compiler.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        arguments: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        options = options or {}
        if function in _DRAWING:
            values = arguments[0] if arguments else options["tensor"]
            if isinstance(values, nn.Parameter):  # buffers are computed
                return values
        return function(*arguments, **options)
