"""Every test of a claim on records whose truth is planted: replicated, contradicted, inconclusive, not measured."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from test_analyses import record as signs
from test_analyses import same
from test_collapse import ALL, flat, step
from test_collapse import record as dosed
from test_cone_effects import KINDS, effects_of
from test_window_runs import asked
from test_windows import GRID, UNITS, made_of
from test_windows import record as windowed
from test_windows import step as jump

from refusal import (
    agreement,
    analyses,
    claim_evidence,
    claim_tests_labels,
    collapse_study,
    cone_designs,
    cone_geometry,
    cone_tables,
    cones,
    curves,
    grids,
    records,
    statistics,
    summaries,
    sweep_cells,
    window_formats,
    window_runs,
)
from refusal.claim_evidence import Evidence, Finding, NotMeasuredError, Record, by_all, by_change, by_interval
from refusal.claim_tests import TESTS
from refusal.control_screens import FAMILIES
from refusal.files import CompendiumError
from refusal.statistics import Interval

MODEL, OTHER = "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"
NOTEBOOKS = {
    "00": "00_can_we_trust_the_labels", "01": "01_extraction", "02": "02_orthogonal_controls",
    "03": "03_sign_inversion", "04": "04_llama_threshold", "05": "05_polyhedral_cones", "06": "06_layer_sweep",
    "07": "07_therapeutic_window", "08": "08_robustness_hierarchy",
}  # fmt: skip
ABOUT = {"parameters": {"seed": 0, "n_prompts": 0, "draws": 400}, "facts": {"layers": 6}}
NOTHING = pd.DataFrame(columns=records.METRICS.names)


def evidence(number, frame=None, metrics=None, model=MODEL, kept=None, **parameters):
    """The evidence of one notebook on a model, as if it had been read."""
    about = ABOUT | {"parameters": ABOUT["parameters"] | parameters}
    made = Record(NOTHING if frame is None else frame, NOTHING if metrics is None else metrics, about)
    kept = {} if kept is None else kept
    kept[model, NOTEBOOKS[number]] = made
    return Evidence(Path("nowhere"), model, kept)


def said(found: Finding, verdict: str) -> Finding:
    """A finding with this verdict, whose numbers are there, and whose power is told where it is inconclusive only."""
    assert found.verdict == verdict, found
    assert found.numbers and "nan" not in found.numbers and bool(found.power) == (verdict == "inconclusive"), found
    return found


# ---- rules


def change(difference, p_holm, p_equivalence=1.0, upper=1.0):
    return pd.Series({"difference": difference, "p_holm": p_holm, "p_equivalence": p_equivalence, "upper": upper})


@pytest.mark.parametrize(
    ("row", "claimed", "verdict"),
    [
        (change(0.2, 0.01), "rises", "replicated"),
        (change(0.2, 0.01), "falls", "contradicted"),
        (change(-0.2, 0.01), "falls", "replicated"),
        (change(-0.2, 0.01), "rises", "contradicted"),
        (change(0.2, 0.06), "rises", "inconclusive"),
        (change(0.01, 0.9, p_equivalence=0.01), "rises", "contradicted"),  # shown to be no change
        (change(0.04, 0.01, p_equivalence=0.01), "rises", "replicated"),  # small, but there
        (change(0.01, 0.9, p_equivalence=0.01), "same", "replicated"),
        (change(0.3, 0.01), "same", "contradicted"),
        (change(0.3, 0.2), "same", "inconclusive"),  # not found is not the same as not there
        (change(-0.3, 0.01, upper=-0.2), "no rise", "replicated"),
        (change(0.01, 0.9, upper=0.09), "no rise", "replicated"),
        (change(0.01, 0.9, upper=0.11), "no rise", "inconclusive"),
        (change(0.05, 0.01, upper=0.08), "no rise", "contradicted"),
    ],
)
def test_the_rule_on_changes(row, claimed, verdict):
    assert by_change(row, claimed) == verdict
    with pytest.raises(CompendiumError, match=r"^a change cannot be claimed as 'grows': .*\.$"):
        by_change(row, "grows")


def test_the_rule_on_intervals_and_parts():
    for low, high, above, below in (
        (0.6, 0.8, "replicated", "contradicted"),
        (0.2, 0.4, "contradicted", "replicated"),
        (0.4, 0.6, "inconclusive", "inconclusive"),
        (0.5, 0.7, "inconclusive", "inconclusive"),  # it touches the limit
        (np.nan, np.nan, "inconclusive", "inconclusive"),
    ):
        assert by_interval(Interval(low, high), 0.5, "above") == above
        assert by_interval(Interval(low, high), 0.5, "below") == below
    with pytest.raises(CompendiumError, match=r"^a size cannot be claimed as 'most': .*\.$"):
        by_interval(Interval(0, 1), 0.5, "most")
    assert by_all(["replicated"] * 2) == "replicated" and by_all([]) == "inconclusive"
    assert by_all(["replicated", "inconclusive"]) == "inconclusive"
    assert by_all(["replicated", "contradicted", "inconclusive"]) == "contradicted"


@pytest.mark.parametrize(("limit", "claimed"), [(0.5, "above"), (0.5, "below"), (0.1, "below")])
def test_the_power_of_a_share_is_what_simulation_says(limit, claimed):
    power = claim_evidence.share_power(100, limit, claimed)
    if "no share" in power:
        pytest.fail(power)
    share = float(power.split("a share of ")[1].split(" %")[0]) / 100
    rng, tried = np.random.default_rng(0), {}
    for truth in (share, share - 0.02 if claimed == "above" else share + 0.02):
        counts = rng.binomial(100, truth, 400)
        hits = [by_interval(statistics.wilson(k, 100), limit, claimed) == "replicated" for k in counts]
        tried[truth] = np.mean(hits)
    assert tried[share] > 0.74 and min(tried.values()) < 0.83, tried
    assert "no share would be told" in claim_evidence.share_power(3, 0.1, "below")


def test_the_power_is_told_only_where_it_matters():
    assert claim_evidence.finding("replicated", "x", "power").power == ""
    assert claim_evidence.finding("inconclusive", "x", "power").power == "power"
    assert "50 prompts" in claim_evidence.change_power(50.9, 0.5) and "no change" in claim_evidence.change_power(0, 0.5)


# ---- records


def test_a_record_that_is_missing_or_small_is_not_measured(tmp_path):
    here = Evidence(tmp_path, MODEL)
    with pytest.raises(NotMeasuredError, match="there is no record of 03_sign_inversion on qwen"):
        here.record(NOTEBOOKS["03"])
    row = {one.name: "" if one.type == "string" else 0 for one in records.COMPLETIONS}
    for tail, frame in (("", pd.DataFrame([row])), (".metrics", NOTHING)):
        records.write(frame, tmp_path / MODEL / f"03_sign_inversion{tail}.parquet", {"quick": True})
    with pytest.raises(NotMeasuredError, match="none of a run in full"):
        Evidence(tmp_path, MODEL).record(NOTEBOOKS["03"])
    assert here.models(NOTEBOOKS["03"]) == [MODEL] and here.models("01_extraction") == []


def test_what_is_computed_is_kept_for_a_model_and_not_for_another():
    here, made = evidence("03"), []
    for one in (here, here, here.of(OTHER)):
        one.once("x", lambda: made.append(1))
    assert len(made) == 2 and here.of(OTHER).kept is here.kept


# ---- 03


RISES, FALLS, SAME, NOISY = (0.6, 0.95, 0.3), (0.6, 0.3, 0.95), (0.6, 0.6, 0.6), (0.6, 0.66, 0.53)


@pytest.mark.parametrize(
    ("shares", "plain", "study"),
    [
        (RISES, "replicated", "replicated"),
        (FALLS, "contradicted", "contradicted"),
        (SAME, "contradicted", "inconclusive"),  # ten clusters that agree are ten, not a hundred
        (NOISY, "inconclusive", "contradicted"),  # clusters that all change alike show that it is less than the margin
    ],
)
def test_signs(shares, plain, study):
    here = evidence("03", signs(same(shares)))
    found = said(TESTS["sign_inversion"](here), plain)
    assert "n = 100 prompts in 100 clusters" in found.numbers
    for prompts, verdict in (("harmful_evaluation", plain), ("harmful_study", study)):
        words = {"prompts": prompts, "first": "minus", "second": "baseline", "claimed": "rises"}
        said(TESTS["jailbreaks"](here, **words), verdict)
    said(TESTS["refusals"](here, comparison="harmless_plus", claimed="rises"), plain)


def test_a_count_of_one_record_changes_the_verdict_on_jailbreaks():
    frame = signs(same(RISES))
    words = {"prompts": "harmful_study", "first": "plus", "second": "baseline", "claimed": "falls"}
    before = said(TESTS["jailbreaks"](evidence("03", frame), **words), "replicated")
    assert "from 40.0 to 5.0 %; n = 100 prompts in 10 clusters" in before.numbers
    turned = (frame["prompt_set"] == "harmful_study") & (frame["condition"] == "extracted +1")
    after = TESTS["jailbreaks"](
        evidence("03", frame.assign(seed_rule=frame["seed_rule"].mask(turned, "jailbreak"))), **words
    )
    said(after, "contradicted")


def test_the_six_comparisons_of_jailbreaks_are_corrected_together_and_paired():
    from refusal.claim_tests_signs import _jailbreaks

    table = _jailbreaks(evidence("03", signs(same(NOISY))))
    assert len(table) == 6 and (table["p_holm"] >= table["p"]).all() and (table["p_holm"] > table["p"]).any()
    row = table.loc[("harmful_evaluation", "minus", "plus")]
    assert row["difference"] == pytest.approx(0.13) and row["p"] == pytest.approx(2 / 2**13)
    assert (table.sort_index().loc["harmful_study", "clusters"] == 10).all()


def test_no_rise_where_none_is_possible_and_where_there_is_one():
    words = {"prompts": "harmful_evaluation", "first": "plus", "second": "baseline", "claimed": "no rise"}
    said(TESTS["jailbreaks"](evidence("03", signs(same((1.0, 1.0, 0.9)))), **words), "replicated")
    said(TESTS["jailbreaks"](evidence("03", signs(same(FALLS))), **words), "contradicted")


@pytest.mark.parametrize(
    ("baseline", "claimed", "limit", "verdict"),
    [(0.55, "below", 0.5, "inconclusive"), (0.8, "below", 0.5, "contradicted"), (0.2, "below", 0.5, "replicated"),
     (0.8, "above", 0.5, "replicated"), (0.04, "below", 0.1, "replicated")],
)  # fmt: skip
def test_rates(baseline, claimed, limit, verdict):
    frame = signs(same((baseline, 0.9, 0.1)))
    words = {"prompts": "harmful_evaluation", "conditions": ["baseline"], "outcome": "refusal"}
    said(TESTS["rates"](evidence("03", frame), **words, claimed=claimed, limit=limit), verdict)


def test_degeneration_under_one_sign_is_enough_to_contradict_coherence():
    words = {"prompts": "harmful_evaluation", "conditions": ["plus", "minus"], "outcome": "degenerate",
             "claimed": "below", "limit": 0.1}  # fmt: skip
    frame = signs(same(RISES))
    said(TESTS["rates"](evidence("03", frame), **words), "replicated")
    broken = (frame["condition"] == "extracted -1") & (frame["label"] == "compliance")
    said(TESTS["rates"](evidence("03", frame.assign(label=frame["label"].mask(broken, "degenerate"))), **words),
         "contradicted")  # fmt: skip


@pytest.mark.parametrize(
    ("minus", "most", "none"),
    [(0.1, "replicated", "contradicted"), (0.6, "contradicted", "replicated"), (0.3, "inconclusive", "contradicted")],
)
def test_refusals_that_turn(minus, most, none):
    here = evidence("03", signs(same((0.6, 0.9, minus))))
    found = said(TESTS["flipped"](here, claimed="most"), most)
    assert found.numbers.startswith(f"{round(60 - 100 * minus)} of 60 refusals")
    said(TESTS["flipped"](here, claimed="none"), none)


def test_a_model_that_refuses_nothing_has_nothing_to_turn_and_broken_text_is_no_compliance():
    said(TESTS["flipped"](evidence("03", signs(same((0.0, 0.5, 0.0)))), claimed="none"), "inconclusive")
    frame = signs(same((0.6, 0.9, 0.0)))
    broken = frame["condition"] == "extracted -1"
    here = evidence("03", frame.assign(label=frame["label"].mask(broken, "degenerate")))
    said(TESTS["flipped"](here, claimed="most"), "contradicted")


@pytest.mark.parametrize(
    ("others", "verdict"),
    [
        ((RISES,), "replicated"),
        ((RISES, NOISY), "inconclusive"),
        ((RISES, FALLS), "contradicted"),
        ((), "inconclusive"),
    ],
)
def test_signs_of_all_models(monkeypatch, others, verdict):
    names, kept = [OTHER, "smollm2-135m"], {}
    for name, shares in zip(names, others, strict=False):
        evidence("03", signs(same(shares)), model=name, kept=kept)
    here = evidence("03", signs(same(RISES)), kept=kept)
    monkeypatch.setattr(Evidence, "models", lambda *_: [MODEL, *names[: len(others)]])
    found = said(TESTS["sign_everywhere"](here), verdict)
    assert found.numbers.count("refusal at +1: ") == 1 + len(others)


@pytest.mark.parametrize(
    ("planned", "verdict"),
    [("supported", "replicated"), ("contradicted", "contradicted"), ("inconclusive", "inconclusive"),
     ("not testable here", "not testable here")],
)  # fmt: skip
def test_the_hierarchy_is_that_of_notebook_08(monkeypatch, planned, verdict):
    told = {"HierarchyVerdict": planned, "HierarchyConclusion": "So.", "HierarchyPower": "With 40 prompts."}
    monkeypatch.setattr(summaries, "report", lambda *_: told)
    said(TESTS["hierarchy"](evidence("08")), verdict)
    with pytest.raises(NotMeasuredError):
        TESTS["hierarchy"](evidence("03"))


# ---- 02


def controlled(random, orthogonal, baseline=0.4, n=16):
    """Jailbreaks by the study's rule under four draws and both signs of two families; the same prompts do."""
    rows = []
    groups = [("baseline", "none", "", baseline)]
    for family, share in (("random", random), ("orthogonal", orthogonal)):
        groups += [(f"{family}[{i}] {sign}1", "add", f"{family}[{i}]", share) for i in range(4) for sign in "+-"]
    for name, operation, direction, share in groups:
        for i in range(n):
            fresh = i < round(n * share)
            rows.append({"prompt_set": "harmful_evaluation", "prompt_id": f"p-{i:02d}", "condition": name,
                         "operation": operation, "direction_id": direction, "cluster": f"p-{i:02d}",
                         "seed_rule": "jailbreak" if fresh else "refusal"})  # fmt: skip
    return pd.DataFrame(rows)


