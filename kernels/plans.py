"""Tables that follow from sizes alone: made once, kept, and constants of a compiled graph.

A tracer would follow the loops that make a table and repeat them in every call, or stop where they look at a value.
Here it gets the finished tensors, and the sizes become conditions of the graph: other sizes are another graph.
"""

from collections.abc import Callable, Hashable
from functools import wraps
from operator import index
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T", bound=tuple[Tensor, ...])


def plan(kind: type[T], maxsize: int = 64) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a function of integers, booleans, tuples of them and devices that returns a ``kind``, a named tuple of
    tensors.

    Its last ``maxsize`` results are kept. It runs on the CPU whatever the default device is, outside of inference mode
    (a later call may need gradients, which inference tensors cannot serve) and of what a compiler traces.
    """

    def decorate(make: Callable[P, T]) -> Callable[P, T]:
        table: dict[tuple[Any, ...], T] = {}

        def kept(*sizes: Any) -> T:
            found = table.get(sizes)
            if found is None:
                with torch.inference_mode(False), torch.device("cpu"):
                    found = make(*sizes)  # type: ignore[call-arg]  # positional, so that a call has one key
                if all(type(each) is Tensor for each in found):  # an exporter's stand-ins are of no use to others
                    table[sizes] = found
                while len(table) > maxsize:
                    table.pop(next(iter(table)))
            return found

        # One tensor at a time: the compiler takes tensors as constants of its graph and no tuple of them.
        @torch.compiler.assume_constant_result
        def part(number: int, *sizes: Any) -> Tensor:
            return kept(*sizes)[number]

        part.__name__ = make.__name__  # of the constant in the graph
        places = range(len(kind._fields))  # type: ignore[attr-defined]

        @wraps(make)
        def planned(*sizes: Any) -> T:
            if not torch.compiler.is_compiling():
                return kept(*sizes)
            fixed = tuple(_fixed(size) for size in sizes)
            return kind(*(part(number, *fixed) for number in places))

        return planned  # type: ignore[return-value]

    return decorate


def _fixed(size: Any) -> Hashable:
    """Plain numbers; a size that a compiler left open is settled."""
    if isinstance(size, tuple):
        return tuple(_fixed(each) for each in size)
    return size if size is None or isinstance(size, (bool, str, torch.device)) else index(size)
