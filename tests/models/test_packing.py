"""Packs of composed models: equal to samples alone, with pruning, tiles and sliding windows; and what is refused.

The families of checkpoints run the same comparison in ``tests/models/families``.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModel

from vlm.models.backbones.conv_vit import ConvVit
from vlm.models.connectors.mlp import Mlp
from vlm.models.errors import ModelError
from vlm.models.language import build_language
from vlm.models.pack import check_packs, lengths_of, pack_mask, pack_rows, packed_attention
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.layout import Layout
from vlm.models.pruners.divprune import Divprune
from vlm.models.pruners.fastv import Fastv
from vlm.models.pruners.random import Random
from vlm.models.vision_language import Inputs, VisionLanguageModel

ROWS = ("tt#ttt", "t", "#tttt#t", "tttttttttttt", "t#")
PACK = torch.tensor([0, 0, 0, 1, 1])
HALF = Budget.parse("50%")


def weights_of(inputs):
    numbers = torch.arange(inputs.tokens.numel()).view_as(inputs.tokens)
    weights = (1.0 + numbers % 3) * (inputs.valid & (inputs.tokens >= 0))
    weights[:, 0] = 0.0
    return weights


def compare(model, inputs, alone, tolerance=1e-11):
    """Packed hidden states, losses and gradients against every sample by itself."""
    weights = weights_of(inputs)
    packed = model(inputs._replace(pack=PACK), weights)
    packed.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    total = weight = 0.0
    for row in range(len(ROWS)):
        one = alone(inputs, row)
        out = model(one, weights[row : row + 1, : one.tokens.shape[1]])
        out.loss.backward()
        mine = packed.layout.sample == row
        torch.testing.assert_close(packed.hidden[mine], out.hidden[out.layout.valid], rtol=0, atol=tolerance)
        for field in ("role", "row", "col", "position", "source"):
            assert torch.equal(getattr(packed.layout, field)[mine], getattr(out.layout, field)[out.layout.valid]), field
        total, weight = total + out.loss.item(), weight + out.weight.item()
    assert packed.weight.item() == weight
    assert abs(packed.loss.item() - total) < 1e-4 * total  # losses are added up in single precision
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-4, msg=name)
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("each", [False, True], ids=["mask", "each sample"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "olmo2"])
def test_packed_is_alone_for_every_language_model(make_model, batch, alone, kind, each):
    model = make_model(kind)
    with packed_attention(model) if each else nullcontext():
        compare(model, batch(*ROWS), alone)
    assert model.language.config._attn_implementation == "sdpa"


def test_each_sample_by_itself_needs_no_mask(make_model, batch, monkeypatch):
    """And a decoder whose layers keep their keyword arguments to themselves is refused, not run without a mask."""
    model, inputs = make_model(), batch(*ROWS)._replace(pack=PACK)
    monkeypatch.setattr("vlm.models.base.pack_mask", None)
    with packed_attention(model):
        model(inputs)
        monkeypatch.setattr("vlm.models.base.LENGTHS", "lost")
        with pytest.raises(ModelError, match="its layers must hand their keyword arguments to attention"):
            model(inputs)


def test_other_passes_meanwhile_are_as_ever(make_model, batch):
    """An evaluation in the middle of training on packs: padded rows, and a program inside the decoder."""
    model, inputs = make_model(), batch(*ROWS)
    fastv = Fastv(HALF, 2).program(model.facts)
    with torch.no_grad():
        plain, cut = model(inputs).hidden, None
        with attach(model, fastv):
            cut = model(inputs).hidden
        with packed_attention(model):
            assert torch.equal(model(inputs).hidden, plain)
            with attach(model, fastv):
                assert torch.equal(model(inputs).hidden, cut)
            assert model.language.config._attn_implementation == "vlm_packed"


def test_a_window_shorter_than_a_sample_keeps_the_mask():
    sample, zero = torch.tensor([[0, 0, 0, 1, -1, -1]]), torch.zeros(1, 6, dtype=torch.long)
    layout = Layout(zero, zero, zero, zero, zero, sample, zero)
    for window, expected in ((None, [[3, 1, 2]]), (3, [[3, 1, 2]]), (2, None)):
        config = SimpleNamespace(_attn_implementation="vlm_packed", sliding_window=window)
        assert lengths_of(layout, config) == expected
    assert lengths_of(layout._replace(block=zero), config) is None
    assert lengths_of(layout, SimpleNamespace(_attn_implementation="sdpa")) is None


def test_a_sliding_window_counts_within_the_sample(batch, alone):
    torch.manual_seed(0)
    vision = ConvVit(48, dim=16, depth=1, heads=2)
    for kind, more in (("mistral", {}), ("qwen2", {"use_sliding_window": True, "max_window_layers": 1})):
        config = {"model_type": kind, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5, "initializer_range": 0.25}
        language = build_language(config | more, 40)
        compare(VisionLanguageModel(vision, Mlp(16, 32), language).double().eval(), batch(*ROWS), alone)


def test_packed_is_alone_under_eager_attention(make_model, batch, alone):
    model = make_model()
    model.language.set_attn_implementation("eager")
    compare(model, batch(*ROWS), alone, tolerance=1e-5)  # its softmax is in single precision


@pytest.mark.parametrize("method", [Random(keep=HALF), Divprune(HALF), Divprune(HALF, position="keep")])
def test_pruning_before_the_decoder_packs_what_is_left(make_model, batch, alone, method):
    model = make_model()
    with attach(model, method.program(model.facts)):
        compare(model, batch(*ROWS), alone)
        packed = model(batch(*ROWS)._replace(pack=PACK)).layout
    assert int(packed.visual.sum()) == 4 * round(36 / 2)  # four images of 6 x 6


def test_tiled_images_pack(alone):
    torch.manual_seed(0)
    vision = ConvVit(48, dim=16, depth=1, heads=2)
    options = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    language = build_language(options | {"num_attention_heads": 4, "initializer_range": 0.25}, 40)
    model = VisionLanguageModel(vision, Mlp(16, 32), language, max_tiles=2).double().eval()
    tokens = torch.tensor([[1, -1, 2, 3], [-1, 4, 5, 0]])
    valid = torch.tensor([[True] * 4, [True] * 3 + [False]])
    images = torch.randn(4, 3, 48, 48, dtype=torch.float64)
    tiles = torch.tensor([[1, 2, 40, 80], [0, 0, 30, 30]])
    owner = torch.tensor([0, 1])
    packed = model(Inputs(tokens, valid, images, owner, (), tiles, torch.tensor([0, 0])))
    for row, views in enumerate((slice(0, 3), slice(3, 4))):
        words = tokens[row : row + 1][:, valid[row]]
        shown = (images[views], torch.tensor([0]), (), tiles[row : row + 1])
        out = model(Inputs(words, torch.ones_like(words, dtype=torch.bool), *shown))
        torch.testing.assert_close(packed.hidden[packed.layout.sample == row], out.hidden[0], rtol=0, atol=1e-11)


@pytest.mark.parametrize("each", [False, True], ids=["mask", "each sample"])
def test_a_neighbour_changes_not_one_bit(make_model, batch, each):
    """Another token, and another picture, in the first sample."""
    model, inputs = make_model(), batch(*ROWS)
    with torch.no_grad(), packed_attention(model) if each else nullcontext():
        plain = model(inputs._replace(pack=PACK))
        tokens, images = inputs.tokens.clone(), inputs.images.clone()
        tokens[0, 0] = (tokens[0, 0] + 1) % 40
        images[0] += 1.0
        other = model(inputs._replace(tokens=tokens, images=images, pack=PACK))
    first = plain.layout.sample == 0
    assert torch.equal(other.hidden[~first], plain.hidden[~first])
    assert not torch.isclose(other.hidden[first], plain.hidden[first]).all()


def test_no_gradient_flows_to_a_neighbour(make_model, batch):
    model, inputs = make_model(), batch("ttt", "ttttt", "tt")
    seen = []
    handle = model.decoder.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0].requires_grad_().retain_grad() or args[0]), with_kwargs=True
    )
    out = model(inputs._replace(pack=torch.tensor([0, 0, 0])))
    handle.remove()
    out.hidden[out.layout.sample == 1].sum().backward()
    reached = seen[0].grad.abs().sum(-1) > 0
    assert torch.equal(reached, out.layout.sample == 1)


@pytest.mark.parametrize("each", [False, True], ids=["mask", "each sample"])
@pytest.mark.parametrize("style", ["forward", "hooks too"])
def test_recomputed_layers_are_the_same(make_model, batch, checkpointing, style, each):
    model, inputs = make_model(), batch(*ROWS)
    weights = weights_of(inputs)
    model(inputs._replace(pack=PACK), weights).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    checkpointing(model.train(), style)
    with packed_attention(model) if each else nullcontext():
        model(inputs._replace(pack=PACK), weights).loss.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[name], rtol=0, atol=1e-9)


def test_the_mask_by_definition():
    sample = torch.tensor([[0, 0, 1, 1, 1, -1]])
    zero = torch.zeros_like(sample)
    block = torch.tensor([[-1, -1, -1, 0, 0, -1]])
    layout = Layout(zero, zero, zero, zero, zero, sample, zero, None, block)

    class Config:
        _attn_implementation, sliding_window = "sdpa", None

    expected = [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0]]
    found = pack_mask(layout, Config, torch.zeros(1))
    assert found.shape == (1, 1, 6, 6)
    assert torch.equal(found[0, 0], torch.tensor([*expected, [0, 0, 0, 0, 0, 1]]).bool())


def test_a_program_inside_the_decoder_is_refused(make_model, batch):
    model = make_model()
    with (
        attach(model, Fastv(HALF, 2).program(model.facts)),
        pytest.raises(ModelError, match="pack: a program that acts inside the language model reads one sample per row"),
    ):
        model(batch(*ROWS)._replace(pack=PACK))


@pytest.mark.parametrize("pack", [[0, 0, 2, 2, 2], [1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 0]])
def test_numbers_that_name_no_packs_are_refused(make_model, batch, pack):
    with pytest.raises(ModelError, match="pack: expected numbers from 0 up, one per row of 5; found"):
        make_model()(batch(*ROWS)._replace(pack=torch.tensor(pack)))


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}, "linear_attention"),
        ({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}, "layers without self_attn"),
        ({"model_type": "opt", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}, "found"),
    ],
)
def test_decoders_that_would_mix_samples_are_refused(config, found):
    with pytest.raises(ModelError, match=f"^pack: .*{found}"):
        check_packs(AutoModel.from_config(AutoConfig.for_model(**config)))


def test_attention_that_takes_no_mask_of_ours_is_refused(make_model):
    decoder = make_model().decoder
    decoder.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="expected sdpa or eager attention"):
        check_packs(decoder)


def test_rows_padded_on_the_left_pack_as_well(batch):
    left, right = batch("ttt", "t", side="left"), batch("ttt", "t")
    for inputs in (left, right):
        role = inputs.valid.long()
        place = torch.arange(3).expand(2, 3)
        zero = torch.zeros_like(place)
        sample = torch.arange(2)[:, None].expand(2, 3)
        layout = Layout(role, zero, zero, zero, zero, sample, place)
        embeds, packed = pack_rows(inputs.tokens[..., None].double(), layout, torch.tensor([0, 0]))
        assert embeds[0, :, 0].tolist() == inputs.tokens[inputs.valid].tolist()
        assert packed.sample.tolist() == [[0, 0, 0, 1]]
