"""The numbers of notebook 05 as strings, and the sentences that follow from them, from its record alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from refusal import cone_effects, cone_prose, cone_study, cone_tables
from refusal.analyses import in_words
from refusal.cone_effects import rule
from refusal.cone_prose import interval_of, median, number, with_interval
from refusal.wording import p_value, percent, points

HEADLINES = {
    "ConesVerdict": "a separate direction for each kind of harm",
    "ConesContrast": "own minus other categories' directions, log-odds",
    "ConesContrastInterval": "its interval",
    "ConesHolm": "its p (categories permuted, Holm)",
    "ConesUnbiasedCosine": "unbiased mean cosine of the category directions",
}
# The rows of the paper's table, which are also the names of its macros.
STATISTICS = {
    "Rank": "entropy_rank",
    "Participation": "participation",
    "TopShare": "top_share",
    "Cosine": "mean_abs_cosine",
    "Unbiased": "unbiased_cosine",
}
NOT_MEASURED = "not measured"


def numbers(frame: pd.DataFrame, metrics: pd.DataFrame, about: Mapping[str, Any]) -> dict[str, str]:
    """Formatted numbers of notebook 05, by macro name.

    Args:
        frame: Its completions.
        metrics: Its metrics.
        about: Metadata of the record: `parameters`, with seed and n_prompts.
    """
    seed, quick = int(about["parameters"]["seed"]), bool(about["parameters"]["n_prompts"])
    kinds = cone_effects.kinds_of(frame)
    tests = cone_effects.tests(metrics, kinds, seed)
    named = _geometry(metrics, tests, quick) | _curves(metrics) | _layers(metrics) | _topics(metrics)
    named |= _causes(metrics, kinds, seed, tests, quick) | _completions(frame, metrics, seed) | cone_study.numbers()
    return named


# ---- geometry


def _geometry(metrics: pd.DataFrame, tests: pd.DataFrame, quick: bool) -> dict[str, str]:
    table, layer = cone_tables.table(metrics), cone_tables.selected(metrics)
    reliability = cone_tables.reliability(metrics).loc[layer]
    both = cone_tables.pairs(metrics)
    both = both[both["second"].isin(cone_tables.categories(metrics))].dropna(subset="value").sort_values("value")
    here = cone_tables.by_layer(metrics).set_index(["layer", "statistic"])["value"]
    named = {
        "ConesLayer": str(layer),
        "ConesKinds": str(len(cone_tables.categories(metrics))),
        "ConesPerCategory": cone_tables.largest(metrics, "observed"),
        "ConesTopicsPrompts": cone_tables.largest(metrics, "topics") or NOT_MEASURED,
        "ConesDraws": str(len(cone_tables.draws(metrics, "permuted", "entropy_rank"))),
        "ConesSplits": str(cone_effects.counts(quick).splits),
        "ConesSubsamples": str(cone_effects.counts(quick).subsamples),
        "ConesReliability": f"{reliability.min():.2f} to {reliability.max():.2f}",
        "ConesCorrected": number(here[layer, "corrected_cosine"]),
        "ConesHalves": number(cone_tables.halves_cosine(metrics), ".3f"),
        "ConesUnbiasedCosine": number(table.loc["unbiased_cosine", "value"]),
        "ConesUnbiasedNumber": with_interval(table.loc["unbiased_participation"]),
        "ConesPairLow": _pair(both.head(1)),
        "ConesPairHigh": _pair(both.tail(1)),
        "ConesGeometryHolm": p_value(tests.loc["geometry", "p_holm"]),
        "ConesGeometrySaid": cone_prose.geometry_said(table.loc["unbiased_cosine"], tests.loc["geometry"]),
    }
    for macro, name in STATISTICS.items():
        row = table.loc[name]
        named[f"Cones{macro}"] = with_interval(row)
        named |= {
            f"Cones{macro}{family.capitalize()}": _null(row, family) for family in ("permuted", "planted", "random")
        }
        named[f"Cones{macro}Few"] = number(row["few"]) if "few" in row else NOT_MEASURED
        named[f"Cones{macro}Topics"] = _null(row, "topics")
    return named


def _null(row: "pd.Series[float]", family: str) -> str:
    """A null's median with the p of the observed among its draws."""
    if family not in row or np.isnan(row[family]):
        return "–"
    return f"{row[family]:.2f} ({p_value(row[f'{family}_p'])})"


def _pair(rows: pd.DataFrame) -> str:
    return "".join(f"{with_interval(row)} ({row['first']} and {row['second']})" for _, row in rows.iterrows()) or "none"


def _band(found: pd.DataFrame, family: str, size: str, layer: int) -> str:
    part = found[(found["family"] == family) & (found["size"] == size) & (found["layer"] == layer)]
    part = part[part["statistic"] == "entropy_rank"]
    return NOT_MEASURED if part.empty else median(part.iloc[0])


