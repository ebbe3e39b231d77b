"""CDPruner's relevance by CLIP on LLaVA and LLaVA-NeXT, against Transformers' whole CLIP and every determinant."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import (
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
)

from vlm.models.errors import ModelError
from vlm.models.pretrained import PretrainedVlm, load_pretrained
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.decode import generate
from vlm.models.pruners.cdpruner import Cdpruner

GRIDS = [[32, 64], [64, 32], [64, 64]]
LONG = "the#" + "quickbrownfx" * 7 + "jumpsover"  # more letters than a text of CLIP may have
ROWS = ("ab#cdefgh", LONG.replace("the", "uvw"), "xyz", "#lmno#kqr", "st#")  # two images; nothing after one


class Clip:
    """A random CLIP on disk whose vision side is the checkpoint's, and what Transformers makes of it."""

    def __init__(self, folder: Any, vision: Any, tokenizer: Any) -> None:
        torch.manual_seed(7)
        size: Any = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        marks: Any = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
        text = CLIPTextConfig(vocab_size=len(tokenizer), initializer_range=0.5, **size, **marks)
        assert text.max_position_embeddings == 77
        both: Any = {"text_config": text.to_dict(), "vision_config": vision.to_dict()}
        self.model: Any = CLIPModel(CLIPConfig(**both, projection_dim=20)).eval()
        for norm in (self.model.vision_model.post_layernorm, self.model.text_model.final_layer_norm):
            torch.nn.init.normal_(norm.weight)
            torch.nn.init.normal_(norm.bias)
        self.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        self.folder, self.tokenizer = str(folder), tokenizer
        self.model.double()

    def patches(self, pixels: Tensor) -> Tensor:
        """LLaVA's features, of the last block but one, in the common space: [pictures, patches, width]."""
        seen = self.model.vision_model(pixels.double(), output_hidden_states=True).hidden_states[-2][:, 1:]
        return self.model.visual_projection(self.model.vision_model.post_layernorm(seen))

    def texts(self, words: str) -> Tensor:
        ids = self.tokenizer.convert_tokens_to_ids(list(words))
        pieces = [ids[at : at + 75] for at in range(0, len(ids), 75)]
        found = [self.model.get_text_features(torch.tensor([[1, *piece, 2]])).pooler_output for piece in pieces]
        return torch.cat(found)

    def relevance(self, patches: Tensor, words: str) -> Tensor:
        """Minus the mean cosine of each patch with the pieces of the text."""
        return -(normalize(patches, dim=1) @ normalize(self.texts(words), dim=1).T).mean(1)


def greedy(x: Tensor, relevance: Tensor, count: int) -> list[int]:
    """Token by token the one whose addition makes the largest determinant, all of them computed."""
    unit = normalize(x.double(), dim=1)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    kept: list[int] = []
    for _ in range(count):
        others = [i for i in range(len(x)) if i not in kept]
        sets = torch.tensor([[*kept, i] for i in others])
        found = torch.linalg.det(kernel[sets[:, :, None], sets[:, None, :]])
        kept.append(others[int(found.argmax())])
    return sorted(kept)


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def pair(request, tiny, tmp_path_factory) -> tuple[Any, Any, Any, Clip]:
    """Transformers' model, ours and the processor, of a checkpoint on disk; and its CLIP."""
    tokenizer, vision = tiny.tokenizer("<image>"), tiny.clip()
    clip = Clip(tmp_path_factory.mktemp("clip"), vision, tiny.tokenizer())
    size, crop = {"shortest_edge": 32}, {"height": 32, "width": 32}
    parts: Any = {"vision_config": vision, "text_config": LlamaConfig(**tiny.text())}
    if request.param == "llava":
        images: Any = CLIPImageProcessor(size=size, crop_size=crop)
        processor: Any = LlavaProcessor(images, tokenizer, 8, "default", num_additional_image_tokens=1)
        config: Any = LlavaConfig(**parts, image_token_id=processor.image_token_id)
    else:
        images = LlavaNextImageProcessor(size=size, crop_size=crop, image_grid_pinpoints=GRIDS)
        processor = LlavaNextProcessor(images, tokenizer, 8, "default", num_additional_image_tokens=1)
        config = LlavaNextConfig(**parts, image_token_id=processor.image_token_id, image_grid_pinpoints=GRIDS)
    torch.manual_seed(0)
    stock: Any = AutoModelForImageTextToText.from_config(config)
    weights = {k: v for k, v in clip.model.vision_model.state_dict().items() if k in _names(stock.model.vision_tower)}
    assert weights
    stock.model.vision_tower.load_state_dict({_names(stock.model.vision_tower)[k]: v for k, v in weights.items()})
    folder = tmp_path_factory.mktemp("llava")
    stock.save_pretrained(folder)
    processor.save_pretrained(folder)
    stock = AutoModelForImageTextToText.from_pretrained(folder).eval().double()
    ours = load_pretrained(folder).double()
    ours.detokenize = lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)
    return stock, ours, processor, clip


