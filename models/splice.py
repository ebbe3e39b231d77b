"""Splice visual tokens into text: one placeholder per image becomes that image's tokens."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.layout import IMAGE, PAD, TEXT, Layout, Side

# The data layer's placeholder for an image. Negative, so no tokenizer and no user text can produce it.
IMAGE_TOKEN = -1


class Visual:
    """The visual tokens of a batch's images: features and their places in each image's grid.

    features [images, tokens, width]; place [images, tokens] raster index in ``grid``; valid marks real tokens
    (images may keep different numbers after a cut). Image i belongs to row owner[i]; owners ascend. whole: positions
    are counted as if every token that there was before a cut were there: size[i] of image i, of which a token was
    number [images, tokens]. Without tiles that is every place of the grid.
    """

    def __init__(
        self,
        features: Float[Tensor, "images tokens width"],
        grid: tuple[int, int],
        owner: Int[Tensor, " images"],
        place: Int[Tensor, "images tokens"] | None = None,
        valid: Bool[Tensor, "images tokens"] | None = None,
        whole: bool = False,
    ) -> None:
        count = features.shape[:2]
        self.features, self.grid, self.owner, self.whole = features, grid, owner, whole
        everywhere = torch.arange(count[1], device=features.device).expand(count)
        self.place = everywhere if place is None else place
        self.number: Int[Tensor, "images tokens"] = self.place
        self.size: Int[Tensor, " images"] = torch.full_like(owner, grid[0] * grid[1])
        self.valid = torch.ones(count, dtype=torch.bool, device=features.device) if valid is None else valid


def check_placeholders(
    tokens: Int[Tensor, "batch length"],
    text_valid: Bool[Tensor, "batch length"],
    owner: Int[Tensor, " images"],
    keys: Sequence[str],
) -> None:
    """Refuse a batch whose placeholders and images do not match, before anything is built.

    Raises ModelError naming the sample, the images it has and the placeholders found.
    """
    placeholders = ((tokens == IMAGE_TOKEN) & text_valid).sum(1)
    images = torch.zeros_like(placeholders).scatter_add_(0, owner, torch.ones_like(owner))
    descends = (owner.diff() < 0).any()
    if not bool(descends | (placeholders != images).any()):  # one look at values, which waits for the GPU
        return
    if bool(descends):
        raise ModelError(f"images come in the order of their rows, so owners must ascend; found {owner.tolist()}")
    for row in (placeholders != images).nonzero().flatten().tolist():
        name = keys[row] if keys else f"row {row}"
        raise ModelError(
            f"sample {name}: expected {int(images[row])} image placeholders, one per image; "
            f"found {int(placeholders[row])}"
        )


def splice(
    tokens: Int[Tensor, "batch length"],
    text_valid: Bool[Tensor, "batch length"],
    embedded: Float[Tensor, "batch length width"],
    visual: Visual,
    side: Side,
) -> tuple[Float[Tensor, "batch spliced width"], Layout]:
    """Replace each placeholder by its image's tokens; rows are padded to one length on ``side``.

    Returns the embeddings and the layout of the spliced sequence (positions 0, 1, 2 ... in each row; with gaps where
    ``visual.whole`` counts tokens that are gone).
    """
    batch, length = tokens.shape
    device = tokens.device
    is_image = (tokens == IMAGE_TOKEN) & text_valid
    image_of = (is_image.flatten().cumsum(0) - 1).unflatten(0, (batch, length))  # n-th placeholder is image n
    per_image = visual.valid.sum(1)  # [N]
    count = text_valid.long()
    if len(per_image):
        count = torch.where(is_image, per_image[image_of.clamp_min(0)], count)

    totals = count.sum(1)
    lengths: list[int] = totals.tolist()  # the only look at values
    places = torch.arange(batch * length, device=device)
    origin = places.repeat_interleave(count.flatten(), output_size=sum(lengths))  # [total]
    starts = count.flatten().cumsum(0) - count.flatten()
    within = torch.arange(len(origin), device=device) - starts[origin]  # number inside its image, 0 for text
    row = origin // length
    spliced = max(lengths, default=0)
    column = torch.arange(len(origin), device=device) - (totals.cumsum(0) - totals)[row]  # place in its row
    position = column
    if visual.whole and len(per_image):
        uncut = torch.where(is_image, visual.size[image_of.clamp_min(0)], text_valid.long())  # [B,L] tokens there were
        position = (uncut.cumsum(1) - uncut).flatten()[origin]
    if side == "left":
        column = column + spliced - totals[row]

    from_image = is_image.flatten()[origin]  # [total]
    image = torch.where(from_image, image_of.flatten()[origin], -1)
    values = embedded.flatten(0, 1)[origin]
    raster = torch.full_like(origin, -1)
    if len(per_image):
        order = visual.valid.int().argsort(dim=1, descending=True, stable=True)  # valid first, in raster order
        picked = order[image.clamp_min(0), within.clamp_max(order.shape[1] - 1)]
        features = visual.features[image.clamp_min(0), picked].to(values.dtype)
        values = torch.where(from_image[:, None], features, values)
        raster = torch.where(from_image, visual.place[image.clamp_min(0), picked], -1)
        if visual.whole:
            number = visual.number[image.clamp_min(0), picked]
            position = position + number.masked_fill(~from_image, 0)

    def fill(value: Tensor, empty: int) -> Tensor:
        out = torch.full((batch, spliced), empty, dtype=torch.long, device=device)
        out[row, column] = value
        return out

    layout = Layout(
        role=fill(torch.where(from_image, IMAGE, TEXT), PAD),
        image=fill(image, -1),
        row=fill(torch.where(raster >= 0, raster // visual.grid[1], -1), -1),
        col=fill(torch.where(raster >= 0, raster % visual.grid[1], -1), -1),
        position=fill(position, 0),
        sample=torch.arange(batch, device=device)[:, None].expand(batch, spliced),
        source=fill(origin % length, 0),
    )
    out = values.new_zeros(batch, spliced, values.shape[-1]).index_put((row, column), values)
    return out, layout