def test_control_directions():
    here = evidence("02", controlled(random=1.0, orthogonal=0.4))
    said(TESTS["control_jailbreaks"](here, family="random", claimed="rises"), "replicated")
    said(TESTS["control_jailbreaks"](here, family="random", claimed="same"), "contradicted")
    few = TESTS["control_jailbreaks"](here, family="orthogonal", claimed="same")
    said(few, "inconclusive")  # sixteen prompts that agree are not enough for equivalence
    many = evidence("02", controlled(random=0.4, orthogonal=0.0, n=100))
    said(TESTS["control_jailbreaks"](many, family="random", claimed="same"), "replicated")
    said(TESTS["control_jailbreaks"](many, family="random", claimed="rises"), "contradicted")
    said(TESTS["control_jailbreaks"](many, family="orthogonal", claimed="rises"), "contradicted")


def test_control_draws_of_a_prompt_are_no_independent_evidence():
    """One prompt of sixteen turns, under all eight conditions: that is one change, not eight."""
    frame = controlled(random=0.4, orthogonal=0.4)
    one = (frame["prompt_id"] == "p-15") & (frame["operation"] == "add")
    here = evidence("02", frame.assign(seed_rule=frame["seed_rule"].mask(one, "jailbreak")))
    found = said(TESTS["control_jailbreaks"](here, family="random", claimed="rises"), "inconclusive")
    assert "+6.2 points" in found.numbers and "n = 16 prompts in 16 clusters" in found.numbers


