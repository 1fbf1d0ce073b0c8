"""The plan's rules, applied to records whose truth is planted."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from refusal import analyses, prompts, summaries
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


@pytest.mark.parametrize("shift", [0.0, 1.5, 2.3])  # AUROC of .50, .86 and .95
def test_auroc_interval_covers_the_truth(shift: float) -> None:
    rng, truth, held = np.random.default_rng(0), stats.norm.cdf(shift / np.sqrt(2)), []
    for _ in range(300):
        values = np.concatenate([rng.normal(shift, 1, 40), rng.normal(0, 1, 60)])
        area = roc_auc_score(np.arange(100) < 40, values)
        interval = analyses.auroc_interval(area, 40, 60)
        assert interval.low < area < interval.high
        held.append(interval.low <= truth <= interval.high)
    assert 0.91 <= np.mean(held) <= 0.99


def test_auroc_interval_is_as_wide_as_the_bootstrap_says() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.normal(1.5, 1, 100), rng.normal(0, 1, 100)
    truth = np.arange(200) < 100

    def area(one: np.ndarray, other: np.ndarray) -> float:
        return float(roc_auc_score(truth, np.concatenate([one, other])))

    drawn = [area(rng.choice(first, 100), rng.choice(second, 100)) for _ in range(500)]
    interval = analyses.auroc_interval(area(first, second), 100, 100)
    assert interval.high - interval.low == pytest.approx(np.subtract(*np.quantile(drawn, [0.975, 0.025])), rel=0.25)


def test_auroc_interval_at_the_ends() -> None:
    whole, none = analyses.auroc_interval(1.0, 100, 100), analyses.auroc_interval(0.0, 100, 100)
    assert whole.high == 1.0 and 0.9 < whole.low < 1.0
    assert none.low == 0.0 and none.high == pytest.approx(1 - whole.low)


def test_auroc_by_layer_knows_how_many_prompts_were_held_out() -> None:
    rows = [{"experiment": "geometry", "direction_id": "extracted", "metric": "auroc", "layer": layer, "value": value}
            for layer, value in ((0, 0.6), (1, 0.9))]  # fmt: skip
    table = analyses.auroc_by_layer(pd.DataFrame(rows), {"parameters": {"n_prompts": 0}}).set_index("layer")
    sizes = [len(prompts.load(f"{kind}_evaluation")) for kind in ("harmful", "harmless")]
    assert tuple(table.loc[1, ["low", "high"]]) == tuple(vars(analyses.auroc_interval(0.9, *sizes)).values())
    quick = analyses.auroc_by_layer(pd.DataFrame(rows), {"parameters": {"n_prompts": 8}}).set_index("layer")
    assert (quick["low"] < table["low"]).all() and (quick["high"] > table["high"]).all()


def test_screen_means_have_t_intervals_over_prompts() -> None:
    values = np.random.default_rng(2).normal(-1, 2, 16)
    rows = [{"experiment": "screen", "metric": "log_odds", "layer": layer, "alpha": alpha, "value": value + alpha}
            for layer, alpha in ((-1, 0.0), (3, 1.0)) for value in values]  # fmt: skip
    table = analyses.screen_means(pd.DataFrame(rows)).set_index(["layer", "alpha"])
    slow = stats.t.interval(0.95, 15, values.mean() + 1, stats.sem(values))
    assert table.loc[(3, 1.0)].tolist() == pytest.approx([values.mean() + 1, *slow])
    assert table.loc[(-1, 0.0), "value"] == pytest.approx(values.mean())
