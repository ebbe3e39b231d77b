"""The report page, from a made-up run of two stages, six results and three pictures: parts, safety, rendering."""

import base64
import html.parser
import io
import json
import math
import random
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vlm.report import ReportError, write_report

RECIPE = "recipe: 1\nname: scenes\nseed: 17\nprune: {use: fastv, keep: 25%}\nstages:\n  - {name: tags, steps: 2000}\n"
LABELS = ["plain", "fastv 50%", "fastv 25%", "var", "m3id", "fastv 25% + m3id"]
METHODS = [
    (None, None),
    ({"use": "fastv", "keep": 0.5}, None),
    ({"use": "fastv", "keep": 0.25}, None),
    (None, {"use": "var"}),
    (None, {"use": "m3id"}),
    ({"use": "fastv", "keep": 0.25}, [{"use": "m3id"}]),
]
#          pope: random popular adversarial | chair s, i, recall, length | counterfactual s, i | tokens kept, FLOPs
SCORES = [
    (0.906, 0.866, 0.847, 0.200, 0.078, 0.871, 12.4, 0.753, 0.263, 36, 1.00),
    (0.901, 0.862, 0.842, 0.214, 0.081, 0.862, 12.3, 0.749, 0.261, 18, 0.71),
    (0.848, 0.809, 0.781, 0.262, 0.101, 0.798, 11.9, 0.771, 0.281, 9, 0.56),
    (0.902, 0.868, 0.846, 0.190, 0.071, 0.866, 12.2, 0.731, 0.252, 36, 1.00),
    (0.907, 0.877, 0.849, 0.196, 0.074, 0.841, 11.3, 0.620, 0.208, 36, 1.98),
    (0.849, 0.814, 0.779, 0.231, 0.088, 0.781, 10.9, 0.660, 0.231, 9, 1.12),
]
OBJECTS = [["cup", "fork", "plate"], ["tree", "bench", "kite", "dog"], ["lamp", "book", "sofa"]]
COLOURS = ["#d22", "#2a2", "#33d", "#dc2"]


def metrics_lines() -> list[dict]:
    noise = random.Random(0)
    lines = []
    for stage, (name, steps, start, end) in enumerate([("tags", 2000, 0.6, 0.08), ("chat", 2200, 3.1, 0.37)]):
        for step in range(9, steps, 10):
            part = math.exp(-step / steps * 5)
            line = {"stage": stage, "name": name, "step": step, "steps": steps, "seconds": stage * 110 + step * 0.055}
            line["loss"] = end + (start - end) * part + noise.gauss(0, 0.03) * (0.3 + part)
            line["lr"] = {"vision": 3e-3 * (1 - step / steps)} if stage == 0 else {
                "connector": 2e-3 * (1 - step / steps), "language": 1e-3 * (1 - step / steps)}  # fmt: skip
            line |= {
                "samples_per_s": noise.gauss(1150 - 300 * stage, 40),
                "data_wait_s": abs(noise.gauss(0.002, 0.001)),
            }
            line |= {"tag_accuracy": 0.97 - 0.3 * part} if stage == 0 else {"tokens_per_s": noise.gauss(14000, 500)}
            lines.append(line)
    return lines


def yes_no(accuracy: float) -> dict:
    half = 0.0145
    scores = {"accuracy": accuracy, "precision": accuracy, "recall": 0.862, "f1": accuracy - 0.004, "yes_ratio": 0.47}
    return scores | {"n": 1800, "ci": [accuracy - half, accuracy + half]}


def chair(s: float, i: float, recall: float, length: float, steep: float) -> dict:
    half, half_i = (1.96 * math.sqrt(rate * (1 - rate) / n) for rate, n in ((s, 500), (i, 2000)))
    rates = [min(1, i * steep * (k + 1) ** 1.3) for k in range(6)]
    scores = {"chair_s": s, "chair_i": i, "recall": recall, "length": length, "n": 500, "by_position": rates}
    return scores | {"ci": [s - half, s + half], "ci_i": [i - half_i, i + half_i], "by_position_n": [500] * 6}


def evaluation() -> dict:
    card = {
        "prompt": "is there a {} ?",
        "parser": "official",
        "decoding": "greedy",
        "files": [{"name": "pope.json", "sha256": "1f0c"}],
        "seed": 17,
    }
    results = []
    for label, (prune, mitigate), row in zip(LABELS, METHODS, SCORES, strict=True):
        rnd, pop, adv, s, i, recall, length, cf_s, cf_i, kept, flops = row
        metrics = {"pope_random": yes_no(rnd), "pope_popular": yes_no(pop), "pope_adversarial": yes_no(adv)}
        metrics["chair"] = chair(s, i, recall, length, 0.35)
        metrics["chair_counterfactual"] = chair(cf_s, cf_i, recall - 0.14, length + 0.6, 0.3)
        tokens = {"before": 36, "after": kept, "average": (36 + 3 * kept) / 4, "per_layer": [36, kept, kept, kept]}
        cost = {"seconds": 21.0 * flops, "visual_tokens": tokens}
        cost |= {"llm_flops_per_prompt": 4.1e7 * flops, "kv_bytes_per_prompt": 1024 * (20 + kept)}
        cost |= {"prefill_s": 0.02 * (1 + flops), "token_s": 0.005 if prune else 0.004}
        protocol = {name: card | ({"n": metrics[name]["n"], "method": label}) for name in metrics}
        results.append({"label": label, "prune": prune, "mitigate": mitigate, "metrics": metrics, "cost": cost,
                        "protocol": protocol})  # fmt: skip
    versions = {"vlm-recipes": "0.1.0", "torch": "2.11.0", "transformers": "5.17.0", "python": "3.11.2"}
    return {"name": "scenes", "created": "2026-03-01T14:05:10+00:00", "recipe_hash": "9c1f" * 16, "versions": versions,
            "results": results}  # fmt: skip


