"""Tests of claims about doses, from notebooks 04 and 06 and the published counts; rules in data/claims.yaml."""

import numpy as np
import pandas as pd

from refusal import analyses, collapse, collapse_study, curves, grids, statistics, sweep_cells
from refusal.analyses import plan
from refusal.claim_evidence import (
    Evidence,
    Finding,
    by_all,
    by_interval,
    change_power,
    decide,
    finding,
    prompts_words,
    rate_words,
    share_power,
)
from refusal.statistics import Interval
from refusal.wording import p_equals, points, span

DOSES, SWEEP = "04_llama_threshold", "06_layer_sweep"


def _doses(evidence: Evidence) -> pd.DataFrame:
    record = evidence.record(DOSES)
    return evidence.once("doses", lambda: curves.table(curves.fit(record.frame, record.seed)))


def _doses_power(evidence: Evidence) -> str:
    rows = grids.part(evidence.record(DOSES).frame, "curves")
    base = rows[rows["operation"] == "none"]
    return change_power(len(base), float((base["label"] == "compliance").mean()))


def collapse_everywhere(evidence: Evidence) -> Finding:
    """Does safety collapse at a threshold, whatever the direction? The plan's verdict."""
    found = _doses(evidence)
    said = f"{collapse.conclusion(found)} {prompts_words(int(found['n'].iloc[0]), int(found['n'].iloc[0]))} a dose"
    return finding(collapse.verdict(found), said, _doses_power(evidence))


def _own(evidence: Evidence, label: str) -> pd.DataFrame:
    found = _doses(evidence)
    return found[(found["direction_id"] == "extracted") & (found["label"] == label)].set_index("sign")


def doses(evidence: Evidence, sign: int, label: str, claimed: str) -> Finding:
    """How does a rate change along the extracted direction?"""
    row = _own(evidence, label).loc[sign]
    open_ = row["change"] == "no change" and row["verdict"] != "flat"
    verdict = decide(row["change"] == claimed, not open_)
    return finding(verdict, f"{collapse.said(row)}; n = {row['n']:.0f} prompts a dose", _doses_power(evidence))


def abrupt(evidence: Evidence, label: str) -> Finding:
    """Does a rate rise at a threshold along the extracted direction, both signs?"""
    own = _own(evidence, label)
    sharp = (own["change"] == "rises") & (own["verdict"] == "threshold")
    resolved = own["verdict"].isin(["flat", "graded"]) | (own["change"] == "falls")
    verdict = decide(sharp.all(), resolved.all() and not sharp.any())
    said = "; ".join(f"{collapse.name(row)}: {collapse.said(row)}" for _, row in own.reset_index().iterrows())
    power = f"A width is a threshold's where its upper bound lies below {grids.rule()['width_limit']:.2f}."
    return finding(verdict, said, f"{power} {_doses_power(evidence)}")


def at_the_end(evidence: Evidence, limit: float) -> Finding:
    """Are most answers jailbreaks by the study's rule at the largest dose of each direction and sign?"""
    rows = grids.part(evidence.record(DOSES).frame, "curves")
    steered, found = rows[rows["operation"] == "add"], {}
    for (name, sign), part in steered.groupby(["direction_id", np.sign(steered["alpha"])]):
        last = part[part["alpha"].abs() == part["alpha"].abs().max()]
        hit = last["seed_rule"] == "jailbreak"
        found[f"{name} {'+' if sign > 0 else '−'}"] = statistics.rate(hit, last["cluster"], plan()["confidence"])
    verdict = by_all([by_interval(one.interval, limit, "above") for one in found.values()])
    order = sorted(found, key=lambda name: found[name].estimate)
    said = " to ".join(f"{rate_words(found[name])} ({name})" for name in (order[0], order[-1]))
    least = min(one.effective_n for one in found.values())
    return finding(verdict, f"{said} (limit {100 * limit:g} %)", share_power(least, limit, "above"))


def gates(evidence: Evidence) -> Finding:
    """Does some confirmed cell pass all three gates?"""
    record = evidence.record(SWEEP)
    table = sweep_cells.gates(record.frame, record.metrics, bool(record.about["parameters"]["n_prompts"]))
    passed = table["passed"]
    sure = passed & (table["p_holm"] < plan()["level"])
    verdict = decide(sure.any(), not passed.any())
    largest = table.loc[table["change"].abs().idxmax(), "change"]
    said = (
        f"{passed.sum()} of {len(table)} confirmed cells pass, {sure.sum()} with Holm's correction; least Holm "
        f"{p_equals(table['p_holm'].min())}, largest change {points(largest)} points; n = {table['n'].iloc[0]} prompts "
        "a cell"
    )
    return finding(verdict, said, change_power(table["n"].iloc[0], float(table["random"].mean())))


# ---- the published counts


def published_jump(evidence: Evidence) -> Finding:
    """Is the study's jump between neighbouring doses more than a smooth curve has?"""
    found = collapse_study.fits()
    p = {way: curves.steepest(curve, collapse_study.SEED)["p"] for way, curve in found.items()}
    kinds = {way: curve.described.verdict for way, curve in found.items()}
    below = [one < plan()["level"] for one in p.values()]
    sharp = set(kinds.values()) == {"threshold"} and all(below)
    smooth = set(kinds.values()) == {"graded"} and not any(below)
    said = "; ".join(
        f"{way} answers: {kinds[way]}, width {curve.described.width:.2f} {span(curve.described.width_interval, 1, 2)}, "
        f"steepest pair {p_equals(p[way])}"
        for way, curve in found.items()
    )
    return finding(decide(sharp, smooth), said, f"Counts of {collapse_study.counts()['n'].iloc[0]} prompts a dose.")


def published_rate(evidence: Evidence, alpha: float, rate: float) -> Finding:
    """Do the study's counts from a dose on agree with a rate?"""
    table = collapse_study.counts()
    table = table[table["alpha"] >= alpha]
    inside = (table["low"] <= rate) & (rate <= table["high"])
    said = "; ".join(
        f"alpha = {row.alpha}: {row.k} of {row.n}, {span(Interval(row.low, row.high))} %" for row in table.itertuples()
    )
    return Finding(decide(inside.all(), True), said)


def published_p(evidence: Evidence, model: str, condition: str) -> Finding:
    """Do the study's counts differ by an exact test too?"""
    table, level = analyses.study_table().set_index(["model", "condition"]), plan()["level"]
    row, base = table.loc[(model, condition)], table.loc[(model, "baseline")]
    verdict = decide(row["fisher"] < level, row["z"] >= level)
    power = statistics.power_two_proportions(base["rate"], row["rate"], int(row["n"]))
    said = (
        f"{row['k']} against {base['k']} of {row['n']}: pooled z {p_equals(row['z'])}, Fisher "
        f"{p_equals(row['fisher'])}, both as if prompts were independent"
    )
    return finding(verdict, said, f"The power of such a comparison is {100 * power:.0f} %.")


TESTS = (collapse_everywhere, doses, abrupt, at_the_end, gates, published_jump, published_rate, published_p)
