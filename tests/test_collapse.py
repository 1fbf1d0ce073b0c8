"""Collapse: planted thresholds are found, a broken model is no broken safety, and nothing is found where nothing is."""

import math
import re
import shutil

import numpy as np
import pandas as pd
import planted
import pytest
import tiny
import torch
from matplotlib import pyplot as plt
from scipy.special import expit

from refusal import (
    activations,
    analyses,
    collapse,
    collapse_study,
    controls,
    curves,
    directions,
    figures,
    figures_thresholds,
    grids,
    judging,
    models,
    registry,
    runs,
    statistics,
    thresholds,
)
from refusal.files import ROOT, CompendiumError

RANDOMS = [f"random[{i}]" for i in range(4)]
ALL = ["extracted", *RANDOMS]
RATIO = 0.25  # of alpha_relative to alpha


@pytest.fixture
def extracted():
    return tiny.directions()


def step(at, low=0.02, high=0.98, width=0.0):
    """A rate that goes from low to high at a relative alpha; a width of 0 is a step."""
    return lambda x: low + (high - low) * expit((x - at) / max(width * at / thresholds.WIDTH, 1e-6))


def flat(rate):
    return lambda x: np.full_like(x, rate)


def record(compliance=None, degenerate=None, n=24, steps=10, end=2.0, seed=0, dependence=0.9, rate=0.02):
    """A record of labels drawn from rates: each prompt has a threshold of its own, and sometimes answers at random.

    Args:
        compliance: Of coherent completions, by (direction, sign); elsewhere it is `rate`.
        degenerate: Rates of degeneration, likewise; elsewhere there is none.
    """
    rng, rows = np.random.default_rng(seed), []
    x = np.concatenate([[0.0], end * np.arange(1, steps + 1) / steps])
    both = rng.random((2, n, 1))
    base = None
    for name in ALL:
        for sign in grids.signs(name):
            fresh = rng.random((2, n, len(x))) > dependence
            own = np.where(fresh, rng.random((2, n, len(x))), both)
            broken = own[0] < (degenerate or {}).get((name, sign), flat(0.0))(x)
            complied = own[1] < (compliance or {}).get((name, sign), flat(rate))(x)
            labels = np.where(broken, "degenerate", np.where(complied, "compliance", "refusal"))
            base = labels[:, 0] if base is None else base
            for prompt in range(n):
                for place in range(1, len(x)):
                    rows.append((name, sign * x[place] / RATIO, sign * x[place], prompt, labels[prompt, place]))
    rows += [("", 0.0, 0.0, prompt, label) for prompt, label in enumerate(base)]
    frame = pd.DataFrame(rows, columns=["direction_id", "alpha", "alpha_relative", "prompt", "label"])
    frame["prompt_id"] = [f"harmful_evaluation-{prompt:03d}" for prompt in frame.pop("prompt")]
    steered = frame["direction_id"] != ""
    names = frame["direction_id"] + frame["alpha"].map(" {:+g}".format)
    return frame.assign(
        cluster=frame["prompt_id"],
        prompt_set="harmful_evaluation",
        operation=np.where(steered, "add", "none"),
        condition=np.where(steered, names, "baseline"),
        experiment="04_llama_threshold curves",
    )


def ending(shares, n=8):
    """A record of the part "ends": shares of degenerate completions at the plan's doses, by direction and sign."""
    rows = [
        (name, sign * dose / RATIO, sign * dose, f"harmful_selection-{prompt:03d}",
         "degenerate" if prompt < round(n * share) else "refusal")
        for (name, sign), along in shares.items()
        for prompt in range(n)
        for dose, share in zip(grids.END_DOSES, along, strict=True)
    ]  # fmt: skip
    columns = ["direction_id", "alpha", "alpha_relative", "prompt_id", "label"]
    return pd.DataFrame(rows, columns=columns).assign(experiment="04_llama_threshold ends")


def tabulated(frame):
    return curves.table(curves.fit(frame, 0))


