"""VISTA's steering, VHR and GIFT against their definitions written out on dense matrices, in double precision."""

import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm.models.decoders.beam import Beam
from vlm.models.errors import ModelError
from vlm.models.mitigators.gift import Gift
from vlm.models.mitigators.pai import Pai
from vlm.models.mitigators.vcd import Vcd
from vlm.models.mitigators.vhr import Vhr
from vlm.models.mitigators.vista_sla import Vistasla
from vlm.models.mitigators.vista_vsv import Vistavsv
from vlm.models.program.attach import attach, check
from vlm.models.program.budget import Budget
from vlm.models.program.decode import generate
from vlm.models.program.gaze import content_words
from vlm.models.program.head_divergence import answer_divergence, token_divergence
from vlm.models.program.observe import resting
from vlm.models.program.steer import turned
from vlm.models.pruners.fastv import Fastv
from vlm.models.pruners.visionzip import Visionzip
from vlm.models.splice import IMAGE_TOKEN

QUARTER = Budget.parse("25%")
ROWS = ("tt#ttt", "t#t#t", "ttt", "#tttttt")
CLASS_TOKEN: dict[str, Any] = {"class_token": True, "blocks": 4}
ACTIVE: dict[str, Any] = {
    "vista_vsv": Vistavsv(strength=0.4),
    "vhr": Vhr(gain=1.7, layers=(0, 1, 3)),
    "vhr without outliers": Vhr(gain=0.4, outliers=False, layers=(2, 1)),
    "gift": Gift(strength=3.0, look=(0, 1), layers=(1, 3)),
}


def decode(ids: Any) -> str:
    """A tokenizer whose every third token is a stop word and whose token 7 is a full stop."""
    return " ".join("the" if token % 3 == 0 else "." if token == 7 else f"word{token}" for token in ids)


@pytest.fixture
def model(make_model) -> Any:
    return with_words(make_model(**CLASS_TOKEN))


def with_words(model: Any) -> Any:
    model.detokenize = decode
    return model


def bare(x: Tensor, image: Tensor) -> Tensor:
    """The sequence without its image."""
    return x[: len(image)][~image]


def dense_vsv(model: Any, dense: Any, prompt: Tensor, image: Tensor, method: Vistavsv, _: Any) -> dict[str, Any]:
    with_image, without = {}, {}
    dense(model, prompt, leave=lambda layer, x: with_image.update({layer: x[-1]}))
    dense(model, bare(prompt, image), leave=lambda layer, x: without.update({layer: x[-1]}))

    def mlp(layer: int, out: Tensor) -> Tensor:
        v, changed = with_image[layer] - without[layer], []
        for x in out:
            opposed = max(0.0, float(-(x @ v) / (x.norm() * v.norm())))
            moved = x / x.norm() + method.strength * (1 + opposed) * v / v.norm()
            changed.append(x.norm() * moved / moved.norm())
        return torch.stack(changed)

    return {"mlp": mlp} if image.any() else {}


def dense_gains(model: Any, dense: Any, prompt: Tensor, image: Tensor, method: Vhr) -> dict[int, Tensor]:
    """Layer by layer, with a pair of whole passes for each: gains of earlier layers are in force in both."""
    gains: dict[int, Tensor] = {}
    for layer in sorted(method.layers or ()):
        seen: list[Tensor] = []

        def heads(number: int, out: Tensor, seen=seen, layer=layer) -> Tensor:
            out = out.clone()
            if number in gains:
                out[-1] *= gains[number][:, None]
            if number == layer:
                seen.append(out[-1])
            return out

        dense(model, prompt, heads=heads)
        dense(model, bare(prompt, image), heads=heads)
        change = [float((a - b).norm()) for a, b in zip(*seen, strict=True)]
        median, mean, deviation = statistics.median(change), statistics.mean(change), statistics.pstdev(change)
        gains[layer] = torch.tensor([method.gain if c > median else 1.0 for c in change], dtype=torch.float64)
        for h, c in enumerate(change):
            if method.outliers and seen[1][h].norm() > seen[0][h].norm() and c > mean + deviation:
                gains[layer][h] = 0.0
    return gains


