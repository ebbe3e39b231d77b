"""LLaVA-OneVision against Transformers."""

import pytest
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
)

from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.program import VIT_OUT, Select
from vlm.models.program.select import even_stride

GRIDS = [[32, 32], [32, 64], [64, 32], [64, 64], [96, 96]]


@pytest.fixture(scope="module")
def case(tiny, make_case):
    tokenizer = tiny.tokenizer("<image>", "<video>")
    images = LlavaOnevisionImageProcessor(size={"height": 32, "width": 32}, image_grid_pinpoints=GRIDS)
    videos = LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32})
    # two tiles' worth of tokens at most, so that some grids are shrunk
    most = "anyres_max_2"
    processor = LlavaOnevisionProcessor(images, tokenizer, videos, 16, "full", vision_aspect_ratio=most)
    config = LlavaOnevisionConfig(
        vision_config=tiny.siglip(vision_use_head=False),
        text_config=Qwen2Config(**tiny.text()),
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        image_grid_pinpoints=GRIDS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=most,
    )
    return make_case(config, processor, "<image>")


def test_llava_onevision(check, case):
    check(case)


def test_only_a_single_image_is_tiled(case):
    one, two = (case.ours.visual_counts(case.ours.inputs(case.batch([row]))) for row in ("a#", "a##"))
    assert int(two) == 2 * 17 and int(one) > 17  # an untiled image is its 16 tokens and a newline


def test_cuts_in_the_encoder_are_refused(case):
    with (
        pytest.raises(ModelError, match=r"vit.out: \w+ encodes and projects images in one step .* prune at llm.in"),
        attach(case.ours, ((VIT_OUT, Select(Budget.parse("50%"), even_stride())),)),
    ):
        pass
