"""CDPruner against a greedy choice that computes every determinant."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, PreTrainedTokenizerFast

from vlm.models.backbones.huggingface import HuggingFace
from vlm.models.errors import ModelError
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.pruners.cdpruner import Cdpruner
from vlm.models.vision_language import VisionLanguageModel


def greedy(x: Tensor, relevance: Tensor, count: int) -> list[int]:
    """Token by token the one whose addition makes the largest determinant."""
    unit = normalize(x, dim=1)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    kept: list[int] = []
    for _ in range(count):
        others = [i for i in range(len(x)) if i not in kept]
        kept.append(max(others, key=lambda i: float(torch.linalg.det(kernel[[*kept, i]][:, [*kept, i]]))))
    return sorted(kept)


def relevance_of(visual: Tensor, words: Tensor) -> Tensor:
    mean = (normalize(visual, dim=1) @ normalize(words, dim=1).T).mean(1)
    return (mean - mean.min() + 1e-6) / (mean.max() - mean.min())


@pytest.mark.parametrize("relevance", ["language", "none"])
def test_cdpruner_equals_the_greedy_determinant(make_model, batch, spliced, by_hand, relevance):
    model, inputs = make_model(), batch("tt#tttt", "#tt")
    with torch.no_grad(), attach(model, Cdpruner(Budget.parse(9), relevance).program(model.facts)):
        out, (logits, _) = model(inputs), model.prefill(inputs)
        for b in range(2):
            x, image_of, _ = spliced(model, inputs, b)
            visual = torch.nonzero(image_of >= 0).flatten()
            weight = relevance_of(x[visual], x[visual[-1] + 1 :]) if relevance == "language" else torch.ones(36)
            chosen = greedy(x[visual], weight.double(), 9)
            layout = out.layout
            assert (layout.row * 6 + layout.col)[b][layout.visual[b]].tolist() == chosen
            kept = torch.cat([torch.nonzero(image_of < 0).flatten(), visual[chosen]]).sort().values
            expected = by_hand(model, x[kept])  # positions anew, by default
            got = model.logits(out.hidden[b][layout.valid[b]])
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
            torch.testing.assert_close(logits[b], expected[-1], rtol=0, atol=1e-9)


def test_the_question_matters_and_the_answer_does_not(make_model, batch):
    model, inputs = make_model(), batch("tt#tttttt")
    other = inputs._replace(tokens=inputs.tokens.clone())
    other.tokens[0, 6:] = (inputs.tokens[0, 6:] + 7) % 40
    weights = torch.tensor([[0.0] * 6 + [1.0] * 3])
    places = []
    with torch.no_grad(), attach(model, Cdpruner(Budget.parse(9)).program(model.facts)):
        for layout in (model(inputs, weights).layout, model(other, weights).layout, model(other).layout):
            places.append((layout.row * 6 + layout.col)[layout.visual].tolist())
    assert places[0] == places[1]
    assert places[0] != places[2]


def test_without_relevance_the_question_does_not_matter(make_model, batch):
    model, inputs = make_model(), batch("tt#ttt")
    other = inputs._replace(tokens=(inputs.tokens + 7) % 40)
    other.tokens[0, 2] = -1
    with torch.no_grad(), attach(model, Cdpruner(Budget.parse(9), "none").program(model.facts)):
        assert torch.equal(model(inputs).layout.col, model(other).layout.col)


BEGIN, END, LONGEST = 40, 41, 8


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP 16 wide, for texts of 8 tokens, whose words are ``w0`` ... ``w39``."""
    torch.manual_seed(3)
    size: Any = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks: Any = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": END}
    text = CLIPTextConfig(vocab_size=42, max_position_embeddings=LONGEST, **size, **marks, initializer_range=0.5)
    vision = CLIPVisionConfig(image_size=48, patch_size=8, **size)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12))
    for norm in (model.vision_model.post_layernorm, model.text_model.final_layer_norm):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{n}": n for n in range(40)} | {"<bos>": BEGIN, "<eos>": END}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>", eos_token="<eos>").save_pretrained(folder)
    return folder


def clip_relevance_of(folder: Path, patches: Tensor, words: list[int]) -> Tensor:
    """The paper's relevance of one sample's patches, text by text."""
    model: Any = CLIPModel.from_pretrained(folder)
    pieces = [words[at : at + LONGEST - 2] for at in range(0, len(words), LONGEST - 2)]
    said = []
    for piece in pieces:
        states = model.text_model(torch.tensor([[BEGIN, *piece, END]])).last_hidden_state
        said.append(model.text_projection(states[0, -1]))
    seen = model.visual_projection(model.vision_model.post_layernorm(patches.float()))
    found = -(normalize(seen, dim=1) @ normalize(torch.stack(said), dim=1).T).mean(1)
    return (found - found.min() + 1e-6) / (found.max() - found.min())


