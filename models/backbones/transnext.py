"""TransNeXt, whose places see their window and the pooled map at once: ``vision: {use: transnext, variant: tiny}``."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from vlm.models.aggregated import VARIANTS, TransnextNet
from vlm.models.backbone import BackboneEncoder


class Transnext(BackboneEncoder):
    """TransNeXt micro to base: aggregated attention in three stages, global cosine attention in the last.

    Images of any size: position biases are computed for it, from offsets counted on the grid of the pretraining
    (published as extrapolation, which the fine-tuned models at 384 pixels use).
    """

    source: ClassVar[str] = "TransNeXt (CVPR 2024), section 3; official code"
    verified: ClassVar[str] = "official outputs and keys"

    network: ClassVar[Any] = TransnextNet
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **VARIANTS,
        "small_384": {**VARIANTS["small"], "image": 384},
        "base_384": {**VARIANTS["base"], "image": 384},
        # aggregated attention in the last stage too
        "micro_aaaa": {"reductions": (16, 8, 4, 2), "pretrained": 256, "image": 256},
    }
    normalized: ClassVar[Literal["inner", "all", "none"]] = "none"  # every stage ends in a norm of its own
    blind = "its blocks attend to windows and pooled maps"
