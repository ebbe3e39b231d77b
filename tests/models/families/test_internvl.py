"""InternVL against Transformers."""

import pytest
from transformers import GotOcr2ImageProcessor, InternVLConfig, InternVLProcessor, InternVLVideoProcessor, Qwen2Config

from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.program import VIT_OUT, Select
from vlm.models.program.select import even_stride


@pytest.fixture(scope="module")
def case(tiny, make_case):
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = tiny.tokenizer(**names)
    images = GotOcr2ImageProcessor(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=4)
    videos = InternVLVideoProcessor(size={"height": 32, "width": 32})
    processor = InternVLProcessor(images, tokenizer, videos, image_seq_length=4)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = InternVLConfig(
        vision_config={**tower, "image_size": [32, 32], "patch_size": [8, 8], "initializer_range": 0.1},
        text_config=Qwen2Config(**tiny.text()),
        image_token_id=processor.image_token_id,
        image_seq_length=4,
    )
    return make_case(config, processor, processor.image_token)


def test_internvl(check, case):
    check(case)


def test_tiles_of_an_image_are_one_image(case):
    layout = case.ours.prefill(case.ours.inputs(case.batch(["a#b", "#c#"])))[1].run.layouts[0]
    assert [row[row >= 0].unique().tolist() for row in layout.image] == [[0], [1, 2]]
    tokens = (layout.image == 0).sum()
    assert tokens > 4 and int(layout.row[layout.image == 0].max()) == tokens // 2 - 1  # 2 x 2 tokens a tile


def test_cuts_in_the_encoder_are_refused(case):
    with (
        pytest.raises(ModelError, match=r"vit.out: \w+ encodes and projects images in one step .* prune at llm.in"),
        attach(case.ours, ((VIT_OUT, Select(Budget.parse("50%"), even_stride())),)),
    ):
        pass