def screened(size, draws=199, seed=0):
    rng, rows = np.random.default_rng(seed), []
    for name, value in [("extracted", size)] + [
        (f"{family}[{i}]", rng.normal()) for family in FAMILIES for i in range(draws)
    ]:
        rows += [{"experiment": "screen", "metric": "mean_log_odds", "operation": "add", "direction_id": name,
                  "alpha": sign, "draw": 0, "prompt_id": "harmful_evaluation", "value": sign * value / 2}
                 for sign in (1.0, -1.0)]  # fmt: skip
    table = pd.DataFrame(rows)
    table["draw"] = table["direction_id"].str.extract(r"\[(\d+)\]")[0].fillna("0").astype(int)
    return table


@pytest.mark.parametrize(
    ("size", "draws", "verdict"),
    [(9.0, 199, "replicated"), (0.1, 199, "contradicted"), (9.0, 9, "inconclusive")],
)
def test_special(size, draws, verdict):
    said(TESTS["special"](evidence("02", metrics=screened(size, draws))), verdict)


# ---- 04


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(curves, "DRAWS", 60)


def with_rule(frame, jailbreak=("compliance",)):
    return frame.assign(seed_rule=np.where(frame["label"].isin(jailbreak), "jailbreak", "refusal"))


EVERY = [(name, sign) for name in ALL for sign in grids.signs(name)]


