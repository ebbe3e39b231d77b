"""Streams under cache policies, and contexts made from the inputs of pretrained models."""

import importlib
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import vlm
from vlm.models.decoders.beam import Beam
from vlm.models.errors import ModelError
from vlm.models.mitigators.agla import Agla
from vlm.models.pretrained import PretrainedInputs, PretrainedVlm
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.contexts import Noised
from vlm.models.program.decode import generate, open_streams
from vlm.models.program.perturb import diffused, masked
from vlm.models.program.program import LOGITS, Rewrite
from vlm.models.program.streams import Streams

POLICIES = sorted(path.stem for path in (Path(vlm.__file__).parent / "models" / "kv").glob("[!_]*.py"))
ROWS = ("tt#ttt", "t#t#tt", "#tttttttt")
NOISED = ((LOGITS, Rewrite(lambda now: 2 * now.main - now.other(Noised(700)), (Noised(700),))),)


def policy(name: str) -> Any:
    found = vars(importlib.import_module(f"vlm.models.kv.{name}")).values()
    (method,) = [c for c in found if is_dataclass(c) and isinstance(c, type) and c.__module__.endswith(f"kv.{name}")]
    make: Any = method
    return make(keep=Budget.parse("40%"))


@pytest.mark.parametrize("name", POLICIES)
def test_reordered_rows_go_on_as_what_they_have_become_under_every_cache_policy(make_model, batch, name):
    model, inputs = make_model(), batch(*ROWS, side="left")
    with attach(model, policy(name).program(model.facts) + NOISED), torch.no_grad():
        streams, fresh = (Streams(model, *open_streams(model, inputs)) for _ in range(2))
        for tokens, index in (((1, 2, 3), (2, 0, 0)), ((4, 5, 6), (0, 2, 1)), ((7, 8, 9), (0, 1, 2))):
            streams.step(torch.tensor(tokens))
            streams.reorder(torch.tensor(index))
        # row 0 is text 2: 3 4 7; row 1 text 0: 1 6 8; row 2 text 0: 1 5 9
        fresh = fresh.take_rows(torch.tensor([2, 0, 0]))
        for tokens in ((3, 1, 1), (4, 6, 5), (7, 8, 9)):
            fresh.step(torch.tensor(tokens))
        for context, logits in streams.logits.items():
            torch.testing.assert_close(logits, fresh.logits[context], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", POLICIES)
def test_beams_of_a_batch_equal_beams_alone_under_every_cache_policy(make_model, batch, alone, name):
    model, inputs = make_model(), batch(*ROWS[:2], side="left")
    options: Any = {"max_new_tokens": 4, "stop": 99, "decoder": Beam(2)}
    with attach(model, policy(name).program(model.facts)):
        answers = generate(model, inputs, **options)
        assert answers == [generate(model, alone(inputs, b), **options)[0] for b in range(2)]


def test_what_a_policy_remembers_cannot_be_taken_back(make_model, batch):
    model = make_model()
    with attach(model, policy("h2o").program(model.facts)), torch.no_grad():
        _, stream = model.prefill(batch("tt#t"))
        model.step(stream, torch.tensor([1]))
        with pytest.raises(ModelError, match=r"^decode: a cache policy that acts at generated tokens cannot be taken"):
            stream.truncate(1)


def test_a_full_sliding_window_cannot_be_taken_back(make_model, batch):
    model = make_model("mistral")
    model.language.config.sliding_window = 8
    with torch.no_grad():
        _, stream = model.prefill(batch("tt#t"))
        model.step(stream, torch.tensor([1]))
        with pytest.raises(ModelError, match=r"^decode: DynamicSlidingWindowLayer cannot be taken back: "):
            stream.truncate(1)


SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def qwen() -> PretrainedVlm:
    """Patches of 2 x 2 pixels in 2 frames, 2 x 2 of them a token."""
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16}
    vision |= {
        "patch_size": 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 8,
        "initializer_range": 0.3,
    }
    text = {
        **SIZES,
        "num_key_value_heads": 2,
        "vocab_size": 40,
        "initializer_range": 0.3,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }
    config: Any = Qwen2_5_VLConfig(vision_config=vision, text_config=text)
    config.image_token_id = 9
    return PretrainedVlm(Qwen2_5_VLForConditionalGeneration(config)).double().eval()


