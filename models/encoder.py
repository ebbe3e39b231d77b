"""What a vision encoder hands over, and the adapter that makes any timm model one."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call

from vlm.models.errors import ModelError
from vlm.models.part import Part


class ImageSpec(NamedTuple):
    """How pixels must come: side in pixels, channel mean and standard deviation (of values in 0..1)."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"


class Features(NamedTuple):
    """tokens in raster order without prefix tokens; grid = (rows, columns) with rows * columns = tokens."""

    tokens: Float[Tensor, "images tokens width"]
    grid: tuple[int, int]
    prefix: Float[Tensor, "images prefix width"] | None = None


class Auxiliary(NamedTuple):
    """A loss that needs pictures alone: ``share`` of the mean of ``values`` is added to what the objective says.

    values: what the passes noted, one per layer and pass.
    """

    share: float
    values: list[Float[Tensor, ""]]


class Encoder(Protocol):
    """A vision backbone: pixels to a grid of features.

    For programs: blocks are its attention blocks that run, in order (none where it has none), of ``depth`` as
    published; output is the number of the block whose features are handed over. prefix: tokens before the patches
    (class token, registers). cuts: why tokens cannot go between blocks, empty when they can.

    More where they are not as usual: blind, why the attention of blocks cannot be read; spatial, False where a
    token's place in the grid does not say which part of the picture it shows; frozen, names of modules that never
    train; kind, the ``model_type`` of an encoder of Transformers.

    auxiliary(), of an encoder that is trained with a loss of its own beside the objective's: a context that yields
    :class:`Auxiliary` terms by name, which passes with gradients inside it fill.

    max_patches, of an encoder whose pictures keep their shape: the most patches of one, of ``patch`` pixels each side.
    It is called with the height and width of each picture too, which stands in the upper left corner of its image;
    tokens of smaller pictures are filled up on the right, ``grids(sizes)`` says each one's rows and columns, and
    ``patches(images, grids)`` its pixels.
    """

    dim: int
    image: ImageSpec
    grid: tuple[int, int]
    depth: int
    output: int
    prefix: int
    class_token: bool
    cuts: str

    @property
    def blocks(self) -> Sequence[nn.Module]: ...

    def __call__(self, images: Float[Tensor, "images 3 height width"]) -> Features: ...


def unread(encoder: Any) -> list[str]:
    """Names of the encoder's weights that neither its features nor a loss of its own depend on: blocks after the one
    whose features are taken, the norm and head behind them. Training them would wait for a gradient that never comes
    (DDP stops with an error).

    Found by one pass and its gradient on the meta device, which computes nothing and needs no memory.
    """
    weights = {name: torch.empty_like(p, device="meta").requires_grad_() for name, p in encoder.named_parameters()}
    buffers = {name: torch.empty_like(b, device="meta") for name, b in encoder.named_buffers()}
    dtype = next((p.dtype for p in weights.values()), torch.float32)
    blank = torch.zeros(1, 3, encoder.image.size, encoder.image.size, device="meta", dtype=dtype)
    own: Any = encoder.auxiliary() if hasattr(encoder, "auxiliary") else nullcontext({})
    with torch.enable_grad(), own as terms:
        total = functional_call(encoder, (weights, buffers), (blank,)).tokens.sum()
        for term in terms.values():
            for value in term.values:  # none where no layer that is kept has such a loss
                total = total + value
    found = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    return [name for name, gradient in zip(weights, found, strict=True) if gradient is None]


class TimmEncoder(Part):
    """A timm model as an encoder: features of one block, blocks after it removed.

    layer: -1 is the last block with the model's final norm; any other block index comes without norm, which is
    what LLaVA takes at -2.
    """

    def __init__(self, model: Any, image: ImageSpec, layer: int = -1) -> None:
        super().__init__()
        depth = len(model.feature_info) if hasattr(model, "feature_info") else 0
        if not hasattr(model, "forward_intermediates") or not -depth <= layer < depth:
            name = type(model).__name__
            raise ModelError(f"model.vision: {name} has feature layers {-depth}..{depth - 1}; found layer {layer}")
        self.norm = layer in (-1, depth - 1)
        self.depth, self.output = depth, layer % depth
        if hasattr(model, "prune_intermediate_layers"):
            model.prune_intermediate_layers([layer], prune_norm=not self.norm, prune_head=True)
            layer = -1
        self.model, self.layer, self.image = model, layer, image
        self.prefix: int = getattr(model, "num_prefix_tokens", 0)
        self.class_token = getattr(model, "cls_token", None) is not None
        # Only a plain transformer has one list of blocks whose tokens need nothing besides themselves.
        self.plain = isinstance(model, VisionTransformer)
        self.cuts = "" if self.plain else f"{type(model).__name__} is not a plain vision transformer"
        self.dim, self.grid = self._probe()

    @property
    def blocks(self) -> Sequence[nn.Module]:
        found = getattr(self.model, "blocks", ())
        return list(found) if self.prefix or self.plain else ()

    def _probe(self) -> tuple[int, tuple[int, int]]:
        """Width and grid for images of the declared size, from one pass without weights or gradient."""
        training, device = self.model.training, next(self.model.parameters()).device
        self.model.eval()  # one image must not move batch-norm statistics
        with torch.no_grad():
            features = self(torch.zeros(1, 3, self.image.size, self.image.size, device=device))
        self.model.train(training)
        return features.tokens.shape[2], features.grid

    def forward(self, images: Float[Tensor, "images 3 height width"]) -> Features:
        kinds: dict[str, Any] = {"return_prefix_tokens": True} if self.prefix else {}
        form = "NLC" if self.plain else "NCHW"  # a list of tokens may be shorter than the grid
        found = self.model.forward_intermediates(  # type: ignore[operator]
            images, indices=[self.layer], norm=self.norm, output_fmt=form, intermediates_only=True, **kinds
        )[-1]
        tokens, prefix = found if kinds else (found, None)
        if self.plain:
            return Features(tokens, self.model.patch_embed.dynamic_feat_size(images.shape[2:]), prefix)
        grid = tokens.shape[2], tokens.shape[3]  # [N,V,h,w]
        return Features(tokens.flatten(2).transpose(1, 2), grid, prefix)
