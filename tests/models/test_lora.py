"""Adapters: what they change, what they leave alone, and that merging them changes nothing."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlm.models.errors import ModelError
from vlm.models.lora import Lora, adapt, adapters, is_adapter, linear_layers, merge_adapters, merged
from vlm.models.pretrained import PretrainedInputs, PretrainedVlm
from vlm.models.roles import ROLES, split

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
LORA = Lora(rank=2, alpha=6.0)


@pytest.fixture
def composed(make_model: Any, batch: Any) -> tuple[Any, Any]:
    return make_model(blocks=2, class_token=True), batch("tt#ttt", "t#tt")


@pytest.fixture
def pretrained() -> tuple[Any, Any]:
    torch.manual_seed(0)
    vision, text = CLIPVisionConfig(**SIZES, image_size=16, patch_size=8), LlamaConfig(**SIZES, vocab_size=20)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=9, tie_word_embeddings=True)
    model = PretrainedVlm(LlavaForConditionalGeneration(config)).double().eval()
    tokens = torch.tensor([[1, 9, 9, 9, 9, 2, 3], [4, 9, 9, 9, 9, 5, 6]])
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    return model, PretrainedInputs(tokens, tokens >= 0, tokens == 9, {"pixel_values": pixels})


@pytest.fixture(params=["composed", "pretrained"])
def case(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return request.getfixturevalue(request.param)


@torch.no_grad()
def logits(model: Any, inputs: Any) -> torch.Tensor:
    return model.logits(model(inputs).hidden)


def train_like(model: Any, inputs: Any, role: str) -> None:
    """One backward pass of what a stage with lora on one part trains."""
    for name, part in model.parts.items():
        part.requires_grad_(False)
        for _, parameter in adapters(part):
            parameter.requires_grad_(name == role)
    weights = (inputs.tokens >= 0).double() * inputs.valid
    model.train()(inputs, weights).loss.backward()
    model.eval()


@pytest.mark.parametrize("role", ROLES)
def test_a_fresh_adapter_changes_nothing_and_gradients_touch_adapters_alone(case: Any, role: str) -> None:
    model, inputs = case
    before, plain = logits(model, inputs), {name for name, _ in model.named_parameters()}
    adapt(model.parts[role], role, LORA._replace(dropout=0.5), model.head)
    assert torch.equal(logits(model, inputs), before)
    assert not any(module.training for module in model.modules())  # as it was
    new = {name for name, _ in model.named_parameters() if is_adapter(name)}
    assert new == {name for name, _ in adapters(model.parts[role])} and new
    assert {n.replace(".base_layer", "") for n, _ in model.named_parameters() if n not in new} == plain
    train_like(model, inputs, role)
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    assert touched == new
    # B is zero at first, so the gradient of A is; B's is not
    assert all(float(p.grad.abs().sum()) > 0 for name, p in model.named_parameters() if ".lora_B." in name)


def test_merging_adapters_changes_no_logits_and_gives_the_bare_names_back(case: Any) -> None:
    model, inputs = case
    names, before = list(model.state_dict()), logits(model, inputs)
    for role in ROLES:
        adapt(model.parts[role], role, LORA, model.head)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            nn.init.normal_(parameter, std=0.3)
    adapted = logits(model, inputs)
    assert (adapted - before).abs().max() > 0.01
    copied = merged(model)
    assert any(map(is_adapter, dict(model.named_parameters())))  # the model itself keeps its own
    torch.testing.assert_close(logits(copied, inputs), adapted, rtol=0, atol=1e-5)  # norms are in float32
    assert list(copied.state_dict()) == names
    assert merged(copied) is copied
    merge_adapters(model)
    torch.testing.assert_close(logits(model, inputs), adapted, rtol=0, atol=1e-5)


def test_it_is_w_plus_alpha_over_rank_times_ba() -> None:
    root = nn.ModuleDict({"language": nn.Sequential(nn.Linear(5, 4))}).double()
    part = split(root, {"language": ("language",)})["language"]
    w = root["language"][0].weight.detach().clone()  # type: ignore[index]
    adapt(part, "language", LORA, None)
    layer: Any = root["language"][0]  # type: ignore[index]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (a.shape, b.shape, bool((b == 0).all())) == ((2, 5), (4, 2), True)
    nn.init.normal_(b)
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x) - layer.base_layer.bias, x @ (w + 3.0 * b @ a).T)


def test_the_head_idle_blocks_and_torchs_own_attention_get_no_adapter(pretrained: Any) -> None:
    model, _ = pretrained
    language = linear_layers(model.parts["language"], model.head)
    assert len(language) == 3 * 7 and not any("lm_head" in name for name in language)
    # LLaVA takes the features of the last but one block: two of three are read
    assert len(linear_layers(model.parts["vision"], model.head)) == 2 * 6
    root = nn.ModuleDict({"vision": nn.TransformerEncoderLayer(8, 2, 8)})
    names = linear_layers(split(root, {"vision": ("vision",)})["vision"], None)
    assert names == ["vision.linear1", "vision.linear2"]


def test_a_part_without_linear_layers_is_refused(pretrained: Any) -> None:
    root = nn.ModuleDict({"connector": nn.LayerNorm(4)})
    with pytest.raises(ModelError, match=r"^train.connector.lora: expected a part with linear layers .* has none$"):
        adapt(split(root, {"connector": ("connector",)})["connector"], "connector", LORA, None)


def test_adapters_of_a_model_in_half_precision_are_in_float32(pretrained: Any) -> None:
    model, inputs = pretrained
    model = model.to(torch.bfloat16)
    adapt(model.parts["language"], "language", LORA, model.head)
    assert {p.dtype for _, p in adapters(model.parts["language"])} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if not is_adapter(n)} == {torch.bfloat16}
    assert logits(model, inputs).isfinite().all()


def test_adapters_of_several_parts_may_have_several_ranks(composed: Any) -> None:
    model, inputs = composed
    adapt(model.parts["connector"], "connector", Lora(1, 1.0), model.head)
    adapt(model.parts["language"], "language", Lora(3, 1.0), model.head)
    for role, rank in (("connector", 1), ("language", 3)):
        assert {p.shape[0] for n, p in adapters(model.parts[role]) if ".lora_A." in n} == {rank}
    train_like(model, inputs, "connector")
    assert all(p.grad is not None for _, p in adapters(model.parts["connector"]))
    assert all(p.grad is None for _, p in adapters(model.parts["language"]))