def test_doses_along_planted_curves(quick):
    sharp = {one: step(0.9) for one in EVERY if one != ("extracted", -1)}
    broken = {("extracted", 1): flat(0.0), ("extracted", -1): step(1.0)}
    here = evidence("04", with_rule(dosed(sharp, broken, n=40, steps=16)))
    said(TESTS["collapse_everywhere"](here), "replicated")
    rises = {"sign": 1, "label": "compliance"}
    assert "n = 40 prompts" in said(TESTS["doses"](here, **rises, claimed="rises"), "replicated").numbers
    said(TESTS["doses"](here, **rises, claimed="falls"), "contradicted")
    said(TESTS["doses"](here, sign=-1, label="compliance", claimed="rises"), "contradicted")  # flat
    assert TESTS["abrupt"](here, label="degenerate").verdict == "inconclusive"  # for one sign only
    said(TESTS["at_the_end"](here, limit=0.5), "contradicted")  # the other sign breaks, by our label and by the rule
    gibberish = evidence("04", with_rule(here.record(NOTEBOOKS["04"]).frame, ("compliance", "degenerate")))
    found = said(TESTS["at_the_end"](gibberish, limit=0.5), "replicated")  # broken text is a jailbreak by that rule
    assert "(limit 50 %)" in found.numbers