def dense_vhr(model: Any, dense: Any, prompt: Tensor, image: Tensor, method: Vhr, _: Any) -> dict[str, Any]:
    if not image.any():
        return {}
    gains = dense_gains(model, dense, prompt, image, method)

    def heads(layer: int, out: Tensor) -> Tensor:
        out = out.clone()
        if layer in gains:
            out[len(prompt) - 1 :] *= gains[layer][:, None]
        return out

    return {"heads": heads}


def dense_heat(model: Any, dense: Any, prompt: Tensor, image: Tensor, tokens: list[int], look: Any) -> Tensor:
    seen: dict[int, Tensor] = {}
    dense(model, prompt, weights=lambda layer, attention: seen.setdefault(layer, attention))
    rows = range(int(image.nonzero().max()) + 1, len(prompt))
    content = [row for row in rows if tokens[row] % 3 and tokens[row] != 7]
    heat = torch.zeros(int(image.sum()), dtype=torch.float64)
    for layer in look if content else ():
        shifts = torch.stack([(seen[layer][:, r] - seen[layer][:, r - 1]).clamp_min(0)[:, image] for r in content], 1)
        best = sorted(range(4), key=lambda h: -float(shifts[h].sum()))[:2]
        heat += shifts[best].mean((0, 1)) / len(look)
    mean, deviation = heat.mean(), heat.std(correction=0)
    heat = heat.clip(mean - 3 * deviation, mean + 3 * deviation)
    return (heat - heat.min()) / (heat.max() - heat.min()) if heat.max() > heat.min() else heat * 0


def dense_gift(model: Any, dense: Any, prompt: Tensor, image: Tensor, method: Gift, tokens: list[int]) -> dict:
    if not image.any():
        return {}
    salience = (method.strength * dense_heat(model, dense, prompt, image, tokens, method.look)).exp()
    at, question = image.nonzero().flatten(), range(int(image.nonzero().max()) + 1, len(prompt))

    def weights(layer: int, attention: Tensor) -> Tensor:
        if not method.layers[0] <= layer <= method.layers[1]:
            return attention
        attention = attention.clone()
        for row in range(len(prompt) - 1, attention.shape[1]):
            a = attention[:, row]
            image_mass, question_mass = a[:, at].sum(1), a[:, list(question)].sum(1)
            lookers = sorted(range(4), key=lambda h, mass=image_mass: -float(mass[h]))[:2]
            askers = sorted(range(4), key=lambda h, mass=question_mass: -float(mass[h]))[:2]
            for h in lookers:
                a[h, at] *= salience
            c = a[lookers][:, at].sum() / image_mass[lookers].sum()
            for h in askers:
                a[h, list(question)] *= c
            attention[:, row] = a / a.sum(1, keepdim=True)
        return attention

    return {"weights": weights}


@pytest.mark.parametrize("name", ACTIVE)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_equals_its_definition_in_the_prompt_and_at_every_token(make_model, batch, spliced, dense, name, kv_heads):
    model, inputs, method = with_words(make_model(kv_heads=kv_heads, **CLASS_TOKEN)), batch(*ROWS), ACTIVE[name]
    more = torch.randint(0, 40, (4, 2))
    edits_of: Any = {Vistavsv: dense_vsv, Vhr: dense_vhr, Gift: dense_gift}[type(method)]
    with torch.no_grad(), attach(model, method.program(model.facts)):
        out = model(inputs)
        first, stream = model.prefill(inputs)
        logits = [first, *(model.step(stream, token) for token in more.unbind(1))]
    changed = 0.0
    for b in range(4):
        prompt, image_of, tokens = spliced(model, inputs, b)
        with torch.no_grad():
            edits = edits_of(model, dense, prompt, image_of >= 0, method, tokens)
            x = torch.cat([prompt, model.language.get_input_embeddings()(more[b])])
            expected, plain = dense(model, x, **edits), dense(model, x)
            got = model.logits(out.hidden[b][out.layout.valid[b]])
        torch.testing.assert_close(got, expected[: len(prompt)], rtol=0, atol=1e-5)
        answer = torch.stack([step[b] for step in logits])
        torch.testing.assert_close(answer, expected[len(prompt) - 1 :], rtol=0, atol=1e-5)
        changed = max(changed, float((plain - expected)[-1].abs().max()))
        if "#" not in ROWS[b]:
            torch.testing.assert_close(answer, plain[len(prompt) - 1 :], rtol=0, atol=1e-5)
    assert changed > 1e-3


