"""Qwen2-VL and Qwen2.5-VL against Transformers."""

from typing import Any

import pytest
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.pruners.stride import Stride

VISION: dict[str, Any] = {"patch_size": 4, "spatial_merge_size": 2, "depth": 2, "num_heads": 4}


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def case(request, tiny, make_case):
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer = tiny.tokenizer(*names)
    images = Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=256, max_pixels=2048)
    videos = Qwen2VLVideoProcessor(patch_size=4, merge_size=2, min_pixels=256, max_pixels=2048)
    image, video, start, end = tokenizer.convert_tokens_to_ids(names)
    tokens = {"image_token_id": image, "video_token_id": video, "vision_start_token_id": start}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = tiny.text(rope_parameters=rope)
    if request.param == "qwen2_vl":
        vision = VISION | {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
        config: Any = Qwen2VLConfig(text_config=text, vision_config=vision, vision_end_token_id=end, **tokens)
        processor: Any = Qwen2VLProcessor(images, tokenizer, videos)
    else:
        window = {"window_size": 16, "fullatt_block_indexes": [1], "out_hidden_size": 32}
        vision = VISION | window | {"hidden_size": 32, "intermediate_size": 48}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, vision_end_token_id=end, **tokens)
        processor = Qwen2_5_VLProcessor(images, tokenizer, videos)
    return make_case(config, processor, "<|vision_start|><|image_pad|><|vision_end|>")


def test_qwen2_vl(check, case):
    check(case)


def test_new_position_ids_are_refused(case):
    program = Stride(keep=Budget.parse("50%"), position="reindex").program(case.ours.facts)
    with pytest.raises(ModelError, match="set position: keep"), attach(case.ours, program):
        pass