def test_a_model_that_breaks_gradually_has_no_cliff_and_no_collapse(quick):
    slow = dict.fromkeys(EVERY, step(1.0, width=1.5))
    here = evidence("04", with_rule(dosed({}, slow, n=40, steps=16, rate=0.0)))
    said(TESTS["collapse_everywhere"](here), "contradicted")
    said(TESTS["abrupt"](here, label="degenerate"), "contradicted")
    both = evidence("04", with_rule(dosed({}, dict.fromkeys(EVERY, step(0.9)), n=40, steps=16, rate=0.0)))
    said(TESTS["abrupt"](both, label="degenerate"), "replicated")


# ---- 06, 01, 00


@pytest.mark.parametrize(
    ("passed", "p_holm", "verdict"),
    [([True, False], [0.01, 0.5], "replicated"), ([True, False], [0.2, 0.5], "inconclusive"),
     ([False, False], [0.01, 0.5], "contradicted")],
)  # fmt: skip
def test_gates(monkeypatch, passed, p_holm, verdict):
    table = pd.DataFrame({"passed": passed, "p_holm": p_holm, "change": [0.4, -0.1], "n": 24, "random": 0.5})
    monkeypatch.setattr(sweep_cells, "gates", lambda *_: table)
    said(TESTS["gates"](evidence("06")), verdict)


@pytest.mark.parametrize(
    ("cosines", "verdict"),
    [((0.3, 0.5, 0.8), "replicated"), ((0.97, 0.98, 0.99), "contradicted"), ((0.9, 0.95, 0.99), "inconclusive")],
)
def test_few_pairs(monkeypatch, cosines, verdict):
    monkeypatch.setattr(analyses, "selected_layer", lambda *_: 3)
    rows = [{"experiment": "geometry", "metric": "cosine_to_full", "layer": layer, "direction_id": f"extracted[{n}]",
             "value": value if (layer, n) == (3, 5) else 0.0}
            for layer in (2, 3) for n in (5, 8) for value in np.quantile(cosines, np.linspace(0, 1, 41))]  # fmt: skip
    said(TESTS["few_pairs"](evidence("01", metrics=pd.DataFrame(rows))), verdict)


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(1.4, 2.1, "replicated"), (-0.5, 0.4, "inconclusive"), (-2, -1, "contradicted")]
)
def test_separated(monkeypatch, low, high, verdict):
    monkeypatch.setattr(analyses, "selected_layer", lambda *_: 3)
    values = {"d_prime": (low + high) / 2, "d_prime_low": low, "d_prime_high": high, "auroc": 0.9}
    rows = [{"experiment": "geometry", "direction_id": "extracted", "metric": name, "layer": layer,
             "value": value if layer == 3 else 0.0} for name, value in values.items() for layer in (2, 3)]  # fmt: skip
    said(TESTS["separated"](evidence("01", metrics=pd.DataFrame(rows))), verdict)


@pytest.mark.parametrize(
    ("ends", "reliable", "unreliable"),
    [
        ({"seed_rule": (0.9, 1.0), "gcg": (0.9, 1.0)}, "replicated", "contradicted"),
        ({"seed_rule": (0.4, 0.8), "gcg": (0.9, 1.0)}, "contradicted", "contradicted"),
        ({"seed_rule": (0.4, 0.8), "gcg": (0.1, 0.6)}, "contradicted", "replicated"),
        ({"seed_rule": (0.7, 0.9), "gcg": (0.9, 1.0)}, "inconclusive", "contradicted"),
        ({"seed_rule": (0.7, 0.9), "gcg": (0.1, 0.6)}, "contradicted", "inconclusive"),
        ({"seed_rule": (np.nan, np.nan), "gcg": (np.nan, np.nan)}, "inconclusive", "inconclusive"),
    ],
)
def test_judges(monkeypatch, ends, reliable, unreliable):
    rows = [{"half": half, "scope": scope, "sense": sense, "judge": name, "kappa": 0.5, "n": 60, "prompts": 40,
             "boot_low": low if right else 0.0, "boot_high": high if right else 1.0}
            for name, (low, high) in ends.items() for half in "AB" for scope in (agreement.ALL, MODEL)
            for sense in agreement.SENSES
            for right in [(half, scope, sense) == ("B", agreement.ALL, "three labels")]]  # fmt: skip
    monkeypatch.setattr(claim_tests_labels.readers, "items", lambda: None)
    monkeypatch.setattr(claim_tests_labels.validation, "pooled", lambda *_: (None, None))
    monkeypatch.setattr(agreement, "agreement", lambda *_, **__: pd.DataFrame(rows))
    for claimed, verdict in (("reliable", reliable), ("unreliable", unreliable)):
        found = TESTS["judge"](evidence("00"), judges=list(ends), claimed=claimed)
        assert found.verdict == verdict and "60 answers to 40 prompts" in found.numbers


