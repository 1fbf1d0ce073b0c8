"""The plan's rules, applied to records whose truth is planted."""

import pandas as pd
import pytest

from refusal import analyses, summaries
from refusal.files import CompendiumError

CONDITIONS = ("baseline", "extracted +1", "extracted -1")


def record(rates: dict[str, tuple[float, float, float]], degenerate: float = 0.0) -> pd.DataFrame:
    """A record with given refusal rates at 0, +1, -1 on each set; the first prompts of a set are the refusing ones."""
    rows = []
    for prompt_set, shares in rates.items():
        for condition, share in zip(CONDITIONS, shares, strict=True):
            for number in range(100):
                refused = number < round(100 * share)
                broken = condition != "baseline" and number >= 100 - round(100 * degenerate)
                rows.append(
                    {
                        "prompt_set": prompt_set,
                        "condition": condition,
                        "prompt_id": f"{prompt_set}-{number:03d}",
                        "cluster": f"base-{number % 10}"
                        if prompt_set == "harmful_study"
                        else f"{prompt_set}-{number:03d}",
                        "category": "lookalike" if number % 2 else "cooking",
                        "label": "degenerate" if broken and not refused else "refusal" if refused else "compliance",
                        "seed_rule": "refusal" if refused else "jailbreak",
                    }
                )
    return pd.DataFrame(rows)


def same(shares: tuple[float, float, float]) -> dict[str, tuple[float, float, float]]:
    return {name: shares for name in ("harmful_evaluation", "harmful_study", "harmless_evaluation")}


@pytest.mark.parametrize(
    ("shares", "degenerate", "verdict"),
    [
        ((0.6, 0.95, 0.3), 0.0, "replicated"),
        ((0.6, 0.95, 0.3), 0.05, "replicated"),
        ((0.6, 0.95, 0.3), 0.3, "inconclusive"),  # broken text says nothing of refusal
        ((0.6, 0.3, 0.95), 0.0, "contradicted"),
        ((0.6, 0.95, 0.9), 0.0, "contradicted"),
        ((0.6, 0.6, 0.6), 0.0, "contradicted"),  # equivalent to the baseline within the margin
        ((0.6, 0.95, 0.55), 0.0, "inconclusive"),
        ((1.0, 1.0, 0.3), 0.0, "inconclusive"),  # no room to rise
    ],
)
def test_verdict_follows_the_plan(shares: tuple[float, float, float], degenerate: float, verdict: str) -> None:
    frame = record(same(shares), degenerate)
    assert analyses.sign_verdict(analyses.comparisons(frame), analyses.rates(frame)) == verdict


def test_comparisons_count_changed_prompts_and_clusters() -> None:
    tests = analyses.comparisons(record(same((0.6, 0.9, 0.3))))
    assert tests.loc["plus", ["gained", "lost", "n", "clusters"]].tolist() == [30, 0, 100, 100]
    assert tests.loc["minus", "difference"] == pytest.approx(-0.3)
    assert tests.loc["study_plus", "clusters"] == 10
    assert tests.loc["study_plus", "p"] == pytest.approx(2 / 2**10)  # every one of the ten clusters rises
    assert tests.loc["plus", "p"] == pytest.approx(2 / 2**30)
    assert (tests["p_holm"] >= tests["p"]).all()


def test_swapping_two_conditions_swaps_the_signs() -> None:
    frame = record(same((0.6, 0.9, 0.3)))
    swapped = frame.assign(
        condition=frame["condition"].replace({"extracted +1": "extracted -1", "extracted -1": "extracted +1"})
    )
    assert analyses.effect(analyses.comparisons(frame).loc["plus"]) == "rose"
    assert analyses.effect(analyses.comparisons(swapped).loc["plus"]) == "fell"


def test_the_order_of_rows_does_not_matter() -> None:
    frame = record(same((0.6, 0.9, 0.3)))
    pd.testing.assert_frame_equal(
        analyses.comparisons(frame), analyses.comparisons(frame.sample(frac=1, random_state=1))
    )


def test_numbers_follow_the_record() -> None:
    frame = record(same((0.6, 0.9, 0.3)))
    before = summaries.sign_numbers(frame)
    assert (before["RefusalBaseline"], before["RefusalPlus"], before["RefusalMinus"]) == ("60.0", "90.0", "30.0")
    assert (before["SignPlusGained"], before["SignMinusLost"], before["SignVerdict"]) == ("30", "30", "replicated")
    one = frame.index[(frame["prompt_id"] == "harmful_evaluation-099") & (frame["condition"] == "extracted +1")]
    frame.loc[one, "label"] = "refusal"
    after = summaries.sign_numbers(frame)
    assert (after["RefusalPlus"], after["SignPlusGained"]) == ("91.0", "31")
    assert "91.0" in after["SignConclusion"]


def test_another_dose_is_compared_as_well() -> None:
    frame = record(same((0.6, 0.9, 0.3)))
    frame["condition"] = frame["condition"].str.replace("1", "2.5")
    assert analyses.comparisons(frame).loc["plus", "first"] == "extracted +2.5"
    assert summaries.sign_numbers(frame)["RefusalPlus"] == "90.0"


def test_own_prompts_have_a_family_of_two() -> None:
    frame = record({"user": (0.6, 0.9, 0.3)})
    assert analyses.comparisons(frame).index.tolist() == ["plus", "minus"]
    assert "your prompts" in summaries.sign_prose(frame)


def counts(**tokens: tuple[int, int, int]) -> pd.DataFrame:
    names = ("refusals", "all_refusals", "completions")
    return pd.DataFrame(
        {"metric": name, "draw": number, "prompt_id": text, "value": float(value)}
        for number, (text, values) in enumerate(tokens.items())
        for name, value in zip(names, values, strict=True)
    )


def test_openings_need_share_and_precision() -> None:
    found = analyses.openings(counts(I=(90, 95, 100), Sorry=(9, 9, 9), The=(1, 1, 300), rare=(0, 1, 1)))
    assert found[found["chosen"]]["opens with"].tolist() == ["I", "Sorry"]


def test_openings_of_a_model_that_hardly_refuses() -> None:
    found = analyses.openings(counts(I=(2, 2, 4), The=(1, 1, 300)))
    assert found[found["chosen"]]["opens with"].tolist() == ["I"]
    with pytest.raises(CompendiumError, match="refused no extraction prompt"):
        analyses.openings(counts(I=(0, 0, 4)))


@pytest.mark.parametrize(
    ("p", "text"), [(0.00001, "< 0.0001"), (0.0032, "0.0032"), (0.038, "0.038"), (0.63, "0.63"), (1.0, "1")]
)
def test_p_values_in_words(p: float, text: str) -> None:
    assert summaries.p_value(p) == text


def test_study_figures_come_out() -> None:
    said = summaries.study_numbers()
    assert (said["StudyMistralPlusZ"], said["StudyMistralPlusFisher"]) == ("0.038", "0.063")
    assert (said["StudyQwenMinusZ"], said["StudyQwenMinusFisher"]) == ("0.002", "0.0032")
    assert said["StudyMistralPlusPower"] in ("56", "57")
