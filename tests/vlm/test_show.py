"""``vlm generate --show``: the picture, light where a phrase of the answer looks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from vlm import generate
from vlm.data.errors import DataError
from vlm.evaluation.answer import Prompt


def test_a_picture_as_the_encoder_frames_it():
    picture = Image.new("RGB", (40, 20), "red")
    assert [generate.framed(picture, how).size for how in ("stretch", "pad", "crop")] == [(40, 20), (40, 40), (20, 20)]


def test_the_phrase_is_found_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Image.new("RGB", (16, 16), (200, 100, 40)).save(tmp_path / "in.png")
    seen: list[Any] = []

    def maps(model: Any, inputs: Any, ids: Any, words: Any, chosen: Any) -> list[torch.Tensor]:
        seen.extend([ids, words, chosen])
        return [torch.tensor([[0.0, 2.0], [0.0, 0.0]])]

    monkeypatch.setattr(generate, "grounding_maps", maps)
    text = ["a", " red", " ball", "."]
    tokenizer = SimpleNamespace(
        encode=lambda answer, add_special_tokens: [0, 1, 2, 3], decode=lambda ids: "".join(text[n] for n in ids)
    )
    asker: Any = SimpleNamespace(tokenizer=tokenizer, model=None, inputs=lambda prompts: None)
    asked = Prompt("in", "what?", 4)
    generate._draw(tmp_path / "out.png", tmp_path / "in.png", asker, asked, "a red ball.", "red ball", "stretch")
    assert seen == [[0, 1, 2, 3], text, [1, 2]]
    drawn = numpy.array(Image.open(tmp_path / "out.png").convert("RGB")).astype(int)
    assert drawn.shape == (16, 16, 3)
    assert abs(drawn[0, -1] - [200, 100, 40]).max() < 6 and drawn[-1, 0].max() < 60
    with pytest.raises(DataError, match=r"--phrase: expected words of the answer 'a red ball.', found 'blue'"):
        generate._draw(tmp_path / "out.png", tmp_path / "in.png", asker, asked, "a red ball.", "blue", "stretch")