@pytest.mark.parametrize(
    ("covered", "verdict"),
    [((0.5, 0.88), "contradicted"), ((0.94, 0.96), "replicated"), ((0.88, 0.94), "inconclusive")],
)
def test_coverage(covered, verdict):
    rows = [{"experiment": "calibration", "metric": "coverage", "direction_id": how, "draw": clusters, "alpha": rate,
             "prompt_id": "0.3", "value": value if (how, clusters) == ("independent", 10) else 0.95}
            for how in ("independent", "score") for clusters in (10, 40)
            for rate, value in zip((0.1, 0.5), covered, strict=True)]  # fmt: skip
    said(TESTS["coverage"](evidence("00", metrics=pd.DataFrame(rows))), verdict)


# ---- published counts


def test_published_counts_need_no_record_and_follow_the_file(monkeypatch):
    here = Evidence(Path("nowhere"), MODEL)
    said(TESTS["published_rate"](here, alpha=10, rate=1.0), "contradicted")
    said(TESTS["published_rate"](here, alpha=14, rate=1.0), "replicated")
    found = said(TESTS["published_p"](here, model="mistral-7b-v0.3", condition="standard_plus"), "inconclusive")
    assert "pooled z p = 0.038, Fisher p = 0.063" in found.numbers and "57 %" in found.power
    said(TESTS["published_p"](here, model="qwen2-7b", condition="standard_minus"), "replicated")
    said(TESTS["published_p"](here, model="qwen2-7b", condition="standard_plus"), "contradicted")


@pytest.mark.parametrize(
    ("kinds", "ps", "verdict"),
    [(("graded", "graded"), (0.2, 0.07), "contradicted"), (("threshold", "threshold"), (0.01, 0.02), "replicated"),
     (("threshold", "graded"), (0.01, 0.02), "inconclusive"), (("threshold", "threshold"), (0.2, 0.3), "inconclusive"),
     (("graded", "graded"), (0.2, 0.01), "inconclusive"), (("not resolved", "graded"), (0.2, 0.3), "inconclusive")],
)  # fmt: skip
def test_published_jump(monkeypatch, kinds, ps, verdict):
    def curve(kind):
        return SimpleNamespace(described=SimpleNamespace(verdict=kind, width=0.5, width_interval=Interval(0.4, 0.6)))

    made = dict(zip(("independent", "nested"), map(curve, kinds), strict=True))
    p = {id(one): value for one, value in zip(made.values(), ps, strict=True)}
    monkeypatch.setattr(collapse_study, "fits", lambda: made)
    monkeypatch.setattr(curves, "steepest", lambda one, _: {"p": p[id(one)]})
    said(TESTS["published_jump"](Evidence(Path("nowhere"), MODEL)), verdict)


# ---- 05


LAYERS, PER, WIDTH = 6, 16, 40
COUNTS = cone_geometry.Counts((4, PER), 99, 10, 10, 60)


def geometry(apart, rank_falls=True, seed=0):
    """Geometry rows of planted activations: separate or shared category directions, more shared with depth or less."""
    rng = np.random.default_rng(seed)
    harmful, about = [kind for kind in KINDS for _ in range(PER)], [kind for kind in KINDS for _ in range(8)]
    harmless = [f"topic {i % 8}" for i in range(4 * PER)]
    values = rng.normal(size=(len(harmful) + len(harmless) + len(about), LAYERS, WIDTH))
    for layer in range(LAYERS):
        depth = layer if rank_falls else LAYERS - 1 - layer
        shared, own = (0.0, 8.0) if apart else (8.0, 0.0)
        if apart:
            shared = 1.5 * depth
        for i, kind in enumerate(harmful):
            values[i, layer, 0] += shared
            values[i, layer, 1 + KINDS.index(kind)] += own
    where = cone_designs.layout(harmful, harmless, about)
    made = cone_geometry.rows(cones.kernel(values.astype(np.float32)), where, WIDTH, 3, COUNTS, seed)
    return made.assign(experiment="geometry")


