"""What a pruner should see in the encoder, written out; the numbers of the published codes; and what was kept."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from vlm.models.errors import ModelError
from vlm.models.program.budget import Budget
from vlm.models.program.layout import Layout
from vlm.models.program.program import Program, Select, Tokens
from vlm.models.program.signals import Signal, Vision

COLUMNS = 6  # of the test models' grid


class Block(NamedTuple):
    """A block of the encoder: queries, keys, values [images, heads, tokens, dim], attention [.., tokens, tokens]."""

    q: Tensor
    k: Tensor
    v: Tensor
    attention: Tensor


class Seen(NamedTuple):
    blocks: list[Block]
    features: Tensor  # [images, patches, width], what goes to the connector

    def class_row(self, block: int = -1, how: str = "mean") -> Tensor:
        """The class token's attention to the patches, mean (or sum) over heads: [images, patches]."""
        row = self.blocks[block].attention[:, :, 0, 1:]
        return row.mean(1) if how == "mean" else row.sum(1)

    def received(self, block: int = -1) -> Tensor:
        """Attention that each patch gets from all tokens, mean over tokens and heads: [images, patches]."""
        return self.blocks[block].attention.mean((1, 2))[:, -36:]


def attend(block: Any, x: Tensor) -> Block:
    """Attention of a block of timm, in dense matrices."""
    q, k, v = (t.unflatten(2, (2, -1)).transpose(1, 2) for t in block.attn.qkv(block.norm1(x)).chunk(3, 2))
    return Block(q, k, v, (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(-1))


@torch.no_grad()
def look(model: Any, images: Tensor) -> Seen:
    """What the encoder of a model without a program computes on its way."""
    seen: list[Tensor] = []
    encoder = model.vision
    handles = [b.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for b in encoder.blocks]
    features = encoder(images).tokens
    for handle in handles:
        handle.remove()
    return Seen([attend(block, x) for block, x in zip(encoder.blocks, seen, strict=True)], features)


def best(score: Sequence[float] | Tensor, count: int, among: Sequence[int] | None = None) -> list[int]:
    """The ``count`` numbers of largest score, the earlier of a tie, in order of their score."""
    values = score.tolist() if isinstance(score, Tensor) else list(score)
    return sorted(range(len(values)) if among is None else among, key=lambda i: (-values[i], i))[:count]


def places(layout: Layout, image: int) -> list[int]:
    """Raster numbers of the visual tokens of an image."""
    mine = layout.image == image
    return (layout.row[mine] * COLUMNS + layout.col[mine]).tolist()


def handed_over(model: Any, run: Callable[[], Any]) -> Tensor:
    """Features [images, kept, width] that the connector gets while ``run()`` runs."""
    seen: list[Tensor] = []
    handle = model.connector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        run()
    finally:
        handle.remove()
    return seen[-1]


def given(x: Tensor, signal: Callable[[Signal], Tensor], columns: int = 1, image: Tensor | None = None) -> Tokens:
    """Tokens that a selector sees, with signals of our own; ``image``: the image that each segment is a view of."""
    valid = torch.ones(x.shape[:2], dtype=torch.bool)
    tokens = Tokens.of_images(x, valid, torch.arange(len(x)), signal, columns)
    if image is None:
        return tokens
    return Tokens(**{**vars(tokens), "image": image[:, None].expand(valid.shape)})


def apply(program: Program, tokens: Tokens, number: int = 0) -> tuple[Tensor, Any]:
    """What the cut ``number`` of a program marks, and what it makes of the features."""
    op = program[number][1]
    assert isinstance(op, Select)
    count = op.keep.count(tokens.total, tokens.images)
    kept = op.selector.choose(tokens, count)
    return kept, None if op.selector.reduce is None else op.selector.reduce(tokens, kept, count)


@pytest.fixture(scope="session")
def clear(make_model: Callable[..., Any]) -> Callable[..., Any]:
    """A model whose encoder's attention is far from even, with a class token and four blocks unless told otherwise."""

    def make(**options: Any) -> Any:
        model = make_model(**{"class_token": True, "blocks": 4, **options})
        g = torch.Generator().manual_seed(3)
        for name, weight in model.vision.model.blocks.named_parameters():
            if weight.ndim > 1 or name.endswith("bias"):
                nn.init.normal_(weight, std=0.35 if weight.ndim > 1 else 0.1, generator=g)
        return model

    return make


@pytest.fixture(scope="session")
def by_eye() -> Any:
    """The helpers of this file, which test files of this folder cannot import."""

    class Helpers:
        attend = staticmethod(attend)
        look = staticmethod(look)
        best = staticmethod(best)
        places = staticmethod(places)
        handed_over = staticmethod(handed_over)
        given = staticmethod(given)
        apply = staticmethod(apply)

    return Helpers


@pytest.fixture(scope="session")
def needs_class_token(make_model: Callable[..., Any]) -> Callable[..., None]:
    """A method that ranks by the class token refuses an encoder without one in one line, which may tell a way out; a
    block that does not run, likewise; and works on such an encoder by ``attention: received``."""

    def check(method: Any, name: str, layer: str = "layer") -> None:
        keep, bare, facts = Budget(tokens=9), make_model(blocks=4).facts, make_model(class_token=True, blocks=4).facts
        with pytest.raises(ModelError) as error:
            method(keep=keep).program(bare)
        expected = "it ranks tokens by the class token's attention, and this vision encoder has no class token"
        assert str(error.value) == f"{name}: {expected}; set attention: received"
        assert method(keep=keep, attention="received").program(bare)
        with pytest.raises(ModelError) as error:
            method(keep=keep, **{layer: 4}).program(facts)
        assert str(error.value) == f"{name}: expected a block of the vision encoder, 0..3; found 4"
        hidden = facts._replace(vision=None, refuses={"vit.out": "this family hides its encoder"})
        with pytest.raises(ModelError) as error:
            method(keep=keep).program(hidden)
        assert str(error.value) == f"{name}: this family hides its encoder"
        blind = Vision(4, 0, 3, True, "", "Swin has no attention blocks")
        with pytest.raises(ModelError) as error:
            method(keep=keep).program(facts._replace(vision=blind))
        assert str(error.value) == f"{name}: it reads attention in the vision encoder, but Swin has no attention blocks"

    return check


@pytest.fixture(scope="session")
def gradients() -> Callable[[Any], dict[str, Tensor]]:
    """``gradients(model)``: the gradients there are, by name, which are then cleared."""

    def take(model: Any) -> dict[str, Tensor]:
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        return found

    return take
