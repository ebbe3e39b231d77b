"""Attaching a program: neutral ones change no bit, and leaving restores everything."""

from typing import Any

import pytest
import torch

from vlm.kernels.grouped_mass.rules import Neutral, visual_redistribution
from vlm.models.errors import ModelError
from vlm.models.mitigators.m3id import M3id
from vlm.models.mitigators.var import Var
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.decode import generate
from vlm.models.program.program import (
    LLM_IN,
    LOGITS,
    VIT_OUT,
    Regroup,
    Rewrite,
    Select,
    Selector,
    Tap,
    attn,
    llm_before,
)
from vlm.models.program.select import attention_from_last_row, even_stride
from vlm.models.program.signals import Facts, Peak, Received
from vlm.models.pruners.divprune import Divprune
from vlm.models.pruners.fastv import Fastv
from vlm.models.pruners.random import Random
from vlm.models.pruners.stride import Stride

PRUNERS = (Random, Stride, Divprune, Fastv)
NEUTRAL = {
    "empty": lambda decoder: (),
    "var taken 0": Var(taken=0, tau=3).program,
    "m3id decay 0": M3id(decay=0).program,
    "m3id tau 0": M3id(tau=0).program,
    **{f"{c.__name__} 100%": c(keep=Budget.parse("100%")).program for c in PRUNERS},
    **{f"{c.__name__} 36": c(keep=Budget.parse(36)).program for c in PRUNERS},
    **{f"{c.__name__} 99": c(keep=Budget.parse(99)).program for c in PRUNERS},
    "tap": lambda decoder: ((attn(1), Tap(Received(1), lambda value, layout: None)),),
}
ACTIVE = {
    "fastv": Fastv(keep=Budget.parse("25%")).program,
    "stride": Stride(keep=Budget.parse("25%")).program,
    "var": Var(tau=3.0).program,
    "m3id": M3id().program,
    "cut at vit.out": lambda decoder: ((VIT_OUT, Select(Budget.parse("25%"), even_stride())),),
}


def state(model: Any) -> dict[str, Any]:
    """Everything that attach() may touch and must restore."""
    hooks = {n: (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for n, m in model.named_modules()}
    own = {n: sorted(vars(m)) for n, m in model.named_modules()}
    config = model.language.config
    return {
        "hooks": hooks,
        "attributes": own,
        "classes": {n: type(m) for n, m in model.named_modules()},
        "attention": config._attn_implementation,
        "config": config.to_dict(),
        "keys": list(model.state_dict()),
        "engine": model.engine,
    }


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_neutral_program_changes_no_bit(make_model, batch, name):
    model, inputs = make_model().float(), batch("tt#ttt", "tt", "#t##tt")
    inputs = inputs._replace(images=inputs.images.float())
    bare = model(inputs)
    logits, _ = model.prefill(inputs)
    answers = generate(model, inputs, max_new_tokens=6, stop=1)
    with attach(model, NEUTRAL[name](model.facts)):
        assert torch.equal(model(inputs).hidden, bare.hidden)
        assert torch.equal(model.prefill(inputs)[0], logits)
        assert generate(model, inputs, max_new_tokens=6, stop=1) == answers


@pytest.mark.parametrize("name", ["empty", "var taken 0", "m3id decay 0", "m3id tau 0", "Fastv 100%", "Random 100%"])
def test_a_setting_that_is_neutral_by_itself_attaches_nothing(make_model, name):
    model = make_model()
    before = state(model)
    with attach(model, NEUTRAL[name](model.facts)):
        assert state(model) == before


@pytest.mark.parametrize("name", ACTIVE)
def test_leaving_restores_the_model(make_model, batch, name):
    model, inputs = make_model(), batch("tt#ttt", "#tt")
    before, bare = state(model), model(inputs).hidden
    with attach(model, ACTIVE[name](model.facts)):
        generate(model, inputs, max_new_tokens=2, stop=1)
        assert state(model) != before
        assert list(model.state_dict()) == before["keys"]
    assert state(model) == before
    with pytest.raises(KeyError), attach(model, ACTIVE[name](model.facts)):
        raise KeyError
    assert state(model) == before
    assert torch.equal(model(inputs).hidden, bare)


def test_a_second_program_is_refused_and_the_first_stays(make_model, batch):
    model, inputs = make_model(), batch("tt#ttt")
    with attach(model, ACTIVE["fastv"](model.facts)):
        first = model(inputs).hidden
        with pytest.raises(ModelError, match="attached to this model already"), attach(model, ACTIVE["m3id"](FACTS)):
            pass
        assert torch.equal(model(inputs).hidden, first)


def test_a_regroup_whose_rule_changes_nothing_is_close(make_model, batch):
    # every row after the image goes through the grouped path; taken = 0 leaves its weights as they are
    model, inputs = make_model(), batch("tt#ttt", "tt", "#t##tt")
    active = Var(tau=3.0).program(model.facts)[0][1]
    assert isinstance(active, Regroup)
    op = Regroup(active.groups, visual_redistribution(taken=0.0), active.needs)
    bare, (logits, _) = model(inputs), model.prefill(inputs)
    with attach(model, ((attn(2), op),)):
        torch.testing.assert_close(model(inputs).hidden, bare.hidden, rtol=0, atol=1e-6)
        torch.testing.assert_close(model.prefill(inputs)[0], logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", "flex", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["fastv", "var"])
def test_every_implementation_of_the_kernels_gives_the_same_model(make_model, batch, name, impl):
    model, inputs = make_model(), batch("t#tt", "tt")
    program = ACTIVE[name](model.facts)
    with torch.no_grad():
        with attach(model, program, impl="reference"):
            expected = model(inputs).hidden
            tokens = generate(model, inputs, max_new_tokens=2, stop=1)
        with attach(model, program, impl=impl):
            torch.testing.assert_close(model(inputs).hidden, expected, rtol=0, atol=1e-5)
            assert generate(model, inputs, max_new_tokens=2, stop=1) == tokens


@pytest.mark.parametrize("name", ["fastv", "var"])
def test_padding_is_masked_under_the_registered_attention(make_model, batch, alone, name):
    # a function registered for attention but not for masks gets no mask, and padding would be attended to
    model, inputs = make_model(), batch("tt#t", "t#tttttttt", "tttttt")
    with attach(model, ACTIVE[name](model.facts)):
        together = model(inputs)
        for b in range(3):
            single = model(alone(inputs, b))
            valid = together.layout.valid[b]
            torch.testing.assert_close(together.hidden[b][valid], single.hidden[0], rtol=0, atol=1e-9)


def attention(layer: int) -> Selector:
    return attention_from_last_row(layer)


KEEP, FACTS = Budget.parse("50%"), Facts(layers=4, width=32)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (Fastv(keep=KEEP, layer=4).program(FACTS), r"llm.before\[4\]: .* layers 1..3; found 4"),
        (((llm_before(0), Select(KEEP, even_stride())),), r"llm.before\[0\]: .* layers 1..3; found 0"),
        (((attn(7), Tap(Received(7), print)),), r"attn\[7\]: .* layers 0..3; found 7"),
        (((attn(1), Tap(Received(9), print)),), r"attn\[1\]: it asks for Received\(layer=9.*\), but layers are 0..3"),
        (((llm_before(2), Select(KEEP, attention(2))),), r"llm.before\[2\]: .* Received\(layer=2.*\), which is known"),
        (((LLM_IN, Select(KEEP, attention(0))),), r"llm.in: .* Received\(layer=0.*\), which is known only"),
        (((VIT_OUT, Select(KEEP, attention(0))),), r"vit.out: .* Received\(layer=0.*\), which is known only"),
        (((attn(1), Tap(Received(2), print)),), r"attn\[1\]: .* Received\(layer=2.*\), which is known only"),
        (Stride(keep=KEEP).program(FACTS) * 2, r"llm.in: two cuts at one site"),
        (
            ((LLM_IN, Select(KEEP, even_stride())), *Stride(keep=KEEP).program(FACTS)),
            r"llm.in: two cuts at one site",
        ),
        (((attn(1), Regroup(lambda keys: keys.layout.role, Neutral(), (Peak(3),))),), r"attn\[1\]: .* Peak\(layer=3"),
    ],
)
def test_a_program_that_does_not_fit_is_refused(make_model, program, message):
    model = make_model()
    before = state(model)
    with pytest.raises(ModelError, match=f"^{message}"), attach(model, program):
        pass
    assert state(model) == before


