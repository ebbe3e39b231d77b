"""Folders of our own: what is written is read back equal, and a folder that does not fit is refused whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoModelForCausalLM, CLIPImageProcessor, CLIPVisionConfig, PreTrainedTokenizerFast

from vlm.models.backbones.conv_vit import ConvVit
from vlm.models.backbones.fused import Fused
from vlm.models.backbones.huggingface import HuggingFace
from vlm.models.backbones.multilane import Multilane
from vlm.models.backbones.timm import Timm
from vlm.models.connectors.linear import Linear
from vlm.models.connectors.mlp import Mlp
from vlm.models.connectors.resampler import Resampler
from vlm.models.errors import ModelError
from vlm.models.language import build_language
from vlm.models.saved import load_composed, load_weights, save_composed
from vlm.models.vision_language import VisionLanguageModel

LLAMA: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def compose(vision: Any, make_connector: Any = Linear, kind: str = "llama", max_tiles: int = 0, **language: Any) -> Any:
    torch.manual_seed(0)
    options = {"model_type": kind, **LLAMA, "num_key_value_heads": 2, "head_dim": 8, **language}
    return VisionLanguageModel(vision, make_connector(vision.dim, 32), build_language(options, 40), max_tiles).eval()


def same(a: Any, b: Any, inputs: Any) -> bool:
    with torch.no_grad():
        return torch.equal(a.logits(a(inputs).hidden), b.logits(b(inputs).hidden))


@pytest.fixture
def clip(tmp_path: Path) -> str:
    config = CLIPVisionConfig(**LLAMA, image_size=48, patch_size=8)
    AutoModel.from_config(config).save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"height": 48, "width": 48}, do_center_crop=False).save_pretrained(tmp_path / "clip")
    return str(tmp_path / "clip")


def encoders(clip: str) -> dict[str, Any]:
    return {
        "conv_vit": lambda: ConvVit(48, dim=16, depth=1, heads=2, class_token=True),
        "timm": lambda: Timm("vit_tiny_patch16_224", layer=-3, image=48),
        "huggingface": lambda: HuggingFace(clip),
        "multilane": lambda: Multilane(ConvVit(48, dim=8, depth=2, heads=2, class_token=True), 3, 2, 1),
        "fused": lambda: Fused([HuggingFace(clip, layer=-1), ConvVit(48, dim=8, depth=1, heads=2)], score_from=1),
    }


@pytest.mark.parametrize("name", ["conv_vit", "timm", "huggingface", "fused", "multilane"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_read_is_what_was_written(batch, clip, tmp_path, name, tied):
    vision = encoders(clip)[name]()
    model = compose(vision, kind="qwen3" if tied else "llama", max_tiles=2, tie_word_embeddings=tied)
    with torch.no_grad():
        for parameter in model.parameters():  # not what any constructor would draw or load
            parameter.add_(torch.randn_like(parameter) * 0.1)
    inputs = batch("t#t", "#tt#")
    inputs = inputs._replace(images=inputs.images.float())
    save_composed(model, tmp_path / "saved", recipe="name: ünïcode\n")
    Path(clip).rename(tmp_path / "gone")  # nothing is loaded from where the parts came from
    found = load_composed(tmp_path / "saved")
    assert found.recipe == "name: ünïcode\n" and found.tokenizer is None
    assert found.model.max_tiles == 2 and found.model.vision.image == model.vision.image
    assert found.model.vision_facts == model.vision_facts
    own, other = model.state_dict(), found.model.state_dict()
    assert list(own) == list(other) and all(torch.equal(own[key], other[key]) for key in own)
    assert same(model, found.model, inputs) and not found.model.training
    language: Any = found.model.language
    head, embeddings = language.get_output_embeddings(), language.get_input_embeddings()
    assert (head.weight is embeddings.weight) == tied


@pytest.mark.parametrize(
    "make", [lambda v, d: Mlp(v, d, 3, shuffle=2), lambda v, d: Resampler(v, d, queries=4, heads=2, positions=True)]
)
def test_connectors_with_options(batch, tmp_path, make):
    model = compose(ConvVit(48, dim=16, depth=1, heads=2), make)
    save_composed(model, tmp_path / "saved")
    inputs = batch("t#t")
    assert same(model, load_composed(tmp_path / "saved").model, inputs._replace(images=inputs.images.float()))


def test_the_file_is_plain_safetensors_with_our_keys_and_types(tmp_path):
    model = compose(ConvVit(48, dim=16, depth=1, heads=2)).bfloat16()
    model.connector.float()
    save_composed(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == model.state_dict().keys()
    found = load_composed(tmp_path).model
    assert [p.dtype for p in found.parameters()] == [p.dtype for p in model.parameters()]
    assert found.connector.layer.weight.dtype == torch.float32


def test_large_weights_are_split_and_read_back(tmp_path, monkeypatch):
    import vlm.models.saved as module

    write = module.save_torch_state_dict
    monkeypatch.setattr(module, "save_torch_state_dict", lambda state, to: write(state, to, max_shard_size="20KB"))
    model = compose(ConvVit(48, dim=16, depth=1, heads=2))
    save_composed(model, tmp_path / "a")
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 1
    found = load_composed(tmp_path / "a").model.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in model.state_dict().items())


def test_the_tokenizer_comes_along(tmp_path):
    plain = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, "a": 2, "b": 3}, "<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", unk_token="<unk>")
    save_composed(compose(ConvVit(48, dim=16, depth=1, heads=2)), tmp_path, tokenizer=tokenizer)
    found = load_composed(tmp_path).tokenizer
    assert found is not None and found("b a")["input_ids"] == [3, 2] and found.eos_token_id == 0


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path):
    model = compose(ConvVit(48, dim=16, depth=1, heads=2))
    save_composed(model, tmp_path / "a", recipe="one")
    (tmp_path / "a" / "old").touch()
    save_composed(model, tmp_path / "a", recipe="two")
    assert load_composed(tmp_path / "a").recipe == "two"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "config.json", "model.safetensors"]


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match=r"holds something else; expected an empty folder or a saved composed model"):
        save_composed(compose(ConvVit(48, dim=16, depth=1, heads=2)), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_part_that_no_recipe_can_name_is_refused(tmp_path):
    class Strange(Linear):
        pass

    with pytest.raises(ModelError, match="Strange is no connector part that a recipe can name"):
        save_composed(compose(ConvVit(48, dim=16, depth=1, heads=2), Strange), tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_composed(compose(ConvVit(48, dim=16, depth=1, heads=2)), tmp_path / "saved")
    return tmp_path / "saved"


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["connector.layer.bias"], tensors["language.model.norm.weight"]
    tensors["connector.layer.weight"] = torch.zeros(32, 5)
    tensors["vision.extra"] = torch.zeros(1)


def test_wrong_keys_are_listed_and_nothing_is_loaded(saved):
    rewrite(saved, spoil)
    model = compose(ConvVit(48, dim=16, depth=1, heads=2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for load in (lambda: load_composed(saved), lambda: load_weights(model, saved)):
        with pytest.raises(ModelError) as error:
            load()
        assert str(error.value) == (
            f"load: the weights in {saved} do not fit the model; "
            "2 missing: connector.layer.bias, language.model.norm.weight; 1 unexpected: vision.extra; "
            "1 of another shape: connector.layer.weight (expected (32, 16), found (32, 5))"
        )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_many_wrong_keys_are_counted(saved):
    rewrite(saved, lambda tensors: tensors.update({f"more.{n}": torch.zeros(1) for n in range(11)}))
    with pytest.raises(ModelError, match=r"11 unexpected: more\.0, .* and 3 more$"):
        load_composed(saved)


def test_weights_enter_a_model_in_its_own_types(saved):
    model = compose(ConvVit(48, dim=16, depth=1, heads=2)).double()
    with torch.no_grad():
        model.connector.layer.weight.zero_()
    load_weights(model, saved)
    assert model.connector.layer.weight.dtype == torch.float64 and model.connector.layer.weight.any()


def edit(folder: Path, **change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava"}, "expected a saved composed model, of type 'vlm_composed'; found 'llava'"),
        ({"vision": None}, "expected parts vision, connector and language; found no vision"),
        ({"vision": {"use": "os.path"}}, "vision 'os.path' is none of ours and of no installed package"),
        ({"connector": {"use": "linear", "width": 3}}, "connector linear has options .*; found 'width'"),
        ({"language": {"model_type": "lama"}}, "cannot build 'lama'"),
    ],
)
def test_a_config_that_says_something_else(saved, change, message):
    edit(saved, **change)
    with pytest.raises(ModelError, match=message):
        load_composed(saved)


@pytest.mark.parametrize("damage", ["gone", "short", "no config"])
def test_damaged_folders(saved, damage):
    weights = saved / "model.safetensors"
    if damage == "gone":
        weights.unlink()
    elif damage == "short":
        weights.write_bytes(weights.read_bytes()[:-7])
    else:
        (saved / "config.json").unlink()
    with pytest.raises(ModelError, match=r"cannot be read" if damage != "no config" else r"found no such folder"):
        load_composed(saved)


def test_stock_transformers_says_that_it_is_not_its_own(saved):
    with pytest.raises(ValueError, match="vlm_composed"):
        AutoModelForCausalLM.from_pretrained(saved)
