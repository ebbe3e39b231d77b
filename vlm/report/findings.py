"""The findings in words, computed from the numbers and saying no more than they do."""

from dataclasses import dataclass
from typing import Literal

from vlm.report.compare import Difference, Quantity, benchmarks, difference, judged, title
from vlm.report.records import Chair, Change, Evaluation, Result, YesNo

SHORTER = 0.05  # a caption this much shorter names fewer objects, which lowers CHAIRs without any better seeing
MANY = 3  # numbers that a sentence still lists when none of them changed


@dataclass(frozen=True)
class Finding:
    """A sentence and what kind it is; one about a result begins with ``subject``, its label, and a colon."""

    kind: Literal["fact", "helps", "hurts", "mixed", "same", "caution"]
    text: str
    subject: str = ""


def find(evaluation: Evaluation) -> list[Finding]:
    """All findings: first of the plain model, then one for each method, then how far to trust them."""
    plain = evaluation.plain
    if plain is None:
        reason = "Nothing was evaluated without a method, so there is nothing to compare the methods with."
        return [Finding("caution", reason)] if evaluation.results else []
    of_methods = [_method(evaluation, plain, method) for method in evaluation.methods]
    of_plain = [*_split_gap(plain), *_scene_gap(plain), *_position(plain)]
    return [*of_plain, *of_methods, *_overall(evaluation, plain), *_warnings(evaluation)]


def _split_gap(plain: Result) -> list[Finding]:
    """POPE from random to adversarial negatives, and the invariant that the positives are the same in all splits."""
    found = []
    for stem in [name.removesuffix("_random") for name in plain.metrics if name.endswith("_random")]:
        names = [f"{stem}_{split}" for split in ("random", "popular", "adversarial")]
        splits = [scores for name in names if isinstance(scores := plain.metrics.get(name), YesNo)]
        if names[2] in plain.metrics and len(splits) > 1:
            found += _fall(title(stem), splits)
    return found


def _fall(name: str, splits: list[YesNo]) -> list[Finding]:
    easy, hard = splits[0], splits[-1]
    change = "falls" if hard.accuracy < easy.accuracy else "does not fall"
    ends = f"from {easy.accuracy:.2f} (random) to {hard.accuracy:.2f} (adversarial)"
    found = [Finding("fact", f"{name} accuracy {change} {ends}.{_overlap(easy, hard)}")]
    recalls = {scores.recall for scores in splits if scores.recall is not None}
    if len(recalls) > 1:
        spread = f"{min(recalls):.3f} to {max(recalls):.3f}"
        found.append(
            Finding("caution", f"{name} recall differs between splits ({spread}); they ask the same positives.")
        )
    elif recalls and hard.accuracy < easy.accuracy:
        said = f"Recall is {recalls.pop():.2f} in every split: the fall is all wrong “yes” to absent objects."
        found.append(Finding("fact", said))
    return found


def _overlap(a: YesNo, b: YesNo) -> str:
    if a.ci is None or b.ci is None:
        return ""
    apart = a.ci[0] > b.ci[1] or b.ci[0] > a.ci[1]
    return "" if apart else " The two confidence intervals overlap."


def _scene_gap(plain: Result) -> list[Finding]:
    """CHAIRs on ordinary and on counterfactual scenes."""
    names = [name for name, scores in plain.metrics.items() if isinstance(scores, Chair)]
    pairs = [(name, f"{name}_counterfactual") for name in names if f"{name}_counterfactual" in names]
    found = []
    for usual, unusual in pairs:
        a, b = (getattr(plain.metrics[name], "chair_s", 0.0) for name in (usual, unusual))
        ratio = f": {b / a:.1f} times as many captions with an invented object" if b > a > 0 else ""
        found.append(Finding("fact", f"CHAIRs {a:.2f} on ordinary scenes, {b:.2f} on counterfactual ones{ratio}."))
    return found


def _position(plain: Result) -> list[Finding]:
    found = []
    for name, scores in plain.metrics.items():
        rates = [(k, rate) for k, rate in enumerate(getattr(scores, "positions", ()), 1) if rate is not None]
        if len(rates) > 1 and rates[0][1] != rates[-1][1]:
            (_, first), (number, last) = rates[0], rates[-1]
            trend = "rises" if last > first else "falls"
            ends = f"from {first:.2f} for the first object named to {last:.2f} for number {number}"
            where = _scenes(title(name, plain.metrics))
            found.append(Finding("fact", f"Hallucination {trend} with the position in the caption{where}: {ends}."))
    return found


def _scenes(benchmark: str) -> str:
    """The title of a CHAIR benchmark as the end of a phrase: `` on ordinary scenes``."""
    where = benchmark.removeprefix("CHAIR").strip()
    return f" on {where} scenes" if where in ("ordinary", "counterfactual") else f" ({where})" if where else ""


def _method(evaluation: Evaluation, plain: Result, method: Result) -> Finding:
    """What one method changes against plain."""
    changes = [(q, difference(q, plain, method)) for q in judged(evaluation.results)]
    known = [(quantity, change) for quantity, change in changes if change is not None]
    if not known:
        reason = "No number with a confidence interval is there for both this and plain, so it is not judged."
        return Finding("caution", f"{method.label}: {reason}", method.label)
    by_verdict = {
        verdict: [_told(q, d, evaluation, verdict) for q, d in known if d.verdict == verdict]
        for verdict in ("helps", "hurts", "same")
    }
    said = [
        f"{start} {_and(by_verdict[verdict])}"
        for verdict, start in (("helps", "helps"), ("hurts", "hurts"), ("same", "no measurable change in"))
        if by_verdict[verdict]
    ]
    if len(by_verdict["same"]) == len(known) > MANY:
        said = [f"no measurable change in any of {len(known)} numbers"]
    sentence = _capital("; ".join(said)) + "."
    text = f"{method.label}: {sentence}{_shorter(plain, method)}{_saved(plain, method)}"
    return Finding(_kind(by_verdict), text, method.label)


