"""LLaVA-NeXT against Transformers."""

import pytest
from transformers import LlamaConfig, LlavaNextConfig, LlavaNextImageProcessor, LlavaNextProcessor

GRIDS = [[32, 64], [64, 32], [64, 64]]


@pytest.fixture(scope="module")
def case(tiny, make_case):
    tokenizer = tiny.tokenizer("<image>")
    size, crop = {"shortest_edge": 32}, {"height": 32, "width": 32}
    images = LlavaNextImageProcessor(size=size, crop_size=crop, image_grid_pinpoints=GRIDS)
    processor = LlavaNextProcessor(images, tokenizer, 8, "default", num_additional_image_tokens=1)
    parts = {"vision_config": tiny.clip(), "text_config": LlamaConfig(**tiny.text())}
    config = LlavaNextConfig(**parts, image_token_id=processor.image_token_id, image_grid_pinpoints=GRIDS)
    return make_case(config, processor, "<image>")


def test_llava_next(check, case):
    check(case)


def test_newlines_end_the_rows_below_the_whole_image(case):
    """An image of 40 x 60 pixels fills a grid of 5 x 8 of its two tiles' 4 x 8 patches, minus padding."""
    layout = case.ours.prefill(case.ours.inputs(case.batch(["a#"])))[1].run.layouts[0]
    place = list(zip(layout.row[0].tolist(), layout.col[0].tolist(), strict=True))[1:]
    base, tiles = place[:16], place[16:]
    assert base == [(r, c) for r in range(4) for c in range(4)]
    rows, columns = tiles[-1][0] - 3, tiles[-1][1]  # the last token is the newline after the last column
    assert tiles == [(4 + r, c) for r in range(rows) for c in range(columns + 1)] and rows * columns > 16