def _names(tower: Any) -> dict[str, str]:
    """Names of CLIP's own vision model -> names in the tower, which may hold it one level deeper."""
    return {name.removeprefix("vision_model."): name for name in tower.state_dict()}


def made(pair: Any, tiny: Any, rows: Any, side: str = "left") -> dict[str, Any]:
    texts = [" ".join("<image>" if mark == "#" else mark for mark in row) for row in rows]
    images = [[tiny.noise(ord(row[-1]) + number) for number in range(row.count("#"))] for row in rows]
    options: Any = {"padding": True, "padding_side": side, "return_tensors": "pt"}
    batch = pair[2](text=texts, images=images if any(images) else None, **options)
    return {n: v.double() if v.is_floating_point() else v for n, v in batch.items()}


def dense(pair: Any, batch: dict[str, Any], rows: Any) -> list[tuple[Tensor, Tensor]]:
    """Of each row the features of its visual tokens, and their relevance before it is scaled."""
    stock, _, _, clip = pair
    media = {name: batch[name] for name in ("pixel_values", "image_sizes") if name in batch}
    features = list(stock.model.get_image_features(**media, return_dict=True).pooler_output)
    pixels = media["pixel_values"]
    if pixels.ndim == 4:
        seen = list(clip.patches(pixels))
    else:  # the tiles of each image, packed as Transformers packs them, newlines not a number
        tiles = [clip.patches(one[one.flatten(1).any(1)]) for one in pixels]
        newline = torch.full((20,), torch.nan, dtype=torch.float64)
        seen, _ = stock.model.pack_image_features(tiles, media["image_sizes"], "default", image_newline=newline)
    found, image = [], 0
    for row in rows:
        number, words = row.count("#"), row.rpartition("#")[2] or row.replace("#", "")
        mine = range(image, image + number)
        image += number
        if not number:
            found.append((torch.empty(0, 32), torch.empty(0)))
            continue
        relevance = clip.relevance(torch.cat([seen[n] for n in mine]), words)
        least = relevance[~relevance.isnan()].min()
        found.append((torch.cat([features[n] for n in mine]), relevance.nan_to_num(float(least))))
    return found


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_relevance_is_that_of_the_whole_clip(pair, tiny, side):
    batch, method = made(pair, tiny, ROWS, side), Cdpruner(Budget(tokens=6), "clip", text=pair[3].folder)
    (need,) = method.program(pair[1].facts)[0][1].selector.needs
    found = need.scores(pair[1], pair[1].inputs(batch), None)
    assert len(LONG) > 77 + 4 and found.shape[0] == len(ROWS)
    for row, (_, expected) in enumerate(dense(pair, batch, ROWS)):
        torch.testing.assert_close(found[row, : len(expected)].double(), expected.double(), rtol=0, atol=3e-6)


@torch.no_grad()
def test_the_subset_has_the_largest_determinant(pair, tiny):
    batch, method = made(pair, tiny, ROWS), Cdpruner(Budget(tokens=5), "clip", text=pair[3].folder)
    with attach(pair[1], method.program(pair[1].facts)):
        layout = pair[1](pair[1].inputs(batch)).layout
    image = pair[0].config.image_token_id
    changed = False
    for row, (x, relevance) in enumerate(dense(pair, batch, ROWS)):
        places = (batch["input_ids"][row] == image).nonzero().flatten()
        kept = [places.tolist().index(place) for place in layout.source[row][layout.visual[row]].tolist()]
        if not len(x):
            assert kept == []
            continue
        weight = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
        count = 5 * ROWS[row].count("#")
        assert kept == greedy(x, weight, count)
        changed |= kept != greedy(x, torch.ones(len(x), dtype=torch.float64), count)
    assert changed  # relevance does make a choice


