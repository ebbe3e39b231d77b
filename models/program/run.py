"""What one stream knows about the sequence that runs through the decoder."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlm.models.program.layout import Layout, Side
from vlm.models.program.program import Peak, Signal


class Run:
    """The layouts and signals of one stream: made for a prompt, extended with every generated token.

    layouts: first layer -> layout of the sequence from that layer on; a cut adds one. kept: layer -> the places that
    its cut kept, None if all. prompt: whether the pass under way is the prompt's. seed: an integer of each image's
    pixels. deep: features [batch, length, width] that a model adds after its first decoder layers, one tensor each, at
    the places of the sequence as the data layer made it (``Layout.source``).
    """

    def __init__(self, layout: Layout, side: Side, seed: Int[Tensor, " images"]) -> None:
        self.layouts: dict[int, Layout] = {0: layout}
        self.side: Side = side
        self.seed = seed
        self.kept: dict[int, Int[Tensor, "batch kept"] | None] = {}
        self.prompt = True
        self.deep: list[Float[Tensor, "batch length width"]] = []
        self.signals: dict[Signal, Float[Tensor, "batch keys"]] = {}
        self._masks: dict[int, Bool[Tensor, "batch 1 rows keys"] | None] = {}

    def stage(self, layer: int) -> int:
        """The first layer of the stage that ``layer`` belongs to."""
        return max(first for first in self.layouts if first <= layer)

    def add_stage(self, layer: int, layout: Layout) -> None:
        """From ``layer`` on the sequence is ``layout``."""
        self.layouts[layer] = layout

    @property
    def last(self) -> Layout:
        """The layout of what leaves the decoder."""
        return self.layouts[max(self.layouts)]

    def append(self, count: int = 1) -> None:
        """``count`` generated tokens follow in every stage; signals of the prompt do not grow."""
        self.layouts = {first: layout.append(count) for first, layout in self.layouts.items()}
        self.prompt = False
        self._masks.clear()

    def mask(self, first: int, rows: int) -> Bool[Tensor, "batch 1 rows keys"] | None:
        """Which keys the last ``rows`` places of a stage may see; None when plain causality says it all."""
        if first not in self._masks:
            self._masks[first] = self._build_mask(self.layouts[first], rows)
        return self._masks[first]

    def _build_mask(self, layout: Layout, rows: int) -> Bool[Tensor, "batch 1 rows keys"] | None:
        valid, block = layout.valid, layout.block
        if bool(valid.all()) and (block is None or bool((block[:, -rows:] < 0).all())):
            return None
        keys = valid.shape[1]
        causal = torch.ones(rows, keys, dtype=torch.bool, device=valid.device).tril(keys - rows)
        if block is not None:
            causal = causal | ((block[:, -rows:, None] == block[:, None, :]) & (block[:, None, :] >= 0))
        itself = torch.eye(keys, dtype=torch.bool, device=valid.device)[keys - rows :]
        return ((causal & valid[:, None, :]) | itself)[:, None]  # a padding row sees itself, so no row is empty

    def keys_signal(self, signal: Signal) -> Float[Tensor, "batch keys"]:
        """A signal over the keys of its layer; tokens generated since it was read have 0."""
        value = self.signals[signal]
        keys = self.layouts[self.stage(signal.layer)].role.shape[1]
        grown = keys - value.shape[1]
        return torch.nn.functional.pad(value, (0, grown)) if isinstance(signal, Peak) and grown else value

    def segment_seed(self, layout: Layout) -> Int[Tensor, " batch"]:
        """One integer per sample from the pixels of its images, whatever else is in the batch."""
        batch = layout.image.shape[0]
        total = torch.zeros(batch, dtype=torch.long, device=layout.image.device)
        for image, seed in enumerate(self.seed.tolist()):
            owners = (layout.image == image).any(1)
            total = total + owners * (seed % 2**40)
        return total

    def visual_tokens(self, layers: int) -> list[float]:
        """Mean number of visual tokens per sample in each decoder layer."""
        return [float(self.layouts[self.stage(layer)].visual.sum(1).float().mean()) for layer in range(layers)]