def _kind(by_verdict: dict[str, list[str]]) -> Literal["helps", "hurts", "mixed", "same"]:
    if by_verdict["helps"] and by_verdict["hurts"]:
        return "mixed"
    return "helps" if by_verdict["helps"] else "hurts" if by_verdict["hurts"] else "same"


def _told(quantity: Quantity, change: Difference, evaluation: Evaluation, verdict: str) -> str:
    name = quantity_title(quantity, evaluation)
    return name if verdict == "same" else f"{name} ({change.before:.3f} → {change.after:.3f})"


def quantity_title(quantity: Quantity, evaluation: Evaluation) -> str:
    """``POPE random accuracy``, ``CHAIRs on counterfactual scenes``."""
    names = benchmarks(evaluation.results)
    whole = title(quantity.benchmark, names)
    if not whole.startswith("CHAIR"):
        return f"{whole} {quantity.title}"
    return quantity.title + _scenes(whole)


def _shorter(plain: Result, method: Result) -> str:
    """That a method wrote captions of another length, what became of recall, and what is left at equal length."""
    said, rest = [], []
    for name, after in method.metrics.items():
        before = plain.metrics.get(name)
        if not isinstance(before, Chair) or not isinstance(after, Chair) or not before.length or after.length is None:
            continue
        shrunk = (before.length - after.length) / before.length
        scenes = _scenes(title(name, plain.metrics))
        if shrunk > SHORTER:
            said.append(
                f"by {shrunk:.0%} ({before.length:.1f} → {after.length:.1f} words{_recall(before, after)}){scenes}"
            )
        matched = method.change.get(name, {}).get("chair_s_matched")
        if matched is not None and abs(shrunk) > SHORTER:
            rest.append(f" Cut to equal length, CHAIRs{scenes} is {_changed(matched)}.")
    warning = f" It shortened captions {_and(said)}; shorter captions alone lower CHAIRs." if said else ""
    return warning + "".join(rest)


def _recall(before: Chair, after: Chair) -> str:
    return "" if None in (before.recall, after.recall) else f", recall {before.recall:.2f} → {after.recall:.2f}"


def _changed(change: Change) -> str:
    """``lower by 0.021 (95 % 0.010 to 0.032)``, or that nothing is left."""
    low, high = change.ci
    if low <= 0 <= high:
        return f"not measurably different ({change.difference:+.3f}, 95 % {low:+.3f} to {high:+.3f})"
    return f"{'lower' if high < 0 else 'higher'} by {abs(change.difference):.3f} (95 % {low:+.3f} to {high:+.3f})"


def _saved(plain: Result, method: Result) -> str:
    """Visual tokens, FLOPs and KV bytes of a pruned result."""
    tokens, a, b = method.cost.visual_tokens, plain.cost, method.cost
    if not (method.prune or method.kv) or tokens is None:
        return ""
    parts = [f"{tokens.after:g} of {tokens.before:g} visual tokens"]
    if a.llm_flops_per_prompt and b.llm_flops_per_prompt is not None:
        parts.append(f"{b.llm_flops_per_prompt / a.llm_flops_per_prompt:.0%} of the language model's FLOPs")
    if a.kv_bytes_per_prompt and b.kv_bytes_per_prompt is not None:
        parts.append(f"{b.kv_bytes_per_prompt / a.kv_bytes_per_prompt:.0%} of the KV bytes")
    took = ""
    if a.prefill_s and b.prefill_s is not None:
        took = f", in {b.prefill_s / a.prefill_s:.0%} of the prefill time"
    return f" Against plain it computes with {_and(parts)}{took}."


def _overall(evaluation: Evaluation, plain: Result) -> list[Finding]:
    """Whether any mitigator lowers CHAIRs at all, and that among many comparisons some are wrong."""
    quantities = judged(evaluation.results)
    mitigators = [method for method in evaluation.methods if method.mitigate and not (method.prune or method.kv)]
    found = []
    for quantity in quantities:
        if quantity.field == "chair_s" and mitigators:
            better = [method.label for method in mitigators if _helps(quantity, plain, method)]
            who = f"{len(better)} of {len(mitigators)} ({_and(better)})" if better else "none"
            what = quantity_title(quantity, evaluation)
            found.append(Finding("fact", f"Mitigators that measurably lower {what}: {who}."))
    total = len(evaluation.methods) * len(quantities)
    if total > 10:
        note = f"{total} differences were judged one by one; among so many, a few can leave their interval by chance."
        found.append(Finding("caution", note))
    return found


def _warnings(evaluation: Evaluation) -> list[Finding]:
    """What the benchmarks warn of, said once."""
    every = [
        f"{result.label}, {title(name, result.metrics)}: {warning}."
        for result in evaluation.results
        for name, scores in result.metrics.items()
        for warning in getattr(scores, "warnings", ())
    ]
    return [Finding("caution", text) for text in dict.fromkeys(every)]


def _helps(quantity: Quantity, plain: Result, method: Result) -> bool:
    change = difference(quantity, plain, method)
    return change is not None and change.verdict == "helps"


def _and(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
