"""Idefics3 and SmolVLM against Transformers."""

import pytest
from transformers import Idefics3Config, Idefics3ImageProcessor, Idefics3Processor, LlamaConfig, SmolVLMConfig


@pytest.fixture(scope="module", params=[Idefics3Config, SmolVLMConfig])
def case(request, tiny, make_case):
    places = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
    names = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *places]
    tokenizer = tiny.tokenizer(*names)
    images = Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    # SmolVLM's own processor needs a package for numerals; its image tokens and tensors are those of Idefics3
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = request.param(
        vision_config={**tower, "image_size": 32, "patch_size": 8, "initializer_range": 0.1},
        text_config=LlamaConfig(**tiny.text()),
        image_token_id=processor.image_token_id,
        scale_factor=2,
        pad_token_id=0,
    )
    return make_case(config, processor, "<image>")


def test_idefics3(check, case):
    check(case)


def test_a_tile_is_an_image_of_the_layout(case):
    layout = case.ours.prefill(case.ours.inputs(case.batch(["a#b"])))[1].run.layouts[0]
    tiles = int(layout.image.max()) + 1
    assert tiles > 1 and layout.row[layout.visual].tolist() == [0, 0, 1, 1] * tiles