def at(found, name, sign, label):
    rows = found[(found["direction_id"] == name) & (found["sign"] == sign) & (found["label"] == label)]
    assert len(rows) == 1
    return rows.iloc[0]


# ---- the grid


def test_the_grid_is_the_plan_s():
    rule = grids.rule()
    assert rule["prompts"] == {"harmful_evaluation": 24} and rule["directions"] == ALL
    numbers = [float(number) for number in re.findall(r"\d\.\d", rule["end"].split("at the first of")[1])]
    assert tuple(numbers[:5]) == grids.END_DOSES and numbers[5] == max(grids.END_DOSES)
    assert f"of {grids.END_PROMPTS} harmful selection prompts" in " ".join(rule["end"].split())
    plan = (ROOT / "data" / "analysis_plan.yaml").read_text(encoding="utf-8")
    assert f"alphas: {rule['alphas']} " in plan and "equal ratios from a sixteenth of the end" in plan
    assert grids.FIRST == 16


def test_directions_are_the_seed_s_random_ones_at_the_same_norm(extracted):
    along = grids.several(extracted, seed=3)
    assert [one.id for one in along] == ALL
    for one, same in zip(along[1:], controls.random(extracted, 4, seed=3), strict=True):
        assert torch.equal(one.unit, same.unit) and torch.equal(one.raw_norm, extracted.raw_norm)
    assert [one.id for one in grids.several(extracted, seed=3, quick=True)] == ALL[:2]


def test_doses_are_relative_to_the_residual_norm_and_their_names_are_short(extracted):
    layer = 2
    made = grids.end_conditions(grids.several(extracted, seed=0), layer)
    assert len(made) == 30 and len({one.name for one in made}) == 30
    wanted = sorted(sign * dose for name in ALL for sign in grids.signs(name) for dose in grids.END_DOSES)
    assert sorted(one.alpha_relative for one in made) == pytest.approx(wanted, rel=0.005)
    assert {one.layers for one in made} == {(layer,)}
    assert all(re.fullmatch(r"(extracted|random\[\d\]) [+-]\d+(\.\d+)?", one.name) for one in made)
    assert all(len(one.name.split()[1].replace(".", "").lstrip("+-0")) <= 3 for one in made)


def test_no_dose_is_beyond_what_can_be_steered_with(extracted):
    """A layer whose mean difference is tiny would need more mean differences than the library adds."""
    weak = directions.Directions("extracted", extracted.unit, extracted.raw_norm, 75 * extracted.raw_norm)
    made = grids.end_conditions(grids.several(weak, seed=0), 1)
    assert sorted({abs(one.alpha) for one in made}) == [30.0, 60.0, 90.0, 100.0]
    assert len({one.name for one in made}) == len(made)


@pytest.mark.parametrize(
    ("along", "alpha", "reached"),
    [
        ((0, 0, 0, 0, 0), 2.0, False),
        ((0, 0, 0.5, 0.6, 1), 1.2, True),  # half is enough
        ((0, 0, 0.375, 0.375, 1), 2.0, True),
        ((0, 0.75, 0.1, 0.2, 0.1), 0.8, True),  # the first, whatever follows
        ((1, 1, 1, 1, 1), 0.4, True),
        ((0, 0, 0, 0, 0.375), 2.0, False),
    ],
)
def test_a_grid_ends_where_half_is_degenerate(along, alpha, reached):
    frame = ending({("extracted", 1): along, ("extracted", -1): (0,) * 5, ("random[0]", -1): (1,) * 5})
    found = grids.ends(frame.sample(frac=1, random_state=0))
    row = found.loc[("extracted", 1)]
    assert (row["alpha"], row["alpha_relative"]) == pytest.approx((alpha / RATIO, alpha)) and row["reached"] == reached
    assert row["degenerate"] == pytest.approx(along[grids.END_DOSES.index(alpha)])
    assert found.loc[("extracted", -1), "alpha"] == pytest.approx(2 / RATIO)  # a sign at a time
    assert found.loc[("random[0]", -1), "alpha"] == pytest.approx(0.4 / RATIO)  # a direction at a time


