"""What holds for every backbone of ours, found by listing the folder: sizes, gradients, refusals, checkpoints."""

from copy import deepcopy
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import vlm
from vlm.models.backbone import BackboneEncoder
from vlm.models.encoder import unread
from vlm.models.errors import ModelError

# A variant of each and settings that make it tiny.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "biformer": ("tiny", {"dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1), "head_dim": 4}),
    "dependencyvit": ("tiny", {"dim": 24, "heads": 3, "depth": 3, "size": 64}),
    "dynamic_perceiver": (
        "reg400m",
        {"depths": (1, 1, 1, 1), "widths": (8, 16, 24, 32), "factors": (1, 1, 1, 1)},
    ),
    "lightnet": ("tiny", {"dim": 24, "heads": 3, "depth": 3}),
    "litv2": ("s", {"embed": 8, "depths": (1, 1, 1, 1), "heads": (1, 2, 4, 8)}),
    "metaspikeformer": ("15m", {"dims": (8, 16, 32, 48), "depths": (1, 1), "heads": 4}),
    "moh": (
        "base_75",
        {
            "dims": (12, 24, 48, 96),
            "depths": (1, 1, 2, 1),
            "head_dim": 6,
            "shared": (2, 1, 2, 3),
            "routed": (0, 1, 3, 4),
        },
    ),
    "nat": ("dinat_mini", {"embed": 16, "depths": (2, 1, 2, 1), "heads": (1, 2, 4, 8)}),
    "overlock": ("xt", {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "focus": (2, 1), "heads": (2, 2)}),
    "sparsifiner": ("s", {"dim": 24, "heads": 3, "depth": 3, "size": 64}),
    "transnext": ("micro", {"dims": (12, 24, 48, 96), "depths": (1, 1, 1, 1), "head_dim": 6}),
    "vsa": (
        "s",
        {
            "embed": (4, 4, 8, 8),
            "dims": (8, 16, 32, 64),
            "depths": (1, 1, 1, 1),
            "heads": (1, 2, 4, 8),
            "reduction_heads": (1, 1, 2, 4),
            "groups": (1, 2, 4, 8),
            "reduction_groups": (1, 2, 2, 4),
        },
    ),
}
ONE_SIZE = {"dependencyvit", "sparsifiner"}  # their weights know every place of a grid
BACKBONES = Path(vlm.__file__).parent / "models/backbones"


def found() -> dict[str, type[BackboneEncoder]]:
    """Recipe name -> class of every backbone of ours."""
    kinds = {}
    for file in sorted(BACKBONES.glob("[!_]*.py")):
        if "BackboneEncoder" in file.read_text(encoding="utf-8"):
            module = import_module(f"vlm.models.backbones.{file.stem}")
            (kinds[file.stem],) = [
                kind
                for kind in vars(module).values()
                if isinstance(kind, type) and issubclass(kind, BackboneEncoder) and kind is not BackboneEncoder
            ]
    return kinds


KINDS = found()
every = pytest.mark.parametrize("name", KINDS)


@cache
def _made(name: str, layer: int, image: int) -> Any:
    torch.manual_seed(0)
    variant, config = TINY[name]
    return KINDS[name](variant, layer=layer, image=image, config=config)


def make(name: str, layer: int = -2, image: int = 64) -> Any:
    """A tiny encoder with random weights, always the same ones."""
    return deepcopy(_made(name, layer, image))


def whole(name: str) -> Any:
    """The network with its head and other weights."""
    torch.manual_seed(1)
    variant, config = TINY[name]
    return KINDS[name].whole(variant, **config)


def test_every_backbone_of_ours_is_here():
    assert set(KINDS) == set(TINY)


@every
def test_what_it_says_of_itself(name):
    kind = KINDS[name]
    assert kind.__name__.lower() == name.replace("_", "")
    assert vars(kind)["source"] and vars(kind)["verified"] and kind.variants
    encoder = make(name)
    assert encoder.blind or encoder.blocks
    assert encoder.options() == {"weights": None} | {
        key: value for key, value in encoder.made_with.items() if key != "weights"
    }


@every
@torch.no_grad()
def test_every_layer_gives_its_grid(name):
    depth = make(name).depth
    for layer in {0, depth - 2, depth - 1}:
        encoder = make(name, layer - depth).eval()
        features = encoder(torch.randn(2, 3, 64, 64))
        assert (encoder.output, features.grid) == (layer, encoder.grid)
        assert features.tokens.shape == (2, encoder.grid[0] * encoder.grid[1], encoder.dim)
        assert features.tokens.isfinite().all()


