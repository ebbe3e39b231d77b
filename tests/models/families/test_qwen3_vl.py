"""Qwen3-VL against Transformers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Qwen2VLImageProcessor, Qwen3VLConfig, Qwen3VLProcessor, Qwen3VLVideoProcessor

from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.select import top_by
from vlm.models.pruners.sgl import Sgl


@pytest.fixture(scope="module")
def case(tiny, make_case):
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer = tiny.tokenizer(*names)
    images = Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=256, max_pixels=2048)
    image, video, start, end = tokenizer.convert_tokens_to_ids(names)
    config = Qwen3VLConfig(
        text_config=tiny.text(
            head_dim=8, rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
        ),
        vision_config={
            "patch_size": 4,
            "spatial_merge_size": 2,
            "depth": 3,
            "num_heads": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    processor = Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(patch_size=4, merge_size=2))
    return make_case(config, processor, "<|vision_start|><|image_pad|><|vision_end|>")


def test_qwen3_vl(check, case):
    check(case)


def test_features_of_earlier_encoder_layers_matter(case):
    inputs = case.ours.inputs(case.batch(["a#b"]))
    with torch.no_grad():
        pictures = case.ours.encode(inputs)
        assert [len(picture.deep) for picture in pictures] == [2]
        plain = case.ours(inputs).hidden
        case.ours.encode = lambda inputs: [picture._replace(deep=()) for picture in pictures]
        try:
            assert (case.ours(inputs).hidden - plain).abs().max() > 0.01
        finally:
            del case.ours.encode


def test_layers_that_are_looked_on_to_add_them_as_well(case):
    inputs = case.ours.inputs(case.batch(["a#b", "c#d#ef"]))
    ((site, op),) = Sgl(Budget.parse("50%"), 1).program(case.ours.facts)
    cut: Any = op
    aside = ((site, replace(cut, selector=top_by(replace(cut.selector.needs[0], watch=None)))),)
    with torch.no_grad():
        with attach(case.ours, ((site, cut),)):
            watched = case.ours(inputs)
        with attach(case.ours, aside):
            expected = case.ours(inputs)
    torch.testing.assert_close(watched.hidden, expected.hidden)
    assert torch.equal(watched.layout.source, expected.layout.source)
    assert torch.equal(watched.layout.col, expected.layout.col)
