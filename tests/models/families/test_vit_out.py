"""Cuts in the vision encoder of LLaVA and LLaVA-NeXT and after it, against Transformers on what was kept."""

from typing import Any

import pytest
import torch
from transformers import (
    CLIPImageProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    SiglipVisionConfig,
)

from vlm.models.errors import ModelError
from vlm.models.pretrained import PretrainedVlm
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.program import VIT_OUT, Select, Selector, Tokens, vit_after
from vlm.models.program.select import even_stride, top
from vlm.models.program.signals import PatchAttention
from vlm.models.pruners.flowcut import Flowcut
from vlm.models.pruners.visionzip import Visionzip

GRIDS = [[32, 64], [64, 32], [64, 64]]
HALF = Budget.parse("50%")


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def case(request, tiny, make_case):
    tokenizer, text = tiny.tokenizer("<image>"), LlamaConfig(**tiny.text())
    size, crop = {"shortest_edge": 32}, {"height": 32, "width": 32}
    parts = {"vision_config": tiny.clip(num_hidden_layers=4), "text_config": text}
    if request.param == "llava":
        images: Any = CLIPImageProcessor(size=size, crop_size=crop)
        processor: Any = LlavaProcessor(images, tokenizer, 8, "default", num_additional_image_tokens=1)
        config: Any = LlavaConfig(**parts, image_token_id=processor.image_token_id)
    else:
        images = LlavaNextImageProcessor(size=size, crop_size=crop, image_grid_pinpoints=GRIDS)
        processor = LlavaNextProcessor(images, tokenizer, 8, "default", num_additional_image_tokens=1)
        config = LlavaNextConfig(**parts, image_token_id=processor.image_token_id, image_grid_pinpoints=GRIDS)
    return make_case(config, processor, "<image>")


def by_attention(block: int) -> Selector:
    signal = PatchAttention(block)
    return Selector(lambda tokens, count: top(tokens.signal(signal).sum(1), tokens.valid, count), (signal,))


@torch.no_grad()
def on_what_was_kept(case: Any, batch: Any, layout: Any) -> Any:
    """The last state of each row, with Transformers' own language model on the kept embeddings of the whole prompt."""
    stock = case.stock
    embeds = stock.get_input_embeddings()(batch["input_ids"])
    media = {name: value for name, value in batch.items() if name in ("pixel_values", "image_sizes")}
    features = torch.cat(list(stock.model.get_image_features(**media, return_dict=True).pooler_output))
    visual = batch["input_ids"] == stock.config.image_token_id
    embeds = embeds.masked_scatter(visual[..., None], features)
    found = []
    for row in range(len(embeds)):
        real = layout.valid[row]
        kept = layout.source[row, real]
        causal = torch.ones(len(kept), len(kept), dtype=torch.bool).tril()[None, None]
        place = layout.position[row, real][None]
        options = {"attention_mask": causal, "position_ids": place, "use_cache": False}
        found.append(stock.get_decoder()(inputs_embeds=embeds[row, kept][None], **options).last_hidden_state[0])
    return found


