"""The state of the newest token between decoder layers, for what reads the model before its last layer."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlm.models.program.run import Run


def watch(decoder: Any, after: Collection[int], run_of: Callable[[Any], Run]) -> list[RemovableHandle]:
    """Hooks that leave in the run of every pass (``Run.inner``) the last place's state after so many layers.

    0 is what enters the first layer. Rows are padded on the left, so the last place is the newest token of every row.
    """

    def keep(number: int, kwargs: Any, hidden: Tensor) -> None:
        run_of(kwargs).inner[number] = hidden[:, -1]

    def leave(number: int, module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        keep(number, kwargs, out[0] if isinstance(out, tuple) else out)

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        keep(0, kwargs, args[0])

    handles = []
    for number in after:
        if number == 0:
            handles.append(decoder.layers[0].register_forward_pre_hook(enter, with_kwargs=True))
        else:
            hook = partial(leave, number)
            handles.append(decoder.layers[number - 1].register_forward_hook(hook, with_kwargs=True))
    return handles