def png(seed: int, objects: int) -> str:
    noise = np.random.default_rng(seed)
    image = Image.fromarray((noise.normal(0.35, 0.08, (48, 48, 3)).clip(0, 1) * 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for k, cell in enumerate(noise.permutation(16)[:objects].tolist()):
        x, y = 12 * (cell % 4) + 1, 12 * (cell // 4) + 1
        (draw.ellipse if seed % 2 else draw.rectangle)((x, y, x + 9, y + 9), fill=COLOURS[k])
    written = io.BytesIO()
    image.save(written, "png")
    return base64.b64encode(written.getvalue()).decode()


def answer(objects: list[str], invented: str) -> tuple[str, list[dict]]:
    words, mentions = "i see", []
    for k, name in enumerate([*objects, invented]):
        words += " a " if k == 0 else " and a "
        mentions.append({"text": name, "start": len(words), "end": len(words) + len(name), "object": name,
                         "hallucinated": name == invented})  # fmt: skip
        words += name
    return words + " .", mentions


def picture(number: int) -> dict:
    draw = random.Random(number)
    views = []
    for label, row in zip(LABELS, SCORES, strict=True):
        kept = sorted(draw.sample(range(36), row[9])) if row[9] < 36 else None
        heat = [draw.random() ** 4 if kept is None or patch in kept else 0.0 for patch in range(36)]
        words, mentions = answer(OBJECTS[number], "knife")
        views.append(
            {"label": label, "grid": [6, 6], "kept": kept, "heat": heat, "answer": words, "mentions": mentions}
        )
    return {"key": f"test/{number:05d}", "png": png(number, len(OBJECTS[number])), "width": 48, "height": 48,
            "objects": OBJECTS[number], "views": views}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "scenes"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics_lines()))
    (folder / "evaluation.json").write_text(json.dumps(evaluation()))
    (folder / "pictures.json").write_text(json.dumps({"items": [picture(number) for number in range(3)]}))
    return folder


class Page(html.parser.HTMLParser):
    """The elements of a page as (name, attributes), and its text; fails on an element that is not closed in order."""

    def __init__(self, document: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(document)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data if self.open[-1:] != ["style"] else ""

    def count(self, name: str, **attributes: str) -> int:
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        return sum(tag == name and wanted.items() <= found.items() for tag, found in self.elements)


def read(folder: Path) -> Page:
    return Page(write_report(folder).read_text())


def change(folder: Path, name: str, edit) -> None:
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))


def test_the_page_has_every_part(run: Path):
    page = read(run)
    sections = [found["id"] for tag, found in page.elements if tag == "section" and "id" in found]
    assert sections == ["findings", "comparison", "position", "pictures", "training", "protocol", "reproduce"]
    assert page.count("h1") == 1 and "scenes" in page.words and "2026-03-01 14:05:10 UTC" in page.words
    assert page.count("table", class_="comparison") == 1
    assert page.count("th", scope="row") >= 6 and page.count("tr", class_="plain") == 1
    assert page.count("article", class_="picture") == 3 and page.count("section", class_="view") == 18
    assert page.count("section", class_="stage") == 2
    assert page.count("details") == 5 + 2  # a protocol card per benchmark, the recipe, the versions
    assert "keep: 25%" in page.words and "9c1f9c1f" in page.words and "official" in page.words


def test_the_table_holds_the_numbers_and_the_costs_relative_to_plain(run: Path):
    document = write_report(run).read_text()
    row = re.search(r'<tr><th scope="row">fastv 25%</th>(.*?)</tr>', document)
    assert row is not None
    cells = [re.sub("<.*?>", " ", cell).split() for cell in re.findall("<td.*?</td>", row[1])]
    assert cells[0][:3] == ["9", "of", "36"]
    assert cells[1] == ["0.848", ".834–.862", "−0.058", "▼"]  # outside: coloured and with a sign
    assert cells[0][3:] == ["mean", "15.8"]  # (36 + 3 * 9) / 4
    costs = ["0.56×", "0.52×", "0.78×", "1.25×", "11.8"]  # KV: (20 + 9) / (20 + 36)
    assert [cell[0] for cell in cells[-5:]] == costs
    assert cells[-3][1:] == ["31.2", "ms"] and cells[-2][1:] == ["5", "ms"]
    assert len(cells) == 1 + 3 * 2 + 2 * 4 + 5