@pytest.mark.parametrize("position", ["keep", "reindex"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cut_after_the_encoder_is_transformers_on_what_was_kept(case, position, side):
    batch = case.batch(side=side)
    program = ((VIT_OUT, Select(HALF, by_attention(2), position)),)
    with torch.no_grad(), attach(case.ours, program):
        out = case.ours(case.ours.inputs(batch))
    before = (batch["input_ids"] == case.stock.config.image_token_id).sum(1)
    assert (out.layout.visual.sum(1) < before)[[0, 2]].all() and out.layout.visual[1].sum() == 0
    for row, expected in enumerate(on_what_was_kept(case, batch, out.layout)):
        real = out.layout.valid[row]
        torch.testing.assert_close(out.hidden[row, real], expected, rtol=0, atol=1e-5)
        kept, place = out.layout.source[row, real], out.layout.position[row, real]
        first = int(batch["attention_mask"][row].argmax())  # padding on the left has no position
        assert torch.equal(place, kept - first if position == "keep" else torch.arange(len(kept)))


def test_the_encoder_sees_what_transformers_sees(case):
    """The attention that patches get from the class token, by Transformers' own eager attention."""
    batch, seen = case.batch(["a#b"]), []

    def look(tokens: Tokens, count: Any) -> Any:
        seen.append(tokens.signal(signal))
        return even_stride().choose(tokens, count)

    signal = PatchAttention(2)
    with torch.no_grad(), attach(case.ours, ((VIT_OUT, Select(HALF, Selector(look, (signal,)))),)):
        case.ours(case.ours.inputs(batch))
        tower = case.stock.model.vision_tower
        pixels = batch["pixel_values"].flatten(0, -4)[: len(seen[0])]
        tower.set_attn_implementation("eager")
        maps = tower(pixels, **{"output_attentions": True}).attentions[2]  # [N,heads,T,T]
        tower.set_attn_implementation("sdpa")
    torch.testing.assert_close(seen[0], maps[:, :, 0, 1:], rtol=0, atol=1e-6)


def test_everything_kept_is_the_bare_model_to_the_bit(case):
    inputs, whole = case.ours.inputs(case.batch()), Budget.parse("100%")
    with torch.no_grad():
        plain, _ = case.ours.prefill(inputs)
        with attach(case.ours, ((VIT_OUT, Select(whole, even_stride())),)):
            assert torch.equal(case.ours.prefill(inputs)[0], plain)
        with attach(case.ours, Visionzip(HALF).program(case.ours.facts)):
            assert not torch.equal(case.ours.prefill(inputs)[0], plain)
        assert torch.equal(case.ours.prefill(inputs)[0], plain)
    assert not any(m._forward_pre_hooks for m in case.ours.model.modules())


@pytest.mark.parametrize("method", [Visionzip(HALF), Flowcut(HALF), Flowcut(Budget.parse(5), position="keep")])
def test_a_sample_alone_equals_the_sample_in_a_batch(case, method):
    rows, model = ("ab#c", "#fghij#k"), case.ours.double()
    try:
        with torch.no_grad(), attach(model, method.program(model.facts)):
            together, stream = model.prefill(model.inputs(case.batch(rows, double=True)))
            counts = stream.run.last.visual.sum(1)
            after = model.step(stream, torch.tensor([5, 6]))
            for row, text in enumerate(rows):
                alone, one = model.prefill(model.inputs(case.batch([text], double=True)))
                assert one.run.last.visual.sum() == counts[row]
                torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-8)
                step = model.step(one, torch.tensor([5 + row]))
                torch.testing.assert_close(step[0], after[row], rtol=0, atol=1e-8)
    finally:
        model.float()


def test_a_cut_inside_the_encoder_goes_through_its_later_blocks(case):
    """Of LLaVA's features the last but one block counts: a cut after block 0 changes what blocks 1 and 2 mix."""
    batch = case.batch(["a#b"])
    inputs = case.ours.inputs(batch)
    with torch.no_grad():
        with attach(case.ours, ((VIT_OUT, Select(HALF, even_stride())),)):
            late = case.ours(inputs)
        with attach(case.ours, ((vit_after(0), Select(HALF, even_stride())),)):
            early = case.ours(inputs)
    assert torch.equal(early.layout.source, late.layout.source)
    assert (early.hidden - late.hidden).abs().max() > 1e-4


def test_gradients_reach_the_encoder_through_what_was_kept(case):
    model = case.ours.train()
    try:
        inputs = model.inputs(case.batch(["ab#cde", "#fghij#k"]))
        with attach(model, Visionzip(HALF).program(model.facts)):
            model(inputs, torch.ones(inputs.tokens.shape)).loss.backward()
        for role in ("vision", "connector", "language"):
            reached = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parts[role].parameters()]
            assert sum(reached) > len(reached) / 2, role
    finally:
        model.zero_grad(set_to_none=True)
        model.eval()


def test_text_alone_trains_under_a_cut_in_the_encoder(case):
    model = case.ours.train()
    try:
        with attach(model, Flowcut(HALF).program(model.facts)):
            for rows in (["ab#c"], ["abc"]):
                inputs = model.inputs(case.batch(rows))
                model(inputs, torch.ones(inputs.tokens.shape)).loss.backward()
        assert all(p.grad is not None for p in model.vision.projector.parameters())
    finally:
        model.zero_grad(set_to_none=True)
        model.eval()


def test_newlines_stay_as_long_as_a_token_of_their_row(case):
    if case.stock.config.model_type != "llava_next":
        pytest.skip("only LLaVA-NeXT has newlines")
    inputs = case.ours.inputs(case.batch(["a#"]))
    first_row = Selector(lambda tokens, count: tokens.valid & (tokens.row == 2))
    with torch.no_grad():
        whole = places(case.ours(inputs).layout)
        with attach(case.ours, ((VIT_OUT, Select(HALF, first_row, exact=False)),)):
            kept = places(case.ours(inputs).layout)
    newlines = {(row, max(c for r, c in whole if r == row)) for row, _ in whole if row >= 4}
    assert {row for row, _ in kept} < {row for row, _ in whole}  # some rows went
    assert kept & newlines == {(row, col) for row, col in newlines if any(r == row for r, _ in kept - newlines)}
    assert kept - newlines and kept <= whole


def places(layout: Any) -> set[tuple[int, int]]:
    """(row, column) of the visual tokens of a batch of one."""
    visual = layout.visual[0]
    return {*zip(layout.row[0, visual].tolist(), layout.col[0, visual].tolist(), strict=True)}


def test_a_siglip_tower_has_no_class_token(tiny):
    vision = tiny.siglip(vision_use_head=False)
    assert isinstance(vision, SiglipVisionConfig)
    text, options = LlamaConfig(**tiny.text()), {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    model = PretrainedVlm(
        LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=9, **options))
    )
    assert model.facts.vision is not None and not model.facts.vision.class_token
    assert model.facts.visual == 16
    with pytest.raises(ModelError, match="this vision encoder has no class token; set attention: received"):
        Visionzip(HALF).program(model.facts)
    assert Visionzip(HALF, attention="received").program(model.facts)
