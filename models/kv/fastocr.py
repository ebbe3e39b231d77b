"""FastOCR: decoding steps that read few visual entries, chosen by some layers for the others (2026)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vlm.models.errors import ModelError
from vlm.models.program.budget import Budget
from vlm.models.program.cache import Entries, ReadStep, Row
from vlm.models.program.compress import check_keep
from vlm.models.program.kv_steps import read_by, step_set
from vlm.models.program.layout import Layout, compact
from vlm.models.program.program import KV_DECODE, Program
from vlm.models.program.signals import Facts


@dataclass(frozen=True)
class Fastocr:
    """Focal layers read every entry; the others read text and the visual entries that a focal layer attends to most.

    keep: visual entries that a layer reads at a step, a share of the prompt's (5 % in the paper) or a number. focal:
    the layers that choose, each for those after it; layers before the first read what the last one chose at the step
    before, and all at the first step. None given: those at one and two thirds of the depth, which is ours. Nothing is
    evicted, so memory stays as it is. Known from the paper's abstract only.
    """

    source: ClassVar[str] = "FastOCR (arXiv 2605.17447), abstract"
    verified: ClassVar[str] = "reconstruction from the abstract"

    keep: Budget
    focal: tuple[int, ...] = ()

    def program(self, facts: Facts) -> Program:
        check_keep(self.keep)
        layers = range(facts.layers)
        focal = self.focal or tuple(sorted({facts.layers // 3, 2 * facts.layers // 3}))
        if wrong := [layer for layer in focal if layer not in layers]:
            raise ModelError(f"kv.focal: expected layers 0..{facts.layers - 1}; found {wrong[0]}")
        if self.keep.everything:
            return ()
        read = lambda entries, query: self._read(focal, entries)  # noqa: E731
        return ((KV_DECODE, ReadStep(read, lambda entries, row: self._seen(focal, entries, row))),)

    def _read(self, focal: tuple[int, ...], entries: Entries) -> Bool[Tensor, "batch kv_heads entries"] | None:
        by = read_by(entries.layer, focal, entries.step - 1)
        if by is None:
            return None
        names, known = _names(entries.layout), entries.shared[f"chosen by {by[0]}"]  # [B,L], [B,T] ascending
        if known.shape[1] == 0:
            return None
        place = torch.searchsorted(known, names).clamp_max(known.shape[1] - 1)
        chosen = known.gather(1, place) == names
        return (~entries.layout.visual | chosen)[:, None].expand(-1, entries.kv_heads, -1)

    def _seen(self, focal: tuple[int, ...], entries: Entries, row: Row) -> None:
        if entries.layer in focal:
            visual = entries.layout.visual
            count = self.keep.count(visual.sum(1), torch.ones_like(visual[:, 0], dtype=torch.long))
            index, real = compact(step_set(row.attention(), visual, count), "left")
            chosen = _names(entries.layout).gather(1, index).masked_fill(~real, -1)
            entries.shared[f"chosen by {entries.layer}"] = chosen.sort(1).values


def _names(layout: Layout) -> Int[Tensor, "batch length"]:
    """A number of each visual token that a cut between two layers does not change; -2 for text."""
    rows, columns = int(layout.row.max()) + 2, int(layout.col.max()) + 2
    name = (layout.image * rows + layout.row + 1) * columns + layout.col + 1
    return name.masked_fill(~layout.visual, -2)
