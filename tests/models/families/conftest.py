"""Tiny random checkpoints with real processors, saved and loaded through us, and the checks that every family passes.

A family's test file gives its config and its processor; ``check`` runs once for each function of ``CHECKS``. The truth
is Transformers: its forward pass, its ``generate``, and for a cut its own layers on what was kept.
"""

import inspect
import io
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, PreTrainedTokenizerFast, SiglipVisionConfig

from vlm.data.draw import Draw
from vlm.data.schema import Message, Part, Sample
from vlm.models.errors import ModelError
from vlm.models.kv.adakv import Adakv
from vlm.models.kv.fastocr import Fastocr
from vlm.models.kv.guikv import Guikv
from vlm.models.kv.h2o import H2o
from vlm.models.kv.recycled import Recycled
from vlm.models.pack import packed_attention
from vlm.models.pretrained import PretrainedVlm, load_pretrained
from vlm.models.program.attach import attach
from vlm.models.program.budget import Budget
from vlm.models.program.decode import generate
from vlm.models.program.program import LLM_IN, Select, llm_before
from vlm.models.program.select import even_stride
from vlm.models.pruners.divprune import Divprune
from vlm.models.pruners.fastv import Fastv
from vlm.models.pruners.random import Random
from vlm.packing import ProcessedSize, VisualTokens
from vlm.processed import CollateProcessed, ProcessorEncoder

# every letter is a word, # an image; different lengths, 0 to 2 images
ROWS = ("ab#c", "de", "#fghij#k")
HALF = Budget.parse("50%")
STEPS = 4


def tiny_tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """One token a letter; ``special`` and ``named`` (image_token="<image>") are tokens wherever they stand."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *map(chr, range(97, 123))]
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        **({"extra_special_tokens": named} if named else {}),
    )
    tokenizer.add_tokens([*special, *named.values()], special_tokens=True)
    return tokenizer


def tiny_text(**more: Any) -> dict[str, Any]:
    """What every tiny language model has; weights so large that attention is far from even."""
    return {
        "vocab_size": 120,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.25,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | more


def tiny_tower(kind: type = CLIPVisionConfig, **more: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return kind(**{**sizes, "image_size": 32, "patch_size": 8, "initializer_range": 0.1, **more})


class Case(NamedTuple):
    """A checkpoint as Transformers loads it and as we do."""

    stock: Any
    ours: PretrainedVlm
    processor: Any
    folder: Path
    placeholder: str  # what stands for an image in a prompt
    needs_images: bool  # its processor takes no batch without images
    inside: bool  # programs may cut inside its language model

    def batch(self, rows: Sequence[str] = ROWS, side: str = "right", double: bool = False) -> Any:
        """What the processor makes of rows of letters and images; image sizes differ."""
        texts = [" ".join(self.placeholder if mark == "#" else mark for mark in row) for row in rows]
        images = [[noise(ord(row[0]) + number) for number in range(row.count("#"))] for row in rows]
        options: Any = {"padding": True, "padding_side": side, "return_tensors": "pt"}
        if any(images):
            batch = self.processor(text=texts, images=images, **options)
        else:
            batch = (self.processor.tokenizer if self.needs_images else self.processor)(text=texts, **options)
        batch = {name: value for name, value in batch.items() if name != "labels"}
        return {n: v.double() if double and v.is_floating_point() else v for n, v in batch.items()}


def noise(seed: int) -> Image.Image:
    """A picture of noise; its size goes by the seed."""
    rows, cols = [(40, 60), (70, 30), (33, 90)][seed % 3]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (rows, cols, 3), np.uint8))


@pytest.fixture(scope="session")
def tiny() -> Any:
    """The building blocks of a family's config and processor."""

    class Tiny:
        tokenizer = staticmethod(tiny_tokenizer)
        text = staticmethod(tiny_text)
        clip = staticmethod(tiny_tower)
        noise = staticmethod(noise)

        @staticmethod
        def siglip(**more: Any) -> Any:
            return tiny_tower(SiglipVisionConfig, **more)

    return Tiny


