"""A whole model from a checkpoint in a recipe: planned, trained with adapters or part by part, resumed, exported."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPConfig

from vlm import export
from vlm.build import build_encoder, build_model, build_tokenizer
from vlm.calibrate import calibrate
from vlm.commands import main
from vlm.data.draw import Draw
from vlm.data.errors import DataError
from vlm.data.index import load_manifest
from vlm.data.schema import Message, Part, Sample
from vlm.data.store import Store
from vlm.models.lora import is_adapter
from vlm.models.program.artifact import contents
from vlm.plan import plan
from vlm.recipe import load_recipe
from vlm.run import run
from vlm.training import checkpoints
from vlm.training.module import TrainingModule

RECIPE = """
name: whole
seed: 3
model: {{from: {name}}}
data: {{workers: 0, sources: {{scenes: {{shards: {folder}/scenes/train}}}}}}
stages:
  - sft:
      mix: {{scenes: 1}}
      train: {{language: {{lora: 4, lr: 1e-2, dropout: 0.1}}}}
      drop_image: 25%
      schedule: {{warmup: 1}}
      steps: 6
run: {{global_batch: 4, log_every: 1, threads: 1, trace_samples: true, save: {{every: 2, keep: 10}}}}
"""
FULL = "stages.0.train={vision: {lr: 1e-3}, connector: {lr: 1e-3}, language: {lora: 4, lr: 1e-2}}"


@pytest.fixture
def whole(stand_ins: Path, tmp_path: Path) -> Any:
    """``whole("llava", "seed=4")`` loads the recipe of that family; its run folder is ``tmp_path / "run"``."""

    def load(kind: str, *overrides: str) -> Any:
        path = tmp_path / "whole.yaml"
        path.write_text(RECIPE.format(name=stand_ins / kind, folder=stand_ins))
        return load_recipe(path, [f"run.dir={tmp_path / 'run'}", *overrides])

    return load


def newest(recipe: Any) -> Path:
    point = checkpoints.newest(Path(recipe.run.dir) / "checkpoints")
    assert point is not None
    return point.path


def weights(recipe: Any) -> dict[str, torch.Tensor]:
    content = checkpoints.read(newest(recipe))
    return {name.removeprefix("model."): value for name, value in content["state_dict"].items()}


def built(recipe: Any) -> Any:
    return build_model(recipe, build_tokenizer(recipe))


def cells(text: str) -> dict[str, list[str]]:
    rows = [line.split("  ") for line in text.splitlines()]
    return {row[0]: [cell.strip() for cell in row[1:] if cell] for row in rows}


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava"])
def test_a_plan_needs_the_config_alone(kind: str, whole: Any, stand_ins: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(stand_ins / kind / "config.json", bare)
    text = plan(whole(kind, f"model.from={bare}", FULL, "prune={use: stride, keep: 50%, position: keep}"))
    audit, model = cells(text), AutoModelForImageTextToText.from_pretrained(stand_ins / kind)
    total = sum(p.numel() for p in model.parameters())
    assert sum(int(audit[part][0].replace(",", "")) for part in ("vision", "connector", "language")) == total
    assert audit["vision"][1] == audit["connector"][1] == "lr 0.001"
    # rank 4 beside 32 x 32 twice, 32 x 16 twice and 32 x 48 three times, in each of 4 layers
    assert audit["language"][1] == "lora 4 (7,424 parameters), lr 0.01"
    fixed = "Per image 36 visual tokens before any cut"
    assert (fixed if kind == "llava" else "Visual tokens per image: depends on the image") in text
    assert "stride 50%" in audit or "the recipe's own" in audit


def test_adapters_alone_are_trained_saved_and_given_to_the_optimizer(whole: Any) -> None:
    recipe = whole("qwen2_5_vl")
    before = {name: value.clone() for name, value in built(recipe).state_dict().items()}
    model = built(recipe)
    module = TrainingModule(model, torch.nn.Module(), "token", recipe.stages[0], 6, 4)
    adapters = {name for name, _ in model.named_parameters() if is_adapter(name)}
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert {id(p) for group in groups for p in group["params"]} == {
        id(p) for name, p in model.named_parameters() if name in adapters
    }
    run(recipe, ("train",))
    saved = weights(recipe)
    assert saved.keys() == adapters and all(".language_model." in name for name in adapters)
    assert all(not torch.equal(saved[name], before[name]) for name in adapters)
    content = checkpoints.read(newest(recipe))
    model = built(recipe)
    checkpoints.load_weights(model, content, newest(recipe))
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name] if name in adapters else before[name]), name


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava"])
def test_a_run_that_was_stopped_ends_where_an_uninterrupted_one_does(kind: str, whole: Any, tmp_path: Path) -> None:
    # dropout would draw anew in another layout
    options = (FULL,) if kind == "llava" else ("stages.0.train.language.dropout=0",)
    straight = whole(kind, *options, f"run.dir={tmp_path / 'straight'}")
    run(straight, ("train",))
    stopped = whole(kind, *options, "run.micro_batch=2")  # and on another layout
    run(stopped, ("train",))
    newest(stopped).unlink()
    assert "step00000004" in newest(stopped).name
    run(stopped, ("train",))
    expected, found = weights(straight), weights(stopped)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)
    lines = [(folder / "samples.jsonl").read_text() for folder in (tmp_path / "straight", tmp_path / "run")]
    assert lines[0] == lines[1]


def test_resuming_on_the_same_layout_is_exact(whole: Any, tmp_path: Path) -> None:
    vision = "stages.0.train.vision={lr: 1e-3}"  # beside adapters with dropout
    straight = whole("llava", vision, f"run.dir={tmp_path / 'straight'}")
    run(straight, ("train",))
    stopped = whole("llava", vision)
    run(stopped, ("train",))
    newest(stopped).unlink()
    run(stopped, ("train",))
    expected, found = weights(straight), weights(stopped)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_parts_train_by_their_roles_and_the_rest_stays(whole: Any) -> None:
    recipe = whole("llava", FULL, "stages.0.drop_image=0")
    before = built(recipe).state_dict()
    run(recipe, ("train",))
    changed = {name for name, value in weights(recipe).items() if not torch.equal(value, before[name])}
    parts = built(recipe).parts
    for role in ("vision", "connector"):
        # biases of keys have no say in a softmax, so their gradient is rounding
        still = {n for n, _ in parts[role].named_parameters() if n not in changed and not n.endswith("k_proj.bias")}
        assert all(parts[role].is_idle(name) for name in still)
    language = {name for name in changed if parts["language"].owns(name)}
    assert language and all(map(is_adapter, language))
    kept = {name for name in weights(recipe) if parts["language"].owns(name)}
    assert all(map(is_adapter, kept))  # what stays of the language model is not saved


def test_other_weights_under_the_same_name_are_refused(
    whole: Any, stand_ins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(stand_ins / "qwen2_5_vl", mine)
    recipe = whole("qwen2_5_vl", f"model.from={mine}")
    run(recipe, ("train",))
    model = AutoModelForImageTextToText.from_pretrained(mine)
    with torch.no_grad():
        model.lm_head.weight += 1
    model.save_pretrained(mine)
    arguments = [str(tmp_path / "whole.yaml"), f"model.from={mine}", f"run.dir={tmp_path / 'run'}"]
    assert main(["evaluate", *arguments]) == 2
    error = capsys.readouterr().err
    assert "goes on top of the weights of model.from: expected those it was trained on, found others" in error


def test_an_export_is_what_transformers_loads_with_the_logits_of_the_run(
    whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = whole("qwen2_5_vl")
    run(recipe, ("train",))
    arguments = [str(tmp_path / "whole.yaml"), str(tmp_path / "out"), f"run.dir={tmp_path / 'run'}"]
    assert main(["export", *arguments]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert (
        line.startswith(f"{tmp_path / 'out'}: loaded back: logits of ")
        and float(line.split(" by ")[1].split()[0]) < 1e-4
    )
    assert main(["export", *arguments]) == 2  # there is something in it now
    stock, processor = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForImageTextToText, AutoProcessor))
    original = AutoModelForImageTextToText.from_pretrained(recipe.model.origin.name)
    assert stock.state_dict().keys() == original.state_dict().keys()
    adapted = built(recipe)
    checkpoints.load_weights(adapted, checkpoints.read(newest(recipe)), newest(recipe))
    encoder = build_encoder(recipe, adapted, build_tokenizer(recipe))
    store = Store(load_manifest([str(recipe.data.sources["scenes"].shards[0])]))
    question = store.read(0)
    batch = encoder.ask([(question.key, [*question.media, "is there a cat ?"])])
    assert processor.chat_template == encoder.processor.chat_template
    with torch.no_grad():
        mine, _ = adapted.prefill(adapted.inputs(batch))
        theirs, before = (model.eval()(**batch).logits[:, -1] for model in (stock, original))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
    assert (mine - before).abs().max() > 1e-3


def test_an_export_with_other_logits_is_told(
    whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(whole("llava", "stages.0.steps=1"), ("train",))
    original = export.load_pretrained

    def other(folder: Any) -> Any:
        model = original(folder)
        next(model.language.parameters()).data.mul_(2)
        return model

    monkeypatch.setattr(export, "load_pretrained", other)
    words = [str(tmp_path / "whole.yaml"), "stages.0.steps=1", f"run.dir={tmp_path / 'run'}"]
    assert main(["export", words[0], str(tmp_path / "one"), *words[1:]]) == 2
    assert "expected the logits of the run's model within 0.001" in capsys.readouterr().err
    assert main(["export", words[0], str(tmp_path / "two"), *words[1:], "--no-verify"]) == 0
    assert "two: not compared" in capsys.readouterr().out


def test_in_bf16_frozen_weights_are_half_as_wide_and_trained_ones_are_not(whole: Any) -> None:
    recipe = whole("llava", FULL.replace("vision: {lr: 1e-3}, ", ""), "run.precision=bf16", "stages.0.steps=2")
    model = built(recipe)
    kinds = {role: {p.dtype for p in part.parameters()} for role, part in model.parts.items()}
    assert kinds["vision"] == {torch.bfloat16} and kinds["connector"] == {torch.float32}
    assert kinds["language"] == {torch.bfloat16, torch.float32}  # adapters
    run(recipe, ("train",))
    line = (Path(recipe.run.dir) / "metrics.jsonl").read_text().splitlines()[-1]
    assert 0 < json.loads(line)["loss"] < 10
    assert {value.dtype for value in weights(recipe).values()} == {torch.float32}
    assert "frozen weights in bf16, the others in fp32, on each device" in plan(recipe)


def test_without_stages_the_checkpoint_itself_is_judged(
    whole: Any, stand_ins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole("llava")
    scenes = stand_ins / "scenes"
    pope = f"{{use: pope, questions: [{scenes}/benchmarks/pope_random.json], images: {scenes}/test, limit: 6}}"
    chair = (
        f"{{use: chair, truth: {scenes}/benchmarks/chair.json, synonyms: {scenes}/benchmarks/synonyms.txt,"
        f" images: {scenes}/test, limit: 4, max_new_tokens: 4}}"
    )
    rows = "[{}, {prune: {use: visionzip, keep: 9}}, {prune: {use: flowcut, keep: 25%}}, {prune: fastv 25%}]"
    arguments = [str(tmp_path / "whole.yaml"), "stages=[]", f"run.dir={tmp_path / 'run'}", "evaluate.pictures=2"]
    arguments += [f"evaluate.benchmarks={{pope: {pope}, chair: {chair}}}"]
    arguments += [f"evaluate.compare={rows.replace('fastv 25%', '{use: fastv, keep: 25%}')}"]
    assert main(["plan", *arguments]) == 0
    assert cells(capsys.readouterr().out)["visionzip 9"][0] == "9 x 4"
    assert main(["train", *arguments]) == 2
    assert "there are none, so nothing trains; `vlm evaluate` judges model.from as it is" in capsys.readouterr().err
    assert main(["run", *arguments]) == 0
    evaluation = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert evaluation["weights"] == str(stand_ins / "llava")
    kept = [result["cost"]["visual_tokens"]["per_layer"] for result in evaluation["results"]]
    assert kept == [[36] * 4, [9] * 4, [9] * 4, [36, 36, 9, 9]]
    [picture, _] = json.loads((tmp_path / "run/pictures.json").read_text())["items"]
    assert [view["grid"] for view in picture["views"]] == [[6, 6]] * 4
    assert [view["kept"] is None or len(view["kept"]) for view in picture["views"]] == [True, 9, 9, 9]
    assert all(len(view["heat"]) == 36 and sum(view["heat"]) > 0 for view in picture["views"])
    assert (tmp_path / "run/report.html").stat().st_size > 10_000


def test_a_pruner_inside_the_encoder_of_qwen_is_planned_trained_and_judged(
    whole: Any, stand_ins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the visual tokens come out of the encoder, a quarter of them out of the second decoder layer."""
    whole("qwen2_5_vl")
    scenes = stand_ins / "scenes"
    pope = f"{{use: pope, questions: [{scenes}/benchmarks/pope_random.json], images: {scenes}/test, limit: 6}}"
    chair = (
        f"{{use: chair, truth: {scenes}/benchmarks/chair.json, synonyms: {scenes}/benchmarks/synonyms.txt,"
        f" images: {scenes}/test, limit: 4, max_new_tokens: 4}}"
    )
    arguments = [str(tmp_path / "whole.yaml"), f"run.dir={tmp_path / 'run'}", "evaluate.pictures=2", FULL]
    method = "{use: flowcut, keep: 25%, form: qwen, position: keep}"
    arguments += ["stages.0.steps=2", f"prune={method}", f"evaluate.compare=[{{}}, {{prune: {method}}}]"]
    arguments += [f"evaluate.benchmarks={{pope: {pope}, chair: {chair}}}"]
    assert main(["plan", *arguments]) == 0
    assert "Visual tokens per image: depends on the image" in capsys.readouterr().out
    assert main(["run", *arguments]) == 0
    results = json.loads((tmp_path / "run/evaluation.json").read_text())["results"]
    kept = [result["cost"]["visual_tokens"]["per_layer"] for result in results]
    assert kept == [[25] * 4, [12, 12, 6, 6]]


