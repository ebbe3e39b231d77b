"""Writes the generated parts of README.md: the tables of methods and kernels, the results of the Scenes run.

python tools/readme.py                                     the tables of methods and kernels
python tools/readme.py runs/scenes                         and the results of that run's evaluation.json
python tools/readme.py runs/scenes runs/scenes-pruners     and of each further run a page of its own in tools/results
"""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import vlm
from vlm.create import FOLDERS, describe

README = Path(__file__).parent.parent / "README.md"
RESULTS = Path(__file__).parent / "results"
KINDS = {
    "vision": "encoder",
    "connector": "connector",
    "head": "head",
    "prune": "pruner",
    "kv": "cache policy",
    "mitigate": "mitigator",
    "decode": "decoder",
    "objective": "objective",
    "benchmark": "benchmark",
    "make": "data maker",
}


def methods_table() -> str:
    """Every method that a recipe can name, as Markdown."""
    rows = ["| kind | name | what | source | verified |", "|---|---|---|---|---|"]
    for kind in FOLDERS:
        for entry in describe(kind):
            cells = (KINDS[kind], f"`{entry['name']}`", entry["summary"], entry["source"], entry["verified"])
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def kernels_table() -> str:
    """Every attention operation with its implementations, best first, as Markdown."""
    rows = ["| operation | what | implementations |", "|---|---|---|"]
    for package in sorted(Path(vlm.__file__).parent.glob("kernels/[!_]*/__init__.py")):
        module = import_module(f"vlm.kernels.{package.parent.name}")
        if hasattr(module, "explain"):
            what = (module.__doc__ or "").split("\n\n")[0].replace("\n", " ").split(": ", 1)[1].rstrip(".")
            names = ", ".join(f"`{i.name}`" for i in module.IMPLEMENTATIONS)
            rows.append(f"| `vlm.kernels.{package.parent.name}.{module.NAME}` | {what} | {names} |")
    return "\n".join(rows)


def results_table(evaluation: dict[str, Any]) -> str:
    """The main numbers of an evaluation with date and versions, as Markdown; rates in percent."""
    packages = _packages(evaluation)
    rows = [
        f"`vlm run recipes/{evaluation['name']}.yaml` on two CPU cores, {evaluation['created'][:10]}, {packages}.",
        "Accuracy, CHAIRs and recall in percent, CHAIRs with its 95 % interval; FLOPs of a prompt against plain.",
        "",
        "| | POPE random | popular | adversarial | CHAIRs | recall | words | CHAIRs counterfactual | FLOPs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    plain = evaluation["results"][0]
    for result in evaluation["results"]:
        metrics = result["metrics"]
        chair, other = metrics["chair"], metrics["chair_counterfactual"]
        pope = [f"{100 * metrics[f'pope_{split}']['accuracy']:.1f}" for split in ("random", "popular", "adversarial")]
        rest = [f"{100 * chair['recall']:.1f}", f"{chair['length']:.1f}"]
        cells = [result["label"], *pope, _with_interval(chair), *rest]
        rows.append(
            "| " + " | ".join([*cells, _with_interval(other), _share(result, plain, "llm_flops_per_prompt")]) + " |"
        )
    return "\n".join(rows)


def comparison_page(evaluation: dict[str, Any]) -> str:
    """Every row of an evaluation against plain: what it costs and what it still sees, as Markdown."""
    packages = _packages(evaluation)
    plain = evaluation["results"][0]
    splits = [f"pope_{split}" for split in ("random", "popular", "adversarial")]
    shown = [split for split in splits if split in plain["metrics"]]
    chairs = [name for name in ("chair", "chair_counterfactual") if name in plain["metrics"]]
    head = ["", *(split.replace("_", " ") for split in shown)]
    head += [column for name in chairs for column in (f"{name.replace('_', ' ')} CHAIRs", "CHAIRi", "recall", "words")]
    matched = any("chair_s_matched" in result["change"].get("chair", {}) for result in evaluation["results"])
    head += ["change of chair CHAIRs at equal length"] * matched
    head += ["visual tokens: average", "final", "FLOPs", "KV bytes", "prefill time", "token time"]
    rows = [
        f"# {evaluation['name']}",
        "",
        f"`vlm run recipes/{evaluation['name'].replace('-', '_')}.yaml` after `vlm run recipes/scenes.yaml`, on two CPU"
        f" cores, {evaluation['created'][:10]}, {packages}; weights: {evaluation['weights']}.",
        "",
        "Accuracy, CHAIR and recall in percent, CHAIRs with its 95 % interval; FLOPs, KV bytes, prefill time (scoring",
        "included) and time of each further token of a prompt against plain. No row is left out.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for result in evaluation["results"]:
        metrics, tokens = result["metrics"], result["cost"]["visual_tokens"]
        cells = [result["label"], *(f"{100 * metrics[split]['accuracy']:.1f}" for split in shown)]
        for name in chairs:
            chair = metrics[name]
            rates = [f"{100 * chair[field]:.1f}" for field in ("chair_i", "recall")]
            cells += [_with_interval(chair), *rates, f"{chair['length']:.1f}"]
        cells += [_change(result, "chair_s_matched")] * matched
        cells += [f"{tokens['average']:.1f}", f"{tokens['after']:g}"]
        cells += [
            _share(result, plain, field)
            for field in ("llm_flops_per_prompt", "kv_bytes_per_prompt", "prefill_s", "token_s")
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def _with_interval(chair: dict[str, Any]) -> str:
    low, high = chair["ci"]
    return f"{100 * chair['chair_s']:.1f} ({100 * low:.0f} to {100 * high:.0f})"


def _change(result: dict[str, Any], field: str) -> str:
    """A paired change of captions of ordinary scenes, in points, with its 95 % interval."""
    change = result["change"].get("chair", {}).get(field)
    if change is None:
        return ""
    low, high = change["ci"]
    return f"{100 * change['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _share(result: dict[str, Any], plain: dict[str, Any], field: str) -> str:
    return f"{result['cost'][field] / plain['cost'][field]:.2f}"


def _packages(evaluation: dict[str, Any]) -> str:
    return ", ".join(f"{name} {evaluation['versions'][name]}" for name in ("torch", "transformers", "lightning"))


def replace_part(page: str, start: str, end: str, content: str) -> str:
    """``page`` with what lies between the comments that begin with ``start`` and ``end`` replaced."""
    head, rest = page.split(f"<!-- {start}", 1)
    opening, rest = rest.split("-->\n", 1)
    return f"{head}<!-- {start}{opening}-->\n{content}\n<!-- {end} -->{rest.split(f'<!-- {end} -->', 1)[1]}"


def main(arguments: list[str]) -> None:
    page = replace_part(README.read_text(), "methods", "end of methods", methods_table())
    page = replace_part(page, "kernels", "end of kernels", kernels_table())
    if arguments:
        evaluation = json.loads((Path(arguments[0]) / "evaluation.json").read_text())
        page = replace_part(page, "results", "end of results", results_table(evaluation))
    README.write_text(page)
    for folder in arguments[1:]:
        evaluation = json.loads((Path(folder) / "evaluation.json").read_text())
        (RESULTS / f"{evaluation['name'].replace('-', '_')}.md").write_text(comparison_page(evaluation))


if __name__ == "__main__":
    main(sys.argv[1:])
