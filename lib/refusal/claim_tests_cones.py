"""Tests of the pilot's claims about several directions, from notebook 05; the rules stand in data/claims.yaml."""

import pandas as pd

from refusal import cone_effects, cone_tables, statistics, window_runs
from refusal.analyses import plan
from refusal.claim_evidence import Evidence, Finding, by_interval, decide, finding
from refusal.cone_effects import Contrast
from refusal.cone_prose import interval_of, number, with_interval
from refusal.statistics import Interval
from refusal.wording import p_equals, p_value, percent, points, span

CONES = cone_effects.NOTEBOOK


def _contrast(evidence: Evidence) -> tuple[Contrast, pd.DataFrame, "pd.Series[str]"]:
    """The contrast of the category directions' swings, the plan's two tests, and the prompts' categories."""
    record = evidence.record(CONES)
    kinds = cone_effects.kinds_of(record.frame)
    found = cone_effects.contrast(cone_effects.swings(record.metrics, "category"), kinds, record.seed)
    return found, cone_effects.tests(record.metrics, kinds, record.seed), kinds


def _shares(found: Contrast) -> str:
    """The contrast's interval as shares of the effect of a category's own direction, beside those that decide."""
    first, second = (100 * cone_effects.rule()[name] for name in ("separate_share", "shared_share"))
    ends = interval_of(found.interval, 100 / found.own, 0) if found.own > 0 else "undefined"
    return f"In percent of the own effect the contrast's interval is {ends}, where {first:.0f} and {second:.0f} decide."


def separate_directions(evidence: Evidence) -> Finding:
    """Has each kind of harm a direction of its own? The plan's verdict."""
    found, tests, kinds = evidence.once("contrast", lambda: _contrast(evidence))
    record = evidence.record(CONES)
    planned = cone_effects.judged(record.metrics, kinds, record.seed)
    verdict = decide(planned == "separate", planned == "shared")
    said = (
        f"{planned}: own minus other categories' directions {found.value:+.2f} log-odds {interval_of(found.interval)}, "
        f"own effect {found.own:+.2f}; n = {found.n} prompts; Holm {p_equals(tests.loc['causes', 'p_holm'])}"
    )
    return finding(verdict, said, _shares(found))


def cone(evidence: Evidence) -> Finding:
    """Does every non-negative combination work? The plan's stronger sense."""
    record = evidence.record(CONES)
    found, _, kinds = evidence.once("contrast", lambda: _contrast(evidence))
    mixed, limit = cone_effects.combinations(record.metrics, kinds)
    holds = cone_effects.is_cone(record.metrics, kinds)
    verdict = decide(holds, found.own > limit)
    said = (
        f"{(mixed > limit).sum()} of {len(mixed)} combinations beyond all random directions (least {mixed.min():+.2f}, "
        f"limit {limit:.2f} log-odds); n = {found.n} prompts"
    )
    return finding(verdict, said, "The categories' own directions do not move refusal beyond random ones.")


def _row(evidence: Evidence, statistic: str) -> "pd.Series[float]":
    """A statistic at the selected layer, with its interval."""
    metrics = evidence.record(CONES).metrics
    here = evidence.once("cones by layer", lambda: cone_tables.by_layer(metrics))
    return here[(here["layer"] == cone_tables.selected(metrics)) & (here["statistic"] == statistic)].iloc[0]


def cosine_below(evidence: Evidence, limit: float) -> Finding:
    """Are the category directions that different, once noise is corrected for?"""
    row = _row(evidence, "unbiased_cosine")
    interval = Interval(row["low"], row["high"])
    layer, n = row["layer"], cone_tables.largest(evidence.record(CONES).metrics, "observed")
    said = f"unbiased mean cosine {with_interval(row)} at layer {layer} (limit {limit:g})"
    power = "The interval is a bootstrap over prompts; more prompts a category would narrow it."
    return finding(by_interval(interval, limit, "below"), f"{said}; {n} prompts a category", power)


