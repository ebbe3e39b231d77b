"""What holds for every test: one thread, a fixed seed, no network, and tensor shapes checked at run time.

The shape check holds each call of ours against the jaxtyping annotations of its signature (a test process only; a
program that a test starts runs without). Shapes alone are checked: other annotations are the type checker's matter.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported; programs that tests start inherit all three
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import inspect
import json
import random
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import jaxtyping
import numpy
import pytest
import torch
from beartype import beartype

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined; on a GPU kernels run as compiled


def keep_kernels_as_written() -> None:
    """Triton reads the source of a kernel, so it must get the function itself and not one that checks shapes."""
    if find_spec("triton") is None:
        return
    import triton

    jit = triton.jit

    def jit_unwrapped(function: Callable | None = None, **options: Any) -> Any:
        if function is None:
            return lambda function: jit(inspect.unwrap(function), **options)
        return jit(inspect.unwrap(function), **options)

    triton.jit = jit_unwrapped


keep_kernels_as_written()


def names_a_shape(hint: Any) -> bool:
    """Whether an annotation is an array of jaxtyping, or holds one (`tuple[Float[...], ...]`, `Float[...] | None`)."""
    is_array = isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)
    return is_array or any(map(names_a_shape, get_args(hint)))


def check_shapes(function: Callable) -> Callable:
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if names_a_shape(hint)}
    return beartype(function)


# from here on: tests import our modules only after this file
jaxtyping.config.update("jaxtyping_remove_typechecker_stack", True)  # a failure shows our frames, not the checker's
jaxtyping.install_import_hook("vlm", f"{__name__}.check_shapes")


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def unchecked_shapes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test marked `bad_shape` breaks a shape on purpose, to see the function's own error and not the checker's."""
    if request.node.get_closest_marker("bad_shape"):
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What recipes fetch from elsewhere, made tiny: encoders and a language model as checkpoints, shards, benchmarks.

    The encoders have as many patches as the ones that they stand in for.
    """
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        SiglipVisionConfig,
    )

    from vlm.data.scenes.make import make

    folder = tmp_path_factory.mktemp("stand_ins")
    make(str(folder / "scenes"), train=60, test=12, seed=0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "patch_size": 4}
    configs = {
        "clip": CLIPVisionConfig(**small, num_hidden_layers=4, image_size=96),
        "siglip": SiglipVisionConfig(**small, num_hidden_layers=2, image_size=56, vision_use_head=False),
    }
    for name, config in configs.items():
        AutoModel.from_config(config).save_pretrained(folder / name)
        size = {"height": config.image_size, "width": config.image_size}
        CLIPImageProcessor(size=size, do_center_crop=False).save_pretrained(folder / name)
    tokenizer = AutoTokenizer.from_pretrained(folder / "scenes/tokenizer")
    tokenizer.save_pretrained(folder / "language")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 8, "num_attention_heads": 2}
    language = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=len(tokenizer)))
    language.save_pretrained(folder / "language")
    for kind in WHOLE:
        whole_stand_in(kind, folder)
    pair_stand_in(folder)
    return folder


def pair_stand_in(folder: Path) -> None:
    """Preference pairs in ``folder / "pairs"``: the answer to the first question of a scene, and that of another."""
    from dataclasses import replace

    from vlm.data.index import load_manifest
    from vlm.data.store import Store
    from vlm.data.write import write_shards

    samples = list(Store(load_manifest(folder / "scenes/train")))
    given = zip(samples, samples[7:] + samples[:7], strict=True)
    pairs = [
        replace(one, messages=one.messages[:2], rejected=(replace(other.messages[1], weight=1.0),))
        for one, other in given
        if one.messages[1].content != other.messages[1].content
    ]
    write_shards(pairs, folder / "pairs")


def start_stand_in(recipe: Any, folder: Path) -> list[str]:
    """Overrides that begin a recipe with a run of its model that has just begun, and its pairs as stand-ins."""
    from vlm.recipe import Recipe
    from vlm.run import run

    tokenizer = f"model.language.tokenizer={folder / 'scenes/tokenizer'}"
    start = folder / f"{recipe.name}-start"
    if not start.exists():
        model = {**recipe.model.plain(), "weights": None}
        model["language"] = {**model["language"], "tokenizer": str(folder / "scenes/tokenizer")}
        stage = {"name": "one", "mix": {"scenes": 1}, "steps": 1, "train": {"connector": {"lr": 1e-3}}}
        sources = {"scenes": {"shards": str(folder / "scenes/train")}}
        plain = {"recipe": 1, "name": "start", "model": model, "data": {"sources": sources, "workers": 0}}
        run(
            Recipe.model_validate({**plain, "stages": [stage], "run": {"dir": str(start), "global_batch": 6}}),
            ("train",),
        )
    words = [tokenizer, f"model.weights={start}"]
    return words + [f"data.sources.{name}.shards={folder / 'pairs'}" for name in recipe.data.sources]


# Whole models: what stands for an image in a chat, the template around it, and the end of an answer where there is one.
CHAT = (
    "{% for m in messages %}HEAD{% for c in m.content %}{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}"
    "{% endif %}{% endfor %}END{% endfor %}{% if add_generation_prompt %}ASK{% endif %}"
)
WHOLE = {
    "qwen2_5_vl": {
        "HEAD": "<|im_start|>{{ m.role }}\n",
        "IMAGE": "<|vision_start|><|image_pad|><|vision_end|>",
        "END": "<|im_end|>\n",
        "ASK": "<|im_start|>assistant\n",
    },
    "llava": {"HEAD": "{{ m.role.upper() }}: ", "IMAGE": "<image>\n", "END": " ", "ASK": "ASSISTANT:"},
}


def whole_stand_in(kind: str, folder: Path) -> None:
    """A random checkpoint of a family, with a processor that knows the words of Scenes, in ``folder / kind``."""
    import transformers as hf

    template = CHAT
    for mark, text in WHOLE[kind].items():
        template = template.replace(mark, text)
    named = ["<|image_pad|>", "<|video_pad|>"] if kind == "qwen2_5_vl" else ["<image>"]
    names = [*named, "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "scenes/tokenizer/tokenizer.json"),
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        eos_token="<|im_end|>" if kind == "qwen2_5_vl" else "<eos>",
        extra_special_tokens=dict(zip(("image_token", "video_token"), named, strict=False)),
    )
    tokenizer.add_tokens(names, special_tokens=True)
    number = dict(zip(names, tokenizer.convert_tokens_to_ids(names), strict=True))
    ends: Any = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    text: Any = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, **ends}
    if kind == "qwen2_5_vl":
        pixels = {"patch_size": 4, "merge_size": 2, "min_pixels": 256, "max_pixels": 2048}
        images, videos = hf.Qwen2VLImageProcessor(**pixels), hf.Qwen2VLVideoProcessor(**pixels)
        processor: Any = hf.Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=template)
        tower: Any = {"patch_size": 4, "spatial_merge_size": 2, "depth": 2, "num_heads": 4, "hidden_size": 32}
        tower |= {"intermediate_size": 48, "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]}
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        marks = {f"{name}_token_id": number[f"<|{name}|>"] for name in ("vision_start", "vision_end")}
        marks |= {"image_token_id": number[named[0]], "video_token_id": number[named[1]]}
        text |= {"rope_parameters": rope}
        config: Any = hf.Qwen2_5_VLConfig(text_config=text, vision_config=tower, **marks, **ends)
    else:
        images = hf.CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
        processor = hf.LlavaProcessor(
            images, tokenizer, 8, "default", chat_template=template, num_additional_image_tokens=1
        )
        tower = hf.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=48,
            patch_size=8,
        )
        config = hf.LlavaConfig(
            vision_config=tower, text_config=hf.LlamaConfig(**text), image_token_id=number["<image>"], **ends
        )
    torch.manual_seed(0)
    hf.AutoModelForImageTextToText.from_config(config).save_pretrained(folder / kind)
    processor.save_pretrained(folder / kind)


def from_stand_ins(recipe: Any, folder: Path) -> list[str]:
    """Overrides that put the stand-ins in the places of what a recipe would fetch."""
    if recipe.model.weights is not None:
        words = start_stand_in(recipe, folder)
    elif recipe.model.origin is not None:
        words = [f"model.from.name={folder / 'qwen2_5_vl'}"]
    else:
        kind = next(kind for kind in ("siglip", "clip") if kind in recipe.model.vision.options["name"])
        words = [f"model.vision.name={folder / kind}", f"model.language.name={folder / 'language'}"]
    words += ["data.workers=1"]
    if recipe.model.weights is None:
        words += [f"data.sources.{name}.shards={folder / 'scenes/train'}" for name in recipe.data.sources]
    benchmarks = folder / "scenes/benchmarks"
    splits = [str(benchmarks / f"pope_{split}.json") for split in ("random", "popular", "adversarial")]
    files = {"pope": {"questions": splits}}
    files["chair_counterfactual"] = {
        "truth": str(benchmarks / "chair_counterfactual.json"),
        "synonyms": str(benchmarks / "synonyms.txt"),
    }
    files["chair"] = {"truth": str(benchmarks / "chair.json"), "synonyms": str(benchmarks / "synonyms.txt")}
    for label in recipe.evaluate.benchmarks:
        images = "counterfactual" if label.endswith("counterfactual") else "test"
        options = files[label] | {"images": str(folder / "scenes" / images)}
        words += [f"evaluate.benchmarks.{label}.{key}={value}" for key, value in options.items()]
    return words + ["evaluate.benchmarks.chair.max_new_tokens=16"] * ("chair" in recipe.evaluate.benchmarks)


@pytest.fixture(scope="session")
def shrunk(request: pytest.FixtureRequest) -> Callable[[Path], list[str]]:
    """Overrides that leave every part of a shipped recipe in place but make each as small as can be."""
    from vlm.recipe import load_recipe

    def overrides(path: Path) -> list[str]:
        recipe = load_recipe(path)
        small = ["run.global_batch=6", "run.trace_samples=true"]
        small += ["run.save.every=2", "run.log_every=2", "evaluate.batch=16", "evaluate.pictures=2"]
        if recipe.data.make:
            small += ["data.make.train=150", "data.make.test=12"]
        else:
            small += from_stand_ins(recipe, request.getfixturevalue("stand_ins"))
        if recipe.run.weights:
            small += ["run.weights=null"]
        small += ["run.micro_batch=null", "run.devices=1", "run.parallel=single"]
        for number, stage in enumerate(recipe.stages):
            small += [f"stages.{number}.samples=null"] if stage.samples else []
            small += [f"stages.{number}.steps=4", f"stages.{number}.schedule.warmup=1"]
            small += [f"stages.{number}.global_batch=6"] if stage.global_batch else []
        rows = [row.plain() for row in recipe.evaluate.compare]
        if len(rows) > 12:  # every one of them is run by itself in test_recipes.py
            small += [f"evaluate.compare={json.dumps([*rows[:2], *rows[-2:]])}"]
        return small + [f"evaluate.benchmarks.{label}.limit=6" for label in recipe.evaluate.benchmarks]

    return overrides
