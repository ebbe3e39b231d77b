"""What a recipe says once it is read: units, shorthands, parents, overrides, and what its identity depends on."""

from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from vlm.recipe import Recipe, load_recipe
from vlm.recipe.tree import dump, parse
from vlm.recipe.units import natural

WHOLE = """\
recipe: 1
seed: 17
model:
  vision: {timm: vit_tiny, layer: -2}
  connector: {kind: mlp, depth: 2}
  language: {config: {model_type: llama, hidden_size: 64, rope_theta: 1e4, tie: true, note: on}}
prune: {use: fastv, keep: 25%, layer: 2, schedule: {from: 100%, over: 20%}}
mitigate: {use: var, layers: [5, 18]}
data:
  make: {use: scenes, folder: d}
  sources:
    caps: {shards: "caps/{000..003}.tar"}
    chat: {shards: [a.tar, b.tar]}
stages:
  - align: {mix: {caps: 1}, train: {connector: {lr: 1e-3}}, tokens: 300M}
  - sft:
      mix: {caps: 3, chat: 7}
      train: {connector: {lr: 2e-5}, language: {lr: 2e-6, weight_decay: 0.1}}
      samples: 20k
      schedule: {use: linear, warmup: 3%}
evaluate:
  benchmarks: {chair: {limit: 5}, yes_no: {use: pope}}
  compare:
    - {}
    - {prune: {use: fastv, keep: 1}, mitigate: [var, {use: m3id}]}
    - {prune: stride, label: half}
run: {global_batch: 64, micro_batch: 8}
"""


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str, *overrides: str) -> Recipe:
    Path("whole.yaml").write_text(text)
    return load_recipe("whole.yaml", overrides)


def test_units_and_defaults():
    recipe = load(WHOLE)
    align, sft = recipe.stages
    assert (align.tokens, align.steps, sft.samples) == (300_000_000, None, 20_000)
    assert (sft.train["language"].lr, sft.train["language"].weight_decay) == (2e-6, 0.1)
    assert (sft.schedule.use, sft.schedule.warmup, sft.schedule.final) == ("linear", 0.03, 0.0)
    assert (align.clip, align.betas, align.drop_image) == (1.0, (0.9, 0.999), 0.0)
    assert (recipe.name, recipe.run.dir, recipe.run.resume) == ("whole", "runs/whole", "auto")
    assert recipe.data.on_bad_sample.skip == 0.001
    assert recipe.data.sources["caps"].shards == ("caps/{000..003}.tar",)
    assert recipe.data.sources["chat"].shards == ("a.tar", "b.tar")
    assert recipe.prune is not None
    assert recipe.prune.schedule is not None
    assert (recipe.prune.schedule.start, recipe.prune.schedule.over) == (1.0, 0.2)


def test_a_hugging_face_config_has_natural_types():
    config = load(WHOLE).model.language.config
    assert config == {"model_type": "llama", "hidden_size": 64, "rope_theta": 1e4, "tie": True, "note": "on"}


def test_shorthands_are_written_out():
    recipe = load(WHOLE)
    assert recipe.model.vision.plain() == {"use": "timm", "name": "vit_tiny", "layer": "-2"}
    assert recipe.model.connector.plain() == {"use": "mlp", "depth": "2"}
    assert recipe.model.language.use == "config"
    assert [stage.name for stage in recipe.stages] == ["align", "sft"]
    assert recipe.stages[0].objective.use == "chat"
    assert {label: method.use for label, method in recipe.evaluate.benchmarks.items()} == {
        "chair": "chair",
        "yes_no": "pope",
    }
    assert [method.use for method in recipe.mitigate] == ["var"]


def test_options_keep_their_text_and_their_place():
    prune = load(WHOLE, "prune.layer=3").prune
    assert prune is not None
    assert prune.options == {"keep": "25%", "layer": "3"}
    assert {str(key): (key.where, key.path) for key in prune.options} == {
        "keep": ("whole.yaml:7", "prune.keep"),
        "layer": ("override prune.layer=3", "prune.layer"),
    }
    assert prune.record() == {"use": "fastv", "keep": "25%", "layer": 3, "schedule": {"from": 1.0, "over": 0.2}}


def test_the_rows_of_the_evaluation():
    recipe = load(WHOLE)
    assert [row.title for row in recipe.comparisons] == ["plain", "fastv 1 + var + m3id", "half"]
    own = load(WHOLE, "evaluate.compare=[]")
    assert [(row.prune, row.mitigate) for row in own.comparisons] == [(own.prune, own.mitigate)]


def test_every_method_is_listed_with_its_kind():
    assert [(kind, str(method.use)) for kind, method in load(WHOLE).methods()] == [
        ("vision", "timm"),
        ("connector", "mlp"),
        ("objective", "chat"),
        ("objective", "chat"),
        ("make", "scenes"),
        ("benchmark", "chair"),
        ("benchmark", "pope"),
        ("prune", "fastv"),
        ("mitigate", "var"),
        ("prune", "fastv"),
        ("mitigate", "var"),
        ("mitigate", "m3id"),
        ("prune", "stride"),
    ]