@pytest.fixture(scope="session")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """Save a random checkpoint and load it twice; made once for each config class and processor class."""
    made: dict[Any, Case] = {}

    def make(config: Any, processor: Any, placeholder: str, *, needs_images: bool = False, inside: bool = True) -> Case:
        name = f"{config.model_type} {config.get_text_config().model_type}"
        if name not in made:
            folder = tmp_path_factory.mktemp("checkpoint")
            torch.manual_seed(0)
            AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
            processor.save_pretrained(folder)
            stock = AutoModelForImageTextToText.from_pretrained(folder).eval()
            made[name] = Case(stock, load_pretrained(folder), processor, folder, placeholder, needs_images, inside)
        return made[name]

    return make


def logits_are_equal(case: Case, rows: Sequence[str] = ROWS) -> None:
    batch = case.batch(rows)
    out = case.ours(case.ours.inputs(batch))
    real = batch["attention_mask"].bool()
    assert torch.equal(case.ours.logits(out.hidden)[real], case.stock(**batch).logits[real])


def generations_are_equal(case: Case, rows: Sequence[str] = ROWS) -> None:
    batch = case.batch(rows, side="left")
    options: Any = {"do_sample": False, "eos_token_id": -1, "return_dict_in_generate": True, "output_logits": True}
    theirs = case.stock.generate(**batch, max_new_tokens=STEPS, **options)
    new = theirs.sequences[:, batch["input_ids"].shape[1] :]
    for side in ("left", "right"):  # rows that come padded on the right are moved
        logits, stream = case.ours.prefill(case.ours.inputs(case.batch(rows, side=side)))
        for step in range(STEPS):
            assert torch.equal(logits, theirs.logits[step]), (side, step)
            logits = case.ours.step(stream, new[:, step])
    assert generate(case.ours, case.ours.inputs(batch), max_new_tokens=STEPS, stop=-1) == new.tolist()


def text_alone_works(case: Case) -> None:
    logits_are_equal(case, ("abc", "d"))
    generations_are_equal(case, ("abc", "d"))


def layout_says_what_stands_where(case: Case) -> None:
    batch = case.batch()
    run = case.ours.prefill(case.ours.inputs(batch))[1].run
    layout, token = run.layouts[0], case.stock.config.image_token_id
    assert torch.equal(layout.visual.sum(1), (batch["input_ids"] == token).sum(1))
    assert torch.equal(layout.valid.sum(1), batch["attention_mask"].sum(1))
    for visual, *places in zip(layout.visual, layout.image, layout.row, layout.col, strict=True):
        found = torch.stack([place[visual] for place in places], 1).tolist()
        assert len({*map(tuple, found)}) == len(found)  # no two tokens of a row at one place
        assert [image for image, *_ in found] == sorted(image for image, *_ in found)
        assert all(bool((place[~visual] == -1).all()) for place in places)


def everything_kept_is_the_bare_model(case: Case) -> None:
    inputs = case.ours.inputs(case.batch())
    plain, _ = case.ours.prefill(inputs)
    sites = [LLM_IN, llm_before(1)] if case.inside else [LLM_IN]
    with attach(case.ours, tuple((site, Select(Budget.parse("100%"), even_stride())) for site in sites)):
        assert torch.equal(case.ours.prefill(inputs)[0], plain)
    for method in (Random, Divprune):
        with attach(case.ours, method(keep=Budget.parse("100%")).program(case.ours.facts)):
            assert torch.equal(case.ours.prefill(inputs)[0], plain)


def take(value: Any, kept: Tensor) -> Any:
    """Whatever Transformers hands to a layer, at the kept places: masks, rotary tables, states, positions."""
    if isinstance(value, tuple | list):
        return type(value)(take(part, kept) for part in value)
    if isinstance(value, dict):
        return {name: take(part, kept) for name, part in value.items()}
    if not isinstance(value, Tensor):
        return value
    if value.ndim == 4 and value.shape[1] == 1 and value.shape[2] == value.shape[3]:  # a mask
        return value[:, :, kept][..., kept]
    return value[..., kept] if not value.is_floating_point() else value[..., kept, :]