@pytest.mark.parametrize("method", [Vistavsv(0.0), Vhr(1.0, outliers=False), Vhr(layers=()), Gift(0.0)], ids=repr)
def test_a_neutral_setting_is_the_empty_program(model, method):
    assert method.program(model.facts) == ()


@pytest.mark.parametrize("name", ACTIVE)
@pytest.mark.parametrize("pruner", [None, Fastv(QUARTER), Visionzip(QUARTER)], ids=["whole", "fastv", "visionzip"])
def test_beams_of_a_padded_batch_equal_single_samples(model, batch, alone, name, pruner):
    inputs = batch(*ROWS, side="left")
    cut = pruner.program(model.facts) if pruner else ()
    options: Any = {"max_new_tokens": 4, "stop": 11, "decoder": Beam(2)}
    with attach(model, cut + ACTIVE[name].program(model.facts)), torch.no_grad():
        answers = generate(model, inputs, **options)
        assert answers == [generate(model, alone(inputs, b), **options)[0] for b in range(4)]
        logits = model.prefill(inputs)[0]
    with attach(model, cut), torch.no_grad():
        assert (model.prefill(inputs)[0] - logits).abs().max() > 1e-4


@pytest.mark.parametrize("name", ACTIVE)
def test_rows_that_are_reordered_keep_what_was_found_for_their_sample(model, batch, name):
    inputs = batch("tt#ttt", "t#t#t")
    with attach(model, ACTIVE[name].program(model.facts)), torch.no_grad():
        _, stream = model.prefill(inputs)
        swapped = stream.take_rows(torch.tensor([1, 0, 1]))
        straight = model.step(stream, torch.tensor([3, 4]))
        crossed = model.step(swapped, torch.tensor([4, 3, 9]))
    torch.testing.assert_close(crossed[:2], straight.flip(0), rtol=0, atol=1e-9)
    assert (crossed[2] - crossed[0]).abs().max() > 1e-3


def test_methods_of_different_sites_act_together_and_other_streams_too(model, batch):
    methods = [Pai(0.5, layers=(0, 1)), Vistavsv(0.1), Vhr(1.5, layers=(3,)), Vistasla(0.2), Vcd(1.0, step=900)]
    program = tuple(pair for method in methods for pair in method.program(model.facts))
    inputs = batch(*ROWS)
    with attach(model, program):
        answers = generate(model, inputs, max_new_tokens=4, stop=11)
    for left_out in range(5):
        fewer = tuple(p for n, method in enumerate(methods) if n != left_out for p in method.program(model.facts))
        with attach(model, fewer), torch.no_grad():
            partly = model.prefill(inputs)[0]
        with attach(model, program), torch.no_grad():
            assert (model.prefill(inputs)[0] - partly).abs().max() > (1e-6 if left_out < 3 else -1)
    assert len(answers) == 4


def test_the_model_is_as_it_was_afterwards(model, batch):
    inputs = batch(*ROWS)
    before = model(inputs).hidden
    for method in ACTIVE.values():
        with attach(model, method.program(model.facts)), resting(model):
            assert torch.equal(model(inputs).hidden, before)
        assert torch.equal(model(inputs).hidden, before)