@pytest.mark.parametrize(
    ("kind", "override", "expected"),
    [
        ("llava", "model.max_tokens=36",
         "model.max_tokens: expected more than the 36 visual tokens of an image, which are never cut; found 36"),
        ("llava", "stages.0.objective=tags",
         "objective tags trains a part of a composed model by itself; found model.from"),
        ("qwen2_5_vl", "prune={use: visionzip, keep: 50%}",
         "visionzip: it ranks tokens by the class token's attention, and this vision encoder has no class token; "
         "set attention: received"),
        ("qwen2_5_vl", "prune={use: flowcut, keep: 50%, form: qwen}",
         "position ids on three axes cannot be counted anew; set position: keep (found reindex)"),
        ("qwen2_5_vl", "prune={use: tome, keep: 50%, position: keep}",
         "vit.mid[0]: patches that the connector merges go together here, from block to block and not inside one; use "
         "a pruner that cuts at vit.after, vit.out or llm.in"),
        ("qwen2_5_vl", "prune={use: stride, keep: 50%, position: reindex}",
         "position ids on three axes cannot be counted anew; set position: keep (found reindex)"),
        ("qwen2_5_vl", "prune={use: stride, keep: 9, position: keep, schedule: {over: 50%}}",
         "keep: expected a share such as 25%, because prune.schedule comes down from a share and the visual tokens of "
         "this model depend on the image; found a number"),
        ("llava", "prune={use: prumerge, schedule: {over: 50%}}",
         "keep: expected a budget for prune.schedule to come down to; found none"),
        ("siglip", "prune={use: visionzip, keep: 9}",
         "visionzip: it ranks tokens by the class token's attention, and this vision encoder has no class token; "
         "set attention: received"),
        ("siglip", "prune={use: cdpruner, keep: 9, relevance: clip, text: some/clip}",
         "cdpruner: relevance: clip: expected a vision encoder of CLIP, of model_type clip_vision_model; "
         "found 'siglip_vision_model'; use relevance: language instead"),
        ("qwen2_5_vl", "prune={use: cdpruner, keep: 50%, relevance: clip, text: some/clip}",
         "cdpruner: relevance: expected a patch behind each visual token; this vision encoder hands over groups of "
         "patches; use relevance: language instead"),
        ("llava", "prune={use: hired, keep: 9, debias: {padding: 0.5}}",
         "vit.out: padding: expected a composed model, whose pictures are padded here"),
        ("llava", "prune={use: fastv, keep: 9, layer: 1, debias: {padding: 0.5}}",
         "llm.before[1]: padding: expected a composed model, whose pictures are padded here"),
        ("llava", "prune={use: visionzip, keep: 9, debias: -1}",
         "prune.debias: expected the sigma of exp(-sigma x), 0 or more, or fastv; found '-1'"),
        ("llava", "prune={use: vscan, keep: 9, debias_encoder: {slope: 1}}",
         "expected sigma, padding or both; found slope"),
        ("nothing", "seed=1", "model: no checkpoint at "),
    ],
)  # fmt: skip
def test_a_plan_refuses_what_cannot_be(
    kind: str, override: str, expected: str, whole: Any, stand_ins: Path, tmp_path: Path, capsys: Any
) -> None:
    if kind == "siglip":  # a LLaVA over SigLIP, as its config says
        config = json.loads((stand_ins / "llava/config.json").read_text())
        config["vision_config"] |= {"model_type": "siglip_vision_model"}
        config |= {"vision_feature_select_strategy": "full"}
        (tmp_path / "siglip").mkdir()
        (tmp_path / "siglip/config.json").write_text(json.dumps(config))
    whole("llava")
    name = tmp_path / "siglip" if kind == "siglip" else stand_ins / kind
    assert main(["plan", str(tmp_path / "whole.yaml"), f"model.from={name}", override]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_plan_takes_the_clip_whose_encoder_the_model_has_and_no_other(
    whole: Any, stand_ins: Path, tmp_path: Path, capsys: Any
) -> None:
    vision = json.loads((stand_ins / "llava/config.json").read_text())["vision_config"]
    whole("llava")
    for name, width in (("own", vision["hidden_size"]), ("other", 2 * vision["hidden_size"])):
        CLIPConfig(vision_config={**vision, "hidden_size": width}).save_pretrained(tmp_path / name)
    for name in ("own", "other"):
        prune = f"prune={{use: cdpruner, keep: 9, relevance: clip, text: {tmp_path / name}}}"
        assert main(["plan", str(tmp_path / "whole.yaml"), prune]) == (0 if name == "own" else 2)
    error = capsys.readouterr().err
    assert "expected the CLIP of the model's own vision encoder" in error and error.count("\n") == 1


def sample(*turns: str, images: int = 0, stand_ins: Path) -> Sample:
    picture = Store(load_manifest([str(stand_ins / "scenes/train")])).read(0).media[0]
    shown = tuple(Part("image", ref=n) for n in range(images))
    messages = [Message(("user", "assistant")[n % 2], (Part("text", text),)) for n, text in enumerate(turns)]
    messages[0] = Message("user", shown + messages[0].content)
    return Sample("a/1", tuple(messages), (picture,) * images, ("png",) * images)


def test_a_chat_is_cut_between_turns_and_never_inside_an_image(whole: Any, stand_ins: Path) -> None:
    recipe = whole("llava")
    model = built(recipe)
    tokenizer = build_tokenizer(recipe)
    long = sample("is there a cat ?", "no", "is there a dog ?", "yes", images=1, stand_ins=stand_ins)
    encoder = build_encoder(recipe, model, tokenizer)
    whole_length = len(encoder(long, Draw(0, 0, 0)).tokens)
    first = len(encoder(Sample("a/1", long.messages[:2], long.media, ("png",)), Draw(0, 0, 0)).tokens)
    assert first > 36
    for most, expected in ((whole_length, whole_length), (whole_length - 1, first), (first, first)):
        cut = build_encoder(whole("llava", f"model.max_tokens={most}"), model, tokenizer)(long, Draw(0, 0, 0))
        assert len(cut.tokens) == expected
        assert sum(token == encoder.image_id for token in cut.tokens) == 36
    short = build_encoder(whole("llava", f"model.max_tokens={first - 1}"), model, tokenizer)
    message = (
        rf"^sample a/1: tokens: expected at most {first - 1}, found {first}, 36 of them an image's, in the shortest"
    )
    with pytest.raises(DataError, match=message):
        short(long, Draw(0, 0, 0))


def test_what_an_answer_teaches_ends_with_the_end_token(whole: Any, stand_ins: Path) -> None:
    """LLaVA's template ends answers with a blank and no end token; Qwen's with its own and a line's end."""
    for kind, ends in (("llava", "<eos>"), ("qwen2_5_vl", "<|im_end|>")):
        recipe = whole(kind)
        encoder = build_encoder(recipe, built(recipe), build_tokenizer(recipe))
        example = encoder(
            sample("is there a cat ?", "no", "a dog ?", "yes", images=1, stand_ins=stand_ins), Draw(0, 0, 0)
        )
        names = encoder.processor.tokenizer.convert_ids_to_tokens
        learned = [name for name, weight in zip(names(example.tokens), example.weights, strict=True) if weight]
        assert learned == ["no", ends, "yes", ends]
        assert encoder.stops[0] == encoder.processor.tokenizer.convert_tokens_to_ids(ends)


@pytest.mark.parametrize("text", ["what is <image> ?", "<eos> a dog"])
def test_text_that_spells_a_special_token_is_refused(text: str, whole: Any, stand_ins: Path) -> None:
    recipe = whole("llava")
    encoder = build_encoder(recipe, built(recipe), build_tokenizer(recipe))
    with pytest.raises(DataError, match=r"text: expected no special token, found '<(image|eos)>' spelt out"):
        encoder(sample(text, "no", images=1, stand_ins=stand_ins), Draw(0, 0, 0))


def test_samples_are_shown_as_the_model_gets_them(whole: Any, tmp_path: Path) -> None:
    whole("llava")
    arguments = [str(tmp_path / "whole.yaml"), "--samples", "2", "--out", str(tmp_path / "page.html")]
    assert main(["data", "show", *arguments]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count('<span class="chip" title="&lt;image&gt;') >= 36
    assert "template of the checkpoint&#x27;s LlavaProcessor" in page and 'class="learn"' in page


def test_a_trained_model_is_asked_about_a_picture(
    whole: Any, stand_ins: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = whole("llava", FULL, "prune={use: visionzip, keep: 50%}")
    run(recipe, ("train",))  # under the cut
    (tmp_path / "a.png").write_bytes(Store(load_manifest([str(stand_ins / "scenes/test")])).read(0).media[0])
    words = ["is there a cat ?", "--max-new-tokens", "4", FULL, "prune={use: visionzip, keep: 50%}"]
    arguments = [str(tmp_path / "whole.yaml"), str(tmp_path / "a.png"), *words, f"run.dir={tmp_path / 'run'}"]
    capsys.readouterr()
    assert main(["generate", *arguments]) == 0
    assert len(capsys.readouterr().out.split()) <= 4  # a random model may say nothing but special tokens


def test_a_template_that_rewrites_turns_is_refused(whole: Any, stand_ins: Path) -> None:
    recipe = whole("qwen2_5_vl")
    encoder = build_encoder(recipe, built(recipe), build_tokenizer(recipe))
    encoder.processor.chat_template = "{% for m in messages %}{{ loop.revindex }}{{ m.role }}{% endfor %}"
    with pytest.raises(DataError, match="expected a chat template that writes a turn the same whatever follows"):
        encoder(sample("a", "b", stand_ins=stand_ins), Draw(0, 0, 0))


def test_a_composed_model_trains_with_adapters(recipe: Path, train: Any) -> None:
    stage = "{name: one, mix: {scenes: 1}, steps: 4, train: {language: {lora: 2, lr: 1e-2}, connector: {lr: 1e-3}}}"
    overrides = [f"stages=[{stage}]", "run.save.every=2"]
    loaded = load_recipe(recipe, overrides)
    # q, k, v, o: 16 x 16; gate, up, down: 16 x 32; two layers
    assert cells(plan(loaded))["language"][1] == f"lora 2 ({2 * 2 * (4 * 32 + 3 * 48):,} parameters), lr 0.01"
    before = built(loaded).state_dict()
    folder = train(*overrides)
    content = torch.load(folder / "checkpoints/stage0-one-step00000004.ckpt", weights_only=True)["state_dict"]
    after = {name.removeprefix("model."): value for name, value in content.items()}
    assert after.keys() == before.keys()  # a composed model is saved whole
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert all(is_adapter(name) or name.startswith("connector.") for name in changed)
    assert {name for name in after if is_adapter(name)} <= changed


def test_two_ranks_are_one(stand_ins: Path, recipe: Path, ranks: Any, tmp_path: Path) -> None:
    """Vision, connector and adapters of LLaVA over two processes, one of which may see text alone."""
    model = f"model={{from: {stand_ins / 'llava'}}}"
    stage = "{name: one, mix: {scenes: 1}, steps: 2, drop_image: 50%, train: {vision: {lr: 1e-3},"
    stage += " connector: {lr: 1e-3}, language: {lora: 2, lr: 1e-3}}}"
    options = (model, f"stages=[{stage}]", "run.global_batch=4")
    found = []
    for world, micro in ((1, 4), (2, 1)):
        group = ranks(world, *options, f"run.micro_batch={micro}", to=f"world{world}")
        assert group.join(120) == [0] * world, group.output()
        path = tmp_path / f"world{world}/checkpoints/stage0-one-step00000002.ckpt"
        found.append(torch.load(path, weights_only=True)["state_dict"])
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-4)


def test_a_checkpoint_is_calibrated_as_it_is(whole):
    methods = "[{use: act, layers: [1, 1]}, {use: ara}]"
    recipe = whole("llava", "stages=[]", f"evaluate.compare=[{{mitigate: {methods}}}]")
    assert "vlm calibrate`: act, ara." in plan(recipe)
    files = calibrate(recipe, samples=4)
    assert [path.name.split("-")[0] for path in files] == ["act", "ara"]
    heads = contents(files[0], "act").tensors["heads"]
    assert heads.shape == (4, 4) and not heads[[0, 2, 3]].any()
    assert "Found on" not in plan(recipe)
