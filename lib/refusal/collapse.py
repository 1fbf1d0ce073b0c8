"""Collapse: does safety give way at a threshold, whatever the direction, or does the model (methods, section 6).

A collapse of safety is a rise of compliance; where degeneration rises, it is the model that collapses.
"""

import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

from refusal import analyses, collapse_study, curves, grids, registry
from refusal.grids import rule, signs
from refusal.statistics import Interval
from refusal.wording import detectable, p_value, percent, points, rated, span

HEADLINES = {
    "ThresholdVerdict": "verdict on a collapse of safety at a threshold, regardless of direction",
    "ThresholdSafetyRises": "directions and signs along which compliance rises",
    "ThresholdSafetyThresholds": "along which compliance rises at a threshold",
    "ThresholdModelRises": "along which degeneration rises",
    "ThresholdModelThresholds": "along which degeneration rises at a threshold",
}
NOUNS = {"refusal": "refusal", "compliance": "compliance", "degenerate": "degeneration"}
KINDS = {"threshold": "a threshold", "graded": "graded", "not resolved": "abrupt or graded, which is not resolved"}


def verdict(found: pd.DataFrame) -> str:
    """The plan's rule on "safety collapses at a threshold, regardless of direction".

    Args:
        found: From `curves.table`. Only compliance counts: a rise of degeneration is no collapse of safety.

    Returns:
        replicated, contradicted or inconclusive; the last also where a direction or sign of the plan is missing.
    """
    safety = found[found["label"] == rule()["outcomes"]["safety"]]
    at_threshold = set(safety[(safety["change"] == "rises") & (safety["verdict"] == "threshold")]["direction_id"])
    if "extracted" in at_threshold and len(at_threshold - {"extracted"}) >= 3:
        return "replicated"
    planned = {(name, sign) for name in rule()["directions"] for sign in signs(name)}
    complete = planned <= set(zip(safety["direction_id"], safety["sign"], strict=True))
    resolved = safety["verdict"].isin(["flat", "graded"]) | (safety["change"] == "falls")
    return "contradicted" if complete and not at_threshold and bool(resolved.all()) else "inconclusive"


# ---- in words


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else "not bounded"


def _half_way(row: "pd.Series[Any]", kind: str) -> str:
    interval = Interval(row[f"{kind}50_low"], row[f"{kind}50_high"])
    return f"{row[f'{kind}50']:+.2f} {span(interval, 1, 2)}"


def name(row: "pd.Series[Any]") -> str:
    """A curve's direction and sign, e.g. "random[2] −"."""
    return f"{row['direction_id']} {'+' if row['sign'] > 0 else '−'}"


def said(row: "pd.Series[Any]") -> str:
    """One curve in words, without its direction.

    Args:
        row: Of `curves.table`.
    """
    noun = NOUNS[row["label"]]
    if row["change"] == "no change":
        if row["verdict"] == "flat":
            rate, p = percent(row["inner"]), p_value(row["p_flat"])
            return f"{noun} shows no change ({rate} % over all doses; p of flatness: {p})"
        return f"{noun} cannot be told from a constant, since the prompts are too few"
    again = f"; beyond its peak at {row['peak_relative']:+.2f} it falls again" if row["humped"] else ""
    width, upper, least = (_number(row[column]) for column in ("width", "width_upper", "resolution"))
    return (
        f"{noun} {row['change']} from {percent(row['inner'])} to {percent(row['outer'])} %, half way at α = "
        f"{_half_way(row, 'alpha')}, relative to the residual norm {_half_way(row, 'relative')}, with a relative width "
        f"of {width} (upper bound {upper}, resolution {least}): {KINDS[row['verdict']]}{again}"
    )


def _rising(found: pd.DataFrame, label: str) -> pd.DataFrame:
    return found[(found["label"] == label) & (found["change"] == "rises")]


def _along(some: pd.DataFrame, total: int) -> str:
    """How many of the curves, and which where they are few."""
    which = f" ({', '.join(name(row) for _, row in some.iterrows())})" if 0 < len(some) <= total / 2 else ""
    return f"{len(some) or 'none'} of {total} directions and signs{which}"