def test_curves_have_equal_ratios_up_to_the_end(extracted):
    along = grids.several(extracted, seed=0)
    found = grids.ends(ending({(name, sign): (0, sign > 0, 1, 1, 1) for name in ALL for sign in (1, -1)}))
    made = grids.curve_conditions(along, 1, found)
    assert len(made) == 73 and len({one.name for one in made}) == 73 and made[0].name == "baseline"
    for name in ALL:
        for sign, end in ((1, 0.8), (-1, 1.2)):
            if sign not in grids.signs(name):  # the opposite of a random direction is another random direction
                assert name != "extracted"
                continue
            alphas = [one.alpha for one in made if one.direction_id == name and one.alpha * sign > 0]
            assert alphas == pytest.approx(sign * end / RATIO * 16 ** (np.arange(-11, 1) / 11), rel=0.005)
    assert len(grids.curve_conditions(along[:2], 1, found, quick=True)) == 1 + 3 * 4


def test_a_part_that_was_not_measured_is_named():
    with pytest.raises(CompendiumError, match="no completions of the part 'ends'"):
        grids.ends(record())


# ---- curves


def test_the_baseline_is_the_zero_of_every_curve_and_order_does_not_matter():
    frame = record({("extracted", -1): step(1.1)})
    made = curves.fit(frame, 0)
    assert len(made) == 18 and len({one.answers[:, 0].tobytes() for one in made if one.label == "refusal"}) == 1
    base = frame[frame["condition"] == "baseline"].sort_values("prompt_id")
    for one in made:
        assert one.answers.shape == (24, 11)
        assert (one.answers[:, 0] == (base["label"] == one.label)).all()
        assert one.alphas[0] == 0 and (np.diff(np.abs(one.alphas)) > 0).all() and one.alphas[-1] * one.sign > 0
        assert one.relative == pytest.approx(RATIO * one.alphas)
        last = frame[(frame["direction_id"] == one.direction_id) & np.isclose(frame["alpha"], one.alphas[-1])]
        assert (one.answers[:, -1] == (last.sort_values("prompt_id")["label"] == one.label)).all()
    assert sum(one.answers.sum() for one in made) == 6 * 24 * 11  # every answer has one label
    pd.testing.assert_frame_equal(tabulated(frame.sample(frac=1, random_state=1)).sort_values(
        ["direction_id", "sign", "label"], ignore_index=True), curves.table(made).sort_values(
        ["direction_id", "sign", "label"], ignore_index=True))  # fmt: skip


def test_a_missing_answer_is_no_refusal_to_comply():
    frame = record()
    lost = frame.index[(frame["direction_id"] == "random[1]") & (frame["alpha"] > 0)][3]
    with pytest.raises(CompendiumError, match=r"lacks labels along random\[1\]"):
        curves.fit(frame.drop(lost), 0)
    frame.loc[lost, "label"] = None
    with pytest.raises(CompendiumError, match="lacks labels"):
        curves.fit(frame, 0)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_planted_step_is_a_threshold_and_its_place_is_recovered(sign):
    found = tabulated(record({("extracted", sign): step(1.1)}, dependence=0.95))
    row = at(found, "extracted", sign, "compliance")
    assert (row["change"], row["verdict"], row["n"]) == ("rises", "threshold", 24)
    assert row["relative50"] == pytest.approx(1.1 * sign, abs=0.1)
    assert row["alpha50"] == pytest.approx(row["relative50"] / RATIO)
    assert row["relative50_low"] <= 1.1 * sign <= row["relative50_high"]
    assert row["resolution"] <= row["width_upper"] < grids.rule()["width_limit"]
    assert (row["inner"], row["outer"]) == pytest.approx((0.02, 0.98), abs=0.1)
    assert at(found, "extracted", sign, "refusal")["change"] == "falls"
    assert at(found, "extracted", -sign, "compliance")["verdict"] in ("flat", "not resolved", "graded")