@every
@torch.no_grad()
def test_features_are_the_map_of_the_network_in_raster_order(name):
    network = whole(name).eval()
    encoder = make(name, -1).eval()
    encoder.model.load_state_dict(network.state_dict(), strict=False)
    images = torch.randn(1, 3, 64, 64)
    *_, last = network.maps(images)
    last = last[1] if isinstance(last, tuple) else last
    tokens = torch.stack([last[:, :, row, col] for row in range(last.shape[2]) for col in range(last.shape[3])], 1)
    if encoder.normalized == "all":
        tokens = (tokens - tokens.mean(2, keepdim=True)) / (tokens.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(encoder(images).tokens, tokens, rtol=1e-4, atol=1e-4)


@every
@torch.no_grad()
def test_another_size_and_shape(name):
    if name in ONE_SIZE:
        pytest.skip("its weights are for one grid")
    encoder = make(name).eval()
    picture = torch.randn(2, 3, 96, 160)
    features = encoder(picture)
    rows, cols = features.grid
    assert features.tokens.shape == (2, rows * cols, encoder.dim) and rows < cols
    torch.testing.assert_close(encoder(picture[1:]).tokens, features.tokens[1:], rtol=1e-4, atol=1e-4)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_every_weight_that_is_read(name, dtype):
    encoder = make(name).to(dtype)
    idle = set(unread(encoder))
    tokens = encoder(torch.randn(2, 3, 64, 64, dtype=dtype)).tokens
    assert tokens.dtype == dtype
    (tokens * torch.randn_like(tokens)).sum().backward()
    gradients = {key: parameter.grad for key, parameter in encoder.named_parameters()}
    assert {key for key, gradient in gradients.items() if gradient is None} == idle
    assert all(gradient.isfinite().all() for gradient in gradients.values() if gradient is not None)
    assert len(idle) < len(gradients)


@every
def test_what_comes_after_the_layer_is_gone(name):
    count = [sum(p.numel() for p in make(name, layer).parameters()) for layer in (-make(name).depth, -1)]
    assert count[0] < count[1] < sum(p.numel() for p in whole(name).parameters())


@every
def test_an_image_that_is_too_small(name):
    encoder = make(name)
    side = encoder.smallest - encoder.multiple
    with pytest.raises(ModelError, match=rf"^model.vision: \w+: expected images .* found {side} x 64"):
        encoder(torch.zeros(1, 3, side, 64))


@every
def test_names_that_are_not_there(name):
    kind, variant = KINDS[name], TINY[name][0]
    with pytest.raises(ModelError, match=rf"^model.vision.variant: \w+ has no '{variant}x'; similar: .*{variant}"):
        kind(variant + "x")
    with pytest.raises(ModelError, match=r"^model.vision.config: \w+ has no 'clases'; similar: classes"):
        kind(variant, config={"clases": 3})
    depth = make(name).depth
    for layer in (depth, -depth - 1):
        with pytest.raises(ModelError, match=rf"has layers -{depth}..{depth - 1}; found layer {layer}"):
            make(name, layer)


@every
@torch.no_grad()
def test_published_weights_are_loaded_whole_or_not_at_all(name, tmp_path):
    variant, config = TINY[name]
    network = whole(name).eval()
    state = {key: value.clone().contiguous() for key, value in network.state_dict().items()}
    heads = tuple(f"{head}." for head in KINDS[name].heads)
    body = {key: value for key, value in state.items() if not key.startswith(heads)}
    save_file(body, tmp_path / "headless.safetensors")
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, tmp_path / "whole.pth")
    images = torch.randn(1, 3, 64, 64)
    loaded = [
        KINDS[name](variant, str(tmp_path / file), -1, 64, config).eval()
        for file in ("headless.safetensors", "whole.pth")
    ]
    assert torch.equal(loaded[0](images).tokens, loaded[1](images).tokens)
    assert not torch.equal(loaded[0](images).tokens, make(name, -1).eval()(images).tokens)
    first = next(key for key in body if body[key].ndim > 1)
    others = {
        f"1 missing: {first}": {key: value for key, value in body.items() if key != first},
        "1 unexpected: something.else": body | {"something.else": torch.zeros(1)},
        f"1 of another shape: {first}": body
        | {first: body[first][:1].repeat(len(body[first]) + 1, *[1] * (body[first].ndim - 1))},
    }
    for message, content in others.items():
        save_file(content, tmp_path / "other.safetensors")
        with pytest.raises(ModelError, match=rf"^model.vision.weights: .*; {message}"):
            KINDS[name](variant, str(tmp_path / "other.safetensors"), -1, 64, config)


def test_a_file_that_holds_no_weights(tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pth")
    for file, reason in (
        ("text.pth", "cannot be read: neither"),
        ("list.pth", "expected tensors by name"),
        ("none.safetensors", "cannot be read"),
    ):
        with pytest.raises(ModelError, match=rf"^model.vision.weights: .*{file}:? {reason}") as error:
            KINDS["nat"]("nat_mini", str(tmp_path / file))
        assert "\n" not in str(error.value)


def test_weights_that_do_not_fit_leave_the_network_as_it_was():
    from vlm.models.backbone import load_weights

    network = whole("litv2")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(ModelError):
        load_weights(network, "nowhere.pth")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
