"""Mitigators that are stages on logits: their arithmetic restated, and what each of them promises wherever it runs."""

from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlm.models.decoders.beam import Beam
from vlm.models.decoders.sample import Sample
from vlm.models.errors import ModelError
from vlm.models.mitigators.agla import Agla
from vlm.models.mitigators.deco import Deco
from vlm.models.mitigators.dola import Dola
from vlm.models.mitigators.icd import Icd
from vlm.models.mitigators.m3id import M3id
from vlm.models.mitigators.pai_cfg import Paicfg
from vlm.models.mitigators.vcd import Vcd
from vlm.models.mitigators.vista_sla import Vistasla
from vlm.models.pretrained import PretrainedVlm
from vlm.models.program.attach import attach, check
from vlm.models.program.budget import Budget
from vlm.models.program.decode import generate, open_streams
from vlm.models.program.perturb import diffused
from vlm.models.program.streams import Streams
from vlm.models.pruners.fastv import Fastv
from vlm.models.pruners.random import Random

QUARTER = Budget.parse("25%")
ROWS = ("tt#ttt", "#t#tttt", "ttt")
ACTIVE: dict[str, Any] = {
    "vcd": Vcd(alpha=3.0, step=900),
    "icd": Icd(alpha=3.0, tokens=(5, 6, 7)),
    "icd plain": Icd(alpha=1.0, tokens=(5, 6, 7), where="start", form="plain"),
    "agla": Agla(alpha=4.0, cut=0.01, keep=0.2),
    "m3id": M3id(decay=1.0, tau=1.1),
    "m3id prompt": M3id(decay=0.2, tau=1.1, t0="prompt"),
    "pai_cfg": Paicfg(gamma=4.0),
    "dola": Dola(cut=0.01),
    "dola high": Dola("high", cut=0.01, norm=False),
    "deco": Deco(alpha=20.0),
    "vista_sla": Vistasla(gamma=0.8),
}
NEUTRAL = [Vcd(alpha=0.0), Icd(alpha=0.0), Agla(alpha=0.0), M3id(decay=0.0), M3id(tau=0.0), Paicfg(gamma=1.0)]
NEUTRAL += [Deco(alpha=0.0), Vistasla(gamma=0.0)]