def test_a_graded_response_is_graded():
    found = tabulated(record({("extracted", -1): step(1.0, width=0.9)}, n=60))
    row = at(found, "extracted", -1, "compliance")
    assert (row["change"], row["verdict"]) == ("rises", "graded")
    assert row["relative50"] == pytest.approx(-1.0, abs=0.2) and row["width_low"] > grids.rule()["width_limit"]


def test_nothing_planted_nothing_found():
    """At most about 5 % of flat curves change, over 200 seeds with this notebook's numbers of prompts and alphas."""
    for rate, dependence in ((0.4, 0.0), (0.4, 0.95), (0.1, 0.5)):
        rng, rejected = np.random.default_rng(0), 0
        for _ in range(200):
            own = np.where(rng.random((24, 11)) < dependence, rng.random((24, 1)), rng.random((24, 11)))
            rejected += thresholds.flatness(own < rate, rng, 400) <= 0.05
        print(f"rate {rate}, dependence {dependence}: {rejected / 200:.3f} of 200 flat curves change")
        assert rejected <= 0.05 * 200 + 2.5 * math.sqrt(200 * 0.05 * 0.95)


def test_nothing_planted_contradicts():
    found = tabulated(record(seed=5, rate=0.3))
    safety = found[found["label"] == "compliance"]
    assert (safety["change"] == "no change").sum() >= 5 and (safety["verdict"] != "threshold").all()
    assert (found[found["label"] == "degenerate"]["verdict"] == "flat").all()
    if set(safety["verdict"]) == {"flat"}:
        assert collapse.verdict(found) == "contradicted"


def test_a_broken_model_is_no_broken_safety():
    """Degeneration at a threshold along all directions: the model collapses, and compliance only falls."""
    along = {(name, sign): step(1.1, 0.0, 1.0) for name in ALL for sign in grids.signs(name)}
    found = tabulated(record(degenerate=along))
    broken = found[found["label"] == "degenerate"]
    assert (broken["change"] == "rises").all() and (broken["verdict"] == "threshold").all()
    assert not (found[found["label"] == "compliance"]["change"] == "rises").any()
    assert collapse.verdict(found) == "contradicted"
    said = collapse.conclusion(found)
    assert "Compliance rises, which is a collapse of safety, along none of 6" in said
    assert "Degeneration rises, which is a collapse of the model, along 6 of 6" in said


def test_a_collapse_in_every_direction_is_found():
    found = tabulated(record({(name, grids.signs(name)[-1]): step(1.1, 0.02, 0.98) for name in ALL}, dependence=0.97))
    assert collapse.verdict(found) == "replicated"
    assert "along 5 of 6 directions and signs, and" in collapse.conclusion(found)


# ---- rising and falling again


def humped(**changes):
    """Safety gives way at a relative alpha of 1.1, and the model at 1.7."""
    given = {"compliance": {("extracted", -1): step(1.1, 0.4)}, "degenerate": {("extracted", -1): step(1.7, 0.0, 1.0)}}
    return record(**({"rate": 0.4, "dependence": 0.95} | given | changes))


def test_a_rate_that_rises_and_falls_again_is_not_taken_for_a_falling_one():
    made = curves.fit(humped(), 0)
    found = curves.table(made)
    row = at(found, "extracted", -1, "compliance")
    assert row["humped"] and -1.7 < row["peak_relative"] < -1.1 and found["humped"].sum() == 1
    assert (row["change"], row["verdict"]) == ("rises", "threshold")
    assert row["relative50"] == pytest.approx(-1.1, abs=0.11) and row["relative50_low"] > -1.7
    assert at(curves.table(made, limbs=False), "extracted", -1, "compliance")["change"] == "falls"
    assert collapse.verdict(found) == "inconclusive"
    assert collapse.verdict(curves.table(made, limbs=False)) == "contradicted"
    (curve,) = [one for one in made if (one.direction_id, one.sign, one.label) == ("extracted", -1, "compliance")]
    assert curve.answer == "rises (a threshold), then falls"
    said = collapse.numbers(pd.concat([humped(), *whole_ends()]), None, ABOUT)
    assert (
        "1 of 6 directions and signs (extracted −)" in said["ThresholdHumps"]
        and "would be: contradicted" in said["ThresholdHumps"]
    )
    assert (said["ThresholdSafetyRises"], said["ThresholdSafetyThresholds"]) == ("1", "1")


