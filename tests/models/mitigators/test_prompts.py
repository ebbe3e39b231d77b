"""What changes prompts before they are run: the seam, and pause tokens."""

from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlm.models.decoders.beam import Beam
from vlm.models.errors import ModelError
from vlm.models.mitigators.m3id import M3id
from vlm.models.mitigators.pause import Pause
from vlm.models.mitigators.vcd import Vcd
from vlm.models.pretrained import PretrainedVlm
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.decode import generate
from vlm.models.program.program import PROMPT, Prepare
from vlm.models.program.prompts import asked
from vlm.models.pruners.fastv import Fastv
from vlm.models.splice import IMAGE_TOKEN

ROWS = ("tt#ttt", "#t#tttt", "ttt")
PAUSE = Pause(count=2, tokens=(5, 6))


@pytest.fixture(scope="module")
def llava() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=32, patch_size=8, initializer_range=0.1)
    text = LlamaConfig(**sizes, num_hidden_layers=4, vocab_size=40, initializer_range=0.25, pad_token_id=0)
    config: Any = LlavaConfig(vision_config=vision, text_config=text)
    config.image_token_id = 39
    return PretrainedVlm(LlavaForConditionalGeneration(config)).double().eval()


def llava_inputs(model: Any, texts: list[list[int]]) -> Any:
    longest = max(map(len, texts))
    tokens = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    g = torch.Generator().manual_seed(1)
    images = torch.randn(int((tokens == 39).sum()) // 16, 3, 32, 32, generator=g, dtype=torch.float64)
    return model.inputs({"input_ids": tokens, "attention_mask": (tokens > 0).long(), "pixel_values": images})


TEXTS = [[1, *[39] * 16, 2, 3], [4, 5, 6, *[39] * 16, 7, 8, 9]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_with_places_dropped_and_words_put_in(batch, side):
    inputs = batch(*ROWS, side=side)
    rows = [row[valid].tolist() for row, valid in zip(inputs.tokens, inputs.valid, strict=True)]
    starts = inputs.valid.int().argmax(1)
    drop = torch.zeros_like(inputs.valid)
    drop[0, starts[0] + 4], drop[1, starts[1] + 1] = True, True
    got = inputs.edit([[7, 8, 9], [], [7]], starts + torch.tensor([2, 3, 0]), drop)
    texts = [row[valid].tolist() for row, valid in zip(got.tokens, got.valid, strict=True)]
    assert texts[0] == [*rows[0][:3], 7, 8, 9, rows[0][3], rows[0][5]]
    assert texts[1] == [rows[1][0], *rows[1][2:]]
    assert texts[2] == [rows[2][0], 7, *rows[2][1:]]


def test_a_pretrained_text_with_words_put_in_stays_padded_on_the_left(llava):
    inputs = llava_inputs(llava, TEXTS)
    got = inputs.edit([[30, 31], []], torch.tensor([inputs.tokens.shape[1] - 2, 0]))
    assert [row[valid].tolist() for row, valid in zip(got.tokens, got.valid, strict=True)] == [
        [*TEXTS[0][:-1], 30, 31, 3],
        TEXTS[1],
    ]
    assert got.valid[:, -1].all() and torch.equal(got.visual, (got.tokens == 39) & got.valid)


def test_pauses_are_the_last_words_before_the_answer(make_model, batch, alone):
    model, inputs = make_model(), batch(*ROWS, side="left")
    options: Any = {"max_new_tokens": 5, "stop": 11}
    expected = []
    for b in range(3):
        row = alone(inputs, b)
        longer = torch.cat([row.tokens, torch.tensor([[5, 6, 5, 6]])], 1)
        longer = row._replace(tokens=longer, valid=torch.ones_like(longer).bool())
        expected += generate(model, longer, **options)
    with attach(model, PAUSE.program(model.facts)):
        assert generate(model, inputs, **options) == expected
    assert generate(model, inputs, **options) != expected


def test_pauses_after_the_image_leave_text_alone(make_model, batch, alone):
    model, inputs = make_model(), batch(*ROWS, side="left")
    options: Any = {"max_new_tokens": 5, "stop": 11}
    with attach(model, Pause(count=1, tokens=(5, 6), where="image").program(model.facts)):
        got = generate(model, inputs, **options)
    assert got[2] == generate(model, alone(inputs, 2), **options)[0]
    text = alone(inputs, 1).tokens[0].tolist()
    longer = torch.tensor([[*text[:3], 5, 6, *text[3:]]])
    row = alone(inputs, 1)._replace(tokens=longer, valid=torch.ones_like(longer).bool())
    assert got[1] == generate(model, row, **options)[0]


@pytest.mark.parametrize(("method", "decoder"), [(Vcd(alpha=3.0, step=900), None), (M3id(1.0, 1.1), Beam(2))], ids=repr)
def test_other_streams_and_pruners_see_the_changed_prompt(make_model, batch, method, decoder):
    model, inputs = make_model(), batch(*ROWS, side="left")
    options: Any = {"max_new_tokens": 5, "stop": 11, "decoder": decoder}
    others = Fastv(Budget.parse("25%")).program(model.facts) + method.program(model.facts)
    longer = inputs.edit([[5, 6, 5, 6]] * 3, torch.full((3,), inputs.tokens.shape[1] - 1))
    with attach(model, others):
        expected = generate(model, longer, **options)
    with attach(model, PAUSE.program(model.facts) + others):
        assert generate(model, inputs, **options) == expected


def test_changes_follow_each_other_and_know_the_stop(make_model, batch):
    model, inputs, seen = make_model(), batch("tt#t"), []

    def put(ids: list[int]) -> Prepare:
        def change(model: Any, inputs: Any, stop: int) -> Any:
            seen.append((stop, inputs.tokens.shape[1]))
            return inputs.edit([ids], torch.tensor([0]))

        return Prepare(change)

    with attach(model, ((PROMPT, put([5])), (PROMPT, put([6, 7])))):
        got = generate(model, inputs, max_new_tokens=3, stop=11)
    text = inputs.tokens[0].tolist()
    by_hand = torch.tensor([[text[0], 6, 7, 5, *text[1:]]])
    by_hand = inputs._replace(tokens=by_hand, valid=torch.ones_like(by_hand).bool())
    assert got == generate(model, by_hand, max_new_tokens=3, stop=11)
    assert seen == [(11, 4), (11, 5)]


def test_it_works_on_a_pretrained_model(llava):
    inputs = llava_inputs(llava, TEXTS)
    longer = inputs.edit([[5, 6, 5, 6]] * 2, torch.full((2,), inputs.tokens.shape[1] - 1))
    options: Any = {"max_new_tokens": 4, "stop": 38}
    with attach(llava, PAUSE.program(llava.facts)):
        got = generate(llava, inputs, **options)
    assert got == generate(llava, longer, **options)


def test_neutral_and_refused_settings(make_model, batch):
    model = make_model()
    assert Pause(count=0).program(model.facts) == ()
    with pytest.raises(ModelError, match=r"^pause.text: this model comes without its tokenizer; give ids as pause.tok"):
        Pause().program(model.facts)
    with pytest.raises(ModelError, match=r"^pause.count: expected 0 or more; found -1"):
        Pause(count=-1).program(model.facts)
    model.tokenize = lambda text: [len(text)]
    ((_, op),) = Pause(count=3).program(model.facts)
    inputs = batch("tt#t")
    assert isinstance(op, Prepare) and op.change(model, inputs, -1).tokens[0, -3:].tolist() == [7, 7, 7]
    with (
        attach(model, Pause(tokens=(5,)).program(model.facts)),
        pytest.raises(ModelError, match=r"^prompt: this method changes prompts that are to be answered; found a train"),
    ):
        model(inputs, torch.ones(inputs.tokens.shape))


def test_which_words_are_the_users(batch):
    inputs = batch("tt#ttttt", "#tt", "tttttt")
    tokens = inputs.tokens.clone()
    tokens[0, 6:8], tokens[1, 2] = torch.tensor([21, 22]), 22
    got = asked(inputs._replace(tokens=tokens), [20, 21, 22])
    assert got.nonzero().tolist() == [[0, 3], [0, 4], [0, 5], [1, 1]]


def test_an_image_shown_twice(make_model, batch, llava):
    inputs = batch("tt#t", "t")
    got = inputs.doubled()
    text = inputs.tokens[0].tolist()
    assert got.tokens[0].tolist() == [*text[:2], IMAGE_TOKEN, IMAGE_TOKEN, text[3]]
    assert got.owner.tolist() == [0, 0] and torch.equal(got.images[0], got.images[1])
    with pytest.raises(ModelError, match=r"^images: expected one image to show it twice; found several in row 1"):
        batch("t", "t#t#").doubled()
    two = llava_inputs(llava, TEXTS).doubled()
    assert two.visual.sum(1).tolist() == [32, 32] and len(two.media["pixel_values"]) == 4
    generate(llava, two, max_new_tokens=1, stop=38)
