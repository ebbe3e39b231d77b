"""The composed model against stock Transformers run by hand, row by row."""

import math

import pytest
import torch

from vlm.models.backbones.timm import Timm
from vlm.models.connectors.mlp import Mlp
from vlm.models.vision_language import VisionLanguageModel

KINDS = ["llama", "qwen2", "qwen3", "mistral"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_equals_stock_transformers_on_the_spliced_row(make_model, batch, spliced, kind, kv_heads):
    model, inputs = make_model(kind, kv_heads=kv_heads), batch("tt#ttt", "t", "#t##tt", side="left")
    out = model(inputs)
    for b in range(3):
        x, image_of, _ = spliced(model, inputs, b)
        stock = model.language(inputs_embeds=x[None]).logits[0]
        mine = model.logits(out.hidden[b][out.layout.valid[b]])
        torch.testing.assert_close(mine, stock, rtol=0, atol=1e-9)
        assert torch.equal(out.layout.visual[b][out.layout.valid[b]], image_of >= 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_by_hand_is_the_stock_decoder(make_model, by_hand, kind):
    model, x = make_model(kind), torch.randn(7, 32, dtype=torch.float64)
    torch.testing.assert_close(by_hand(model, x), model.language(inputs_embeds=x[None]).logits[0], rtol=0, atol=1e-9)


def test_loss_is_the_weighted_cross_entropy(make_model, batch, spliced):
    model, inputs = make_model(), batch("tt#ttt", "tttt", "#t#ttt")
    weights = torch.rand(3, 6) * (inputs.tokens >= 0) * inputs.valid
    weights[0, 1] = 0.0
    out = model(inputs, weights)
    expected = torch.zeros((), dtype=torch.float64)
    for b in range(3):
        x, _, token_of = spliced(model, inputs, b)
        log_p = model.language(inputs_embeds=x[None]).logits[0].log_softmax(-1)
        text = [weights[b, t].item() for t in range(6) if inputs.valid[b, t] and inputs.tokens[b, t] >= 0]
        places = [n for n, token in enumerate(token_of) if token >= 0]
        for n, weight in zip(places, text, strict=True):
            if n > 0:  # nothing predicts the first token
                expected = expected - weight * log_p[n - 1, token_of[n]]
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=0)
    # the first token of a row that begins with text is never predicted
    assert out.weight.item() == pytest.approx((weights.sum() - weights[0, 0] - weights[1, 0]).item(), rel=1e-6)


def test_a_supervised_token_right_after_the_image_is_predicted_by_its_last_token(make_model, batch, spliced):
    model, inputs = make_model(), batch("t#t")
    out = model(inputs, torch.tensor([[0.0, 0.0, 2.0]]))
    x, _, token_of = spliced(model, inputs)
    log_p = model.language(inputs_embeds=x[None]).logits[0].log_softmax(-1)
    torch.testing.assert_close(out.loss.double(), -2 * log_p[-2, token_of[-1]], rtol=1e-5, atol=0)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_loss_and_gradients_do_not_depend_on_padding_or_batch(make_model, batch, alone):
    model, inputs = make_model().train(), batch("tt#ttt", "tt", "#t#ttttt")
    weights = torch.rand(3, 8) * (inputs.tokens >= 0) * inputs.valid
    model(inputs, weights).loss.backward()
    together, loss = gradients(model), model(inputs, weights).loss
    model.zero_grad()
    parts = []
    for b in range(3):
        part = model(alone(inputs, b), weights[b][inputs.valid[b]][None]).loss
        part.backward()
        parts.append(part)
    torch.testing.assert_close(loss, torch.stack(parts).sum(), rtol=1e-5, atol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, together[name], rtol=1e-4, atol=1e-6, msg=name)


def test_text_only_batch_in_training_gives_zero_gradients_to_the_vision_path(make_model, batch):
    model, inputs = make_model().train(), batch("ttt", "tt")
    model(inputs, inputs.valid.float()).loss.backward()
    for part in (model.vision, model.connector):
        assert all(p.grad is not None and not p.grad.any() for p in part.parameters())
    assert all(p.grad is not None for p in model.language.parameters())


def test_text_only_batch_is_the_plain_language_model(make_model, batch):
    model, inputs = make_model(), batch("ttt", "tt")
    for mode in (model.train(), model.eval()):
        logits = mode.logits(mode(inputs).hidden)
        stock = model.language(input_ids=inputs.tokens, attention_mask=inputs.valid.long()).logits
        torch.testing.assert_close(logits[inputs.valid], stock[inputs.valid], rtol=0, atol=1e-9)


def test_a_batch_without_supervised_tokens_reaches_every_parameter(make_model, batch):
    # distributed training waits for the gradient of every parameter, the head's too
    model, inputs = make_model().train(), batch("t#t", "tt")
    out = model(inputs, torch.zeros(2, 3))
    out.loss.backward()
    assert out.loss == 0 and out.weight == 0
    assert {n for n, p in model.named_parameters() if p.grad is None} == set()
    assert all(not p.grad.any() for p in model.parameters())


def test_without_weights_there_is_no_loss(make_model, batch):
    out = make_model()(batch("t#t"))
    assert not out.loss.requires_grad
    assert out.loss == 0 and out.weight == 0


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_steps_equal_the_forward_without_cache(make_model, batch, spliced, by_hand, kind):
    model, inputs = make_model(kind), batch("tt#ttt", "t", "#t##tt")
    more = torch.randint(0, 40, (3, 4))
    with torch.no_grad():
        logits, stream = model.prefill(inputs)
        for step in range(5):
            for b in range(3):
                x, _, _ = spliced(model, inputs, b)
                x = torch.cat([x, model.language.get_input_embeddings()(more[b, :step])])
                torch.testing.assert_close(logits[b], by_hand(model, x)[-1], rtol=0, atol=1e-9)
            if step < 4:
                logits = model.step(stream, more[:, step])


def test_any_timm_model_and_a_folding_connector(make_model, batch):
    vision = Timm("vit_tiny_patch16_224", layer=-2)
    language = make_model().language.float()
    model = VisionLanguageModel(vision, Mlp(vision.dim, 32, shuffle=2), language).eval()
    assert model.visual_grid == (7, 7) and model.visual_tokens == 49
    inputs = batch("t#t", "#ttt", image=224)
    inputs = inputs._replace(images=inputs.images.float())
    out = model(inputs, (inputs.tokens >= 0).float())
    assert out.layout.visual.sum(1).tolist() == [49, 49]
    assert math.isfinite(out.loss.item())
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_logits_follow_the_scaling_and_cap_of_the_config(make_model):
    model, hidden = make_model(), torch.randn(3, 32, dtype=torch.float64)
    plain = model.language.lm_head(hidden)
    model.language.config.logits_scaling = 4.0
    torch.testing.assert_close(model.logits(hidden), plain / 4)
    model.language.config.logits_scaling = 1.0
    model.language.config.final_logit_softcapping = 2.0
    torch.testing.assert_close(model.logits(hidden), 2 * torch.tanh(plain / 2))