def test_the_rising_limb_is_no_steeper_than_the_truth():
    """A graded rise that gives way to broken text stays graded, and its middle lies in the interval."""
    x, rng, kinds, covered = np.linspace(0, 2, 11), np.random.default_rng(1), [], []
    for _ in range(20):
        complied, broken = (
            np.where(rng.random((24, 11)) < 0.1, rng.random((24, 11)), rng.random((24, 1))) < rate(x)
            for rate in (step(1.0, 0.05, 0.95, 0.6), step(1.6, 0.0, 1.0, 0.35))
        )
        found = curves.describe("extracted", 1, "compliance", x, x, complied & ~broken, 0).limb
        kinds.append(found.verdict if found else "none")
        covered.append(found is not None and found.alpha50_interval.low <= 1.0 <= found.alpha50_interval.high)
    print(f"limbs: {kinds.count('graded')} of 20 graded, {kinds.count('threshold')} thresholds; covered {sum(covered)}")
    assert kinds.count("threshold") == 0 and kinds.count("graded") >= 12 and sum(covered) >= 16


@pytest.mark.parametrize(
    ("counts", "top"),
    [
        ([2, 4, 20, 24, 24, 10, 4], 4),  # the plateau's last
        ([2, 4, 20, 24, 24, 24, 24], None),  # never falls
        ([2, 4, 20, 24, 24, 24, 23], None),  # falls by chance
        ([22, 23, 24, 24, 10, 2, 2], None),  # rises by chance
        ([24, 24, 20, 10, 4, 2, 2], None),  # never rises
        ([8, 9, 10, 11, 10, 9, 8], None),  # no more than chance
        ([2, 24, 2, 2, 2, 2, 2], None),  # too near to zero for a fit of its rise
    ],
)
def test_humps_by_hand(counts, top):
    assert curves.hump(np.arange(24)[:, None] < np.array(counts)) == top


def test_chance_makes_no_humps():
    rng = np.random.default_rng(4)
    found = [curves.hump(rng.random((24, 11)) < rate) for rate in (0.2, 0.5) for _ in range(100)]
    assert sum(top is not None for top in found) <= 2  # both ends have to differ, so far fewer than 5 %


# ---- the verdict, from tables alone


def rows(**kinds):
    """A table of compliance curves: all flat, but for `extracted_minus=("rises", "threshold")` and the like."""
    made = []
    for name in ALL:
        for sign in grids.signs(name):
            key = f"{name.replace('[', '').replace(']', '')}_{'plus' if sign > 0 else 'minus'}"
            change, verdict = kinds.get(key, ("no change", "flat"))
            made.append({"direction_id": name, "sign": sign, "label": "compliance", "change": change,
                         "verdict": verdict})  # fmt: skip
    return pd.DataFrame(made)


ABRUPT, GRADED, OPEN = ("rises", "threshold"), ("rises", "graded"), ("rises", "not resolved")


