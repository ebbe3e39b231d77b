"""Every mistake in a recipe is one line that names the file, the line, the key, and what would have been right."""

from pathlib import Path

import pytest

from vlm.recipe import RecipeError, load_recipe

GOOD = """\
recipe: 1
seed: 17
model:
  vision: {timm: vit_tiny, layer: -2}
  connector: {kind: mlp, depth: 2}
  language: {hf: some/llm}
data:
  sources:
    caps: {shards: "caps/*.tar"}
stages:
  - align:
      mix: {caps: 1}
      train: {connector: {lr: 1e-3}}
      steps: 100
run:
  global_batch: 32
"""

STAGE_KEYS = (
    "betas, clip, drop_image, global_batch, mix, name, objective, pack, repeat, samples, schedule, steps, tokens, train"
)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def message(text: str | bytes, *overrides: str) -> str:
    Path("x.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as error:
        load_recipe("x.yaml", overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_recipe_that_the_mistakes_are_made_in_is_good():
    Path("x.yaml").write_text(GOOD)
    assert load_recipe("x.yaml").stages[0].steps == 100


@pytest.mark.parametrize(
    "right, wrong, expected",
    [
        ("steps: 100", "stpes: 100",
         f"x.yaml:14: stages.0.stpes is unknown; did you mean 'steps'? Known: {STAGE_KEYS}"),
        ("seed: 17", "sede: 17", "x.yaml:2: sede is unknown; did you mean 'seed'? Known: data, evaluate, kv, "
         "mitigate, model, name, prune, recipe, run, seed, stages"),
        ("steps: 100", "steps: many",
         "x.yaml:14: stages.0.steps must be a whole number such as 20 or 8k, found 'many'"),
        ("steps: 100", "steps: 012",
         "x.yaml:14: stages.0.steps must be a whole number such as 20 or 8k, found '012'"),
        ("steps: 100", "steps: 1:30",
         "x.yaml:14: stages.0.steps must be a whole number such as 20 or 8k, found '1:30'"),
        ("steps: 100", "steps: [1]",
         "x.yaml:14: stages.0.steps must be a whole number such as 20 or 8k, found a list"),
        ("steps: 100", "steps: 0", "x.yaml:14: stages.0.steps must be at least 1, found 0"),
        ("steps: 100", "", "x.yaml:11: stages.0 has no length; give one of steps, samples, tokens"),
        ("steps: 100", "steps: 100\n      samples: 8k",
         "x.yaml:15: stages.0.samples stands beside steps; give only one of steps, samples, tokens"),
        ("{caps: 1}", "{cap: 1}", "x.yaml:12: stages.0.mix.cap is unknown; did you mean 'caps'? Known: caps"),
        ("{caps: 1}", "{caps: 0}", "x.yaml:12: stages.0.mix.caps must be a weight above 0, found 0"),
        ("{caps: 1}", "{}", "x.yaml:12: stages.0.mix is empty; give at least one source and its weight"),
        ("train: {connector: {lr: 1e-3}}", "train: {}",
         "x.yaml:13: stages.0.train is empty, so nothing would train; name vision, connector or language"),
        ("train: {connector: {lr: 1e-3}}", "train: {conector: {lr: 1e-3}}",
         "x.yaml:13: stages.0.train.conector must be 'vision', 'connector', 'language' or 'head', found 'conector'; "
         "did you mean 'connector'?"),
        ("lr: 1e-3", "lr: fast",
         "x.yaml:13: stages.0.train.connector.lr must be a number such as 0.1 or 2e-6, found 'fast'"),
        ("lr: 1e-3", "lr: -1e-3", "x.yaml:13: stages.0.train.connector.lr must be above 0, found -1e-3"),
        ("{lr: 1e-3}", "1e-3", "x.yaml:13: stages.0.train.connector must be a mapping, found '1e-3'"),
        ("{hf: some/llm}", "{}", "x.yaml:6: model.language.use is missing"),
        ("{hf: some/llm}", "{use: hf}", "x.yaml:6: model.language uses 'hf' and so needs 'name'"),
        ("{hf: some/llm}", "{use: confg, name: x}",
         "x.yaml:6: model.language.use must be 'hf' or 'config', found 'confg'; did you mean 'config'?"),
        ("  connector: {kind: mlp, depth: 2}\n", "",
         "x.yaml:3: model.connector is missing; a model has vision, connector and language, or is `from` a checkpoint"),
        ("global_batch: 32", "global_batch: 32\n  micro_batch: 5",
         "x.yaml:17: run.micro_batch is 5, which does not divide global_batch / devices = 32; "
         "legal: 1, 2, 4, 8, 16, 32"),
        ("global_batch: 32", "global_batch: 32\n  devices: 3\n  parallel: ddp",
         "x.yaml:17: run.devices is 3, which does not divide global_batch 32; legal: 1, 2, 4, 8, 16, 32"),
        ("global_batch: 32", "global_batch: 32\n  devices: 2\n  parallel: single",
         "x.yaml:18: run.parallel is single, but run.devices is 2; use ddp or fsdp2"),
        ("global_batch: 32", "parallel: dpp",
         "x.yaml:16: run.parallel must be 'single', 'ddp', 'fsdp2', 'zero1', 'zero2' or 'zero3', found 'dpp'; did you "
         "mean 'ddp'?"),
        ("global_batch: 32", "trace_samples: on", "x.yaml:16: run.trace_samples must be true or false, found 'on'"),
        ("recipe: 1", "recipe: 2", "x.yaml:1: recipe must be 1, found 2"),
        ("seed: 17", "seed: 17\nseed: 18", "x.yaml:3: seed is given twice, first at x.yaml:2"),
        ("seed: 17", "seed: !!python/name:os.system ''", "x.yaml:2: tag tag:yaml.org,2002:python/name:os.system is "
         "refused; a recipe holds only plain data"),
        ("seed: 17", "name: a/../../b", "x.yaml:2: name must be letters, digits and . _ - only, found 'a/../../b'"),
        ("seed: 17", "? [a]\n: 1", "x.yaml:2: a key must be a word, found a list or mapping"),
        ("seed: 17", "<<: {seed: 3}", "x.yaml:2: the merge key << is not read; write the keys or use extends"),
        ("seed: 17", "extends: nowhere",
         "x.yaml:2: extends: there is no recipe 'nowhere' here or among the packaged ones"),
        ("seed: 17", "extends: x", "x.yaml:2: extends 'x' goes round in a circle"),
        ("seed: 17", "extends: [a, b]", "x.yaml:2: extends must name one parent, found a list"),
        ("seed: 17", "prune: {keep: 1}", "x.yaml:2: prune.use is missing"),
        ("seed: 17", "prune: {use: [a]}", "x.yaml:2: prune.use must be text, found a list"),
        ("seed: 17", "prune: {use: a, schedule: {form: 1}}",
         "x.yaml:2: prune.schedule.form is unknown; did you mean 'from'? Known: from, over"),
        ("seed: 17", "mitigate: [var, 3, {layer: 2}]", "x.yaml:2: mitigate.2.use is missing"),
        ("seed: 17", "evaluate: {compare: {}}", "x.yaml:2: evaluate.compare must be a list, found a mapping"),
        ("seed: 17", "seed: [1", "x.yaml:3: is not YAML: expected ',' or ']', but got ':'"),
        ("    caps: {", "    caps: {reader: chat-v1, shards: []}\n    more: {",
         "x.yaml:9: data.sources.caps.shards is empty; "
         "give at least one"),
        ("      steps: 100\n", "      steps: 100\n  - align: {mix: {caps: 1}, train: {connector: {lr: 1}}, steps: 1}\n",
         "x.yaml:15: stages.1.name is 'align', the name of an earlier stage"),
        ("      steps: 100\n", "      steps: 100\n      name: sft\n",
         "x.yaml:11: stage align has a second name, 'sft'"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file(right: str, wrong: str, expected: str):
    assert right in GOOD
    assert message(GOOD.replace(right, wrong)) == expected


FROM = """\
name: x
model: {from: some/vlm}
data: {sources: {caps: {shards: caps}}}
stages:
  - one: {mix: {caps: 1}, steps: 3, train: {language: {lora: 8, lr: 1e-4}}}
  - two: {mix: {caps: 1}, steps: 3, train: {language: {lora: 8, lr: 1e-4}, vision: {lr: 1e-5}}}
"""
BESIDE = "stands beside model.from, which brings its own; set it to null or leave it out"


@pytest.mark.parametrize(
    "override, expected",
    [
        ("model.vision=conv_vit", f"model.vision {BESIDE}"),
        ("model.language={hf: x}", f"model.language {BESIDE}"),
        ("model.template=vicuna", f"model.template {BESIDE}"),
        ("model.image.tiling=anyres", f"model.image {BESIDE}"),
        ("model.from=[a]", "model.from must be a mapping, found a list"),
        ("model.from={timm: x}", "model.from.use must be 'hf', found 'timm'"),
        ("stages.0.train.language.lora=0", "stages.0.train.language.lora must be at least 1, found 0"),
        ("stages.0.train.language.dropout=1", "stages.0.train.language.dropout must be below 1, found 1"),
        ("stages.1.train.vision.alpha=4",
         "stages.1.train.vision.alpha is of an adapter; give its rank with lora"),
        ("stages.1.train.language.lora=4",
         "stages.1.train.language.lora is another adapter than that of stage one; lora, alpha and dropout must agree"),
    ],
)  # fmt: skip
def test_a_mistake_about_a_whole_model_or_adapters(override: str, expected: str):
    assert message(FROM, override) == f"override {override}: {expected}"


@pytest.mark.parametrize(
    "override, expected",
    [
        ("stages.0.stpes=60", f"stages.0.stpes is unknown; did you mean 'steps'? Known: {STAGE_KEYS}"),
        ("stages.1.steps=60", "stages has 1 entries, counted from 0; 1 is none of them"),
        ("stages.alig.steps=60", "stages.alig is unknown; did you mean 'align'? Known: 0, align"),
        ("stages.0.steps=fast", "stages.0.steps must be a whole number such as 20 or 8k, found 'fast'"),
        ("stages=[]", "stages is empty; give at least one"),
        ("stages=null", "stages is missing"),
        ("seed.x=1", "seed is '17', which has no keys"),
        ("seed", "is not of the form key.path=value"),
        ("=1", "is not of the form key.path=value"),
        ("run..dir=x", "has an empty name in its path; expected key.path=value"),
        ("seed=[1", "is not YAML: expected ',' or ']', but got '<stream end>'"),
        ("extends=y", "extends belongs in a file"),
    ],
)
def test_a_mistake_on_the_command_line(override: str, expected: str):
    assert message(GOOD, override) == f"override {override}: {expected}"


def test_a_mistake_in_a_parent_names_the_parents_line():
    Path("base").mkdir()
    Path("base/classic.yaml").write_text(GOOD.replace("steps: 100", "stpes: 100"))
    found = message("extends: base/classic\nseed: 3\n")
    assert found.startswith("base/classic.yaml:14: stages.0.stpes is unknown; did you mean 'steps'?")


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "x.yaml: must be a mapping of keys, found nothing"),
        (b"- a\n", "x.yaml: must be a mapping of keys, found a list"),
        (b"a: \xff\n", "x.yaml: is not UTF-8 text (byte 3)"),
        (b"a: 1\n---\nb: 2\n", "x.yaml:2: is not YAML: but found another document"),
        (b"a: \x07\n", "x.yaml: is not YAML:"),
        (b"a: " + b"[" * 60 + b"]" * 60, "x.yaml:1: is nested too deeply or repeats itself through anchors"),
        (b"a: " + b"[" * 5000, "x.yaml: is nested too deeply"),
        (b"a: &a [*a]\n", "x.yaml:1: is nested too deeply or repeats itself through anchors"),
        (b"# " + b"x" * 1_000_000, "x.yaml: is 1000002 bytes long; a recipe has at most 1000000"),
    ],
)
def test_a_file_that_is_no_recipe(content: bytes, expected: str):
    assert message(content).startswith(expected)


def test_anchors_that_multiply_are_stopped():
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert "repeats itself through anchors" in message("\n".join(levels))


def test_a_missing_file_suggests_the_nearest():
    Path("scene-small.yaml").write_text(GOOD)
    with pytest.raises(RecipeError) as error:
        load_recipe("scene-smal.yaml")
    assert str(error.value) == (
        "scene-smal.yaml: there is no recipe 'scene-smal.yaml' here or among the packaged ones; "
        "did you mean 'scene-small'?"
    )
