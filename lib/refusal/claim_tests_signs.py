"""Tests of claims about signs, controls and models, from notebooks 02, 03 and 08; rules in data/claims.yaml."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from refusal import analyses, specificity, statistics, summaries
from refusal.analyses import plan
from refusal.claim_evidence import (
    CONTRADICTED,
    INCONCLUSIVE,
    NAMES,
    NOT_TESTABLE,
    REPLICATED,
    Evidence,
    Finding,
    by_all,
    by_change,
    by_interval,
    change_power,
    change_words,
    decide,
    finding,
    rate_words,
    share_power,
)
from refusal.control_screens import family_of
from refusal.wording import p_equals, p_value, people, percent

CONTROLS, SIGN, HIERARCHY = "02_orthogonal_controls", "03_sign_inversion", "08_robustness_hierarchy"
EVALUATION, LAYOUT = "harmful_evaluation", "harmful_study"
PAIRS = (("plus", "baseline"), ("minus", "baseline"), ("minus", "plus"))
MOST = 0.5


# ---- 03: signs


def _comparisons(evidence: Evidence) -> pd.DataFrame:
    """The plan's comparisons, with the rates before and after."""
    frame = evidence.record(SIGN).frame
    tests = analyses.comparisons(frame)
    rate = (frame["label"] == "refusal").groupby([frame["prompt_set"], frame["condition"]]).mean()
    for name, column in (("after", "first"), ("before", "second")):
        tests[name] = [rate[row.prompt_set, getattr(row, column)] for row in tests.itertuples()]
    return tests


def sign_inversion(evidence: Evidence) -> Finding:
    """Does adding the direction raise refusal, and subtracting it lower it? The plan's verdict."""
    tests = evidence.once("comparisons", lambda: _comparisons(evidence))
    verdict = analyses.sign_verdict(tests, analyses.rates(evidence.record(SIGN).frame))
    said = "; ".join(
        f"at {tests.loc[name, 'first'][-2:]}: {change_words(tests.loc[name])}" for name in ("plus", "minus")
    )
    return finding(verdict, f"refusal {said}", change_power(tests.loc["plus", "n"], tests.loc["plus", "before"]))


def sign_everywhere(evidence: Evidence) -> Finding:
    """Is it the same on every measured model?"""
    evidence.record(SIGN)
    found = {model: sign_inversion(evidence.of(model)) for model in evidence.models(SIGN)}
    verdict = by_all([one.verdict for one in found.values()])
    verdict = INCONCLUSIVE if verdict == REPLICATED and len(found) == 1 else verdict
    said = "; ".join(f"{people(model)} {one.verdict}, {one.numbers}" for model, one in found.items())
    return finding(verdict, said, f"Models measured: {len(found)}; the power on each is that of sign-inversion.")


def hierarchy(evidence: Evidence) -> Finding:
    """Do the models form a hierarchy of robustness? The plan's verdict, as notebook 08 has it."""
    evidence.record(HIERARCHY)
    said = evidence.once("hierarchy", lambda: summaries.report(evidence.root, evidence.model, HIERARCHY))
    planned, why = said["HierarchyVerdict"], said["HierarchyConclusion"]
    if planned == NOT_TESTABLE:
        return Finding(NOT_TESTABLE, why)
    return finding(decide(planned == "supported", planned == CONTRADICTED), why, said["HierarchyPower"])


def refusals(evidence: Evidence, comparison: str, claimed: str) -> Finding:
    """A comparison of the plan, by its name."""
    row = evidence.once("comparisons", lambda: _comparisons(evidence)).loc[comparison]
    return finding(by_change(row, claimed), f"refusal {change_words(row)}", change_power(row["n"], row["before"]))


def _jailbreaks(evidence: Evidence) -> pd.DataFrame:
    """Changes of the rate of jailbreaks by the study's rule: six comparisons, corrected together."""
    frame, rows = evidence.record(SIGN).frame, {}
    frame = frame.assign(jailbreak=frame["seed_rule"] == "jailbreak")
    for prompts in (LAYOUT, EVALUATION):
        part = frame[frame["prompt_set"] == prompts]
        for one, other in PAIRS:
            first, second, clusters = statistics.pair(part, NAMES[one], NAMES[other], "jailbreak")
            found = statistics.paired(first, second, clusters, plan()["confidence"])
            equal = statistics.equivalence(first, second, clusters, plan()["margin"])
            before = statistics.rate(second, clusters, plan()["confidence"])
            rows[prompts, one, other] = {
                "difference": found.difference, "low": found.interval.low, "high": found.interval.high,
                "before": before.estimate, "after": first.mean(), "n": found.n, "clusters": found.clusters,
                "p": found.p, "p_equivalence": equal.p, "upper": equal.interval.high, "effective": before.effective_n,
            }  # fmt: skip
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.assign(p_holm=list(statistics.holm(table["p"].to_dict()).values()))


def jailbreaks(evidence: Evidence, prompts: str, first: str, second: str, claimed: str) -> Finding:
    """Does the rate of jailbreaks by the study's rule change from one condition to another?"""
    row = evidence.once("jailbreaks", lambda: _jailbreaks(evidence)).loc[(prompts, first, second)]
    power = change_power(row["effective"], row["before"])
    return finding(by_change(row, claimed), f"jailbreaks {change_words(row)}", power)


