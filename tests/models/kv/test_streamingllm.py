"""StreamingLLM holds the first and the last entries, in the prompt and as the text grows."""

import torch

from vlm.models.kv.streamingllm import Streamingllm
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget


def test_sinks_and_recent_at_every_step(make_model, batch, held):
    model, inputs = make_model(), batch("tt#ttt", "tttt")
    with torch.no_grad(), attach(model, Streamingllm(Budget.parse(10)).program(model.facts)):
        _, stream = model.prefill(inputs)
        for step in range(12):
            for layer in range(4):
                assert held(stream.run, layer, 0) == [[0, 1, 2, 3, *range(35 + step, 41 + step)]] * 2
                short = list(range(4 + step)) if step <= 6 else [0, 1, 2, 3, *range(step - 2, 4 + step)]
                assert held(stream.run, layer, 1) == [short] * 2
            model.step(stream, torch.tensor([1, 2]))


def test_the_prompt_alone(make_model, batch, held):
    model, inputs = make_model(), batch("tt#ttt")
    with torch.no_grad(), attach(model, Streamingllm(Budget.parse("25%"), steps=False).program(model.facts)):
        _, stream = model.prefill(inputs)
        assert held(stream.run, 0, 0) == [[0, 1, 2, 3, *range(35, 41)]] * 2
        for token in range(4):
            model.step(stream, torch.tensor([token]))
        assert held(stream.run, 0, 0) == [[0, 1, 2, 3, *range(35, 45)]] * 2


def test_a_small_budget_is_half_sinks_and_never_without_the_last_entry(make_model, batch, kept):
    model, inputs = make_model(), batch("tt#ttt")
    assert kept(model, inputs, Streamingllm(Budget.parse(5)))[0] == [[0, 1, 38, 39, 40]] * 2
    assert kept(model, inputs, Streamingllm(Budget.parse(2)))[0] == [[0, 40]] * 2
    assert kept(model, inputs, Streamingllm(Budget.parse(1)))[0] == [[40]] * 2
    assert kept(model, inputs, Streamingllm(Budget.parse(3), sinks=0))[0] == [[38, 39, 40]] * 2