def readable(model: Any) -> Any:
    model.detokenize = lambda ids: " ".join(f"w{n}" for n in ids)
    return model


def test_clip_s_relevance_equals_the_dense_procedure(make_model, batch, spliced, clip):
    model, inputs = readable(make_model()), batch("tt#tttttttt", "#t#tt", "tt#")
    program = Cdpruner(Budget.parse("25%"), "clip", text=str(clip)).program(model.facts)
    owners = inputs.owner.tolist()
    with torch.no_grad(), attach(model, program):
        layout = model(inputs).layout
    with torch.no_grad():
        patches = model.vision(inputs.images).tokens
        for b in range(3):
            x, image_of, token_of = spliced(model, inputs, b)
            visual = torch.nonzero(image_of >= 0).flatten()
            after = token_of[int(visual[-1]) + 1 :]
            words = after or [token_of[place] for place in torch.nonzero(image_of < 0).flatten()]
            mine = patches[[n for n, owner in enumerate(owners) if owner == b]].flatten(0, 1)
            weight = clip_relevance_of(clip, mine, list(map(int, words)))
            chosen = greedy(x[visual], weight.double(), len(visual) // 4)
            image = layout.image[b] - owners.index(b)
            place = (image * 36 + layout.row[b] * 6 + layout.col[b])[layout.visual[b]]
            assert place.tolist() == chosen


def test_an_answer_has_no_say_in_clip_s_relevance_and_the_question_has(make_model, batch, clip):
    model, inputs = readable(make_model()), batch("tt#tttttt")
    weights = torch.tensor([[0.0] * 6 + [1.0] * 3])
    answer, question = (inputs._replace(tokens=inputs.tokens.clone()) for _ in range(2))
    answer.tokens[0, 6:] = (inputs.tokens[0, 6:] + 7) % 40
    question.tokens[0, 3:6] = (inputs.tokens[0, 3:6] + 7) % 40
    kept = []
    with torch.no_grad(), attach(model, Cdpruner(Budget.parse(9), "clip", text=str(clip)).program(model.facts)):
        for given in (inputs, answer, question):
            layout = model(given, weights).layout
            kept.append((layout.row * 6 + layout.col)[layout.visual].tolist())
    assert kept[0] == kept[1] != kept[2]


def test_a_composed_model_s_encoder_of_transformers_must_be_a_clip(make_model, clip):
    model = readable(make_model())
    for kind in ("clip_vision_model", "siglip_vision_model"):
        size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision = HuggingFace(config={"model_type": kind, "image_size": 48, "patch_size": 8, **size})
        facts = readable(VisionLanguageModel(vision, model.connector, model.language)).facts
        method = Cdpruner(Budget.parse(9), "clip", text=str(clip))
        if kind == "clip_vision_model":
            assert method.program(facts)
            continue
        with pytest.raises(ModelError, match=r"a vision encoder of CLIP, .*; found 'siglip_vision_model'"):
            method.program(facts)


@pytest.mark.parametrize(
    ("relevance", "text", "expected"),
    [
        ("clip", None, "expected the name of a CLIP with relevance: clip"),
        ("none", "a/clip", "and none without; found 'a/clip' with relevance: none"),
        ("clip", "nowhere/at/all", "no CLIP at 'nowhere/at/all'"),
    ],
)
def test_a_clip_that_is_not_there_is_refused(make_model, relevance, text, expected):
    model = readable(make_model())
    with pytest.raises(ModelError, match=expected):
        Cdpruner(Budget.parse(9), relevance, text=text).program(model.facts)


def test_clip_needs_a_tokenizer_and_the_model_s_own_encoder(make_model, clip, tmp_path):
    model = make_model()
    method = Cdpruner(Budget.parse(9), "clip", text=str(clip))
    with pytest.raises(ModelError, match="built with its tokenizer"):
        method.program(model.facts)
    with pytest.raises(ModelError, match="expected a patch behind each visual token; the connector Mlp mixes tokens"):
        method.program(readable(make_model(shuffle=2)).facts)
    wide: Any = CLIPModel.from_pretrained(clip)
    wide.config.vision_config.hidden_size = 24
    CLIPModel(wide.config).save_pretrained(tmp_path)
    for file in clip.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match=r"vision encoder, 16 wide; found .* 24 wide"):
        Cdpruner(Budget.parse(9), "clip", text=str(tmp_path)).program(readable(model).facts)