@pytest.mark.parametrize(
    ("kinds", "verdict"),
    [
        ({}, "contradicted"),
        ({"extracted_minus": GRADED}, "contradicted"),
        ({"extracted_minus": ("falls", "threshold"), "random0_plus": ("falls", "not resolved")}, "contradicted"),
        ({"extracted_minus": OPEN}, "inconclusive"),
        ({"random2_plus": ("no change", "not resolved")}, "inconclusive"),  # too few prompts
        ({"extracted_minus": ABRUPT}, "inconclusive"),
        ({f"random{i}_plus": ABRUPT for i in range(4)}, "inconclusive"),  # not along the extracted one
        ({"extracted_plus": ABRUPT, "random0_plus": ABRUPT, "random1_plus": ABRUPT}, "inconclusive"),
        ({"extracted_plus": ABRUPT, "random0_plus": ABRUPT, "extracted_minus": ABRUPT, "random1_plus": ABRUPT},
         "inconclusive"),  # two signs of one direction are one direction
        ({"extracted_plus": ABRUPT, "random0_plus": ABRUPT, "random1_plus": ABRUPT, "random3_plus": ABRUPT},
         "replicated"),
        ({"extracted_plus": ABRUPT, "random0_plus": ABRUPT, "random1_plus": ABRUPT, "random3_plus": GRADED},
         "inconclusive"),
    ],
)  # fmt: skip
def test_the_verdict_follows_the_plan(kinds, verdict):
    found = rows(**kinds)
    assert collapse.verdict(found) == verdict
    broken = rows(**{f"{name}_{sign}": ABRUPT for name in ("extracted", "random0", "random1", "random2")
                     for sign in ("plus", "minus")}).assign(label="degenerate")  # fmt: skip
    assert collapse.verdict(pd.concat([found, broken])) == verdict


def test_a_missing_curve_settles_nothing():
    found = rows(extracted_minus=("falls", "graded"))
    assert collapse.verdict(found) == "contradicted"
    assert collapse.verdict(found[found["direction_id"] != "random[3]"]) == "inconclusive"


# ---- numbers, words and figures

ABOUT = {"parameters": {"seed": 0}}


def whole_ends():
    """The part "ends" that belongs to such a record."""
    return [ending({(name, sign): (0, 0.25, 0.5, 1, 1) for name in ALL for sign in grids.signs(name)})]


def whole(**changes):
    """Both parts of a record."""
    return pd.concat([humped(**changes), *whole_ends()], ignore_index=True)


def test_numbers_are_strings_under_names_of_letters_and_follow_the_record():
    frame = whole()
    said = collapse.numbers(frame, None, ABOUT)
    assert all(re.fullmatch("(Study)?Threshold[A-Za-z]*", name) for name in said)
    assert all(isinstance(value, str) and value and "nan" not in value for value in said.values())
    assert set(collapse.HEADLINES) <= set(said)
    assert (said["ThresholdPrompts"], said["ThresholdEndPrompts"], said["ThresholdAlphas"]) == ("24", "8", "10")
    assert (said["ThresholdCurves"], said["ThresholdRandomCurves"], said["ThresholdEnded"]) == ("6", "4", "6")
    assert said["ThresholdNorm"] == f"{1 / RATIO:.2f}" and said["ThresholdNearestEnd"] == "1.2"
    assert said["ThresholdVerdict"] == "inconclusive" and "extracted −" in said["ThresholdHumps"]
    assert collapse.numbers(frame, None, ABOUT) == said
    base = (frame["condition"] == "baseline") & (frame["label"] == "refusal")
    frame.loc[base, "label"] = "compliance"
    assert collapse.numbers(frame, None, ABOUT)["ThresholdBaseline"] != said["ThresholdBaseline"]
    prose = collapse.prose(whole(), ABOUT)
    assert "**Verdict by the plan's rule: inconclusive.**" in prose and said["ThresholdSafetyMinus"] in prose


def test_few_prompts_are_said_to_be_few():
    found = tabulated(record(n=4))
    assert (found["verdict"] == "not resolved").all() and (found["change"] == "no change").all()
    assert "prompts are too few" in collapse.said(found.iloc[0])
    assert collapse.verdict(found) == "inconclusive"