def swings(interaction, base=3.0, mixed=3.0):
    """Screen rows with a planted interaction of direction and category, random directions of size 1, combinations."""
    effects, kinds = effects_of(interaction, seed=0, n=25, base=base)
    rows = [{"direction_id": f"category[{name}]", "prompt_id": one, "value": effects.loc[name, one]}
            for name in effects.index for one in effects.columns]  # fmt: skip
    for family, count, size in (("random", 19, 1.0), ("combination", 64, mixed)):
        rows += [{"direction_id": f"{family}[{i}]", "prompt_id": one, "value": size * (1 - i / 100)}
                 for i in range(count) for one in effects.columns]  # fmt: skip
    return pd.DataFrame(rows).assign(experiment="screen", metric="swing", layer=3, draw=0), kinds


def completed(kinds, share):
    """Completions under ablation: the own category's refusals go, those of the others with the rest of the share."""
    rng, rows = np.random.default_rng(0), []
    about = {"experiment": "05_polyhedral_cones causes", "prompt_set": "harmful_evaluation"}
    for own in ("", *KINDS):
        direction = f"category[{own}]" if own else ""
        condition = {"condition": f"ablate {direction}" if own else "baseline", "direction_id": direction}
        for one, kind in kinds.items():
            gone = own and rng.random() < (0.9 if own == kind else 0.9 * (1 - share))
            rows.append(about | condition | {"operation": "ablate" if own else "none", "prompt_id": one,
                        "category": kind, "cluster": one, "label": "compliance" if gone else "refusal"})  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def shapes():
    return {name: geometry(*how) for name, how in
            {"apart": (True,), "rising": (True, False), "shared": (False,)}.items()}  # fmt: skip


def coned(shapes, shape="apart", interaction=9.0, base=3.0, mixed=3.0, share=1.0):
    screen, kinds = swings(interaction, base, mixed)
    metrics = pd.concat([shapes[shape], screen], ignore_index=True)
    return evidence("05", completed(kinds, share), metrics)


@pytest.mark.parametrize(
    ("interaction", "base", "verdict"),
    [(9.0, 3.0, "replicated"), (0.0, 3.0, "contradicted"), (1.5, 3.0, "inconclusive"), (0.0, 0.2, "inconclusive")],
)
def test_separate_directions(shapes, interaction, base, verdict):
    found = said(TESTS["separate_directions"](coned(shapes, interaction=interaction, base=base)), verdict)
    assert "n = 100 prompts" in found.numbers


def test_cones(shapes):
    said(TESTS["cone"](coned(shapes)), "replicated")
    said(TESTS["cone"](coned(shapes, mixed=0.5)), "contradicted")
    said(TESTS["cone"](coned(shapes, interaction=0.0, base=0.1, mixed=0.5)), "inconclusive")


def test_the_share_of_what_ablation_takes_away(shapes):
    said(TESTS["ablation_apart"](coned(shapes, share=1.0)), "replicated")
    said(TESTS["ablation_apart"](coned(shapes, share=0.0)), "contradicted")
    said(TESTS["ablation_apart"](coned(shapes, share=0.4)), "inconclusive")


def test_geometry_of_separate_and_of_shared_directions(shapes):
    apart, shared = coned(shapes), coned(shapes, "shared")
    said(TESTS["geometry_differs"](apart), "replicated")
    assert TESTS["geometry_differs"](shared).verdict == "inconclusive"
    said(TESTS["cosine_below"](apart, limit=0.5), "replicated")
    said(TESTS["cosine_below"](shared, limit=0.5), "contradicted")
    said(TESTS["toolkit_call"](apart), "contradicted")  # one planted direction is called polyhedral all the same


def test_a_toolkit_that_tells_them_apart_would_be_replicated(shapes):
    metrics = shapes["apart"].copy()
    called = (metrics["metric"] == "polyhedral") & metrics["direction_id"].str.startswith("planted")
    metrics.loc[called, "value"] = 0.0
    found = TESTS["toolkit_call"](coned({"apart": metrics}))
    assert found.verdict == "replicated" and "0.0 %" in found.numbers
    metrics.loc[called, "value"] = 0.05
    said(TESTS["toolkit_call"](coned({"apart": metrics})), "inconclusive")


def test_the_layers_of_the_extremes(shapes):
    for name, verdict in (("apart", "replicated"), ("rising", "contradicted")):
        said(TESTS["depth_extremes"](coned(shapes, name)), verdict)


@pytest.mark.parametrize(
    ("trend", "verdict"),
    [((-0.9, -0.1, 0.01), "replicated"), ((0.9, -0.1, 0.01), "contradicted"), ((-0.9, -0.9, 0.6), "inconclusive")],
)
def test_the_trend_is_that_of_notebook_05_with_its_null(shapes, monkeypatch, trend, verdict):
    monkeypatch.setattr(cone_tables, "trend", lambda _: trend)
    said(TESTS["depth_trend"](coned(shapes)), verdict)


# ---- 07