def cut_equals_stock_layers_on_what_was_kept(case: Case) -> None:
    """At llm.in and before layer 1, one sample: Transformers' layers with everything gathered by hand."""
    ours, stock = case.ours, case.stock
    batch, seen = case.batch(ROWS[2:]), []
    decoder = stock.get_decoder()
    hook = lambda module, args, kwargs: seen.append((args, kwargs))  # noqa: E731
    handles = [part.register_forward_pre_hook(hook, with_kwargs=True) for part in (decoder, decoder.layers[1])]
    stock(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    (_, whole), ((hidden,), inside) = seen
    for site in (LLM_IN, llm_before(1)) if case.inside else (LLM_IN,):
        with attach(ours, ((site, Select(HALF, even_stride())),)):
            out = ours(ours.inputs(batch))
        kept = out.layout.source[0]
        visual = batch["input_ids"][0] == stock.config.image_token_id
        assert int(visual[kept].sum()) == round(int(visual.sum()) / 2)
        if site == LLM_IN:
            more = {k: v for k, v in whole.items() if k not in ("visual_pos_masks", "deepstack_visual_embeds")}
            more = {name: take(value, kept) for name, value in more.items()} | deep_of(whole, visual, kept)
            more["attention_mask"] = on_kept(more.get("attention_mask"), len(kept), decoder.config)
            if more.get("position_ids") is None:
                more["position_ids"] = kept[None]
            expected = decoder(**more).last_hidden_state
        else:
            state = decoder.layers[1](take(hidden, kept), **{n: take(v, kept) for n, v in inside.items()})
            if levels := deep_of(whole, visual, kept):
                state[levels["visual_pos_masks"]] += levels["deepstack_visual_embeds"][1]
            expected = decoder.norm(state)
        torch.testing.assert_close(out.hidden, expected, rtol=0, atol=1e-5)


def on_kept(mask: Any, length: int, config: Any) -> Any:
    """The mask of the kept places. A 2-d mask becomes a causal one, without which a jump of position ids would be read
    as packed samples; a sliding window counts kept tokens."""
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if isinstance(mask, dict) and mask["full_attention"] is None:
        return {"full_attention": causal, "sliding_attention": causal.triu(1 - config.sliding_window)}
    if isinstance(mask, dict) and not torch.equal(mask["full_attention"], mask["sliding_attention"]):
        full, early = mask["full_attention"], causal.tril(-config.sliding_window)
        return mask | {"sliding_attention": full.masked_fill(early, False if full.dtype == torch.bool else full.min())}
    return causal if isinstance(mask, Tensor) and mask.ndim == 2 else mask


def deep_of(whole: dict[str, Any], visual: Tensor, kept: Tensor) -> dict[str, Any]:
    if whole.get("deepstack_visual_embeds") is None:
        return {}
    number = visual.cumsum(0) - 1
    levels = [level[number[kept[visual[kept]]]] for level in whole["deepstack_visual_embeds"]]
    return {"visual_pos_masks": visual[kept][None], "deepstack_visual_embeds": levels}


def a_sample_alone_equals_the_sample_in_a_batch(case: Case) -> None:
    model = case.ours.double()
    # eager attention takes its softmax in float32
    near: Any = {"rtol": 0, "atol": 1e-8 if model.language.config._attn_implementation == "sdpa" else 1e-5}
    programs: list[Any] = [(), Random(keep=HALF), Divprune(HALF, position="keep")]
    if case.inside:
        programs += [Fastv(HALF, 1), Adakv(HALF), Guikv(HALF), H2o(HALF), Fastocr(HALF, (0,)), Recycled(HALF)]
    try:
        for method in programs:
            with attach(model, method.program(model.facts) if method else ()):
                together, stream = model.prefill(model.inputs(case.batch(double=True)))
                more = torch.tensor([5, 6, 7])
                after = model.step(stream, more)
                for row, text in enumerate(ROWS):
                    if case.needs_images and "#" not in text:
                        continue
                    alone, one = model.prefill(model.inputs(case.batch([text], double=True)))
                    torch.testing.assert_close(alone[0], together[row], **near)
                    torch.testing.assert_close(model.step(one, more[row : row + 1])[0], after[row], **near)
    finally:
        model.float()


def a_truncated_image_is_refused(case: Case) -> None:
    batch = case.batch(ROWS[2:])
    place = (batch["input_ids"][0] == case.stock.config.image_token_id).nonzero().max()
    cut = {name: value[:, :place] if name in PER_TOKEN else value for name, value in batch.items()}
    with pytest.raises(ModelError, match=r"sample street/7: expected \d+ image tokens, those of whole images; found"):
        case.ours(case.ours.inputs(cut, keys=["street/7"]))


PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def a_blank_image_trains_the_vision_path(case: Case) -> None:
    """A batch of text alone gives every trained part a gradient, so that no rank waits for it."""
    case.ours.train()
    try:
        inputs = case.ours.inputs(case.batch(("abc", "d")))
        case.ours(inputs, torch.ones(inputs.tokens.shape)).loss.backward()
        tower = case.ours.model.get_encoder(modality="image")
        assert any(p.grad is not None for p in tower.parameters())
    finally:
        case.ours.zero_grad(set_to_none=True)
        case.ours.eval()


def every_weight_has_one_role(case: Case) -> None:
    parts = case.ours.parts
    owners = {name: [role for role, part in parts.items() if part.owns(name)] for name in case.ours.state_dict()}
    assert {name: roles for name, roles in owners.items() if len(roles) != 1} == {}
    assert {role for [role] in owners.values()} == {"vision", "connector", "language"}
    decoder = {id(p) for p in case.ours.decoder.parameters()}
    assert decoder <= {id(p) for p in parts["language"].parameters()}


def visual_tokens_are_known_where_they_are_fixed(case: Case) -> None:
    counts = {int(case.ours.visual_counts(case.ours.inputs(case.batch([row])))) for row in ("a#", "b#", "c#")}
    assert case.ours.visual_tokens in (None, *counts)
    assert len(counts) == 1 or case.ours.visual_tokens is None


def every_trained_weight_gets_a_gradient(case: Case) -> None:
    """Whatever may train is read in every pass, or ranks would wait for its gradient; the others are named idle."""
    model = case.ours.train()
    try:
        for rows in (["ab#cde"], ["abc"]) if not case.needs_images else (["ab#cde"],):
            inputs = model.inputs(case.batch(rows))
            model(inputs, torch.ones(inputs.tokens.shape)).loss.backward()
            missing = {name for name, p in model.named_parameters() if p.grad is None}
            parts = model.parts.values()
            assert missing == {name for part in parts for name, _ in part.named_parameters() if part.is_idle(name)}
            model.zero_grad(set_to_none=True)
    finally:
        model.zero_grad(set_to_none=True)
        model.eval()


# u and a begin turns; an answer has no end of its own, so the tokenizer's end token is put after it
TURNS = (
    "{% for m in messages %}{{ m.role[0] }} {% for c in m.content %}{% if c.type == 'image' %}PLACEHOLDER {% else %}"
    "{{ c.text }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}a {% endif %}"
)
SAMPLES = ("b#c/de/fg/h", "d/ef", "#bc#/d", "k#/lm")  # question/answer/question/answer; different image sizes


def samples_become_what_the_processor_makes_of_their_text(case: Case) -> None:
    """Encoded one by one and put together, they are the processor's own batch of texts written by hand."""
    processor = copy(case.processor)
    suffix = "suffix" in inspect.signature(type(processor).__call__).parameters
    rows = [row for row in SAMPLES if not suffix or (row.count("/") == 1 and "#" in row)]
    if not suffix:
        processor.chat_template = TURNS.replace("PLACEHOLDER", case.placeholder)
    image = case.ours.family.image_token
    encoder = ProcessorEncoder(processor, image, (2,))
    collate = CollateProcessed(0, image)
    batch = collate([encoder(sample_of(row, n), Draw(n, 0, 0)) for n, row in enumerate(rows)])
    images = [[noise(n + 7 * i) for i in range(row.count("#"))] for n, row in enumerate(rows)]
    texts = []
    for row in rows:
        turns = [" ".join(case.placeholder if mark == "#" else mark for mark in turn) for turn in row.split("/")]
        texts.append("".join(f"a {t}<eos>" if n % 2 else f"u {t} " for n, t in enumerate(turns)))
        if suffix:
            texts[-1] = turns[0]
    options: Any = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
    if suffix:
        options["suffix"] = [" ".join(row.split("/")[1]) for row in rows]
    expected = processor(text=texts, images=images, **options)
    real = expected["attention_mask"].bool()
    assert torch.equal(batch.inputs().valid, real)
    assert torch.equal(batch.tokens[real], expected["input_ids"][real])
    theirs = case.ours.inputs({n: v for n, v in expected.items() if n != "labels"})
    assert torch.equal(batch.visual, theirs.visual)
    assert batch.media.keys() == theirs.media.keys()
    for name, value in theirs.media.items():  # a batch of theirs may have room for images that a row does not have
        assert torch.equal(batch.media[name].flatten()[: value.numel()].sum(), value.flatten().sum()), name
    if theirs.types is not None:
        assert batch.types is not None and torch.equal(batch.types[real], theirs.types[real])
    plain, mine = case.ours(theirs).hidden[real], case.ours(batch.inputs()).hidden[real]
    torch.testing.assert_close(mine, plain, rtol=0, atol=1e-5)
    names = processor.tokenizer.convert_ids_to_tokens
    for number, row in enumerate(rows):
        learned = names(batch.tokens[number][batch.weights[number] > 0].tolist())
        answers = [[*turn, "<eos>"] for turn in row.split("/")[1::2]]
        assert learned == [word for answer in answers for word in answer]
        assert set(batch.weights[number].tolist()) <= {0.0, 1.0}


def sample_of(row: str, first: int) -> Sample:
    """Turns separated by /, user first; # is the next image."""
    media: list[bytes] = []
    messages = []
    for number, turn in enumerate(row.split("/")):
        parts, text = [], ""
        for mark in turn:
            if mark != "#":
                text += f"{mark} " if mark != turn[-1] else mark
                continue
            parts += [Part("text", text.strip())] if text else []
            text = ""
            out = io.BytesIO()
            noise(first + 7 * len(media)).save(out, "PNG")
            parts.append(Part("image", ref=len(media)))
            media.append(out.getvalue())
        parts += [Part("text", text.strip())] if text else []
        messages.append(Message("assistant" if number % 2 else "user", tuple(parts)))
    return Sample(f"row/{first}", tuple(messages), tuple(media), ("png",) * len(media))


@torch.enable_grad()
def packed_samples_equal_samples_alone(case: Case) -> None:
    """Logits and gradients of two packs of samples are those of the samples alone, and nobody sees a neighbour."""
    model = case.ours.double()
    eager = model.language.config._attn_implementation == "eager"  # it takes its softmax in float32
    near: Any = {"rtol": 0, "atol": 1e-5 if eager else 1e-10}
    rows = ROWS if not case.needs_images else ("ab#c", "#de", "#fghij#k")
    try:
        inputs = model.inputs(case.batch(rows, double=True))
        numbers = torch.arange(inputs.tokens.numel()).view_as(inputs.tokens)
        weights = (1.0 + numbers % 3) * inputs.valid
        weights[:, 0] = 0.0
        packed = model(inputs._replace(pack=torch.tensor([0, 0, 1])), weights)
        packed.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        total = 0.0
        for row, text in enumerate(rows):
            one = model.inputs(case.batch([text], double=True))
            alone = model(one, weights[row : row + 1, : one.tokens.shape[1]])
            alone.loss.backward()
            total += float(alone.loss)
            mine = packed.layout.sample == row
            assert packed.layout.source[mine].tolist() == list(range(one.tokens.shape[1]))
            torch.testing.assert_close(packed.hidden[mine], alone.hidden[0], **near)
        torch.testing.assert_close(packed.loss, packed.loss.new_tensor(total), rtol=1e-6, atol=0)
        assert grads.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
        for name, p in model.named_parameters():
            if p.grad is not None:
                size = max(float(p.grad.abs().max()), 1.0)  # the loss itself is added up in single precision
                torch.testing.assert_close(grads[name], p.grad, rtol=0, atol=1e-4 * size if eager else 1e-6 * size)
        with packed_attention(model):
            again = model(inputs._replace(pack=torch.tensor([0, 0, 1]))).hidden
        torch.testing.assert_close(again, packed.hidden, **near)
        other = inputs._replace(tokens=inputs.tokens.clone())
        other.tokens[0, 0] += 1
        changed = model(other._replace(pack=torch.tensor([0, 0, 1])))
        assert torch.equal(changed.hidden[packed.layout.sample > 0], packed.hidden[packed.layout.sample > 0])
        assert not torch.equal(changed.hidden, packed.hidden)
    finally:
        model.zero_grad(set_to_none=True)
        model.float()


def sizes_are_told_without_the_pictures(case: Case) -> None:
    """What packing measures with blank images is what the samples take up, also when sizes are known already."""
    processor = copy(case.processor)
    suffix = "suffix" in inspect.signature(type(processor).__call__).parameters
    if not suffix:
        processor.chat_template = TURNS.replace("PLACEHOLDER", case.placeholder)
    rows = [row for row in SAMPLES if not suffix or (row.count("/") == 1 and "#" in row)]
    encoder = ProcessorEncoder(processor, case.ours.family.image_token, (2,))
    measure = ProcessedSize(encoder, VisualTokens((), 2), 8)
    for again in range(2):
        for n, row in enumerate(rows):
            sample, draw = sample_of(row if not again else row[:-1] + "nop", n), Draw(n, 0, 0)
            example = encoder(sample, draw)
            shown = [Image.open(io.BytesIO(content)).size for content in sample.media]
            size = measure(sample, shown, draw)
            assert (size.tokens, size.length) == (len(example.tokens), len(example.tokens)), row
            assert (size.patches > 0) == bool(shown)


CHECKS = [
    sizes_are_told_without_the_pictures,
    packed_samples_equal_samples_alone,
    samples_become_what_the_processor_makes_of_their_text,
    every_trained_weight_gets_a_gradient,
    every_weight_has_one_role,
    visual_tokens_are_known_where_they_are_fixed,
    logits_are_equal,
    generations_are_equal,
    text_alone_works,
    layout_says_what_stands_where,
    everything_kept_is_the_bare_model,
    cut_equals_stock_layers_on_what_was_kept,
    a_sample_alone_equals_the_sample_in_a_batch,
    a_truncated_image_is_refused,
    a_blank_image_trains_the_vision_path,
]


WITH_GRADIENT = (a_blank_image_trains_the_vision_path, every_trained_weight_gets_a_gradient)


@pytest.fixture(params=CHECKS, ids=lambda check: check.__name__)
def check(request: pytest.FixtureRequest) -> Callable[[Case], None]:
    """Each of the checks in turn."""

    def run(case: Case) -> None:
        with torch.set_grad_enabled(
            request.param in (a_blank_image_trains_the_vision_path, every_trained_weight_gets_a_gradient)
        ):
            request.param(case)

    return run