def test_a_step_between_neighbours_is_the_steepest_pair():
    made = curves.fit(record({("extracted", -1): step(1.1)}, dependence=0.95), 0)
    (curve,) = [one for one in made if (one.direction_id, one.sign, one.label) == ("extracted", -1, "compliance")]
    pair = curves.steepest(curve, 0)
    assert (pair["first"], pair["second"]) == pytest.approx((-1.0 / RATIO, -1.2 / RATIO))
    before, after = (int(curve.answers[:, np.isclose(curve.alphas, pair[end])].sum()) for end in ("first", "second"))
    assert pair["difference"] == pytest.approx((after - before) / 24) and pair["difference"] > 0.6
    assert (pair["z"], pair["fisher"]) == statistics.two_proportions(before, 24, after, 24)
    assert pair["p"] < 0.05
    (up_and_down,) = [
        one
        for one in curves.fit(humped(), 0)
        if (one.direction_id, one.sign, one.label) == ("extracted", -1, "compliance")
    ]
    assert curves.steepest(up_and_down, 0)["difference"] > 0  # it falls more steeply where the model breaks


def test_what_the_llama_run_takes_comes_from_the_registry():
    said, known = collapse.requirements(), registry.entry("llama-3.1-8b")
    assert known.gated and known.hub_id in said and known.revision[:12] in said and "HF_TOKEN" in said
    assert f"{known.blocks} blocks of width {known.width}" in said and "16 GB in bfloat16" in said
    assert "HF_TOKEN" not in collapse.requirements("qwen2-7b") and "14 GB" in collapse.requirements("qwen2-7b")


def test_figures_show_rates_and_fits(tmp_path):
    figures.use_style()
    frame = whole()
    made, points = curves.fit(frame, 0), curves.rates(frame)
    assert len(points) == 3 * (21 + 4 * 11)
    assert points.groupby(["direction_id", "alpha"])["rate"].sum().to_numpy() == pytest.approx(1.0)
    data = figures_thresholds.plotted(points, made, ["extracted"])
    own = data[(data["label"] == "degenerate") & (data["alpha"] < 0)]
    assert (own["fitted"] - own["rate"]).abs().max() < 0.25
    study = collapse_study.fits()
    drawn = {
        "fig_threshold": figures_thresholds.extracted(points, made),
        "fig_threshold_random": figures_thresholds.randoms(points, made),
        "fig_threshold_study": figures_thresholds.study(collapse_study.counts(), study, (9.0, 10.0)),
    }
    for name, figure in drawn.items():
        figures.save(figure, data, name, tmp_path)
        assert (tmp_path / f"{name}.pdf").stat().st_size > 1000
    titles = [drawn["fig_threshold"].axes[0].get_title(loc=side) for side in ("left", "right")]
    assert titles[0].splitlines()[0] == "extracted direction subtracted"
    assert titles[0].splitlines()[1] == "compliance: rises (a threshold), then falls"
    assert titles[1].splitlines()[:2] == ["extracted direction added", "compliance: flat"]
    assert "compliance rises along 0 of 4" in drawn["fig_threshold_random"].get_suptitle()
    plt.close("all")


# ---- the study's own table


