"""A folder of captioned pictures, and the index that is made of it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from vlm import captions
from vlm.data.errors import DataError
from vlm.models.backbones.conv_vit import ConvVit
from vlm.models.connectors.mlp import Mlp
from vlm.models.language import build_language
from vlm.models.program.retrieval import encoder_of, load_captions
from vlm.models.vision_language import Inputs, VisionLanguageModel


def captioned(folder: Any, **texts: str) -> None:
    for name, text in texts.items():
        Image.new("RGB", (8, 8), name).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(text)


def test_pairs_are_pictures_with_the_text_of_their_name(tmp_path):
    with pytest.raises(DataError, match=r"expected pictures \(.jpg, .jpeg, .png, .webp\), found none"):
        captions.pairs_of(tmp_path)
    (tmp_path / "deep").mkdir()
    captioned(tmp_path, red="a red\n  square \n")
    captioned(tmp_path / "deep", blue="blue")
    assert [(path.name, text) for path, text in captions.pairs_of(tmp_path)] == [
        ("blue.png", "blue"),
        ("red.png", "a red square"),
    ]
    (tmp_path / "red.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"red.png: expected its caption in red.txt, found an empty one"):
        captions.pairs_of(tmp_path)
    (tmp_path / "red.txt").unlink()
    with pytest.raises(DataError, match=r"red.png: expected its caption in red.txt, found none"):
        captions.pairs_of(tmp_path)


def test_the_index_holds_what_the_model_sees(tmp_path, monkeypatch):
    options: dict[str, Any] = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16}
    options |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    vision = ConvVit(16, dim=8, depth=1, heads=2)
    model = VisionLanguageModel(vision, Mlp(8, 16), build_language(options, 9)).eval()

    class Asker:
        batch = 2

        def __init__(self, *_: Any) -> None: ...

        def inputs(self, prompts: Any) -> Inputs:
            tokens = torch.tensor([[-1, 1]] * len(prompts))
            colours = [Image.open(prompt.image).getpixel((0, 0)) for prompt in prompts]
            images = torch.tensor(colours).float()[:, :, None, None].expand(-1, -1, 16, 16) / 255
            return Inputs(tokens, torch.ones_like(tokens).bool(), images, torch.arange(len(prompts)))

    for name in ("build_tokenizer", "build_encoder", "trained_weights"):
        monkeypatch.setattr(captions, name, lambda *_: None)
    monkeypatch.setattr(captions, "build_model", lambda *_: model)
    monkeypatch.setattr(captions, "for_evaluation", lambda recipe, model: model)
    monkeypatch.setattr(captions, "Asker", Asker)
    captioned(tmp_path, red="a red square", blue="blue", green="it is green")
    told: list[tuple[int, int]] = []
    recipe: Any = SimpleNamespace(evaluate=SimpleNamespace(batch=2))
    assert captions.index_captions(recipe, tmp_path, tmp_path / "x.safetensors", lambda *at: told.append(at)) == 3
    found = load_captions(str(tmp_path / "x.safetensors"))
    assert found.texts == ["blue", "it is green", "a red square"] and found.encoder == encoder_of(model)
    assert told == [(2, 3), (3, 3)]
    blue = torch.tensor([0.0, 0.0, 1.0])[None, :, None, None].expand(1, 3, 16, 16)
    out = model.vision(blue)
    torch.testing.assert_close(found.features[0], model.connector(out.tokens, out.grid)[0].mean(0).detach())
