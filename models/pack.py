"""Packs: several samples one after the other in one sequence of the decoder, each as if it stood alone.

A batch always comes as one row per sample, so that images, placeholders and position ids (of one axis or of three) are
made as without packing. After the images are in, and after any cut before the decoder, the rows are laid end to end:
position ids start anew with each sample because they are the rows' own, and attention is block-diagonal because the
mask is made of ``Layout.sample``, never inferred from position ids. What leaves the decoder stays packed; its layout
says of every place which sample it belongs to and which token of that sample it is.
"""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.layout import PAD, Layout

FULL, SLIDING = "full_attention", "sliding_attention"


def check_packs(decoder: Any) -> None:
    """Refuse a decoder in which samples of a pack could not be kept apart exactly.

    Raises ModelError for a layer that is not plain or sliding-window attention (a recurrent state runs on from sample
    to sample), positions that are not rotary, or attention that takes no mask of ours.
    """
    config, kind = decoder.config, type(decoder).__name__
    other = sorted(set(getattr(config, "layer_types", None) or [FULL]) - {FULL, SLIDING})
    if getattr(config, "attention_chunk_size", None):
        other.append("chunked_attention")
    if other or not all(hasattr(layer, "self_attn") for layer in getattr(decoder, "layers", [None])):
        found = ", ".join(other) or "layers without self_attn"
        raise ModelError(f"pack: {kind}: expected layers of full or sliding-window attention; found {found}")
    if not any("rotary" in name for name, _ in decoder.named_modules()):
        raise ModelError(f"pack: {kind}: expected rotary positions, which start anew in each sample; found none")
    if config._attn_implementation not in ("sdpa", "eager"):
        found = config._attn_implementation
        raise ModelError(f"pack: {kind}: expected sdpa or eager attention, which take a mask; found {found!r}")


def pack_rows(embeds: Tensor, layout: Layout, pack: Int[Tensor, " batch"]) -> tuple[Tensor, Layout]:
    """Lay the rows [batch, length, width] end to end: row b goes into sequence ``pack[b]``, in order.

    Returns [packs, places, width], padded on the right, and its layout; ``sample`` is -1 at padding.
    Raises ModelError unless ``pack`` ascends from 0 without a gap.
    """
    steps = torch.diff(pack, prepend=pack.new_full((1,), -1))
    if len(pack) != len(embeds) or int(steps[:1]) != 1 or bool(((steps < 0) | (steps > 1)).any()):
        raise ModelError(f"pack: expected numbers from 0 up, one per row of {len(embeds)}; found {pack.tolist()}")
    row, place = layout.valid.nonzero(as_tuple=True)  # [total], row by row
    totals = torch.zeros(int(pack[-1]) + 1, dtype=torch.long, device=pack.device)
    totals.scatter_add_(0, pack, layout.valid.sum(1))
    there = (pack[row], torch.arange(len(row), device=pack.device) - (totals.cumsum(0) - totals)[pack[row]])
    shape = (len(totals), int(totals.max()))

    def laid(field: Tensor, empty: int) -> Tensor:
        values = field[row, place]
        return values.new_full((*shape, *values.shape[1:]), empty).index_put(there, values)

    packed = Layout(
        role=laid(layout.role, PAD),
        image=laid(layout.image, -1),
        row=laid(layout.row, -1),
        col=laid(layout.col, -1),
        position=laid(layout.position, 0),
        sample=laid(layout.sample, -1),
        source=laid(layout.source, 0),
        axes=None if layout.axes is None else laid(layout.axes, 0),
        block=None if layout.block is None else laid(layout.block, -1),
    )
    return laid(embeds, 0), packed


def pack_mask(layout: Layout, config: Any, like: Tensor) -> Any:
    """What a decoder of ``config`` takes as its attention mask for packed sequences: each place sees those before it in
    its sample, and those of its own block (``Layout.block``).

    One mask [packs, 1, places, places], boolean or as eager attention adds it to scores of the type of ``like``; where
    layers differ, a mask for each kind of layer. The window of a sliding layer counts within the sample.
    """
    sample, block = layout.sample, layout.block
    place = torch.arange(sample.shape[1], device=sample.device)
    same = sample[:, :, None] == sample[:, None, :]  # [P,N,N]; padding sees padding, so that no row is empty
    seen = same & (place[:, None] >= place)
    kinds = set(getattr(config, "layer_types", None) or [])
    window = getattr(config, "sliding_window", None)
    near = seen if window is None else seen & (place[:, None] - place < window)
    if block is not None:
        together = same & (block[:, :, None] == block[:, None, :]) & (block >= 0)[:, None, :]
        seen, near = seen | together, near | together
    if SLIDING in kinds:
        return {kind: _as_taken(near if kind == SLIDING else seen, config, like) for kind in kinds}
    return _as_taken(seen if kinds else near, config, like)  # without kinds, a window is that of all layers


def _as_taken(seen: Bool[Tensor, "packs places places"], config: Any, like: Tensor) -> Tensor:
    if config._attn_implementation != "eager":
        return seen[:, None]
    least = torch.finfo(like.dtype).min
    return torch.zeros_like(seen, dtype=like.dtype).masked_fill(~seen, least)[:, None]
