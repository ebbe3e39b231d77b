"""Visual query tuning: learned queries read every block of a frozen encoder: ``head: {use: vqt}``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vlm.models.encoder import Features
from vlm.models.errors import ModelError
from vlm.models.head import summary, unit


@dataclass(frozen=True)
class Vqt:
    """Queries beside the tokens of each block that read them and change nothing; a linear layer on all they found.

    queries: of each block. dropout: of the queries while training.

    The encoder's own pass stays as it is, to the bit. Features are the final class token (the mean token where there is
    none) and one vector of each block, its queries one after the other, each at length 1.
    """

    source: ClassVar[str] = "VQT (CVPR 2023), section 3; official code"
    verified: ClassVar[str] = "dense restatement; trunk bit-identical"
    per_pixel: ClassVar[bool] = False

    queries: int = 1
    dropout: float = 0.1

    def build(self, encoder: Any, classes: int) -> nn.Module:
        if self.queries < 1 or not 0 <= self.dropout < 1:
            raise ModelError(
                f"head vqt: expected queries of 1 or more and a dropout in [0, 1); found {self.queries}, {self.dropout}"
            )
        if not encoder.blocks:
            raise ModelError("head vqt: expected an encoder of attention blocks; found none in it")
        patch = encoder.image.size // encoder.grid[0]
        return QueryTuning(len(encoder.blocks), encoder.dim, self.queries, classes, patch, self.dropout)


class QueryTuning(nn.Module):
    """patch: side of a patch in pixels, of which the queries' initial size depends."""

    def __init__(self, blocks: int, dim: int, queries: int, classes: int, patch: int, dropout: float) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(blocks, queries, dim))
        bound = (6.0 / (3 * patch**2 + dim)) ** 0.5
        nn.init.uniform_(self.queries, -bound, bound)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(dim + blocks * queries * dim, classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, encoder: Any, images: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images classes"]:
        found, read = self.read(encoder, images)
        vectors = [summary(encoder, found), *(one.flatten(1) for one in read)]
        return self.linear(torch.cat([unit(vector) for vector in vectors], 1))

    def read(
        self, encoder: Any, images: Float[Tensor, "images 3 height width"]
    ) -> tuple[Features, list[Float[Tensor, "images queries dim"]]]:
        """The encoder's features, and what the queries of each block became in it."""
        read: list[Tensor] = []
        scopes: list[_Heard] = []

        def before(block: nn.Module, args: Any) -> None:
            scopes.append(_Heard())
            scopes[-1].__enter__()

        def after(block: nn.Module, args: Any, out: Any) -> None:
            heard = scopes.pop()
            heard.__exit__(None, None, None)
            if out is not None:  # it is None where the block failed
                read.append(self._through(len(read), block, heard, args[0]))

        blocks = list(encoder.blocks)
        handles = [block.register_forward_pre_hook(before) for block in blocks]
        handles += [block.register_forward_hook(after, always_call=True) for block in blocks]
        try:
            found = encoder(images)
        finally:
            for handle in handles:
                handle.remove()
        return found, read

    def _through(self, number: int, block: nn.Module, heard: "_Heard", tokens: Tensor) -> Tensor:
        if heard.keys is None or heard.values is None:
            raise ModelError("head vqt: this encoder's attention does not say its keys; expected fused attention")
        queries = self.dropout(self.queries[number]).to(tokens.dtype).expand(len(tokens), -1, -1)  # [N,Q,D]
        with _Told(heard.keys, heard.values):
            out = block.forward(queries)  # without its hooks
        return out[0] if isinstance(out, tuple) else out


class _Heard(TorchFunctionMode):
    """Remembers keys and values [N,H,T,d] of the attention call in its block."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def __torch_function__(self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is F.scaled_dot_product_attention:
            said = given | dict(zip(("query", "key", "value"), args, strict=False))
            self.keys, self.values = said["key"], said["value"]
        return func(*args, **given)


class _Told(TorchFunctionMode):
    """Lets an attention call read the keys and values of another one."""

    def __init__(self, keys: Float[Tensor, "n heads tokens dim"], values: Float[Tensor, "n heads tokens dim"]) -> None:
        super().__init__()
        self.given = keys, values

    def __torch_function__(self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **given)
        said = given | dict(zip(("query", "key", "value"), args, strict=False))
        return func(said["query"], *self.given, scale=given.get("scale"))
