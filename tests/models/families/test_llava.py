"""LLaVA-1.5 against Transformers."""

import pytest
from transformers import CLIPImageProcessor, LlamaConfig, LlavaConfig, LlavaProcessor


@pytest.fixture(scope="module")
def case(tiny, make_case):
    tokenizer = tiny.tokenizer("<image>")
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(images, tokenizer, 8, "default", num_additional_image_tokens=1)
    text = LlamaConfig(**tiny.text())
    config = LlavaConfig(vision_config=tiny.clip(), text_config=text, image_token_id=processor.image_token_id)
    return make_case(config, processor, "<image>")


def test_llava(check, case):
    check(case)


def test_the_grid_of_an_image(case):
    layout = case.ours.prefill(case.ours.inputs(case.batch(["a#b"])))[1].run.layouts[0]
    assert layout.row[0].tolist() == [-1, *[r for r in range(4) for _ in range(4)], -1]
    assert layout.col[0].tolist() == [-1, *[0, 1, 2, 3] * 4, -1]