def test_two_cuts_name_the_site_that_has_two(make_model):
    program = ((llm_before(1), Select(KEEP, even_stride())), *Stride(keep=KEEP).program(make_model().facts) * 2)
    with pytest.raises(ModelError, match=r"^llm.in: two cuts at one site"), attach(make_model(), program):
        pass


def test_sliding_window_attention_is_refused(make_model):
    model = make_model("mistral")
    model.language.config.sliding_window = 8
    with pytest.raises(ModelError, match="full attention"), attach(model, ACTIVE["fastv"](model.facts)):
        pass


def test_a_state_after_a_layer_that_does_not_exist_is_refused(make_model):
    model = make_model()
    program = ((LOGITS, Rewrite(lambda now: now.main, inner=(2, 5))),)
    with (
        pytest.raises(ModelError, match=r"^logits: it reads the state after 0 to 4 layers; found 5"),
        attach(model, program),
    ):
        pass


def gradients(model: Any, *losses: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.stack(losses).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("style", ["forward", "hooks too"])
@pytest.mark.parametrize("name", ["fastv", "stride", "var", "fastv and var"])
def test_gradient_checkpointing_gives_the_same_gradients(make_model, batch, style, name, checkpointing):
    model, inputs = make_model().train(), batch("tt#ttt", "#t##tt")
    other = batch("t#tttt", "#ttttt")
    programs = [ACTIVE[part](model.facts) for part in name.split(" and ")]
    weights = (inputs.tokens >= 0).double()
    with attach(model, sum(programs, ())):
        first, second = model(inputs, weights), model(other, weights)
        plain = gradients(model, first.loss, second.loss)
        checkpointing(model, style)
        # two passes before one backward, as preference losses have: each must be recomputed with its own layout
        again = [model(inputs, weights), model(other, weights)]
        assert torch.equal(again[0].layout.image, first.layout.image)
        for key, gradient in gradients(model, *(out.loss for out in again)).items():
            torch.testing.assert_close(gradient, plain[key], rtol=1e-6, atol=1e-9, msg=key)