def _curves(metrics: pd.DataFrame) -> dict[str, str]:
    found, called = cone_tables.bands(metrics), cone_tables.called_polyhedral(metrics)
    layer, most = cone_tables.selected(metrics), cone_tables.largest(metrics, "observed")
    small = str(int(found["n"].min()))
    share = called.set_index(["family", "size", "layer"])["share"]
    named = {
        f"ConesSmall{family.capitalize()}": _band(found, family, small, layer)
        for family in ("observed", "own", "permuted", "planted")
    }
    return named | {
        "ConesSmall": small,
        "ConesSmallCalled": f"{100 * share['planted', small, layer]:.0f}",
        "ConesCalled": f"{100 * share['planted', most, layer]:.0f}",
        "ConesPilotSaid": cone_prose.pilot_said(cone_tables.study_sized(metrics)),
    }


def _layers(metrics: pd.DataFrame) -> dict[str, str]:
    here = cone_tables.by_layer(metrics)
    rank = here[here["statistic"] == "entropy_rank"].set_index("layer")
    rho, null, p = cone_tables.trend(metrics)
    high, low = rank["value"].idxmax(), rank["value"].idxmin()
    return {
        "ConesLayers": str(len(rank)),
        "ConesHighest": with_interval(rank.loc[high]),
        "ConesHighestLayer": str(high),
        "ConesLowest": with_interval(rank.loc[low]),
        "ConesLowestLayer": str(low),
        "ConesTrend": number(rho, "+.2f"),
        "ConesTrendP": p_value(p),
        "ConesTrendSaid": cone_prose.trend_said(null, p),
    }


def _topics(metrics: pd.DataFrame) -> dict[str, str]:
    here = cone_tables.by_layer(metrics)
    here = here[here["layer"] == cone_tables.selected(metrics)].set_index("statistic")
    return {
        f"Cones{name}Cosine": with_interval(here.loc[f"{name.lower()}_cosine"])
        for name in ("Topic", "About", "Matched")
    }


# ---- effects


def _causes(
    metrics: pd.DataFrame, kinds: "pd.Series[str]", seed: int, tests: pd.DataFrame, quick: bool
) -> dict[str, str]:
    found = cone_effects.contrast(cone_effects.swings(metrics, "category"), kinds, seed)
    matrix = cone_effects.causes(metrics, kinds)
    mixed, limit = cone_effects.combinations(metrics, kinds)
    verdict = cone_effects.verdict(found, float(tests.loc["causes", "p_holm"]), matrix, limit)
    drawn = cone_effects.directions_drawn(quick)
    holds = cone_effects.is_cone(metrics, kinds)
    return {
        "ConesPrompts": str(found.n),
        "ConesPromptsEach": "/".join(sorted({str(n) for n in matrix["n"]})),
        "ConesOwn": f"{found.own:+.2f}",
        "ConesOther": f"{found.other:+.2f}",
        "ConesContrast": f"{found.value:+.2f}",
        "ConesContrastInterval": interval_of(found.interval),
        "ConesContrastShare": f"{100 * found.value / found.own:.0f}" if found.own else "undefined",
        "ConesContrastP": p_value(found.p),
        "ConesHolm": p_value(tests.loc["causes", "p_holm"]),
        "ConesPermutations": str(cone_effects.PERMUTATIONS),
        "ConesBeyond": f"{matrix['beyond'].sum()} of {len(matrix)}",
        "ConesCellLow": f"{matrix['value'].min():+.2f}",
        "ConesCellHigh": f"{matrix['value'].max():+.2f}",
        "ConesRandoms": str(drawn["random"]),
        "ConesRandomLargest": f"{limit:.2f}",
        "ConesVerdict": verdict,
        "ConesRule": in_words(rule()["verdict"]),
        "ConesConclusion": cone_prose.conclusion(verdict, found, limit),
        "ConesCombinations": str(len(mixed)),
        "ConesCombinationsBeyond": f"{'all' if holds else int((mixed > limit).sum())}",
        "ConesCombinationLeast": f"{mixed.min():+.2f}",
        "ConesCone": "holds" if holds else "does not hold",
    }


def _completions(frame: pd.DataFrame, metrics: pd.DataFrame, seed: int) -> dict[str, str]:
    beside = cone_effects.secondary(frame, metrics, seed)
    named: dict[str, str] = {}
    for name in ("rest", "topic"):
        found, head = beside[name], f"Cones{name.capitalize()}"
        named |= {head: f"{found.value:+.2f}", f"{head}Interval": interval_of(found.interval),
                  f"{head}Own": f"{found.own:+.2f}"}  # fmt: skip
    for name in ("added", "ablated"):
        found, head = beside[name], f"Cones{name.capitalize()}"
        named |= {
            head: points(found.value),
            f"{head}Interval": interval_of(found.interval, 100, 1),
            f"{head}Own": points(found.own),
        }
    for operation, tail in (("add", "Added"), ("ablate", "Ablated")):
        drawn = cone_effects.generated(frame, operation, "random").mean(axis=1)
        named[f"ConesRandom{tail}"] = " and ".join(points(value) for value in drawn)
    mixed = cone_effects.generated(frame, "add", "combination")
    unsteered = cone_effects.refused(frame, "causes").loc["baseline"]
    return named | {
        "ConesBaseline": percent(float(unsteered.mean())),
        "ConesGenerated": str(len(mixed)),
        "ConesGeneratedPrompts": str(mixed.shape[1]),
        "ConesGeneratedLeast": points(mixed.mean(axis=1).min()),
        "ConesGeneratedMost": points(mixed.mean(axis=1).max()),
    }