def geometry_differs(evidence: Evidence) -> Finding:
    """Do the category directions differ by more than those of permuted categories?"""
    _, tests, _ = evidence.once("contrast", lambda: _contrast(evidence))
    metrics, row = evidence.record(CONES).metrics, tests.loc["geometry"]
    permuted = cone_tables.table(metrics).loc["unbiased_cosine", "permuted"]
    clear = row["p_holm"] < plan()["level"]
    verdict = decide(clear and row["value"] < permuted, clear and row["value"] > permuted)
    said = (
        f"unbiased mean cosine {with_interval(row)}, {number(permuted)} under permuted categories; "
        f"{p_equals(row['p'])}, Holm {p_value(row['p_holm'])}"
    )
    drawn = len(cone_tables.draws(metrics, "permuted", "unbiased_cosine"))
    return finding(verdict, said, f"With {drawn} permutations no p lies below {p_value(1 / (1 + drawn))}.")


def toolkit_call(evidence: Evidence) -> Finding:
    """How often does the pilot's toolkit see a polyhedron where one shared direction is planted?"""
    record = evidence.record(CONES)
    called = cone_tables.called_polyhedral(record.metrics)
    called = called[called["family"] == "planted"]
    named = "pilot" if (called["size"] == "pilot").any() else str(pd.to_numeric(called["size"]).min())
    row = called[called["size"] == named].sort_values("layer").iloc[0]
    draws = cone_effects.counts(bool(record.about["parameters"]["n_prompts"])).draws
    interval, level = statistics.wilson(round(row["share"] * draws), draws, plan()["confidence"]), plan()["level"]
    size = "the pilot's numbers of prompts" if named == "pilot" else f"{named} prompts a category"
    said = f"called polyhedral: {percent(row['share'])} % {span(interval)} of {draws} draws with one planted direction"
    said += f", {size}, layer {row['layer']} (limit {100 * level:g} %)"
    return finding(by_interval(interval, level, "below"), said, f"The share is known from {draws} draws only.")


def ablation_apart(evidence: Evidence) -> Finding:
    """Does ablating a category's direction take away the refusals of that category, and not the others'?"""
    record = evidence.record(CONES)
    kinds = cone_effects.kinds_of(record.frame)
    found = cone_effects.contrast(cone_effects.generated(record.frame, "ablate"), kinds, record.seed)
    least, most = (cone_effects.rule()[name] * found.own for name in ("separate_share", "shared_share"))
    apart, alike = found.interval.low > least, found.interval.high < most
    verdict = decide(apart and found.own > 0, alike and found.own > 0)
    said = (
        f"ablation takes away {points(found.own)} points of the own category's refusals, {points(found.value)} "
        f"{interval_of(found.interval, 100, 1)} more than of the others'; n = {found.n} prompts, {p_equals(found.p)}"
    )
    return finding(verdict, said, _shares(found))


def depth_trend(evidence: Evidence) -> Finding:
    """Does the entropy rank fall with depth, beyond what depth does to permuted categories?"""
    rho, null, p = cone_tables.trend(evidence.record(CONES).metrics)
    clear = p < plan()["level"]
    verdict = decide(clear and rho < 0, clear and rho > 0)
    said = f"rank correlation with the layer {rho:+.2f}, {null:+.2f} under permuted categories (median), {p_equals(p)}"
    return finding(verdict, said, "Depth alone may give as strong a trend: the null's draws reach it.")


def depth_extremes(evidence: Evidence) -> Finding:
    """Does the highest entropy rank lie in early layers, and the lowest behind them?"""
    here = cone_tables.by_layer(evidence.record(CONES).metrics)
    rank = here[here["statistic"] == "entropy_rank"].set_index("layer")
    high, low = (rank.loc[place] for place in (rank["value"].idxmax(), rank["value"].idxmin()))
    early = window_runs.third(len(rank), window_runs.FIRST)
    placed = high.name in early and low.name not in early
    apart = high["low"] > low["high"]
    verdict = decide(apart and placed, apart)
    said = "; ".join(
        f"{which} {with_interval(row)} at layer {row.name}" for which, row in (("highest", high), ("lowest", low))
    )
    return finding(verdict, f"entropy rank {said} of {len(rank)}", "The intervals of the two extremes overlap.")


TESTS = (separate_directions, cone, cosine_below, geometry_differs, toolkit_call, ablation_apart, depth_trend,
         depth_extremes)  # fmt: skip