@pytest.fixture(scope="module")
def llava() -> Any:
    """A LLaVA of Transformers with 16 tokens an image and random weights, in double precision."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=32, patch_size=8, initializer_range=0.1)
    text = LlamaConfig(
        **sizes, num_hidden_layers=4, num_key_value_heads=2, vocab_size=40, initializer_range=0.25, pad_token_id=0
    )
    config: Any = LlavaConfig(vision_config=vision, text_config=text)
    config.image_token_id = 39
    return PretrainedVlm(LlavaForConditionalGeneration(config)).double().eval()


def llava_inputs(model: Any, rows: tuple[str, ...]) -> Any:
    """One row per string, as the processor makes them, padded on the left; each row is the same in any batch."""
    texts, images = [], []
    for row in rows:
        g = torch.Generator().manual_seed(sum(map(ord, row)) + len(row))
        text = []
        for mark in row:
            text += [39] * 16 if mark == "#" else torch.randint(1, 39, (1,), generator=g).tolist()
            images += [torch.randn(3, 32, 32, generator=g, dtype=torch.float64)] if mark == "#" else []
        texts.append(text)
    longest = max(map(len, texts))
    tokens = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    valid = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    media = {"pixel_values": torch.stack(images)} if images else {}
    return model.inputs({"input_ids": tokens, "attention_mask": valid, **media})


@pytest.mark.parametrize("method", NEUTRAL, ids=repr)
def test_a_neutral_setting_is_the_empty_program(make_model, method):
    assert method.program(make_model().facts) == ()


@pytest.mark.parametrize("name", ACTIVE)
@pytest.mark.parametrize(
    ("decoder", "pruner"),
    [(None, None), (Sample(1.5), Fastv(QUARTER)), (Beam(2), Random(QUARTER))],
    ids=["greedy", "sample, fastv", "beam, random"],
)
def test_a_padded_batch_equals_single_samples(make_model, batch, alone, name, decoder, pruner):
    model, inputs = make_model(), batch(*ROWS, side="left")
    cut = pruner.program(model.facts) if pruner else ()
    options: Any = {"max_new_tokens": 5, "stop": 11, "decoder": decoder}
    with attach(model, cut + ACTIVE[name].program(model.facts)):
        answers = generate(model, inputs, **options)
        assert answers == [generate(model, alone(inputs, b), **options)[0] for b in range(3)]
    with attach(model, cut):
        plain = generate(model, inputs, **options)
    assert answers != plain


@pytest.mark.parametrize("name", ACTIVE)
@pytest.mark.parametrize(("decoder", "pruner"), [(None, Fastv(QUARTER)), (Beam(2), None)], ids=["greedy", "beam"])
def test_a_pretrained_model_takes_it_too(llava, name, decoder, pruner):
    cut = pruner.program(llava.facts) if pruner else ()
    options: Any = {"max_new_tokens": 4, "stop": 38, "decoder": decoder}
    with attach(llava, cut + ACTIVE[name].program(llava.facts)):
        answers = generate(llava, llava_inputs(llava, ROWS), **options)
        assert answers == [generate(llava, llava_inputs(llava, (row,)), **options)[0] for row in ROWS]
    with attach(llava, cut):
        assert generate(llava, llava_inputs(llava, ROWS), **options) != answers


@pytest.mark.parametrize("name", ["vcd", "agla", "m3id", "pai_cfg"])
def test_a_row_without_an_image_is_decoded_plainly(make_model, batch, name):
    model, inputs = make_model(), batch("tttt", "tt")
    plain = generate(model, inputs, max_new_tokens=6, stop=99)
    with attach(model, ACTIVE[name].program(model.facts)):
        assert generate(model, inputs, max_new_tokens=6, stop=99) == plain


# the arithmetic: logits after two generated tokens, against models that were run for them alone


def after(model: Any, inputs: Any, tokens: list[int]) -> torch.Tensor:
    logits, stream = model.prefill(inputs)
    for token in tokens:
        logits = model.step(stream, torch.tensor([token]))
    return logits[0]


def rewritten(model: Any, inputs: Any, method: Any, tokens: list[int]) -> torch.Tensor:
    with attach(model, method.program(model.facts)), torch.no_grad():
        streams = Streams(model, *open_streams(model, inputs))
        for token in tokens:
            streams.step(torch.tensor([token]))
        return streams.rewritten(model.engine.rewrites)[0]


def cut_off(value: torch.Tensor, main: torch.Tensor, beta: float) -> torch.Tensor:
    """What ``main`` finds less likely than ``beta`` times its likeliest token becomes -inf."""
    p = main.softmax(-1)
    return torch.where(p >= beta * p.max(), value, -torch.inf)


@pytest.fixture
def one(make_model, batch) -> Any:
    return make_model(), batch("tt#ttt")


def test_vcd(one):
    model, inputs = one
    got = rewritten(model, inputs, Vcd(alpha=0.7, cut=0.05, step=400, seed=3), [3, 4])
    with torch.no_grad():
        main = after(model, inputs, [3, 4])
        noised = after(model, inputs._replace(images=diffused(inputs.images[0], 400, 3)[None]), [3, 4])
    torch.testing.assert_close(got, cut_off(1.7 * main - 0.7 * noised, main, 0.05))
    assert got.isinf().any() and got.isfinite().sum() > 1


@pytest.mark.parametrize("step", [0, 1, 500, 999])
def test_the_noise_of_a_step(step):
    pixels = torch.randn(3, 60, 60, dtype=torch.float64)
    betas = torch.sigmoid(torch.linspace(-6, 6, 1000)) * (0.5e-2 - 1e-5) + 1e-5  # as the paper's code has them
    left = torch.cumprod(1 - betas, 0)[step].double()
    noise = diffused(pixels, step) - left.sqrt() * pixels
    assert abs(float(noise.var()) - float(1 - left)) < 0.05 * float(1 - left) + 1e-6
    assert torch.equal(diffused(pixels, step), diffused(pixels, step))
    assert not torch.equal(diffused(pixels, step), diffused(pixels, step, seed=1))


def test_a_step_that_does_not_exist_is_refused(make_model):
    with pytest.raises(ModelError, match="noised image: expected a step from 0 to 999; found 1000"):
        Vcd(step=1000).program(make_model().facts)


@pytest.mark.parametrize(("form", "where", "at"), [("vcd", "image", 3), ("plain", "start", 1)])
def test_icd(one, form, where, at):
    model, inputs = one
    got = rewritten(model, inputs, Icd(0.5, 0.2, tokens=(8, 9), where=where, form=form), [3, 4])
    text = inputs.tokens[0].tolist()
    disturbed = inputs._replace(tokens=torch.tensor([[*text[:at], 8, 9, *text[at:]]]), valid=torch.ones(1, 8).bool())
    with torch.no_grad():
        main, other = after(model, inputs, [3, 4]), after(model, disturbed, [3, 4])
    expected = 1.5 * main - 0.5 * other if form == "vcd" else main - 0.5 * other
    torch.testing.assert_close(got, cut_off(expected, main, 0.2))


def test_icd_tokenizes_its_words_or_says_that_it_cannot(make_model):
    model = make_model()
    with pytest.raises(ModelError, match=r"icd.prefix: this model comes without its tokenizer; give ids as icd.tokens"):
        Icd().program(model.facts)
    model.tokenize = lambda text: [len(word) for word in text.split()]
    op: Any = Icd().program(model.facts)[0][1]
    assert op.streams[0].ids == (3, 3, 1, 8, 6, 9)
    with pytest.raises(ModelError, match=r"icd.prefix: expected words that disturb; found '', which is no token"):
        Icd(prefix="").program(model.facts)


def test_agla_masks_what_the_question_does_not_look_at(one, spliced, by_hand):
    model, inputs = one
    got = rewritten(model, inputs, Agla(1.5, 0.01, keep=0.25, layer=1), [3, 4])
    attention = {}
    with torch.no_grad():
        x, image, _ = spliced(model, inputs)
        by_hand(model, x, edit=lambda layer, x, place, a: attention.setdefault(layer, a))
        looked = attention[1].mean(0)[-3:][:, image >= 0].sum(0)  # three words of question, 36 patches
        kept = looked >= looked.sort().values[-9]
        shown = kept.reshape(6, 6).repeat_interleave(8, 0).repeat_interleave(8, 1)  # patches of 8 x 8 pixels
        main = after(model, inputs, [3, 4])
        local = after(model, inputs._replace(images=inputs.images * shown), [3, 4])
    torch.testing.assert_close(got, cut_off(main + 1.5 * local, main, 0.01))


def test_agla_refuses_what_it_cannot_mask(make_model, batch):
    model = make_model()
    with attach(model, Agla().program(model.facts)):
        with pytest.raises(ModelError, match="expected a question after the image; found none in row 1"):
            generate(model, batch("t#t", "tt#"), max_new_tokens=1, stop=9)
        _, stream = model.prefill(batch("t#t"))
        stream.run.grids = []
        ((_, op),) = model.engine.program
        with pytest.raises(ModelError, match="expected images that are one grid of patches each; found several views"):
            op.streams[0].kept(stream.run)
    with pytest.raises(ModelError, match=r"agla.keep: expected a share above 0 and below 1; found 1"):
        Agla(keep=1.0).program(model.facts)


def test_pai_cfg(one):
    model, inputs = one
    got = rewritten(model, inputs, Paicfg(1.6, 0.1), [3, 4])
    with torch.no_grad():
        main, blind = after(model, inputs, [3, 4]), after(model, inputs.without_images(), [3, 4])
    s, u = main.log_softmax(-1), blind.log_softmax(-1)
    torch.testing.assert_close(got, cut_off(1.6 * (s - u) + u, main, 0.1))


def states(model: Any, spliced: Any, inputs: Any, tokens: list[int]) -> tuple[Any, ...]:
    """Transformers' own states of the last place after 0, 1, ... layers; the last of them is behind the final norm."""
    x, _, _ = spliced(model, inputs)
    x = torch.cat([x, model.language.get_input_embeddings()(torch.tensor(tokens))])
    out = model.language(inputs_embeds=x[None], output_hidden_states=True)
    return tuple(state[0, -1] for state in out.hidden_states)