def rates(
    evidence: Evidence, prompts: str, conditions: Sequence[str], outcome: str, claimed: str, limit: float
) -> Finding:
    """On which side of a limit do rates of a label, or of jailbreaks by the study's rule, lie?"""
    frame, how = evidence.record(SIGN).frame, plan()["intervals"]["clusters"]
    found = {}
    for name in conditions:
        part = frame[(frame["prompt_set"] == prompts) & (frame["condition"] == NAMES[name])]
        hit = part["seed_rule"] == outcome if outcome == "jailbreak" else part["label"] == outcome
        found[NAMES[name]] = statistics.rate(hit, part["cluster"], plan()["confidence"], how=how)
    verdict = by_all([by_interval(one.interval, limit, claimed) for one in found.values()])
    said = "; ".join(f"{outcome} under {name}: {rate_words(one)}" for name, one in found.items())
    effective = min(one.effective_n for one in found.values())
    return finding(verdict, f"{said} (limit {100 * limit:g} %)", share_power(effective, limit, claimed))


def flipped(evidence: Evidence, claimed: str) -> Finding:
    """Which share of what is refused unsteered is complied with at alpha = -1?"""
    frame = evidence.record(SIGN).frame
    part = frame[frame["prompt_set"] == EVALUATION]
    part = part.assign(refused=part["label"] == "refusal", complied=part["label"] == "compliance")
    refused, _, clusters = statistics.pair(part, NAMES["baseline"], NAMES["minus"], "refused")
    complied, _, _ = statistics.pair(part, NAMES["minus"], NAMES["baseline"], "complied")
    limit, side = {"most": (MOST, "above"), "none": (plan()["margin"], "below")}[claimed]
    if not refused.any():
        return Finding(INCONCLUSIVE, "no request is refused without steering", "There was nothing to turn.")
    found = statistics.rate(complied[refused], clusters[refused], plan()["confidence"])
    said = f"{found.k} of {found.n} refusals turned into compliance: {rate_words(found)} (limit {100 * limit:g} %)"
    return finding(by_interval(found.interval, limit, side), said, share_power(found.effective_n, limit, side))


# ---- 02: controls


def special(evidence: Evidence) -> Finding:
    """Is the direction special? The plan's verdict."""
    test = specificity.table(evidence.record(CONTROLS).metrics)
    planned = specificity.verdict(test)
    verdict = decide(planned == "special", planned == "not special")
    row, draws = test.loc["random"], int(test["n"].min())
    said = (
        f"swing {row['extracted']:+.2f} log-odds, z = {row['z']:+.1f} among random directions, rank "
        f"{p_equals(row['p'])}; largest Holm {p_equals(test['p_holm'].max())} of {len(test)} families; {draws} draws"
    )
    return finding(verdict, said, f"With {draws} draws no rank p lies below {p_value(1 / (1 + draws))}.")


def _control_jailbreaks(evidence: Evidence) -> pd.DataFrame:
    """The mean change of jailbreaks under a family's draws, a value a prompt; two families, corrected together."""
    frame, rows = evidence.record(CONTROLS).frame, {}
    frame = frame[frame["prompt_set"] == EVALUATION].assign(jailbreak=lambda all_: all_["seed_rule"] == "jailbreak")
    before = frame[frame["operation"] == "none"].set_index("prompt_id")["jailbreak"].astype(float)
    added = frame[frame["operation"] == "add"]
    for family in ("random", "orthogonal"):
        part = added[added["direction_id"].map(family_of) == family]
        after = part.groupby("prompt_id")["jailbreak"].mean()
        rows[family] = _mean_change((after - before.loc[after.index]).to_numpy(dtype=float)) | {
            "before": before.mean(), "after": after.mean(), "conditions": part["condition"].nunique(),
        }  # fmt: skip
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.assign(p_holm=pd.Series(statistics.holm(table["p"].to_dict())))


def _mean_change(values: NDArray[np.float64]) -> dict[str, float]:
    """Mean of a change a prompt: t interval, p, and the two one-sided tests; Tango's where no value differs."""
    n, mean, margin = len(values), float(values.mean()), plan()["margin"]
    if np.ptp(values) == 0:
        pairs = values > 0, values < 0, np.arange(n)
        found, equal = statistics.paired(*pairs), statistics.equivalence(*pairs, margin=margin)
        interval, p, p_equal, spread = found.interval, found.p, equal.p, 0.0
    else:
        _, interval = analyses.mean_interval(values)
        spread, freedom = float(stats.sem(values)), n - 1
        p = float(2 * stats.t.sf(abs(mean) / spread, freedom))
        p_equal = float(
            max(stats.t.sf((mean + margin) / spread, freedom), stats.t.sf((margin - mean) / spread, freedom))
        )
    return {"difference": mean, "low": interval.low, "high": interval.high, "n": n, "clusters": n, "p": p,
            "p_equivalence": p_equal, "error": spread}  # fmt: skip


def control_jailbreaks(evidence: Evidence, family: str, claimed: str) -> Finding:
    """Does a family of control directions change the rate of jailbreaks?"""
    row = evidence.once("control jailbreaks", lambda: _control_jailbreaks(evidence)).loc[family]
    freedom = max(int(row["n"]) - 1, 1)
    least = float((stats.t.isf(0.025, freedom) + stats.t.isf(0.2, freedom)) * row["error"])
    power = f"With {row['n']:.0f} prompts, a mean change of about {percent(least)} points would be found at 80 %."
    said = f"jailbreaks over {row['conditions']:.0f} conditions {change_words(row)}"
    return finding(by_change(row, claimed), said, power)


TESTS = (sign_inversion, sign_everywhere, hierarchy, refusals, jailbreaks, rates, flipped, special, control_jailbreaks)
