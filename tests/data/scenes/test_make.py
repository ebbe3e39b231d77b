"""The data set on disk: read back through the shards, the tokenizer and the benchmarks themselves."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm.data.benchmarks._shared.images import ImageSource
from vlm.data.benchmarks._shared.objects import Vocabulary
from vlm.data.benchmarks.chair import Chair
from vlm.data.benchmarks.pope import Pope, recall_spread
from vlm.data.errors import DataError
from vlm.data.index import load_manifest
from vlm.data.scenes.make import make
from vlm.data.scenes.render import render
from vlm.data.scenes.world import Scene
from vlm.data.store import Store

COUNTS = {"train": 50, "test": 40, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("data") / "scenes", **COUNTS)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def samples(folder: Path, split: str) -> list:
    return list(Store(load_manifest(folder / split)))


def chair(folder: Path, split: str) -> Chair:
    name = "chair.json" if split == "test" else f"chair_{split}.json"
    files = folder / "benchmarks"
    return Chair(str(files / name), str(folder / split), synonyms=str(files / "synonyms.txt"))


def test_splits_have_the_records_asked_for(folder):
    assert {p.name for p in folder.iterdir()} == {
        "scenes.json", "train", "test", "counterfactual", "tokenizer", "benchmarks",
    }  # fmt: skip
    for split, count in (("train", 50), ("test", 40), ("counterfactual", 40)):
        assert [s.key for s in samples(folder, split)] == [f"{split}/{k:06d}" for k in range(count)]


def test_meta_regenerates_the_pixels_of_every_record(folder):
    for split in ("train", "test", "counterfactual"):
        for sample in samples(folder, split):
            scene = Scene.from_meta(sample.meta)
            assert scene.split == split
            assert sample.tags == scene.names
            with Image.open(io.BytesIO(sample.media[0])) as image:
                assert np.array_equal(np.asarray(image), render(scene))


def test_every_answer_of_the_shards_is_true(folder):
    words = Vocabulary.read(folder / "benchmarks" / "synonyms.txt")
    for split in ("train", "test", "counterfactual"):
        for sample in samples(folder, split):
            prompt, answer = sample.messages[0].content[1].text, sample.messages[1].content[0].text
            asked = {m.object for m in words.mentions(prompt)}
            said = {m.object for m in words.mentions(answer)}
            present = set(sample.tags)
            if asked:
                assert answer == ("yes" if asked <= present else "no")
            else:
                assert said <= present if "briefly" in prompt else said == present
            assert split == "train" or not asked


def test_training_and_test_scenes_are_apart(folder):
    seeds = [{s.meta["seed"] for s in samples(folder, split)} for split in ("train", "test", "counterfactual")]
    assert [len(one) for one in seeds] == [50, 40, 40]
    assert not seeds[0] & seeds[1]
    assert seeds[1] == seeds[2]  # a counterfactual scene is a test scene, changed


def test_reference_captions_are_perfect_for_chair(folder):
    for split in ("test", "counterfactual"):
        answers = {s.key: s.messages[1].content[0].text for s in samples(folder, split)}
        scores = chair(folder, split).score(answers)[""]
        assert (scores["chair_s"], scores["chair_i"], scores["recall"], scores["n"]) == (0.0, 0.0, 1.0, 40)


def test_captions_of_the_original_hallucinate_on_the_counterfactual(folder):
    captions = [s.messages[1].content[0].text for s in samples(folder, "test")]
    answers = {f"counterfactual/{k:06d}": caption for k, caption in enumerate(captions)}
    scores = chair(folder, "counterfactual").score(answers)[""]
    expected = [Scene.from_meta(s.meta) for s in samples(folder, "test")]
    # wrong exactly where slot 0 or 1 of the context was there to be taken away
    had = np.mean([any(o.cls // 4 == s.objects[0].cls // 4 and o.cls % 4 < 2 for o in s.objects) for s in expected])
    assert scores["chair_s"] == pytest.approx(had)


def test_pope_is_answered_from_the_truth(folder):
    files = folder / "benchmarks"
    pope = Pope([str(files / f"pope_{s}.json") for s in ("random", "popular", "adversarial")], str(folder / "test"))
    truth = {f"{key}.png": names for key, names in json.loads((files / "chair.json").read_text()).items()}
    words = Vocabulary.read(files / "synonyms.txt")
    answers = {}
    for question in pope.ask():
        [mention] = words.mentions(question.prompt)
        answers[question.id] = "yes" if mention.object in truth[question.image] else "no"
    scores = pope.score(answers)
    assert {v["accuracy"] for v in scores.values()} == {1.0}
    assert {v["n"] for v in scores.values()} == {240}
    assert recall_spread(scores) == 0


def test_every_question_finds_its_picture(folder):
    for split in ("test", "counterfactual"):
        source = ImageSource(folder / split)
        assert all(source.read(q.image).startswith(b"\x89PNG") for q in chair(folder, split).ask())
    pope = Pope([str(folder / "benchmarks" / "pope_random.json")], str(folder / "test"))
    assert ImageSource(pope.images).read(pope.ask()[0].image).startswith(b"\x89PNG")


def test_same_bytes_for_any_number_of_workers(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("vlm.data.scenes.make.SCENES_PER_BATCH", 4)  # more batches than wait at a time
    assert contents(make(tmp_path / "scenes", **COUNTS, workers=2)) == contents(folder)


def test_same_arguments_do_nothing_and_others_make_it_anew(tmp_path):
    calls = []
    arguments = {"train": 3, "test": 4, "seed": 0}
    folder = make(tmp_path / "s", **arguments, progress=lambda *done: calls.append(done))
    assert calls == [(3, 11), (7, 11), (11, 11)]
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    make(folder, **arguments, progress=lambda *done: calls.append(done))
    assert len(calls) == 3
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    make(folder, **{**arguments, "seed": 1})
    assert len(samples(folder, "train")) == 3
    assert json.loads((folder / "scenes.json").read_text())["arguments"]["seed"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_an_interrupted_remake_leaves_the_old_one_whole(tmp_path):
    folder = make(tmp_path / "s", train=3, test=4, seed=0)
    before = contents(folder)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(folder, train=3, test=4, seed=1, progress=stop)
    assert contents(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_records_share_a_scene(tmp_path):
    folder = make(tmp_path / "s", train=7, test=4, seed=0, records_per_scene=3)
    seeds = [s.meta["seed"] for s in samples(folder, "train")]
    assert seeds == [seeds[0]] * 3 + [seeds[3]] * 3 + [seeds[6]]
    assert len(set(seeds)) == 3


def test_both_arms_are_judged_on_the_same_counterfactual_pictures(tmp_path, folder):
    uniform = make(tmp_path / "s", **COUNTS, world="uniform")
    one, other = (contents(f / "counterfactual") for f in (folder, uniform))
    assert one == other
    assert {s.meta["context"] for s in samples(uniform, "train")} == {""}


def test_other_peoples_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="something else than Scenes"):
        make(tmp_path, train=1, test=1, seed=0)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"train": 0}, "train"), ({"test": 0}, "test"), ({"seed": -1}, "seed"), ({"world": "flat"}, "'flat'")],
)
def test_impossible_arguments_are_one_line(tmp_path, wrong, message):
    with pytest.raises(DataError, match=message):
        make(tmp_path / "s", **{"train": 1, "test": 1, "seed": 0, **wrong})
    assert not any(tmp_path.iterdir())
