"""The command line: quick help, one line per mistake, exit codes, and each command handing over to its module."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm import commands
from vlm.commands import main
from vlm.create import names
from vlm.data.errors import DataError

RECIPE = """\
model:
  vision: {use: conv_vit}
  connector: {use: mlp}
  language: {config: {model_type: llama}, tokenizer: d/tokenizer}
data:
  make: {use: scenes, folder: d, train: 12, test: 4, seed: 0}
  sources: {scenes: {shards: d/train}}
stages:
  - sft: {mix: {scenes: 1}, train: {language: {lr: 1e-3}}, steps: 2}
"""


@pytest.fixture(autouse=True)
def in_a_folder_with_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(RECIPE)


def vlm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vlm", *arguments], capture_output=True, text=True)


def failing(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of error of a command that must end with exit code 2."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip("\n")


def test_a_missing_recipe_is_one_line_and_exit_code_2():
    done = vlm("plan", "missing.yaml")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: missing.yaml: there is no recipe 'missing.yaml' here or among the packaged ones\n"


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom vlm.commands import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = ('torch', 'transformers', 'timm', 'lightning', 'pydantic', 'numpy', 'rich', 'yaml')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")
    for name in ("run", "train", "evaluate", "report", "plan", "data", "generate", "methods", "kernels", "doctor"):
        assert f"\n    {name} " in done.stdout


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("rnu", "x.yaml"),
         "rnu is no command of vlm; did you mean 'run'? Known: run, train, evaluate, report, plan, data, "
         "calibrate, generate, export, methods, kernels, doctor"),
        (("data", "mak"), "mak is no command of vlm data; did you mean 'make'? Known: make, pack, make-pairs, index, "
         "index-captions, check, show, score"),
        ((), "the following arguments are required: COMMAND"),
        (("plan",), "the following arguments are required: RECIPE"),
        (("plan", "x.yaml", "--fast"), "--fast is no argument of vlm plan; see vlm plan --help"),
        (("data", "pack", "llava", "f", "--images", "i", "--out", "o"),
         "llava is no command of vlm data pack; did you mean 'llava-json'? Known: llava-json, coco-captions, rlhf-v"),
        (("plan", "x.yaml", "sede=3"), "override sede=3: sede is unknown; did you mean 'seed'? Known: data, evaluate, "
         "kv, mitigate, model, name, prune, recipe, run, seed, stages"),
        (("plan", "x.yaml", "steps"), "override steps: is not of the form key.path=value"),
        (("run", "x.yaml", "prune.use=fastvv"), "override prune.use=fastvv: prune.use fastvv is unknown; did you mean "
         f"'fastv'? Known: {', '.join(names('prune'))}"),
        (("run", "x.yaml", "prune={use: fastv, kep: 1}"),
         "override prune={use: fastv, kep: 1}: prune.kep is unknown; did "
         "you mean 'keep'? Known: debias, keep, layer, position"),
        (("train", "x.yaml", "data.make.train=some"), "override data.make.train=some: data.make.train must be a whole "
         "number such as 20 or 8k, found 'some'"),
        (("data", "make", "x.yaml", "data.make=null"), "x.yaml: data.make is not set, so there is nothing to make"),
        (("data", "make", "scenes", "trian=3"),
         "override trian=3: trian is unknown; did you mean 'train'? Known: folder, "
         "records_per_scene, seed, test, train, workers, world"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]):
    assert failing(capsys, *arguments) == expected
    assert sorted(path.name for path in Path().iterdir()) == ["x.yaml"]


def test_an_unknown_method_in_the_file_names_its_line(capsys: pytest.CaptureFixture[str]):
    Path("x.yaml").write_text(RECIPE + "mitigate: {use: varr}\n")
    assert failing(capsys, "plan", "x.yaml") == (
        f"x.yaml:10: mitigate.use varr is unknown; did you mean 'var'? Known: {', '.join(names('mitigate'))}"
    )


@pytest.mark.parametrize(
    "command, parts",
    [
        ("run", ("data", "train", "evaluate", "report")),
        ("train", ("data", "train")),
        ("evaluate", ("evaluate",)),
    ],
)
def test_the_parts_of_a_run(command: str, parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    calls: list[Any] = []
    monkeypatch.setattr("vlm.run.run", lambda recipe, parts: calls.append((recipe.seed, recipe.run.dir, parts)))
    assert main([command, "x.yaml", "seed=3", "run.dir=elsewhere"]) == 0
    assert calls == [(3, "elsewhere", parts)]


def test_report_writes_the_page_of_the_recipes_run(capsys: pytest.CaptureFixture[str]):
    assert failing(capsys, "report", "x.yaml") == "runs/x: expected the folder of a run, found nothing"
    Path("runs/x").mkdir(parents=True)
    step = {"stage": 0, "name": "sft", "step": 1, "steps": 2, "loss": 1.0, "lr": {}, "samples_per_s": 1.0}
    Path("runs/x/metrics.jsonl").write_text(json.dumps(step) + "\n")
    assert main(["report", "x.yaml"]) == 0
    assert capsys.readouterr().out == "Report: runs/x/report.html\n"
    assert Path("runs/x/report.html").is_file()


def test_plan_prints_what_plan_says_or_the_resolved_recipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("vlm.plan.plan", lambda recipe, gpu: f"the plan of {recipe.name}")
    assert main(["plan", "x.yaml"]) == 0
    assert capsys.readouterr().out == "the plan of x\n"
    assert main(["plan", "x.yaml", "--resolved", "seed=5"]) == 0
    Path("again.yaml").write_text(capsys.readouterr().out)
    assert main(["plan", "again.yaml", "--resolved"]) == 0
    assert capsys.readouterr().out == Path("again.yaml").read_text()
    assert "seed: 5\n" in Path("again.yaml").read_text()


def test_generate_prints_the_answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def answer(recipe: Any, image: Path, prompt: str, max_new_tokens: int) -> str:
        return f"{recipe.seed} {image} {prompt} {max_new_tokens}"

    monkeypatch.setattr("vlm.generate.generate", answer)
    assert main(["generate", "x.yaml", "a.png", "what is this?", "--max-new-tokens", "9", "seed=4"]) == 0
    assert capsys.readouterr().out == "4 a.png what is this? 9\n"


@pytest.mark.parametrize("error, code", [(DataError("a.tar: truncated"), 2), (KeyboardInterrupt(), 130)])
def test_what_stops_a_command(error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys):
    def stop(recipe: Any, gpu: Any) -> str:
        raise error

    monkeypatch.setattr("vlm.plan.plan", stop)
    assert main(["plan", "x.yaml"]) == code
    assert capsys.readouterr().err == {2: "error: a.tar: truncated\n", 130: "interrupted\n"}[code]


def test_a_fault_of_ours_is_no_user_error(monkeypatch: pytest.MonkeyPatch):
    def fault(recipe: Any, gpu: Any) -> str:
        raise ValueError("of the program")

    monkeypatch.setattr("vlm.plan.plan", fault)
    with pytest.raises(ValueError, match="of the program"):
        main(["plan", "x.yaml"])


def test_every_user_error_is_known_by_its_name():
    from importlib import import_module

    for name in commands.USER_ERRORS:
        module, _, kind = name.rpartition(".")
        found = getattr(import_module(module), kind)
        assert commands._is_user_error(found("x"))
    assert not commands._is_user_error(ValueError("x"))


def test_data_made_checked_indexed_and_shown(capsys: pytest.CaptureFixture[str]):
    assert main(["data", "make", "x.yaml", "data.make.train=10"]) == 0
    assert capsys.readouterr().out == "d\n"
    assert main(["data", "check", "d/train", "d/test"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["data", "index", "d/train"]) == 0
    assert capsys.readouterr().out.startswith("10 samples in 1 shards, hash ")
    assert main(["data", "show", "x.yaml", "--samples", "3", "--out", "page/s.html", "seed=1"]) == 0
    assert capsys.readouterr().out == "page/s.html\n"
    page = Path("page/s.html").read_text()
    assert page.count("<article>") == 3
    assert page.count("data:image/png;base64,") == 3


def test_a_maker_takes_its_own_options(capsys: pytest.CaptureFixture[str]):
    # The rest comes from the packaged recipe of its name.
    assert main(["data", "make", "scenes", "folder=own", "train=5", "test=3"]) == 0
    assert capsys.readouterr().out == "own\n"
    stamp = json.loads(Path("own/scenes.json").read_text())
    assert (stamp["arguments"]["train"], stamp["arguments"]["test"]) == (5, 3)


def test_check_prints_one_line_per_problem(capsys: pytest.CaptureFixture[str]):
    Path("bad.tar").write_bytes(b"no tar at all")
    assert main(["data", "check", "bad.tar", "absent"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["bad.tar", "absent"]


def pictures() -> None:
    Path("images").mkdir()
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (4, 4), colour).save(Path("images", name))


def test_pack_llava_json(capsys: pytest.CaptureFixture[str]):
    pictures()
    turns = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "red"}]
    records = [
        {"id": "1", "image": "a.png", "conversations": turns},
        {"id": "2", "image": "c.png", "conversations": turns},
    ]
    Path("l.json").write_text(json.dumps(records))
    pack = ["data", "pack", "llava-json", "l.json", "--images", "images", "--out", "out"]
    assert "c.png" in failing(capsys, *pack)
    assert failing(capsys, *pack, "on_bda=skip").startswith(
        "override on_bda=skip: on_bda is unknown; did you mean 'on_bad'?"
    )
    assert main([*pack, "on_bad=skip"]) == 0
    assert capsys.readouterr().out == "out: 1 samples in 1 shards\n"
    assert main(["data", "check", "out"]) == 0


def test_pack_coco_captions(capsys: pytest.CaptureFixture[str]):
    pictures()
    images = [{"id": n, "file_name": name} for n, name in enumerate(("a.png", "b.png"))]
    captions = [{"id": 10 + n, "image_id": n // 2, "caption": f"caption {n}"} for n in range(3)]
    Path("c.json").write_text(json.dumps({"images": images, "annotations": captions}))
    pack = ["data", "pack", "coco-captions", "c.json", "--images", "images", "--out"]
    assert main([*pack, "all"]) == 0
    assert main([*pack, "one", "per=image", "prompt=What is it?"]) == 0
    assert capsys.readouterr().out == "all: 3 samples in 1 shards\none: 2 samples in 1 shards\n"


def test_methods_as_json_and_as_a_table(capsys: pytest.CaptureFixture[str]):
    assert main(["methods", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert {"divprune", "fastv", "random", "stride", "var", "m3id", "pope", "chair"} <= {e["name"] for e in entries}
    assert all({"kind", "name", "source", "verified"} <= entry.keys() for entry in entries)
    assert main(["methods"]) == 0
    table = capsys.readouterr().out
    assert all(entry["name"] in table for entry in entries)


def test_kernels_and_doctor_say_what_is_here(capsys: pytest.CaptureFixture[str]):
    assert main(["kernels", "--device", "cpu"]) == 0
    assert "grouped_mass_attention: torch\n" in capsys.readouterr().out
    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    assert f"{sys.version_info.major}.{sys.version_info.minor}." in report
    assert "transformers" in report