def test_each_view_shows_what_was_dropped_and_each_invented_word_is_marked(run: Path):
    document = write_report(run).read_text()
    dropped = re.findall(r'<path d="([^"]*)" class="dropped">', document)
    assert [cells.count("M") for cells in dropped] == [18, 27, 27] * 3  # fastv 50%, fastv 25%, with m3id
    assert document.count('<mark title="knife: not in the picture">') == 18
    assert document.count('title="cup: in the picture">cup</span>') == 6
    assert document.count("data:image/png;base64,") == 3  # one copy of each, however many views


def test_nothing_is_fetched_and_nothing_runs(run: Path):
    document = write_report(run).read_text()
    assert "://" not in document
    page = Page(document)
    links = [found[key] for _, found in page.elements for key in ("src", "href") if key in found]
    assert links and all(link and link.startswith(("data:", "#")) for link in links)
    ids = [found["id"] for _, found in page.elements if "id" in found]
    assert len(ids) == len(set(ids)) and {link[1:] for link in links if link and link[0] == "#"} <= set(ids)
    assert page.count("script") == 0 and "url(" not in document and "@import" not in document
    assert not any(key.startswith("on") for _, found in page.elements for key in found)
    assert len(document) < 400_000


def test_whatever_comes_from_the_run_is_text_and_never_markup(run: Path):
    attack = "</title></style><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"

    def poison(tree):
        result = tree["results"][2]
        result["label"] = tree["name"] = tree["created"] = tree["recipe_hash"] = tree["versions"][attack] = attack
        result["metrics"][attack] = result["metrics"]["chair"]
        result["protocol"]["chair"][attack] = {attack: attack}

    def poison_pictures(tree):
        item = tree["items"][0]
        item["key"], item["objects"] = attack, [attack]
        item["views"][0] |= {"label": attack, "answer": attack, "mentions": [
            {"text": attack, "start": 8, "end": 40, "object": attack, "hallucinated": True}]}  # fmt: skip

    change(run, "evaluation.json", poison)
    change(run, "pictures.json", poison_pictures)
    lines = metrics_lines()
    lines[0] |= {attack: 1.0, "lr": {attack: 1.0}}
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(line | {"name": attack}) for line in lines))
    (run / "recipe.yaml").write_text(f"name: {json.dumps(attack)}\n# {attack}\n")
    document = write_report(run).read_text()
    page = Page(document)
    assert page.count("script") == page.count("img") == 0
    assert "alert(1)" in page.words and "<script" not in document.lower() and "<img" not in document.lower()
    assert not any("onerror" in key for _, found in page.elements for key in found)


@pytest.mark.parametrize(
    ("missing", "gone", "note"),
    [
        ("pictures.json", "pictures", "there are no pictures"),
        ("metrics.jsonl", "training", "there are no training curves"),
        ("recipe.yaml", "", "the recipe is not shown"),
        ("evaluation.json", "comparison", "nothing was evaluated yet"),
    ],
)
def test_a_missing_part_is_noted_and_the_rest_is_shown(run: Path, missing: str, gone: str, note: str):
    (run / missing).unlink()
    page = read(run)
    assert f"{missing} is not in the run folder: {note}." in page.words
    sections = {found.get("id") for tag, found in page.elements if tag == "section"}
    assert gone not in sections and len(sections) >= 4


def test_results_without_plain_are_shown_and_not_judged(run: Path):
    change(run, "evaluation.json", lambda tree: tree["results"].pop(0))
    page = read(run)
    assert page.count("table", class_="comparison") == 1 and page.count("table", class_="differences") == 0
    assert "nothing to compare the methods with" in page.words


def test_the_same_folder_gives_the_same_bytes_and_a_failure_leaves_the_old_report(run: Path):
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    (run / "evaluation.json").write_text('{"results": 3}')
    with pytest.raises(ReportError, match=r"^evaluation\.json: results"):
        write_report(run)
    assert (run / "report.html").read_bytes() == first
    assert sorted(path.name for path in run.iterdir() if "report" in path.name) == ["report.html"]


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--window-size=1400,3000"),
    *("--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the path")
def test_a_browser_renders_the_page(run: Path, tmp_path: Path):
    report, shot = write_report(run), tmp_path / "shot.png"
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run([*command, f"--screenshot={shot}", report.as_uri()], capture_output=True, check=True, timeout=120)
    pixels = np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 200  # text, charts and pictures; a blank page has one colour
    dumped = subprocess.run(
        [*command, "--dump-dom", report.as_uri()], capture_output=True, check=True, text=True, timeout=120
    )
    page = Page(dumped.stdout)
    assert page.count("table", class_="comparison") == 1 and page.count("article", class_="picture") == 3
