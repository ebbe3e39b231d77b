"""Several encoders as one: each sees its own pixels, and their features stand side by side."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vlm.data.images import ImageTransform
from vlm.models.backbones.conv_vit import ConvVit
from vlm.models.backbones.fused import Fused, pixels_for
from vlm.models.connectors.linear import Linear
from vlm.models.encoder import Features, ImageSpec
from vlm.models.errors import ModelError
from vlm.models.language import build_language
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.decode import generate
from vlm.models.program.program import VIT_OUT, Select, vit_after
from vlm.models.program.select import even_stride
from vlm.models.pruners.visionzip import Visionzip
from vlm.models.vision_language import VisionLanguageModel

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


class Plain(nn.Module):
    """Hands out the mean colour of each of ``grid`` cells, behind ``prefix`` tokens that must not come along."""

    def __init__(self, size: int, grid: tuple[int, int], mean: float = 0.0, std: float = 1.0, prefix: int = 0) -> None:
        super().__init__()
        self.image = ImageSpec(size, (mean, mean, mean), (std, std, std))
        self.dim, self.grid, self.prefix = 3, grid, prefix
        self.blocks, self.depth, self.output, self.class_token, self.cuts = (), 0, 0, False, "none"
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> Features:
        self.seen.append(images)
        tokens = nn.functional.adaptive_avg_pool2d(images, self.grid).flatten(2).transpose(1, 2)
        return Features(tokens, self.grid, torch.full((len(images), self.prefix, 3), 99.0))


def picture(side: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


def as_data_gives_it(image: Image.Image, spec: ImageSpec) -> torch.Tensor:
    return ImageTransform((spec.size, spec.size), spec.mean, spec.std)(image)[None]


def test_each_encoder_sees_what_it_would_see_alone():
    parts = [ConvVit(48, dim=8, depth=1, heads=2), ConvVit(48, dim=12, depth=2, heads=2, class_token=True)]
    parts[1].image = parts[1].image._replace(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    fused, shown = Fused(parts).eval(), picture(48)
    with torch.no_grad():
        found = fused(as_data_gives_it(shown, fused.image))
        alone = [part(as_data_gives_it(shown, part.image)).tokens for part in parts]
    assert torch.equal(found.tokens, torch.cat(alone, 2))  # to the bit, without the class token
    assert found.grid == fused.grid == (6, 6) and fused.dim == 20 and found.tokens.shape == (1, 36, 20)


def test_a_smaller_encoder_gets_the_picture_in_its_size():
    large, small = Plain(64, (4, 4), 0.5, 0.5), Plain(32, (4, 4), 0.2, 0.3)
    fused, shown = Fused([small, large]), picture(64)
    assert fused.image.size == 64
    fused(as_data_gives_it(shown, fused.image))
    assert torch.equal(large.seen[0], as_data_gives_it(shown, large.image))
    by_pil = as_data_gives_it(shown, small.image)
    assert (small.seen[0] - by_pil).abs().max() < 2.5 / 255 / 0.3  # PIL rounds to whole levels, twice
    assert pixels_for(small.image, torch.ones(1, 3, 64, 64)).max() <= (1 - 0.2) / 0.3 + 1e-6


def test_grids_are_resized_corner_to_corner():
    parts = [Plain(12, (2, 3)), Plain(12, (3, 5))]
    fused = Fused(parts, grid=(3, 5))
    images = torch.rand(2, 3, 12, 12)
    found = fused(images).tokens.unflatten(1, (3, 5))
    coarse, fine = (part(images).tokens.unflatten(1, part.grid) for part in parts)
    assert torch.equal(found[..., 3:], fine)
    for r in range(3):
        for c in range(5):
            y, x = r / 2, c / 2  # corners stay corners
            top, left = min(int(y), 0), min(int(x), 1)
            dy, dx = y - top, x - left
            rows = coarse[:, top] * (1 - dy) + coarse[:, top + 1] * dy
            torch.testing.assert_close(found[:, r, c, :3], rows[:, left] * (1 - dx) + rows[:, left + 1] * dx)


def test_prefix_tokens_of_any_number_are_left_out():
    fused = Fused([Plain(12, (2, 2), prefix=5), Plain(12, (2, 2))])
    assert fused(torch.rand(1, 3, 12, 12)).tokens.max() < 99 and fused.prefix == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected parts with one grid; found 2 x 2, 3 x 3; set grid to resize them"),
        ({"grid": (0, 2)}, "expected a grid of at least 1 x 1; found 0 x 2"),
        ({"grid": (2, 2), "score_from": 2}, r"expected score_from 0..1, a part; found 2"),
    ],
)
def test_what_does_not_fit_is_refused(options: Any, message: str):
    with pytest.raises(ModelError, match=message):
        Fused([Plain(12, (2, 2)), Plain(12, (3, 3))], **options)


def test_pixels_of_another_size_are_refused():
    with pytest.raises(ModelError, match=r"expected pixels of side 12; found \(8, 8\)"):
        Fused([Plain(12, (2, 2))])(torch.rand(1, 3, 8, 8))


def compose(score_from: int, **options: Any) -> Any:
    torch.manual_seed(0)
    parts = [ConvVit(48, dim=8, depth=2, heads=2), ConvVit(48, dim=12, depth=4, heads=2, class_token=True)]
    nn.init.normal_(parts[1].model.cls_token)  # type: ignore[arg-type]
    fused = Fused(parts, score_from=score_from, **options)
    return VisionLanguageModel(fused, Linear(fused.dim, 32), build_language(LLAMA, 40)).double().eval()


def test_a_pruner_sees_the_encoder_that_is_named(batch):
    inputs = batch("t#t", "#tt#")
    inputs = inputs._replace(images=inputs.images.sigmoid())
    keep = Visionzip(keep=Budget.parse(9))
    with pytest.raises(ModelError, match="no class token"):
        keep.program(compose(0).facts)
    model = compose(1)
    with attach(model, keep.program(model.facts)), torch.no_grad():
        fused = model(inputs).layout
    scorer = model.vision.parts[1]
    alone = VisionLanguageModel(scorer, Linear(12, 32), build_language(LLAMA, 40)).double().eval()
    pixels = pixels_for(scorer.image, inputs.images)
    with attach(alone, keep.program(alone.facts)), torch.no_grad():
        single = alone(inputs._replace(images=pixels)).layout
    # VisionZip's dominant tokens come from attention alone; those it merges around are spread by keys, also its own
    assert torch.equal(fused.row, single.row) and torch.equal(fused.col, single.col)


def test_cuts_and_attention_that_have_no_place_are_refused():
    model = compose(1)
    with (
        pytest.raises(ModelError, match="tokens of several encoders must stay in step"),
        attach(model, ((vit_after(0), Select(Budget(ratio=0.5), even_stride())),)),
    ):
        pass
    resized = compose(1, grid=(3, 3))
    with pytest.raises(ModelError, match=r"part 1 has a grid of \(6, 6\), resized to \(3, 3\)"):
        Visionzip(keep=Budget.parse(4)).program(resized.facts)


def test_a_model_with_two_encoders_trains_prunes_and_speaks(batch):
    model, inputs = compose(1, grid=(4, 4)).train(), batch("t#t", "#tt#")
    with attach(model, ((VIT_OUT, Select(Budget(ratio=0.5), even_stride())),)):
        out = model(inputs, (inputs.tokens >= 0).double())
        assert out.layout.visual.sum(1).tolist() == [8, 16]
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert len(generate(model.eval(), inputs, max_new_tokens=3, stop=99)) == 2
