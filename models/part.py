"""What encoders and connectors have in common: a part remembers what it was made with, so that it can be made again."""

import inspect
from typing import Any, Self

from torch import nn


class Part(nn.Module):
    """A part of a composed model. ``made_with`` are the arguments of its constructor by name, defaults included."""

    made_with: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        part = super().__new__(cls)
        # Partial, because copying a module makes one without arguments and then gives it its state.
        bound = inspect.signature(cls.__init__).bind_partial(part, *args, **kwargs)
        bound.apply_defaults()
        vars(part)["made_with"] = {name: value for name, value in bound.arguments.items() if value is not part}
        return part

    def options(self) -> dict[str, Any]:
        """Recipe options that make the same part without loading weights from elsewhere: what a saved model notes."""
        return dict(self.made_with)