@torch.no_grad()
def test_a_sample_alone_equals_the_sample_in_a_batch_and_answers_follow(pair, tiny):
    model, method = pair[1], Cdpruner(Budget(tokens=5), "clip", text=pair[3].folder)
    with attach(model, method.program(model.facts)):
        together, stream = model.prefill(model.inputs(made(pair, tiny, ROWS)))
        answers = generate(model, model.inputs(made(pair, tiny, ROWS)), max_new_tokens=3, stop=-1)
        for row, text in enumerate(ROWS):
            inputs = model.inputs(made(pair, tiny, [text]))
            alone, _ = model.prefill(inputs)
            torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-8)
            assert generate(model, inputs, max_new_tokens=3, stop=-1) == [answers[row]]
    assert stream.run.last.visual.sum(1).tolist() == [5 * row.count("#") for row in ROWS]


def test_training_asks_by_the_question_alone_also_under_autocast(pair, tiny):
    model, method = pair[1].float(), Cdpruner(Budget(tokens=5), "clip", text=pair[3].folder)
    try:
        rows = ("ab#cdefgh", "ab#cdexyz", "ab#qrsfgh")  # an answer of three letters
        batch = made(pair, tiny, [row[:-1] + "h" for row in rows])  # one and the same picture
        ids = pair[2].tokenizer.convert_tokens_to_ids(list("hzh"))
        batch["input_ids"][:, -1] = torch.tensor(ids)
        inputs = model.inputs({n: v.float() if v.is_floating_point() else v for n, v in batch.items()})
        weights = torch.zeros(inputs.tokens.shape)
        weights[:, -3:] = 1
        (need,) = method.program(model.facts)[0][1].selector.needs
        with torch.no_grad():
            plain = need.scores(model, inputs, weights)
            with torch.autocast("cpu", torch.bfloat16):  # features are then in half precision, their comparison is not
                half = need.scores(model, inputs, weights)
        assert torch.equal(plain[0], plain[1]) and not torch.equal(plain[0], plain[2])
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, plain, rtol=0, atol=0.03)
        with attach(model.train(), method.program(model.facts)):
            out = model(inputs, weights)
            out.loss.backward()
        assert all(p.grad is not None for p in model.vision.projector.parameters())
    finally:
        model.zero_grad(set_to_none=True)
        model.double().eval()


@torch.no_grad()
def test_text_alone_and_half_precision_work(pair, tiny):
    model, method = pair[1], Cdpruner(Budget(tokens=5), "clip", text=pair[3].folder)
    inputs = model.inputs(made(pair, tiny, ["abc", "de"]))
    plain = model.prefill(inputs)[0]
    with attach(model, method.program(model.facts)):
        assert torch.equal(model.prefill(inputs)[0], plain)
    try:
        model.bfloat16()
        inputs = model.inputs(made(pair, tiny, ROWS))
        media = {n: v.bfloat16() if v.is_floating_point() else v for n, v in inputs.media.items()}
        with attach(model, method.program(model.facts)):
            layout = model(inputs._replace(media=media)).layout
        assert layout.visual.sum(1).tolist() == [5 * row.count("#") for row in ROWS]
    finally:
        model.double()


def test_an_encoder_that_is_no_clip_is_refused(tiny, pair):
    method, text = Cdpruner(Budget(tokens=5), "clip", text=pair[3].folder), LlamaConfig(**tiny.text())
    options: Any = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    config = LlavaConfig(
        vision_config=tiny.siglip(vision_use_head=False), text_config=text, image_token_id=9, **options
    )
    siglip = PretrainedVlm(AutoModelForImageTextToText.from_config(config))
    siglip.detokenize = str
    with pytest.raises(
        ModelError, match=r"vision encoder of CLIP, .*; found 'siglip_vision_model'; use relevance: lan"
    ):
        method.program(siglip.facts)
    several = LlavaConfig(vision_config=tiny.clip(), text_config=text, image_token_id=9, vision_feature_layer=[-2, -3])
    deep = PretrainedVlm(AutoModelForImageTextToText.from_config(several))
    deep.detokenize = str
    with pytest.raises(ModelError, match=r"model's own vision encoder, 64 wide; found .* 32 wide"):
        method.program(deep.facts)