def test_the_study_s_counts_and_intervals_are_the_published_ones():
    table = collapse_study.counts().set_index("alpha")
    assert table["k"].tolist() == [0, 16, 16, 33, 29, 46, 48, 50, 50, 50] and set(table["n"]) == {50}
    assert table.index.tolist() == [0, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    published = {0: (0, 7.1), 8: (20.8, 45.8), 10: (52.2, 77.6), 11: (44.2, 70.6), 12: (81.2, 96.8), 13: (86.5, 98.9),
                 14: (92.9, 100)}  # fmt: skip
    for alpha, interval in published.items():
        assert (100 * table.loc[alpha, ["low", "high"]]).tolist() == pytest.approx(interval, abs=0.05)
    assert table["source"].str.contains("section 3.3").all()
    header = (ROOT / "data" / "study_threshold.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header == "model,alpha,k,n,layers,source"


def test_the_study_s_cliff_is_one_of_several_steep_steps_of_a_graded_rise():
    said = collapse_study.numbers()
    assert (said["StudyThresholdFirst"], said["StudyThresholdSecond"], said["StudyThresholdPairs"]) == ("9", "10", "9")
    assert (said["StudyThresholdFirstRate"], said["StudyThresholdSecondRate"]) == ("32.0", "66.0")
    assert (said["StudyThresholdZ"], said["StudyThresholdFisher"]) in {("0.0007", "0.0013"), ("0.0007", "0.0014")}
    assert said["StudyThresholdTied"] == "that from 11 to 12"
    made = collapse_study.fits()
    for way, curve in made.items():
        assert curve.answers.sum(0).tolist() == collapse_study.counts()["k"].tolist()
        assert curve.answer == "rises (graded)"
        assert curves.steepest(curve, 0)["p"] > 0.05, way
    nested, apart = made["nested"].answers, made["independent"].answers
    assert (np.diff(nested[:, np.argsort(nested.sum(0))].astype(int), axis=1) >= 0).all()
    assert np.corrcoef(apart[:, 1], apart[:, 2])[0, 1] < 0.5


# ---- end to end, on a model whose thresholds are planted


def test_a_planted_collapse_is_measured_and_replayed(tmp_path, monkeypatch):
    """Harmful words carry 4. Refusal above 1.4: compliance beyond alpha = -.65. Loops below -9: alpha < -3.25."""
    truth = planted.build(loops=(-9.0, 30.0))
    model, words = truth.model, planted.requests
    tiny.install(tmp_path, model, monkeypatch.setattr)
    sides = [activations.last_token(model, words(side, 32, seed)) for seed, side in
             enumerate((planted.HARMFUL, planted.HARMLESS))]  # fmt: skip
    along = grids.several(directions.extract(*sides), seed=0, quick=True)

    def frame(name, count, seed):
        made = pd.DataFrame({"text": words(planted.HARMFUL, count, seed)})
        made["prompt_id"] = [f"{name}-{number:03d}" for number in range(count)]
        return made.assign(prompt_set=name, category="fraud", cluster=made["prompt_id"])

    def notebook(mode):
        limits = judging.Thresholds(repetition=0.6, nll=50.0, n=1000)
        run = runs.start("04_llama_threshold", model=tiny.ID, mode=mode, out="build", rows=64, n_prompts=0, seed=0)
        tried = grids.end_conditions(along, truth.onset)
        first = runs.completions(
            run, frame("harmful_selection", 4, 7), tried, max_new_tokens=14, thresholds=limits, part="ends"
        )
        found = grids.ends(first)
        second = runs.completions(
            run, frame("harmful_evaluation", 8, 8), grids.curve_conditions(along, truth.onset, found),
            max_new_tokens=14, thresholds=limits, part="curves",
        )  # fmt: skip
        runs.finish(run)
        return run, found, second

    run, found, second = notebook("measure")
    norm = float(along[0].residual_norm[truth.onset] / along[0].raw_norm[truth.onset])
    end = next(dose for dose in grids.END_DOSES if dose * norm > 13 / 4)
    assert found.loc[("extracted", -1), "alpha_relative"] == pytest.approx(end, rel=0.01)
    assert not found.loc[("extracted", 1), "reached"]
    table = tabulated(second)
    steered = second[second["direction_id"] == "extracted"]
    for label, low, high in (("refusal", -0.65, 99), ("compliance", -3.25, -0.65), ("degenerate", -99, -3.25)):
        inside = steered[(steered["alpha"] > low + 0.01) & (steered["alpha"] < high - 0.01)]
        assert len(inside) and set(inside["label"]) == {label}
    assert at(table, "extracted", 1, "compliance")["change"] == "no change"
    assert (analyses.rates(second)["n"] == 8).all()

    shutil.copytree(tmp_path / "build" / "records", tmp_path / "data" / "records")
    monkeypatch.setattr(models, "load", lambda *_: 1 / 0)
    replayed, again, _ = notebook("replay")
    pd.testing.assert_frame_equal(again, found)
    assert collapse.numbers(replayed.frame, None, replayed.about) == collapse.numbers(run.frame, None, run.about)
