"""MULTI-LANE's patch selectors as an encoder: ``vision: {use: multilane, encoder: {timm: vit_base_patch16_224}}``."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vlm.models.encoder import Encoder, Features
from vlm.models.errors import ModelError
from vlm.models.part import Part


class Multilane(Part):
    """A frozen encoder read through a few learned selectors: so many summary tokens instead of its patches.

    Beside the encoder's own pass runs a lane of few tokens. Before every block each selector summarises the patches
    that enter the block (softmax of its products with them); class token and summaries go through that same block, in
    the first ``prompted`` ones with learned prompts among its keys and values; the class token goes on to the next
    block, the summaries are made anew there. The last block's summaries are the visual tokens, its class token their
    prefix. Only selectors and prompts train: recipes freeze or train them as ``vision``.

    The paper classifies from the class tokens of one lane per task; here is one lane, and its summaries go to a
    language model.

    Args:
        encoder: the frozen encoder, as ``vision`` itself would name it.
        selectors: summary tokens. prompts: learned keys and values of a prompted block. prompted: so many blocks have
            them, the first ones.
    """

    source: ClassVar[str] = "MULTI-LANE (CoLLAs 2024), section 3; official code"
    verified: ClassVar[str] = "lane from code; as tokens of a language model: ours"

    frozen: ClassVar[tuple[str, ...]] = ("encoder",)
    spatial: ClassVar[bool] = False

    def __init__(self, encoder: Encoder, selectors: int = 20, prompts: int = 20, prompted: int = 5) -> None:
        super().__init__()
        who = "model.vision: multilane"
        if not encoder.blocks or not encoder.class_token:
            raise ModelError(f"{who}: expected an encoder of attention blocks with a class token; found none in it")
        if selectors < 1 or prompts < 0 or prompted < 0:
            raise ModelError(f"{who}: expected selectors of 1 or more and prompts, prompted of 0 or more")
        self.encoder: Any = encoder
        self.encoder.requires_grad_(False)
        self.image, self.dim, self.grid = encoder.image, encoder.dim, (1, selectors)
        self.depth, self.output, self.prefix, self.class_token = encoder.depth, encoder.output, 1, True
        self.cuts = "its selectors summarise every patch of every block"
        self.blind = "its tokens are summaries, not patches"
        self.selectors = nn.Parameter(torch.empty(selectors, self.dim))
        nn.init.orthogonal_(self.selectors) if selectors <= self.dim else nn.init.normal_(self.selectors)
        lanes = min(prompted, encoder.output + 1)
        self.prompts = nn.Parameter(0.02 * torch.randn(lanes, 2, prompts, self.dim))  # keys and values

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return ()

    def forward(self, images: Float[Tensor, "images 3 height width"]) -> Features:
        entering = self._entering(images)
        skip = self.encoder.prefix
        lane_class, lane = entering[0][:, :1], entering[0][:, :0]
        for number, block in enumerate(self.encoder.blocks[: len(entering)]):
            patches = entering[number][:, skip:]  # [N,P,V]
            choice = (self.selectors.to(patches.dtype) @ patches.transpose(1, 2) * self.dim**-0.5).softmax(-1)
            lane = torch.cat([lane_class, choice @ patches], 1)  # [N,1+S,V]
            lane = self._through(number, block, lane)
            lane_class = lane[:, :1]
        return Features(lane[:, 1:], self.grid, lane_class)

    @torch.no_grad()
    def _entering(self, images: Tensor) -> list[Float[Tensor, "images tokens width"]]:
        """What enters each block of the frozen encoder, up to the block of its features."""
        found: list[Tensor] = []
        blocks = self.encoder.blocks[: self.encoder.output + 1]
        handles = [block.register_forward_pre_hook(lambda block, args: found.append(args[0])) for block in blocks]
        try:
            self.encoder(images)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _through(self, number: int, block: nn.Module, lane: Tensor) -> Tensor:
        if number >= len(self.prompts) or not self.prompts.shape[2]:
            out = block(lane)
        else:
            with _Prompted(self.prompts[number]) as prompted:
                out = block(lane)
            if not prompted.used:
                raise ModelError("model.vision: multilane: this encoder's attention takes no prompts; set prompted: 0")
        return out[0] if isinstance(out, tuple) else out


class _Prompted(TorchFunctionMode):
    """Puts learned keys and values before those of the attention calls in its block."""

    def __init__(self, prompt: Float[Tensor, "two prompts width"]) -> None:
        super().__init__()
        self.prompt, self.used = prompt, False

    def __torch_function__(self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            kwargs |= dict(zip(("query", "key", "value"), args, strict=False))
            self.used, args = True, args[3:]
            for name, prompt in zip(("key", "value"), self.prompt, strict=True):
                state = kwargs[name]  # [N,H,T,d]
                own = prompt.unflatten(1, (state.shape[1], -1)).transpose(0, 1).to(state.dtype)  # [H,prompts,d]
                kwargs[name] = torch.cat([own.expand(len(state), -1, -1, -1), state], 2)
            rest = ("attn_mask", "dropout_p", "is_causal")
            return func(**kwargs, **dict(zip(rest, args, strict=False)))
        return func(*args, **kwargs)
