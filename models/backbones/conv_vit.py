"""A small ViT with a convolutional stem, quick to train from scratch on a CPU: ``vision: {use: conv_vit}``."""

from functools import partial
from typing import ClassVar

from timm.layers import HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vlm.models.encoder import ImageSpec, TimmEncoder


class ConvVit(TimmEncoder):
    """timm's VisionTransformer behind three stride-2 convolutions, so one token per 8 x 8 pixels.

    A linear 8 x 8 patch embedding does not learn small objects in a short run; early
    convolutions do (Xiao et al., "Early Convolutions Help Transformers See Better", NeurIPS 2021).

    Args:
        image: side of the input in pixels, a multiple of 8.
        dim: width of the tokens. depth: number of blocks. heads: attention heads.
        class_token: a token before the patches, as CLIP has one, for pruners that go by its attention.
    """

    source: ClassVar[str] = "timm VisionTransformer; Early Convolutions (NeurIPS 2021), section 4"
    verified: ClassVar[str] = "library"

    def __init__(
        self, image: int = 48, dim: int = 64, depth: int = 2, heads: int = 4, class_token: bool = False
    ) -> None:
        stem = nn.Sequential(
            nn.Conv2d(3, 24, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(48, dim, 3, stride=2, padding=1),
        )
        model = VisionTransformer(
            img_size=image,
            patch_size=1,
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            num_classes=0,
            global_pool="",
            class_token=class_token,
            mlp_ratio=3,
            embed_layer=partial(HybridEmbed, backbone=stem, proj=False),
        )
        super().__init__(model, ImageSpec(image, (0.4, 0.4, 0.4), (0.25, 0.25, 0.25)))