@pytest.mark.parametrize(
    "override, found",
    [
        ("stages.0.tokens=2k", lambda r: r.stages[0].tokens == 2000),
        ("stages.sft.samples=5", lambda r: r.stages[1].samples == 5),
        ("prune=null", lambda r: r.prune is None),
        ("prune=divprune", lambda r: r.prune.plain() == {"use": "divprune"}),
        ("prune={use: divprune, keep: 64}", lambda r: r.prune.options == {"keep": "64"}),
        ("prune.use=stride", lambda r: (r.prune.use, r.prune.options["keep"]) == ("stride", "25%")),
        ("mitigate=[var, m3id]", lambda r: [m.use for m in r.mitigate] == ["var", "m3id"]),
        ("mitigate.use=m3id", lambda r: [m.use for m in r.mitigate] == ["m3id"]),
        ("mitigate=null", lambda r: r.mitigate == ()),
        ("model.vision.timm=vit_base", lambda r: r.model.vision.options == {"name": "vit_base", "layer": "-2"}),
        ("model.language={hf: some/llm}", lambda r: (r.model.language.use, r.model.language.config) == ("hf", None)),
        ("data.sources.chat.shards=c.tar", lambda r: r.data.sources["chat"].shards == ("c.tar",)),
        ("data.on_bad_sample.skip=1%", lambda r: r.data.on_bad_sample.skip == 0.01),
        ("stages.0.clip=null", lambda r: r.stages[0].clip is None),
        ("stages.0.drop_image=null", lambda r: r.stages[0].drop_image == 0),
        ("stages.1.train.language=null", lambda r: list(r.stages[1].train) == ["connector"]),
        ("run.dir=/x/a=b", lambda r: r.run.dir == "/x/a=b"),
        ("run.resume=true", lambda r: r.run.resume == "auto"),
        ("run.resume=false", lambda r: r.run.resume == "never"),
        ("run.resume=a/b.ckpt", lambda r: r.run.resume == "a/b.ckpt"),
        ("name=012", lambda r: (r.name, r.run.dir) == ("012", "runs/012")),
    ],
)
def test_overrides(override: str, found):
    assert found(load(WHOLE, override))


def test_later_overrides_win_and_the_file_stays():
    assert load(WHOLE, "seed=1", "seed=2").seed == 2
    assert load(WHOLE).seed == 17


def test_extends_merges_mappings_and_replaces_lists_and_scalars():
    Path("base").mkdir()
    Path("base/parent.yaml").write_text(WHOLE.replace("seed: 17", "name: parent\nseed: 17"))
    recipe = load(
        "extends: base/parent\n"
        "data: {workers: 3, sources: {chat: {shards: c.tar}}}\n"
        "stages: [only: {mix: {chat: 1}, train: {language: {lr: 1}}, steps: 5}]\n"
        "run: {micro_batch: null}\n"
    )
    assert (recipe.seed, recipe.data.workers, recipe.run.global_batch, recipe.run.micro_batch) == (17, 3, 64, None)
    assert {name: source.shards for name, source in recipe.data.sources.items()} == {
        "caps": ("caps/{000..003}.tar",),
        "chat": ("c.tar",),
    }
    assert [stage.name for stage in recipe.stages] == ["only"]
    assert (recipe.name, recipe.run.dir) == ("whole", "runs/whole")


def test_precedence_grandparent_parent_child_override():
    Path("a.yaml").write_text(WHOLE.replace("seed: 17", "seed: 1\nrun_is_below: 0").replace("run_is_below: 0\n", ""))
    Path("b.yaml").write_text("extends: a\nseed: 2\nrun: {log_every: 2, devices: 1}\n")
    child = "extends: b\nseed: 3\nrun: {log_every: 3}\n"
    recipe = load(child, "seed=4")
    assert (recipe.seed, recipe.run.log_every, recipe.run.global_batch) == (4, 3, 64)
    assert load(child).seed == 3
    assert load_recipe("b").seed == 2
    assert load_recipe("a").seed == 1


def test_another_method_does_not_inherit_the_options_of_the_parents():
    Path("parent.yaml").write_text(WHOLE)
    other = load("extends: parent\nprune: {use: divprune, keep: 50%}\n").prune
    same = load("extends: parent\nprune: {use: fastv, keep: 50%}\n").prune
    cleared = load("extends: parent\nprune: null\n").prune
    assert other is not None
    assert same is not None
    assert other.plain() == {"use": "divprune", "keep": "50%"}
    assert same.options == {"keep": "50%", "layer": "2"}
    assert cleared is None


