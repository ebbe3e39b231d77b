"""Gemma 3 against Transformers."""

import pytest
from transformers import Gemma3Config, Gemma3ImageProcessor, Gemma3Processor, Gemma3TextConfig

from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.pruners.fastv import Fastv


@pytest.fixture(scope="module")
def case(tiny, make_case):
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = tiny.tokenizer(**named)
    images = Gemma3ImageProcessor(size={"height": 32, "width": 32})
    processor = Gemma3Processor(images, tokenizer, image_seq_length=4)
    config = Gemma3Config(
        vision_config=tiny.siglip(vision_use_head=False),
        text_config=Gemma3TextConfig(
            **tiny.text(head_dim=8, layer_types=["sliding_attention", "full_attention"], sliding_window=8)
        ),
        mm_tokens_per_image=4,
        image_token_id=tokenizer.image_token_id,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
    )
    return make_case(config, processor, "<start_of_image>", inside=False)


def test_gemma3(check, case):
    check(case)


def test_cuts_between_sliding_layers_are_refused(case):
    program = Fastv(Budget.parse("50%"), 1).program(case.ours.facts)
    with pytest.raises(ModelError, match="full attention"), attach(case.ours, program):
        pass
