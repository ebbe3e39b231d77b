"""Encoders of Transformers against Transformers itself, and a composed model against its export."""

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from vlm.models.backbones.huggingface import HuggingFace
from vlm.models.connectors.mlp import Mlp
from vlm.models.errors import ModelError
from vlm.models.export import save_llava, to_llava
from vlm.models.language import build_language
from vlm.models.pretrained import load_pretrained
from vlm.models.splice import IMAGE_TOKEN
from vlm.models.vision_language import Inputs, VisionLanguageModel

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
GRID = {"image_size": 32, "patch_size": 8}
ENCODERS = {  # config and number of tokens before the grid
    "clip": (CLIPVisionConfig(**SIZES, **GRID), 1),
    "siglip": (SiglipVisionConfig(**SIZES, **GRID, vision_use_head=False), 0),
    "dinov2": (Dinov2WithRegistersConfig(**SIZES, **GRID, num_register_tokens=4), 5),
    "dinov3": (DINOv3ViTConfig(**SIZES, **GRID, num_register_tokens=2), 3),
}


def processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)


@pytest.fixture(scope="module", params=ENCODERS)
def folder(request, tmp_path_factory):
    config, prefix = ENCODERS[request.param]
    found = tmp_path_factory.mktemp(request.param)
    AutoModel.from_config(config).save_pretrained(found)
    processor().save_pretrained(found)
    return found, prefix


@pytest.mark.parametrize("layer", [-1, -2, 0, 2])
def test_features_are_those_of_transformers(folder, layer):
    path, prefix = folder
    encoder, stock = HuggingFace(str(path), layer=layer).eval(), AutoModel.from_pretrained(path).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        mine = encoder(images)
        out = stock(images, output_hidden_states=True)
    expected = out.last_hidden_state if layer == -1 else out.hidden_states[layer + 1 if layer >= 0 else layer]
    assert torch.equal(mine.tokens, expected[:, prefix:]) and mine.grid == encoder.grid == (4, 4)
    assert (0 if mine.prefix is None else mine.prefix.shape[1]) == prefix and encoder.dim == 32
    assert encoder.image.size == 32 and encoder.image.mean == tuple(processor().image_mean)


def test_the_vision_side_of_a_model_with_two(tmp_path):
    text = {**SIZES, "vocab_size": 20, "eos_token_id": 2}
    both = CLIPModel(CLIPConfig(vision_config={**SIZES, **GRID}, text_config=text)).eval()
    both.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = both.vision_model(images).last_hidden_state[:, 1:]
        assert torch.equal(HuggingFace(str(tmp_path), layer=-1).eval()(images).tokens, expected)


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_that_is_not_there(folder, layer):
    with pytest.raises(ModelError, match=rf"a layer in -3..2; found patch 8, layer {layer}"):
        HuggingFace(str(folder[0]), layer=layer)


def test_no_encoder(tmp_path):
    with pytest.raises(ModelError, match=r"^model.vision: no encoder at '.*': [^\n]*$"):
        HuggingFace(str(tmp_path))


def tokenizer() -> PreTrainedTokenizerFast:
    plain = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, **{chr(97 + i): 2 + i for i in range(26)}}, "<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")


def compose(path, tied: bool = False, **connector: int) -> VisionLanguageModel:
    torch.manual_seed(0)
    vision = HuggingFace(str(path))
    options = {"num_key_value_heads": 2, "initializer_range": 0.25, "tie_word_embeddings": tied}
    language = build_language({"model_type": "llama", **SIZES, **options}, 28)
    return VisionLanguageModel(vision, Mlp(32, 32, **connector), language).eval()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    found = tmp_path_factory.mktemp("clip")
    AutoModel.from_config(ENCODERS["clip"][0]).save_pretrained(found)
    processor().save_pretrained(found)
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_stock_transformers_loads_an_export_with_equal_logits(clip, tied, tmp_path):
    model = compose(clip, tied)
    save_llava(model, tokenizer(), tmp_path)
    stock, prepare = (
        AutoModelForImageTextToText.from_pretrained(tmp_path).eval(),
        AutoProcessor.from_pretrained(tmp_path),
    )
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 40, 3), np.uint8))
    batch = prepare(text="a <image> b c", images=picture, return_tensors="pt")
    tokens = torch.tensor([[2, IMAGE_TOKEN, 3, 4]])
    inputs = Inputs(tokens, torch.ones_like(tokens).bool(), batch["pixel_values"], torch.tensor([0]))
    with torch.no_grad():
        expected = model.logits(model(inputs).hidden)
        assert torch.equal(stock(**batch).logits[..., :28], expected)
        again = load_pretrained(tmp_path)
        assert torch.equal(again.logits(again(again.inputs(batch)).hidden)[..., :28], expected)


@pytest.mark.parametrize("connector", [{"depth": 1}, {"shuffle": 2}])
def test_what_llava_does_not_have_is_refused(clip, connector):
    with pytest.raises(ModelError, match=r"export: LLaVA's connector has 2 layers and shuffle 1; found"):
        to_llava(compose(clip, **connector), 28)


def test_registers_are_refused(folder):
    path, prefix = folder
    if prefix > 1:
        with pytest.raises(ModelError, match=f"at most one token before the grid; found {prefix}"):
            to_llava(compose(path), 28)
    else:
        assert to_llava(compose(path), 28).config.vision_feature_select_strategy == ("default" if prefix else "full")
