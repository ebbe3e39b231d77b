"""Changes to a prompt and its images from which other contexts of a decode are made."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.layout import Side, compact

STEPS = 1000  # of the diffusion whose noise is used


def pixel_seed(images: Float[Tensor, "images *pixels"]) -> Int[Tensor, " images"]:
    """An integer of each image's pixels: exact, so the same image gives it in any batch."""
    bits = images.detach().float().contiguous().view(torch.int32).flatten(1)
    # bit pattern times place (from 1, modulo 8191), summed; those of equal place first
    whole = bits.shape[1] // 8191 * 8191
    total = bits[:, :whole].unflatten(1, (-1, 8191)).sum(1, dtype=torch.long)  # [N,8191]
    total[:, : bits.shape[1] - whole] += bits[:, whole:]
    return (total * (torch.arange(1, 8192, device=bits.device) % 8191)).sum(1) % 2**40


def signal_left(step: int) -> float:
    """The share of an image's variance that is left after ``step`` (0 to 999) of the diffusion.

    The noise of a step grows along a sigmoid from 1e-5 to 5e-3. Source: VCD (CVPR 2024), official code.
    Raises ModelError for another step.
    """
    if not 0 <= step < STEPS:
        raise ModelError(f"noised image: expected a step from 0 to {STEPS - 1}; found {step}")
    noise = torch.linspace(-6, 6, STEPS, dtype=torch.float64).sigmoid() * (5e-3 - 1e-5) + 1e-5
    return float((1 - noise)[: step + 1].prod())


def diffused(pixels: Float[Tensor, "*pixels"], step: int, seed: int = 0) -> Float[Tensor, "*pixels"]:
    """The image after ``step`` of a diffusion: sqrt(a) x + sqrt(1 - a) noise, on normalised pixels, not clamped.

    The noise goes by ``seed`` and the pixels themselves, and is drawn on the CPU, so that it depends neither on the
    batch nor on the device. Source: VCD (CVPR 2024), section 3.2.
    """
    left = signal_left(step)
    own = int(pixel_seed(pixels[None]))
    generator = torch.Generator().manual_seed((own + seed * 1_000_003) % 2**63)
    noise = torch.randn(pixels.shape, generator=generator).to(pixels)
    return left**0.5 * pixels + (1 - left) ** 0.5 * noise


def cropped(
    pixels: Float[Tensor, "channels height width"], most: float = 0.2
) -> Float[Tensor, "channels height width"]:
    """A piece of the image at a random place, at most that share of its area, blown up to its size.

    Place and size go by the pixels themselves, drawn on the CPU. Source: mDPO (EMNLP 2024), section 3.2: the rejected
    image is a crop of 0 to 20 % of the original. Raises ModelError where pixels are no picture.
    """
    if pixels.ndim != 3:
        raise ModelError(f"cropped image: expected pixels [3, height, width]; found {tuple(pixels.shape)}; use noise")
    generator = torch.Generator().manual_seed(int(pixel_seed(pixels[None])))
    share, down, right = torch.rand(3, generator=generator).tolist()
    side = (share * most) ** 0.5
    height, width = (max(1, round(side * size)) for size in pixels.shape[1:])
    top, left = round(down * (pixels.shape[1] - height)), round(right * (pixels.shape[2] - width))
    piece = pixels[None, :, top : top + height, left : left + width]
    return torch.nn.functional.interpolate(piece, size=pixels.shape[1:], mode="bilinear", align_corners=False)[0]


def masked(
    pixels: Float[Tensor, "channels height width"], kept: Bool[Tensor, "rows cols"]
) -> Float[Tensor, "channels height width"]:
    """The image with every cell of the grid that is not kept in the mean colour (0 after normalisation)."""
    size = pixels.shape[-2:]
    # nearest: cell (i, j) covers its share of the pixels, whole numbers or not
    shown = torch.nn.functional.interpolate(kept[None, None].float(), size=size, mode="nearest")[0, 0]
    return pixels * shown.to(pixels)


def insertion(
    visual: Bool[Tensor, "batch length"], valid: Bool[Tensor, "batch length"], count: int, start: bool
) -> Callable[[Int[Tensor, "batch length"], int | Int[Tensor, " count"]], Int[Tensor, "batch longer"]]:
    """How ``count`` tokens are put into texts: a function from what stands at each place, and what shall stand at the
    new ones, to what then stands at each place.

    They go after the last image of each row; with ``start``, and in a row without an image, after its first token (the
    one that begins every text).
    """
    batch, length = valid.shape
    place = torch.arange(length, device=valid.device)
    last, first = (visual * (place + 1)).amax(1) - 1, valid.int().argmax(1)
    at = first if start else torch.where(last >= 0, last, first)
    key = torch.cat([2 * place.expand(batch, length), (2 * at + 1)[:, None].expand(-1, count)], 1)
    order = key.argsort(dim=1, stable=True)

    def put(values: Tensor, new: int | Tensor) -> Tensor:
        fresh = torch.as_tensor(new, dtype=values.dtype, device=values.device).expand(batch, count)
        return torch.cat([values, fresh], 1).gather(1, order)

    return put


def edited(
    keep: Bool[Tensor, "batch length"], at: Int[Tensor, " batch"], ids: Sequence[Sequence[int]], side: Side
) -> tuple[
    Callable[[Int[Tensor, "batch length"], int | Int[Tensor, "batch most"]], Int[Tensor, "batch longer"]],
    Int[Tensor, "batch most"],
    Bool[Tensor, "batch longer"],
]:
    """How each row keeps some places of its text and gets ``ids[row]`` put in after its place ``at`` (-1: before all).

    Returns a function from what stands at each place, and what shall stand at the new ones, to what then stands at each
    place (0 where nothing does); the new tokens, padded on the right; and which places are then real, rows padded on
    ``side``.
    """
    batch, length = keep.shape
    most = max(map(len, ids), default=0)
    fresh = torch.tensor([[*row, *[0] * (most - len(row))] for row in ids], dtype=torch.long, device=keep.device)
    fresh = fresh.reshape(batch, most)
    there = (
        torch.arange(most, device=keep.device) < torch.tensor([len(row) for row in ids], device=keep.device)[:, None]
    )
    place = torch.arange(length, device=keep.device).expand(batch, length)
    key = torch.cat([2 * place, (2 * at + 1)[:, None].expand(-1, most)], 1)
    order = key.argsort(dim=1, stable=True)
    index, valid = compact(torch.cat([keep, there], 1).gather(1, order), side)
    index = order.gather(1, index)

    def put(values: Tensor, new: int | Tensor) -> Tensor:
        added = torch.as_tensor(new, dtype=values.dtype, device=values.device).expand(batch, most)
        return torch.cat([values, added], 1).gather(1, index).masked_fill(~valid, 0)

    return put, fresh, valid