def test_the_dump_loads_to_an_equal_recipe():
    recipe = load(WHOLE, "prune.version=1.10", "prune.text='1.10'", "prune.word=on")
    Path("again.yaml").write_text(recipe.to_yaml())
    again = load_recipe("again.yaml")
    assert again == recipe
    assert again.hash() == recipe.hash()
    assert again.to_yaml() == recipe.to_yaml()
    assert 'version: 1.10\n  text: "1.10"\n  word: on\n' in recipe.to_yaml()
    # A mitigator alone stays a mapping, so the dotted names of the file hold for the resolved one too.
    assert load_recipe("again.yaml", ["mitigate.use=m3id"]).mitigate[0].use == "m3id"


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8
)


@example({"": "*", "a": "&", "b": "!"})
@given(st.dictionaries(st.text(), trees, max_size=4).filter(lambda tree: "<<" not in str(tree)))
def test_what_is_dumped_is_read_back(tree):
    assert natural(parse(dump(tree), "x")) == tree


def test_the_hash_knows_content_not_spelling():
    recipe = load(WHOLE)
    lines = WHOLE.splitlines()
    turned = "\n".join(
        ["# a comment", *lines[1:2], *lines[0:1], *lines[2:-1], "run: {micro_batch: 8, global_batch: 64}"]
    )
    spelled = (
        turned.replace("{kind: mlp, depth: 2}", "{depth: 2, use: mlp}").replace("20k", "20000").replace("3%", "0.03")
    )
    assert spelled != WHOLE
    assert load(spelled).hash() == recipe.hash()
    assert load(WHOLE, "seed=18").hash() != recipe.hash()


# Where a run is, how it is shared out and what is looked at afterwards leaves the weights as they are.
@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "data.workers=5",
        "run.dir=elsewhere",
        "run.resume=never",
        "run.save.every=7",
        "run.trace_samples=true",
        "run.micro_batch=4",
        "run.log_every=1",
        "run.threads=1",
        "run={global_batch: 64, devices: 2, parallel: ddp}",
        "evaluate=null",
        "evaluate.batch=3",
    ],
)
def test_identity_ignores(override: str):
    plain, changed = load(WHOLE), load(WHOLE, override)
    assert changed.identity() == plain.identity()
    assert changed.identity_hash() == plain.identity_hash()
    assert changed.hash() != plain.hash()


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "stages.0.tokens=1",
        "run.global_batch=32",
        "run.precision=bf16",
        "prune.keep=50%",
        "prune=null",
        "data.sources.caps.shards=x.tar",
        "model.vision.layer=-1",
        "data.on_bad_sample.skip=0",
    ],
)
def test_identity_notices(override: str):
    assert load(WHOLE, override).identity_hash() != load(WHOLE).identity_hash()


def test_a_copy_keeps_its_places():
    # Copies go through the protocol that carries a recipe to other processes.
    recipe = load(WHOLE)
    copy = deepcopy(recipe)
    assert copy == recipe
    assert copy.prune is not None
    assert copy.prune is not recipe.prune
    assert copy.prune.where == "whole.yaml:7"


def test_the_text_is_not_what_pyyaml_would_guess():
    guessed = yaml.safe_load("{a: 2e-6, b: on, c: 1:30, d: 012}")
    assert guessed == {"a": "2e-6", "b": True, "c": 90, "d": 10}
    assert parse("{a: 2e-6, b: on, c: 1:30, d: 012}", "x") == {"a": "2e-6", "b": "on", "c": "1:30", "d": "012"}


FROM = "name: x\nmodel: {from: some/vlm}\ndata: {sources: {a: {shards: b}}}\n"


def test_a_whole_model_in_every_spelling(tmp_path):
    path = tmp_path / "x.yaml"
    recipes = []
    for spelling in ("some/vlm", "{hf: some/vlm}", "{use: hf, name: some/vlm}"):
        path.write_text(FROM.replace("some/vlm", spelling))
        recipes.append(load_recipe(path))
    path.write_text(recipes[0].to_yaml())
    assert len({recipe.hash() for recipe in (*recipes, load_recipe(path))}) == 1
    assert recipes[0].model.origin is not None and recipes[0].model.origin.name == "some/vlm"
    assert recipes[0].stages == () and recipes[0].model.template is None
    for override in ("model.from=other", "model.from.hf=other", "model.from.name=other", "model={from: other}"):
        assert load_recipe(path, [override]).model.origin.name == "other"


def test_an_adapter_has_twice_its_rank_as_alpha(tmp_path):
    path = tmp_path / "x.yaml"
    train = "{language: {lora: 8, lr: 1}, vision: {lr: 1}}"
    path.write_text(f"{FROM}stages: [{{s: {{mix: {{a: 1}}, steps: 1, train: {train}}}}}]")
    found = load_recipe(path).stages[0].train
    assert (found["language"].adapter, found["vision"].adapter) == ((8, 16.0, 0.0), None)
    given = load_recipe(path, ["stages.0.train.language={lora: 8, lr: 1, alpha: 4, dropout: 0.05}"]).stages[0].train
    assert given["language"].adapter == (8, 4.0, 0.05)
