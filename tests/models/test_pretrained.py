"""Loading checkpoints and what is refused, in one clear line."""

import json

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlm.models.errors import ModelError
from vlm.models.family import find_family
from vlm.models.pretrained import PretrainedVlm, load_pretrained
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.program import VIT_OUT, Select
from vlm.models.program.select import even_stride

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = 9
HALF = Budget.parse("50%")


@pytest.fixture(scope="module")
def llava():
    vision = CLIPVisionConfig(**SIZES, image_size=16, patch_size=8)
    text = LlamaConfig(**SIZES, vocab_size=20)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE))


@pytest.fixture(scope="module")
def model(llava):
    return PretrainedVlm(llava).eval()


def test_every_family_is_found_by_its_types():
    types = "llava llava_next llava_onevision qwen2_vl qwen2_5_vl qwen3_vl internvl idefics3 smolvlm paligemma gemma3"
    assert all(name in find_family(name).model_types for name in types.split())


def test_an_unknown_type_names_the_nearest():
    with pytest.raises(ModelError, match=r"found 'qwen4_vl'; nearest: qwen\d_vl$"):
        find_family("qwen4_vl")


def test_a_checkpoint_of_another_kind_is_refused_before_its_weights_are_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match="found 'bert'"):
        load_pretrained(tmp_path)


def test_no_checkpoint(tmp_path):
    with pytest.raises(ModelError, match=r"^model: no checkpoint at '.*': [^\n]*$"):
        load_pretrained(tmp_path)


def test_a_checkpoint_without_weights(llava, tmp_path):
    llava.config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"^model: cannot load '.*': [^\n]*$"):
        load_pretrained(tmp_path)


def test_a_video_is_refused(model):
    with pytest.raises(ModelError, match="llava: images only here; found pixel_values_videos, a video"):
        model.inputs({"input_ids": torch.ones(1, 2).long(), "pixel_values_videos": torch.zeros(1, 2, 3, 16, 16)})


def test_images_without_a_place_are_refused(model):
    batch = {"input_ids": torch.tensor([[1, *[IMAGE] * 4, 2]]), "pixel_values": torch.zeros(2, 3, 16, 16)}
    with pytest.raises(ModelError, match="expected a place for each of 2 images; found none for the last 1"):
        model(model.inputs(batch))


def test_an_image_that_runs_into_the_next_sample_is_refused(model):
    """The sum of image tokens is right, so Transformers would spread one image over two samples."""
    tokens = torch.tensor([[1, IMAGE, IMAGE, 2], [1, IMAGE, IMAGE, 2]])
    with pytest.raises(ModelError, match="sample row 0: expected 4 image tokens, those of whole images; found 2"):
        model(model.inputs({"input_ids": tokens, "pixel_values": torch.zeros(1, 3, 16, 16)}))


def test_a_cut_in_the_encoder_is_refused_where_what_is_projected_are_not_its_patches(llava):
    """CLIP's class token among the visual tokens, as a LLaVA of ``full`` has it."""
    config = LlavaConfig.from_dict({**llava.config.to_dict(), "vision_feature_select_strategy": "full"})
    model, program = PretrainedVlm(LlavaForConditionalGeneration(config)), ((VIT_OUT, Select(HALF, even_stride())),)
    assert model.facts.visual == 5
    with (
        pytest.raises(ModelError, match=r"vit.out: llava encodes and projects .* prune at llm.in"),
        attach(model, program),
    ):
        pass


def test_without_images_the_text_stays(model):
    tokens = torch.tensor([[1, *[IMAGE] * 4, 2], [0, 0, 3, 4, 5, 6]])
    valid = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    batch = {"input_ids": tokens, "attention_mask": valid, "pixel_values": torch.zeros(1, 3, 16, 16)}
    bare = model.inputs(batch).without_images()
    assert [row[real].tolist() for row, real in zip(bare.tokens, bare.valid, strict=True)] == [[1, 2], [3, 4, 5, 6]]
    assert not bare.visual.any() and not bare.media
    text = model.inputs({"input_ids": torch.tensor([[1, 2]])})
    with torch.no_grad():
        torch.testing.assert_close(model.prefill(bare)[0][0], model.prefill(text)[0][0], rtol=0, atol=1e-6)


def test_the_loss_is_that_of_transformers(model, llava):
    tokens = torch.tensor([[1, *[IMAGE] * 4, 2, 3, 4, 5]])
    batch = {"input_ids": tokens, "pixel_values": torch.randn(1, 3, 16, 16)}
    labels = torch.where(torch.arange(9) > 6, tokens, -100)
    with torch.no_grad():
        expected = llava(**batch, labels=labels).loss
        out = model(model.inputs(batch), (labels != -100).float())
    assert out.weight == 2
    torch.testing.assert_close(out.loss / out.weight, expected)