def test_a_picture_of_patches_gets_the_same_noise_in_both_frames(qwen):
    g = torch.Generator().manual_seed(0)
    once = torch.randn(16 + 8, 3, 1, 4, generator=g, dtype=torch.float64)  # images of 4 x 4 and 2 x 4 patches
    pixels = once.expand(-1, -1, 2, -1).flatten(1)
    media = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4], [1, 2, 4]])}
    got = qwen.family.map_pixels(media, lambda x, n: diffused(x, 500))["pixel_values"].unflatten(1, (3, 2, 4))
    assert torch.equal(got[:, :, 0], got[:, :, 1])
    whole = once[:, :, 0].flatten(1)
    expected = torch.cat([diffused(whole[:16], 500), diffused(whole[16:], 500)]).unflatten(1, (3, 4))
    assert torch.equal(got[:, :, 0], expected)


def test_contrast_with_noise_runs_on_patches_and_masks_are_refused_there(qwen):
    text = torch.tensor([[1, 9, 9, 9, 9, 2, 3]])
    pixels = torch.randn(16, 3, 1, 4, dtype=torch.float64).expand(-1, -1, 2, -1).flatten(1)
    batch = {"input_ids": text, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    inputs = qwen.inputs(batch)
    with attach(qwen, NOISED):
        answers = generate(qwen, inputs, max_new_tokens=6, stop=-1, decoder=Beam(2))
    assert answers != generate(qwen, inputs, max_new_tokens=6, stop=-1, decoder=Beam(2))
    with (
        attach(qwen, Agla(layer=1).program(qwen.facts)),
        pytest.raises(ModelError, match="masked image: expected one picture for each of 1 grids; found more views"),
    ):
        generate(qwen, inputs, max_new_tokens=1, stop=-1)


def test_tiles_get_noise_of_their_own_and_what_fills_them_up_stays_zero():
    vision = CLIPVisionConfig(**SIZES, image_size=16, patch_size=8)
    config: Any = LlavaNextConfig(vision_config=vision, text_config=LlamaConfig(**SIZES, vocab_size=40))
    model = PretrainedVlm(LlavaNextForConditionalGeneration(config))
    tiles = torch.randn(2, 3, 3, 16, 16)
    tiles[0, 2] = 0  # an image with fewer tiles
    got = model.family.map_pixels({"pixel_values": tiles}, lambda x, n: diffused(x, 500))["pixel_values"]
    assert not got[0, 2].any()
    assert torch.equal(got[1, 2], diffused(tiles[1, 2], 500))
    with pytest.raises(ModelError, match=r"^llava_next: expected pixels \[..., 3, H, W\] to change; found \(4, 8\)"):
        model.family.map_pixels({"pixel_values": torch.zeros(4, 8)}, lambda x, n: x)


def test_words_put_into_pretrained_inputs():
    tokens = torch.tensor([[0, 1, 9, 9, 2], [1, 2, 3, 4, 5]])
    visual = tokens == 9
    inputs = PretrainedInputs(tokens, tokens > 0, visual, types=visual.long())
    got = inputs.insert((7, 8))
    assert got.tokens.tolist() == [[0, 1, 9, 9, 7, 8, 2], [1, 7, 8, 2, 3, 4, 5]]
    assert got.valid.tolist() == [[False] + [True] * 6, [True] * 7]
    assert got.types is not None and torch.equal(got.visual, got.types.bool())
    assert got.visual.sum(1).tolist() == [2, 0]


def test_a_mask_covers_its_share_of_any_picture():
    kept = torch.tensor([[True, False, True], [False, True, False]])
    shown = masked(torch.ones(3, 10, 9), kept)[0].bool()
    assert torch.equal(shown, kept.repeat_interleave(5, 0).repeat_interleave(3, 1))
