"""What the report says of a difference, against numbers made by hand on both sides of each threshold."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.report.compare import Quantity, difference, judged, title
from vlm.report.findings import find
from vlm.report.records import Evaluation

ACCURACY = Quantity("pope_random", "accuracy", "accuracy", 1, "ci")


def yes_no(accuracy: float, half: float = 0.02, recall: float = 0.8) -> dict:
    return {"accuracy": accuracy, "recall": recall, "f1": accuracy, "n": 100, "ci": [accuracy - half, accuracy + half]}


def chair(s: float, half: float = 0.03, length: float = 20.0, recall: float = 0.8, positions: tuple = ()) -> dict:
    scores = {"chair_s": s, "chair_i": s / 3, "recall": recall, "length": length, "n": 100}
    return scores | {"ci": [s - half, s + half], "by_position": list(positions)}


def result(
    label: str, prune: str | None = None, mitigate: str | None = None, cost: dict | None = None, **metrics
) -> dict:
    methods = {"prune": prune and {"use": prune}, "mitigate": mitigate and {"use": mitigate}}
    return {"label": label, **methods, "metrics": metrics, "cost": cost or {}}


def evaluate(*results: dict) -> Evaluation:
    return Evaluation.model_validate({"results": list(results)}, strict=False)


def said(evaluation: Evaluation, subject: str = "") -> list[str]:
    found = [finding for finding in find(evaluation) if finding.subject == subject]
    assert all(finding.text.startswith(f"{subject}: ") for finding in found if subject)
    return [f"{finding.kind}: {finding.text.removeprefix(f'{subject}: ')}" for finding in found]


def test_the_interval_of_a_difference_is_square_and_add():
    """Newcombe 1998, table II, row (a): 56/70 against 48/80 by method 10 gives 0.0524 to 0.3339.

    The Wilson intervals of the two rates go in; they are computed here from their formula.
    """

    def wilson(hits: int, n: int) -> tuple[float, float]:
        z, p = 1.959964, hits / n
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)

    a = {"accuracy": 48 / 80, "ci": wilson(48, 80)}
    b = {"accuracy": 56 / 70, "ci": wilson(56, 70)}
    plain, method = evaluate(result("plain", pope_random=a), result("x", "x", pope_random=b)).results
    found = difference(ACCURACY, plain, method)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


rates = st.floats(0.05, 0.95)
halves = st.floats(0, 0.05)


@given(rates, halves, rates, halves)
def test_swapping_the_two_turns_the_interval_and_the_verdict_round(a: float, half_a: float, b: float, half_b: float):
    first, second = yes_no(a, half_a), yes_no(b, half_b)
    x, y = evaluate(result("x", pope_random=first), result("y", pope_random=second)).results
    there, back = difference(ACCURACY, x, y), difference(ACCURACY, y, x)
    assert there is not None and back is not None
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=1e-12)
    assert there.low <= there.value <= there.high
    assert back.verdict == {"helps": "hurts", "hurts": "helps", "same": "same"}[there.verdict]


# the interval of the difference of two scores ± .02 is ± .02 * sqrt(2) = ± .0283
@pytest.mark.parametrize(
    ("after", "kind", "words"),
    [
        (0.879, "helps", "Helps POPE random accuracy (0.850 → 0.879)."),
        (0.878, "same", "No measurable change in POPE random accuracy."),
        (0.850, "same", "No measurable change in POPE random accuracy."),
        (0.822, "same", "No measurable change in POPE random accuracy."),
        (0.821, "hurts", "Hurts POPE random accuracy (0.850 → 0.821)."),
    ],
)
def test_a_method_helps_or_hurts_only_outside_the_interval(after: float, kind: str, words: str):
    evaluation = evaluate(result("plain", pope_random=yes_no(0.85)), result("m", "m", pope_random=yes_no(after)))
    assert said(evaluation, "m") == [f"{kind}: {words}"]


@pytest.mark.parametrize(
    ("after", "kind"), [(0.150, "helps"), (0.160, "same"), (0.200, "same"), (0.240, "same"), (0.250, "hurts")]
)
def test_less_chair_is_better(after: float, kind: str):
    """± .03 * sqrt(2) = ± .0424"""
    evaluation = evaluate(result("plain", chair=chair(0.2)), result("m", None, "m", chair=chair(after)))
    assert [line.split(":")[0] for line in said(evaluation, "m")] == [kind]


def test_a_paired_change_decides_where_the_evaluation_gives_one():
    plain, method = result("plain", chair=chair(0.2)), result("m", None, "m", chair=chair(0.19))
    assert said(evaluate(plain, method), "m")[0].startswith("same")
    method["change"] = {"chair": {"chair_s": {"difference": -0.01, "ci": [-0.02, -0.001], "p": 0.03}}}
    assert said(evaluate(plain, method), "m") == ["helps: Helps CHAIRs (0.200 → 0.190)."]
    method["change"]["chair"]["recall"] = {"difference": -0.01, "ci": [-0.02, -0.001], "p": 0.03}
    assert said(evaluate(plain, method), "m")[0].startswith("mixed: Helps CHAIRs (0.200 → 0.190); hurts recall (0.8")


def test_the_interval_of_chair_i_is_used_where_it_is_given():
    before, after = chair(0.2) | {"ci_i": [0.06, 0.07]}, chair(0.2) | {"chair_i": 0.1, "ci_i": [0.09, 0.11]}
    assert said(evaluate(result("plain", chair=before), result("m", None, "m", chair=after)), "m") == [
        "hurts: Hurts CHAIRi (0.067 → 0.100); no measurable change in CHAIRs."
    ]


def test_positions_that_few_captions_reach_say_nothing():
    scores = chair(0.2, positions=(0.1, 0.2, 1.0)) | {"by_position_n": [90, 50, 49]}
    assert said(evaluate(result("plain", chair=scores)))[0].endswith("to 0.20 for number 2.")


def test_what_a_benchmark_warns_of_is_said():
    scores = chair(0.0) | {"ci": None, "warnings": ["chair_i has nothing to divide by"]}
    assert said(evaluate(result("plain", chair=scores))) == ["caution: plain, CHAIR: chair_i has nothing to divide by."]


def test_a_method_that_helps_one_number_and_hurts_another_is_mixed():
    evaluation = evaluate(
        result("plain", pope_random=yes_no(0.85), chair=chair(0.2), chair_counterfactual=chair(0.7)),
        result("m", None, "m", pope_random=yes_no(0.80), chair=chair(0.21), chair_counterfactual=chair(0.6)),
    )
    assert said(evaluation, "m") == [
        "mixed: Helps CHAIRs on counterfactual scenes (0.700 → 0.600); hurts POPE random accuracy (0.850 → 0.800); "
        "no measurable change in CHAIRs on ordinary scenes."
    ]


def test_only_captions_shorter_by_more_than_five_per_cent_are_told():
    def about(length: float) -> str:
        before, after = chair(0.3, length=20.0, recall=0.8), chair(0.2, length=length, recall=0.75)
        return said(evaluate(result("plain", chair=before), result("m", None, "m", chair=after)), "m")[0]

    assert "shortened" not in about(19.0)
    assert "shortened" not in about(25.0)
    assert about(18.9).endswith(
        " It shortened captions by 6% (20.0 → 18.9 words, recall 0.80 → 0.75); shorter captions alone lower CHAIRs."
    )


def test_the_gap_between_the_splits():
    metrics = {"pope_random": yes_no(0.91), "pope_popular": yes_no(0.87), "pope_adversarial": yes_no(0.85)}
    assert said(evaluate(result("plain", **metrics))) == [
        "fact: POPE accuracy falls from 0.91 (random) to 0.85 (adversarial).",
        "fact: Recall is 0.80 in every split: the fall is all wrong “yes” to absent objects.",
    ]
    metrics["pope_adversarial"] = yes_no(0.89, recall=0.7)
    assert said(evaluate(result("plain", **metrics))) == [
        "fact: POPE accuracy falls from 0.91 (random) to 0.89 (adversarial). The two confidence intervals overlap.",
        "caution: POPE recall differs between splits (0.700 to 0.800); they ask the same positives.",
    ]


def test_the_gap_between_the_scenes_and_the_rise_with_position():
    metrics = {"chair": chair(0.2, positions=(0.04, None, 0.22)), "chair_counterfactual": chair(0.75)}
    assert said(evaluate(result("plain", **metrics))) == [
        "fact: CHAIRs 0.20 on ordinary scenes, 0.75 on counterfactual ones: "
        "3.8 times as many captions with an invented object.",
        "fact: Hallucination rises with the position in the caption on ordinary scenes: "
        "from 0.04 for the first object named to 0.22 for number 3.",
    ]


def test_it_says_so_when_no_mitigator_helps():
    plain = result("plain", chair=chair(0.2))
    weak, strong = result("var", None, "var", chair=chair(0.19)), result("m3id", None, "m3id", chair=chair(0.1))
    pruned = result("fastv", "fastv", chair=chair(0.1))
    assert said(evaluate(plain, weak, pruned)) == ["fact: Mitigators that measurably lower CHAIRs: none."]
    assert said(evaluate(plain, weak, strong)) == ["fact: Mitigators that measurably lower CHAIRs: 1 of 2 (m3id)."]


def test_what_a_pruner_saves_is_told_against_plain():
    def cost(after: int, flops: float, kv: float, **more: float) -> dict:
        tokens = {"before": 36, "after": after}
        return {"visual_tokens": tokens, "llm_flops_per_prompt": flops, "kv_bytes_per_prompt": kv, **more}

    saved = (
        " Against plain it computes with 9 of 36 visual tokens, "
        "45% of the language model's FLOPs and 52% of the KV bytes"
    )
    plain = result("plain", cost=cost(36, 200.0, 1000.0), pope_random=yes_no(0.85))
    pruned = result("fastv", "fastv", cost=cost(9, 90.0, 520.0), pope_random=yes_no(0.85))
    assert said(evaluate(plain, pruned), "fastv")[0].endswith(f"{saved}.")
    plain = result("plain", cost=cost(36, 200.0, 1000.0, prefill_s=0.5), pope_random=yes_no(0.85))
    slower = result("fastv", "fastv", cost=cost(9, 90.0, 520.0, prefill_s=0.6), pope_random=yes_no(0.85))
    assert said(evaluate(plain, slower), "fastv")[0].endswith(f"{saved}, in 120% of the prefill time.")


def test_without_an_interval_nothing_is_judged():
    bare = {"accuracy": 0.9, "recall": 0.8}
    evaluation = evaluate(result("plain", pope_random=yes_no(0.5)), result("m", "m", pope_random=bare))
    assert said(evaluation, "m")[0].startswith("caution: ") and "not judged" in said(evaluation, "m")[0]


def test_an_unknown_benchmark_is_shown_and_never_judged():
    evaluation = evaluate(result("plain", mme={"total": 1400, "ci": [1, 2]}), result("m", "m", mme={"total": 9}))
    assert judged(evaluation.results) == []


def test_titles():
    assert title("pope_adversarial") == "POPE adversarial"
    assert [title(name, ["chair", "chair_counterfactual"]) for name in ("chair", "chair_counterfactual")] == [
        "CHAIR ordinary",
        "CHAIR counterfactual",
    ]
    assert title("chair", ["chair"]) == "CHAIR"