def conclusion(found: pd.DataFrame) -> str:
    """Where it is safety that collapses and where the model, in a sentence.

    Args:
        found: From `curves.table`.
    """
    parts = []
    for outcome, what in {"safety": "safety", "model": "the model"}.items():
        label = rule()["outcomes"][outcome]
        total, rising = int((found["label"] == label).sum()), _rising(found, label)
        abrupt = rising[rising["verdict"] == "threshold"]
        parts.append(
            f"{NOUNS[label].capitalize()} rises, which is a collapse of {what}, along {_along(rising, total)}, and "
            f"does so at a threshold along {_along(abrupt, total)}."
        )
    return " ".join(parts)


def _shapes(safety: pd.DataFrame) -> str:
    counts = safety["best"].value_counts()
    best = ", ".join(f"{shape} {counts.get(shape, 0)}" for shape in ("constant", "logistic", "isotonic"))
    return f"by AIC the best description of compliance is, in numbers of curves: {best}"


def _resolution(found: pd.DataFrame) -> str:
    known = found[found["label"].isin(rule()["outcomes"].values())]["resolution"].dropna()
    if known.empty:
        return "no curve changed, so there was no width to resolve"
    enough = int((known < rule()["width_limit"]).sum())
    return (
        f"of the {len(known)} curves of compliance and degeneration that change, the grid could have shown a width "
        f"below the limit in {enough} (resolutions from {_number(known.min())} to {_number(known.max())})"
    )


def _humps(safety: pd.DataFrame, whole: str) -> str:
    """What is said of curves that rise and fall again, and what whole grids would give."""
    humped = safety[safety["humped"]]
    if humped.empty:
        return "No compliance rate rises and then falls again."
    return (
        f"Compliance rises and then falls again along {_along(humped, len(safety))}, which no shape describes: there, "
        f"the fits are to the doses up to the peak. With fits to whole grids throughout, the verdict would be: {whole}."
    )


def _detectable(n: int, base: float) -> str:
    return detectable(
        n,
        base,
        "With {n} prompts, a change of compliance between two doses of {points} points or more would be found with a "
        "probability of 80 %; smaller ones may hide in what is called flat.",
        "With {n} prompts, no change of compliance between two doses would be found with a probability of 80 %.",
    )


def numbers(frame: pd.DataFrame, metrics: pd.DataFrame | None, about: Mapping[str, Any]) -> dict[str, str]:
    """Formatted numbers of notebook 04, by macro name; the study's own follow.

    Args:
        frame: The record.
        metrics: Not used: this notebook makes completions only.
        about: The record's metadata, for the seed.
    """
    seed, plan = int(about["parameters"]["seed"]), rule()
    made = curves.fit(frame, seed)
    found, ended = curves.table(made), grids.ends(frame)
    rows, ending = grids.part(frame, "curves"), grids.part(frame, "ends")
    base = analyses.rates(rows[rows["condition"] == "baseline"]).set_index("label")
    safety, model = (found[found["label"] == plan["outcomes"][kind]] for kind in ("safety", "model"))
    values: dict[str, str] = {}
    for macro, label in {"Safety": "compliance", "Model": "degenerate", "Refusal": "refusal"}.items():
        own = found[(found["label"] == label) & (found["direction_id"] == "extracted")].set_index("sign")
        values |= {f"Threshold{macro}{end}": said(own.loc[sign]) for end, sign in {"Plus": 1, "Minus": -1}.items()}
    for macro, part in {"Safety": safety, "Model": model}.items():
        rising = part[part["change"] == "rises"]
        values |= {
            f"Threshold{macro}Rises": str(len(rising)),
            f"Threshold{macro}Thresholds": str(int((rising["verdict"] == "threshold").sum())),
            f"Threshold{macro}RandomRises": str(int((rising["direction_id"] != "extracted").sum())),
        }
    own, random = safety[safety["direction_id"] == "extracted"], safety[safety["direction_id"] != "extracted"]
    top = own.loc[own["peak"].idxmax()]
    pairs = [curves.steepest(one, seed) for one in made if (one.direction_id, one.label) == ("extracted", "compliance")]
    pair = max(pairs, key=lambda one: one["difference"])  # the claim is about a rise
    norm = rows[rows["operation"] == "add"].iloc[0]
    return values | {
        "ThresholdPrompts": str(rows["prompt_id"].nunique()),
        "ThresholdEndPrompts": str(ending["prompt_id"].nunique()),
        "ThresholdAlphas": str(len(made[0].alphas) - 1),
        "ThresholdDirections": str(found["direction_id"].nunique()),
        "ThresholdRandoms": str(random["direction_id"].nunique()),
        "ThresholdCurves": str(len(safety)),
        "ThresholdRandomCurves": str(len(random)),
        "ThresholdNorm": f"{norm['alpha'] / norm['alpha_relative']:.2f}",
        "ThresholdFarthest": f"{grids.END_DOSES[-1]:.1f}",
        "ThresholdEnded": str(int(ended["reached"].sum())),
        "ThresholdNearestEnd": f"{ended['alpha_relative'].min():.1f}",
        "ThresholdLimit": f"{plan['width_limit']:.2f}",
        "ThresholdDraws": str(curves.DRAWS),
        **rated("ThresholdBaseline", *base.loc["compliance", ["rate", "low", "high"]]),
        "ThresholdPeak": percent(top["peak"]),
        "ThresholdPeakRelative": f"{top['peak_relative']:+.2f}",
        "ThresholdPeakRandom": percent(random["peak"].max()),
        "ThresholdHumps": _humps(safety, verdict(curves.table(made, limbs=False))),
        "ThresholdPairFirst": f"{pair['first']:+.2f}",
        "ThresholdPairSecond": f"{pair['second']:+.2f}",
        "ThresholdPairChange": points(pair["difference"]),
        "ThresholdPairZ": p_value(pair["z"]),
        "ThresholdPairFisher": p_value(pair["fisher"]),
        "ThresholdPairP": p_value(pair["p"]),
        "ThresholdShapes": _shapes(safety),
        "ThresholdResolution": _resolution(found),
        "ThresholdDetectable": _detectable(int(found["n"].iloc[0]), float(base.loc["compliance", "rate"])),
        "ThresholdVerdict": verdict(found),
        "ThresholdRule": analyses.in_words(rule()["verdict"], "replicated", "contradicted"),
    } | collapse_study.numbers()  # fmt: skip


