"""How much an image changes what each attention head says: vision-aware head divergence, and gains from it.

Source: "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence" (VHR, ACL 2025).
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlm.models.program.inside import output_projection
from vlm.models.program.layout import PAD, Layout
from vlm.models.program.observe import resting
from vlm.models.program.run import Run

OfHeads = Callable[[int, Float[Tensor, "batch heads dim"]], Float[Tensor, "batch heads"] | None]


def divergence(
    with_image: Float[Tensor, "batch heads dim"], without: Float[Tensor, "batch heads dim"]
) -> Float[Tensor, "batch heads"]:
    """Length of the difference of each head's output, in single precision or more."""
    return (_wide(with_image) - _wide(without)).norm(dim=2)


def head_gains(
    with_image: Float[Tensor, "batch heads dim"], without: Float[Tensor, "batch heads dim"], gain: float, drop: bool
) -> Float[Tensor, "batch heads"]:
    """``gain`` for heads whose divergence is above the median of the layer's, 1 for the others.

    drop: 0 for a head that says more without the image than with it and whose divergence is above the mean by more than
    a standard deviation. Our reading of the paper's filter, whose threshold is not known to us.
    """
    change = divergence(with_image, without)
    gains = torch.where(change > change.quantile(0.5, dim=1, keepdim=True), gain, torch.ones_like(change))
    if drop:
        louder = _wide(without).norm(dim=2) > _wide(with_image).norm(dim=2)
        far = change > change.mean(1, keepdim=True) + change.std(1, correction=0, keepdim=True)
        gains = gains.masked_fill(louder & far, 0)
    return gains


@torch.no_grad()
def image_gains(
    model: Any, inputs: Any, layers: Collection[int], gain: float, drop: bool
) -> Float[Tensor, "batch layers heads"]:
    """:func:`head_gains` of each layer at each prompt's last token, 1 in other layers and in rows without an image.

    One pass, in which each prompt stands beside itself without images; the heads of a layer are scored after those of
    earlier layers got their gains, in both.
    """
    shown = (model.visual_counts(inputs) > 0)[:, None]
    found: dict[int, Tensor] = {}

    def score(layer: int, out: Float[Tensor, "batch heads dim"]) -> Float[Tensor, "batch heads"]:
        with_image, without = out.chunk(2)
        gains = head_gains(with_image, without, gain, drop)
        found[layer] = torch.where(shown, gains, torch.ones_like(gains))
        return torch.cat([found[layer], found[layer]])

    with resting(model), at_heads(model, layers, score):
        embeds, run = _beside_itself(model, inputs)
        model._decode(embeds, run, None)
    one = torch.ones_like(next(iter(found.values())))
    return torch.stack([found.get(layer, one) for layer in range(len(model.decoder.layers))], 1)


@torch.no_grad()
def answer_divergence(
    model: Any, inputs: Any, tokens: Int[Tensor, "batch steps"]
) -> Float[Tensor, "batch steps layers heads"]:
    """The divergence of every head in the rows that predict the tokens of an answer, in passes of the bare model."""
    layers = range(len(model.decoder.layers))
    now: dict[int, Tensor] = {}
    with resting(model), at_heads(model, layers, lambda layer, out: now.update({layer: out})):
        states, streams = [], []
        for prompts in (inputs, inputs.without_images()):
            _, stream = model.prefill(prompts)
            states.append([torch.stack([now[layer] for layer in layers], 1)])
            streams.append(stream)
        for token in tokens.unbind(1)[:-1]:
            for state, stream in zip(states, streams, strict=True):
                model.step(stream, token)
                state.append(torch.stack([now[layer] for layer in layers], 1))  # [B,L,H,D]
    with_image, without = (_wide(torch.stack(state, 1)) for state in states)
    return (with_image - without).norm(dim=4)


def token_divergence(by_head: Float[Tensor, "batch steps layers heads"], top: int) -> Float[Tensor, "batch steps"]:
    """T-VHD: the ``top`` largest divergences of each layer, summed over layers. A token that the image has no part in
    gets little; the paper finds that of hallucinated words. Section 3.2."""
    return by_head.topk(min(top, by_head.shape[3]), dim=3).values.sum((2, 3))


@contextmanager
def at_heads(model: Any, layers: Collection[int], see: OfHeads) -> Iterator[None]:
    """Show ``see(layer, output of each head at the last place)`` in every pass; what it returns multiplies them."""
    heads = model.decoder.config.num_attention_heads

    def hook(layer: int, projection: nn.Module, args: tuple) -> tuple | None:
        last = args[0][:, -1].unflatten(1, (heads, -1))  # [B,H,D]
        gains = see(layer, last)
        if gains is None:
            return None
        changed = args[0].clone()
        changed[:, -1] = (last * gains.to(last.dtype)[..., None]).flatten(1)
        return (changed, *args[1:])

    found = ((layer, output_projection(model.decoder.layers[layer])) for layer in layers)
    handles = [module.register_forward_pre_hook(partial(hook, layer)) for layer, module in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _beside_itself(model: Any, inputs: Any) -> tuple[Float[Tensor, "twice length width"], Run]:
    """Embeddings and run of the prompts followed by the same prompts without images, padded on the left."""
    embeds, run = model._enter(inputs, "left")
    bare, other = model._enter(inputs.without_images(), "left")
    missing = embeds.shape[1] - bare.shape[1]
    first, second = run.layouts[0], other.layouts[0]
    if first.axes is not None and second.axes is None:
        second = second._replace(axes=second.position[..., None].expand(-1, -1, 3))
    fills = {"role": PAD, "position": 0, "axes": 0, "sample": 0}
    fields: list[Any] = []
    for name, one, two in zip(Layout._fields, first, second, strict=True):
        if one is None:
            fields.append(None)
            continue
        two = torch.full_like(second.role, -1) if two is None else two
        pad = (0, 0, missing, 0) if two.ndim == 3 else (missing, 0)
        fields.append(torch.cat([one, nn.functional.pad(two, pad, value=fills.get(name, -1))]))
    both = Run(Layout(*fields), "left", run.seed)
    both.deep = run.deep  # found by sample and place, which only visual tokens look up
    return torch.cat([embeds, nn.functional.pad(bare, (0, 0, missing, 0))]), both


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