@pytest.mark.parametrize("norm", [True, False])
def test_dola(one, spliced, norm):
    model, inputs = one
    head, normed = model.language.lm_head, model.decoder.norm if norm else lambda x: x
    got = rewritten(model, inputs, Dola((0, 1, 3), cut=0.1, norm=norm), [3, 4])
    with torch.no_grad():
        seen = states(model, spliced, inputs, [3, 4])
        final = head(seen[4]).log_softmax(-1)
        early = [head(normed(seen[k])).log_softmax(-1) for k in (0, 1, 3)]

    def jsd(p, q):
        m = (p.exp() + q.exp()) / 2
        return ((p.exp() * (p - m.log())).sum() + (q.exp() * (q - m.log())).sum()) / 2

    far = max(early, key=lambda q: float(jsd(final, q)))
    torch.testing.assert_close(got, cut_off(final - far, final, 0.1))


@pytest.mark.parametrize(
    ("layers", "depth", "tied", "expected"),
    [
        ("low", 32, False, range(0, 16, 2)),
        ("low", 32, True, range(2, 16, 2)),
        ("high", 32, False, range(16, 32, 2)),
        ("low", 60, False, range(0, 20, 2)),
        ("high", 60, False, range(40, 60, 2)),
    ],
)
def test_the_candidates_of_dola(layers, depth, tied, expected):
    assert Dola(layers, tied=tied).candidates(depth) == tuple(expected)