@pytest.mark.parametrize("method", [Vistavsv(), Vhr(layers=(1,))], ids=repr)
def test_training_is_refused(model, batch, method):
    with attach(model, method.program(model.facts)), pytest.raises(ModelError, match="which training does not have"):
        model(batch("tt#ttt"), torch.tensor([[0.0, 0, 0, 0, 1, 1]]))


def test_the_divergence_of_an_answer_is_that_of_two_dense_passes(model, batch, spliced, dense):
    inputs, tokens = batch("tt#ttt", "#t"), torch.tensor([[3, 4, 5], [8, 1, 2]])
    by_head = answer_divergence(model, inputs, tokens)
    for b in range(2):
        prompt, image_of, _ = spliced(model, inputs, b)
        with torch.no_grad():
            for step in range(3):
                more = model.language.get_input_embeddings()(tokens[b, :step])
                seen: dict[tuple[int, int], Tensor] = {}
                for which, x in enumerate((prompt, bare(prompt, image_of >= 0))):
                    keep = lambda layer, out, which=which, seen=seen: seen.setdefault((which, layer), out)  # noqa: E731
                    dense(model, torch.cat([x, more]), heads=keep)
                expected = torch.stack([(seen[0, n][-1] - seen[1, n][-1]).norm(dim=1) for n in range(4)])
                torch.testing.assert_close(by_head[b, step], expected, rtol=0, atol=1e-6)
    largest = by_head.sort(dim=3).values[..., -2:].sum((2, 3))
    torch.testing.assert_close(token_divergence(by_head, 2), largest)
    assert bool((answer_divergence(model, batch("tttt"), tokens[:1]) < 1e-12).all())


def test_a_direction_of_zero_turns_nothing_and_lengths_stay():
    x = torch.randn(2, 3, 5)
    out = turned(x, torch.stack([torch.zeros(5), torch.randn(5)]), 0.5, more_when_opposed=True)
    assert torch.equal(out[0], x[0]) and not torch.allclose(out[1], x[1])
    torch.testing.assert_close(out.norm(dim=2), x.norm(dim=2))


def test_content_words():
    words = {1: " The", 2: " dog", 3: "?", 4: " of", 5: " 3", 6: "▁what", 7: "'s"}
    assert content_words(lambda ids: words[ids[0]], [1, 2, 3, 4, 5, 6, 7]) == [False, True] + [False] * 2 + [
        True,
        False,
        True,
    ]


def test_a_question_of_stop_words_changes_nothing(model, batch):
    inputs = batch("tt#ttt")
    inputs = inputs._replace(tokens=torch.where(inputs.tokens == IMAGE_TOKEN, inputs.tokens, inputs.tokens // 3 * 3))
    with torch.no_grad():
        plain = model.prefill(inputs)[0]
        with attach(model, ACTIVE["gift"].program(model.facts)):
            torch.testing.assert_close(model.prefill(inputs)[0], plain, rtol=0, atol=1e-9)


def test_the_layers_of_a_model_of_32(model):
    facts = model.facts._replace(layers=32)
    layers = lambda method: [site.layer for site, _ in method.program(facts)]  # noqa: E731
    assert layers(Vhr()) == [1, *range(18, 32)]
    assert layers(Vistavsv()) == list(range(32))
    assert layers(Gift()) == list(range(12, 23))
    check(Gift().program(facts) + Vhr().program(facts) + Vistavsv().program(facts), facts)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Vhr(layers=(1, 4)), r"vhr.layers: expected layers of 0..3; found 4"),
        (Gift(look=(9,)), r"gift.look: expected layers of 0..3; found 9"),
        (Gift(look=()), r"gift.look: expected layers of 0..3; found none"),
        (Gift(), r"gift: it tells content words by the tokenizer; found a model that comes without one"),
    ],
)
def test_what_makes_no_sense_is_refused(make_model, method, message):
    with pytest.raises(ModelError, match=message):
        method.program(make_model().facts)
