"""Where a model looks while it answers: the attention of every row that predicts a token, to the image alone."""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.layout import Layout, compact
from vlm.models.program.observe import observe
from vlm.models.program.signals import Attention


class Looks(NamedTuple):
    """maps: attention of the row that predicts token t, mean over heads, to the visual tokens of each prompt in order,
    padded on the right. real: whether the answer had not ended before that token. tokens: the answer's. layout, grids:
    of the prompts, uncut."""

    maps: Float[Tensor, "steps layers batch visual"]
    real: Bool[Tensor, "steps batch"]
    tokens: Int[Tensor, "batch steps"]
    layout: Layout
    grids: list[tuple[int, int]]

    def on_grids(self, scores: Float[Tensor, "batch visual"]) -> list[Float[Tensor, "rows cols"]]:
        """Scores of the visual tokens as one map for each image. Raises ModelError where images are no grids."""
        if not self.grids and bool(self.layout.visual.any()):
            raise ModelError("image: expected images that are one grid of tokens each; found several views")
        place, real = compact(self.layout.visual, "right")
        whole = scores.new_zeros(self.layout.visual.shape).scatter_add(1, place, scores.masked_fill(~real, 0))
        found = []
        for number, (rows, cols) in enumerate(self.grids):
            here = self.layout.image == number
            grid = scores.new_zeros(rows * cols)
            grid[(self.layout.row * cols + self.layout.col)[here]] = whole[here]
            found.append(grid.reshape(rows, cols))
        return found


@torch.no_grad()
def looks(
    model: Any,
    inputs: Any,
    layers: Collection[int],
    steps: int,
    stop: int = -1,
    answer: Int[Tensor, "batch steps"] | None = None,
) -> Looks:
    """Watch the first ``steps`` tokens of an answer: the model's own, greedily, up to ``stop`` (-1: none), or those of
    ``answer``.

    Takes passes of their own, in which the attached program rests. One row a layer is read, so nothing of the size of
    the prompt squared is made. Raises ModelError for a decoder whose attention cannot be seen.
    """
    wanted = sorted(layers)
    if outside := [layer for layer in wanted if not 0 <= layer < len(model.decoder.layers)]:
        raise ModelError(f"layers: expected decoder layers 0..{len(model.decoder.layers) - 1}; found {outside[0]}")
    rows: list[Tensor] = []

    def see(layer: int, seen: Attention) -> None:
        if layer in wanted and seen.layout is not None:
            last = torch.full_like(seen.valid[:, :1], seen.k.shape[2] - 1, dtype=torch.long)
            place, real = compact(seen.layout.visual, "right")
            rows.append(seen.received(last).mean(1).gather(1, place).masked_fill(~real, 0))

    maps, real, tokens = [], [], []
    with observe(model, see):
        logits, stream = model.prefill(inputs)
        layout, grids = stream.run.layouts[0], stream.run.grids
        alive = torch.ones_like(logits[:, 0], dtype=torch.bool)
        for step in range(steps):
            maps.append(torch.stack(rows))  # layers are run in order
            rows.clear()
            real.append(alive)
            token = logits.argmax(-1) if answer is None else answer[:, step]
            tokens.append(token)
            alive = alive & (token != stop)
            if step == steps - 1 or not bool(alive.any()):
                break
            logits = model.step(stream, token)
    return Looks(torch.stack(maps), torch.stack(real), torch.stack(tokens, 1), layout, grids)