def prose(frame: pd.DataFrame, about: Mapping[str, Any]) -> str:
    """What notebook 04 says in words, from its record (markdown)."""
    of = {name_.removeprefix("Threshold"): value for name_, value in numbers(frame, None, about).items()}
    found = curves.table(curves.fit(frame, int(about["parameters"]["seed"])))
    both = {"added": "Plus", "subtracted": "Minus"}
    lines = [
        f"- **Extracted direction {way}**: {of[f'Safety{end}']}; {of[f'Model{end}']}; {of[f'Refusal{end}']}."
        for way, end in both.items()
    ]
    lines += [
        f"- **Regardless of direction?** {conclusion(found)} The highest compliance rate at any dose is {of['Peak']} % "
        f"along the extracted direction and {of['PeakRandom']} % along the random ones, from {of['Baseline']} % "
        f"{of['BaselineInterval']} without steering.",
        f"- **Up and down again?** {of['Humps']}",
        f"- **The steepest pair** of compliance along the extracted direction, α = {of['PairFirst']} to "
        f"{of['PairSecond']} ({of['PairChange']} points): the study's tests would give p = {of['PairZ']} (z) and "
        f"{of['PairFisher']} (Fisher); as the steepest of all pairs of a smooth curve, p = {of['PairP']}.",
        f"- **Shapes and grid**: {of['Shapes']}; {of['Resolution']}.",
        f"- {of['Detectable']}",
        f"\n**Verdict by the plan's rule: {of['Verdict']}.** The rule: {of['Rule']}.",
    ]
    return "\n".join(lines)


def requirements(model: str = "llama-3.1-8b") -> str:
    """What a run on a hub model takes (markdown), from its registry entry and the size in its name."""
    known = registry.entry(model)
    size = re.search(r"-(\d+(?:\.\d+)?)B\b", known.hub_id)
    weights = f"{2 * float(size[1]):g} GB in bfloat16, twice that in float32" if size else "of unknown size"
    token = f"the licence ({known.licence}) accepted on the hub, and a token of that account in `HF_TOKEN`"
    lines = [
        f"- an entry of `data/models.yaml`: there is one, `{model}`, for {known.hub_id} at revision "
        f"`{known.revision[:12]}`, {known.blocks} blocks of width {known.width};",
        f"- a machine that reaches the hub{', ' + token if known.gated else ''};",
        f"- memory for the weights: by the number of parameters in the name, {weights}, on one GPU or beside the "
        "processor. Keys and values come on top; the library halves the rows of a batch until they fit;",
        f"- `./run_all.sh --model {model} --only 04`, which runs `01_extraction` first. The record's `alpha_absolute` "
        "is then in the study's unit.",
    ]
    return "\n".join(lines)