@pytest.mark.parametrize("method", [Dola((4,)), Deco(layers=(3, 4)), Deco(layers=(2, 1)), Vistasla(layers=(-1, 2))])
def test_layers_that_do_not_exist_are_refused(make_model, method):
    with pytest.raises(ModelError, match=r"layers: expected .*; found .*\d"):
        method.program(make_model().facts)


def test_deco(one, spliced):
    model, inputs = one
    head, norm = model.language.lm_head, model.decoder.norm
    got = rewritten(model, inputs, Deco(alpha=0.6, top_k=5, top_p=0.9, layers=(0, 2)), [3, 4])
    with torch.no_grad():
        seen = states(model, spliced, inputs, [3, 4])
        final = head(seen[4])
        middle = [head(norm(seen[k])) for k in (1, 2, 3)]
    p = final.softmax(-1)
    order = p.argsort(descending=True).tolist()
    candidates, mass = [], 0.0
    for token in order[:5]:
        if mass >= 0.9:
            break
        candidates.append(token)
        mass += float(p[token])
    sure = max(middle, key=lambda logits: float(logits.softmax(-1)[candidates].max()))
    expected = final + 0.6 * sure.softmax(-1)[candidates].max() * sure
    torch.testing.assert_close(got[candidates], expected[candidates])
    assert int(got.isfinite().sum()) == len(candidates) > 1


@pytest.mark.parametrize("norm", [False, True])
def test_vista_sla(one, spliced, norm):
    model, inputs = one
    head, normed = model.language.lm_head, model.decoder.norm if norm else lambda x: x
    got = rewritten(model, inputs, Vistasla(gamma=0.3, layers=(1, 2), norm=norm), [3, 4])
    with torch.no_grad():
        seen = states(model, spliced, inputs, [3, 4])
        expected = 0.7 * head(seen[4]) + 0.3 * (head(normed(seen[2])) + head(normed(seen[3]))) / 2
    torch.testing.assert_close(got, expected)


def test_the_windows_of_a_model_of_32_layers(make_model):
    facts = make_model().facts._replace(layers=32)
    program: Any = Vistasla().program(facts) + Deco().program(facts)
    assert [op.inner for _, op in program] == [
        tuple(range(26, 32)),  # after layers 25 to 30
        tuple(range(21, 30)),  # after layers 20 to 28
    ]


# together


@pytest.mark.parametrize(("first", "second"), [("vcd", "agla"), ("m3id", "vcd"), ("pai_cfg", "m3id")])
def test_two_stages_that_weigh_the_image_are_refused(make_model, first, second):
    facts = make_model().facts
    program = ACTIVE[first].program(facts) + ACTIVE[second].program(facts)
    with pytest.raises(ModelError, match=r"^logits: .* and .* both weigh the image .*; use one of the two$"):
        check(program, facts)


@pytest.mark.parametrize("names", [("vcd", "icd"), ("pai_cfg", "dola", "deco"), ("deco", "vista_sla", "m3id")])
@pytest.mark.parametrize("decoder", [None, Beam(2)])
def test_other_stages_follow_each_other(make_model, batch, alone, names, decoder):
    model, inputs = make_model(), batch(*ROWS, side="left")
    program = tuple(pair for name in names for pair in ACTIVE[name].program(model.facts))
    with attach(model, program):
        answers = generate(model, inputs, max_new_tokens=4, stop=99, decoder=decoder)
        assert answers == [
            generate(model, alone(inputs, b), max_new_tokens=4, stop=99, decoder=decoder)[0] for b in range(3)
        ]
        streams = Streams(model, *open_streams(model, inputs))
        assert not streams.rewritten(model.engine.rewrites).isnan().any()