def wide(rate, harmless=None, broken=None, variant="many", relative=None, **more):
    frame = windowed(made_of(rate, harmless, broken, variant=variant))
    if relative:
        frame["alpha_relative"] = frame["alpha"] * relative
    return evidence("07", frame, **more)


USEFUL = np.interp(GRID, [0, 1], [0.4, 0.9])


@pytest.mark.parametrize(
    ("rate", "none", "defence"),
    [
        (USEFUL, "contradicted", "replicated"),
        (np.full(25, 0.5), "replicated", "contradicted"),
        (np.full(25, 0.96), "inconclusive", "inconclusive"),
    ],
)
def test_windows(rate, none, defence):
    found = said(TESTS["no_window"](wide(rate), variant="many"), none)
    assert "n = 50 + 50 prompts" in found.numbers
    said(TESTS["defence"](wide(rate, variant="one")), defence)


def test_a_model_with_no_room_settles_nothing():
    found = said(TESTS["no_window"](wide(np.full(25, 0.96)), variant="many"), "inconclusive")
    assert "No useful part was possible" in found.power


def test_edges_of_the_window_under_both_readings():
    broken = np.where(np.abs(GRID) > 0.6, 0.5, 0.0)
    said(TESTS["window_edges"](wide(USEFUL, None, broken), size=0.5), "replicated")
    said(TESTS["window_edges"](wide(USEFUL, None, broken), size=0.05), "contradicted")
    unit = UNITS["alpha_absolute"] * 0.55  # where the edges lie in multiples of a unit vector
    found = said(TESTS["window_edges"](wide(USEFUL, None, broken), size=unit), "replicated")
    assert "as multiples of a unit vector" in found.numbers
    said(TESTS["window_edges"](wide(USEFUL, None, jump(0.2, high=0.4)), size=0.5), "contradicted")  # one side only


@pytest.mark.parametrize(("relative", "verdict"), [(0.5, "replicated"), (0.02, "contradicted"), (0.18, "inconclusive")])
def test_windows_of_two_models(relative, verdict):
    kept, broken = {}, np.where(np.abs(GRID) > 1.1, 0.5, 0.0)
    wide(USEFUL, None, broken, "one", relative, model=OTHER, kept=kept)
    here = wide(USEFUL, None, broken, "one", model=MODEL, kept=kept)
    words = {"smaller": MODEL, "larger": OTHER}
    assert said(TESTS["window_widens"](here, **words), verdict) == TESTS["window_widens"](here.of(OTHER), **words)
    with pytest.raises(NotMeasuredError, match=f"no record of 07_therapeutic_window on {OTHER}"):
        TESTS["window_widens"](wide(USEFUL, variant="one"), **words)


@pytest.mark.parametrize(
    ("json", "verdict"),
    [("r" * 2 + "c" * 18, "replicated"), ("r" * 20, "contradicted"), ("r" * 9 + "c" * 11, "inconclusive")],
)
def test_formats(json, verdict):
    same_ = "r" * 12 + "c" * 8
    frame = asked(json=json, table=same_, template=same_)
    said(TESTS["formats"](evidence("07", frame)), verdict)


def test_formats_that_change_nothing_on_many_prompts_contradict(monkeypatch):
    row = {"change": 0.0, "change_low": -0.04, "change_high": 0.04, "p_holm": 1.0, "n": 200, "rate": 0.6}
    table = pd.DataFrame({name: row for name in (window_runs.NONE, "json", "table", "template")}).T
    monkeypatch.setattr(window_formats, "refusals", lambda _: table)
    said(TESTS["formats"](evidence("07")), "contradicted")


@pytest.mark.parametrize(("early", "late", "verdict"), [(0, 1, "replicated"), (1, 0, "contradicted"), (1, 1, None)])
def test_formats_in_late_layers(early, late, verdict):
    rng, layers = np.random.default_rng(0), 9
    frame = asked(json="r" * 20, table="r" * 20, template="r" * 20)
    ids = [f"harmful_evaluation-{i:03d}" for i in range(20)]
    rows = []
    for demand in (window_runs.NONE, "json", "table", "template"):
        for layer in range(layers):
            moved = early if layer < 3 else late if layer >= 6 else 0
            values = rng.normal(0, 0.1, 20) + (0 if demand == window_runs.NONE else moved)
            rows += [{"metric": f"projection {demand}", "layer": layer, "prompt_id": one, "value": value}
                     for one, value in zip(ids, values, strict=True)]  # fmt: skip
    found = TESTS["formats_late"](evidence("07", frame, pd.DataFrame(rows)))
    if verdict:
        said(found, verdict)
    else:
        assert found.verdict == "inconclusive" or "+0.0" in found.numbers or "-0.0" in found.numbers


# ---- all of them


def test_every_test_is_tried_here():
    source = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in TESTS if f'TESTS["{name}"]' not in source] == []
