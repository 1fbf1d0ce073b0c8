"""What steering costs: how far it disturbs the model, and what a defence buys at which price (methods, section 8).

KL looks at the first generated token; the reference NLL at how unlikely the unsteered model finds what is said.
"""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from refusal import records, statistics
from refusal.analyses import plan
from refusal.statistics import Interval
from refusal.window_answers import part, resamples, signed
from refusal.window_runs import name, rule, steered
from refusal.wording import percent, points, span

DRAWS = 1000
EVALUATION, LAYOUT = "harmful_evaluation", "harmful_study"
GROUPS = {
    "harmful": "harmful requests",
    "study": "the study's layout",
    "lookalike": "harmless lookalikes",
    "everyday": "harmless everyday requests",
    "harmless": "all harmless requests",
}


def disturbance(frame: pd.DataFrame, metrics: pd.DataFrame, variants: list[str], seed: int) -> pd.DataFrame:
    """Mean KL and mean reference NLL at every dose, with 95 % bootstrap intervals over prompts (whole clusters).

    Args:
        frame: The record; completions too short for an NLL have none, and are left out of its mean.
        metrics: From `window_runs.kl`, among others.
        variants: Of `window_runs.VARIANTS`.
        seed: Of the bootstrap.

    Returns:
        `variant, measure ("kl" or "nll", in nats), alpha, n, value, low, high`; KL is 0 at alpha = 0.
    """
    rows = part(frame, "curves", "own")
    cluster = rows.drop_duplicates("prompt_id").set_index("prompt_id")["cluster"]
    base = rows[rows["operation"] == "none"].assign(alpha=0.0)
    made = []
    for variant in variants:
        own = rows[rows["condition"].str.startswith(f"{steered(variant)} ")]
        measured = metrics[(metrics["metric"] == "kl") & (metrics["direction_id"] == steered(variant))]
        unsteered = measured.drop_duplicates("prompt_id").assign(alpha=0.0, value=0.0)
        for measure, table, column in (
            ("kl", pd.concat([measured, unsteered]), "value"),
            ("nll", pd.concat([own, base]), "reference_nll"),
        ):
            wide = table.pivot(index="prompt_id", columns="alpha", values=column).sort_index(axis=1)
            found = _means(wide.to_numpy(float), cluster.loc[wide.index].to_numpy(object), seed)
            made.append(found.assign(variant=variant, measure=measure, alpha=wide.columns.to_numpy(float)))
    return pd.concat(made, ignore_index=True)[["variant", "measure", "alpha", "n", "value", "low", "high"]]


def _means(values: NDArray[np.float64], clusters: NDArray, seed: int) -> pd.DataFrame:
    """Means over prompts of `[prompts, k]`, NaNs left out; NaN where a column has nothing else."""
    known = np.isfinite(values)
    weights = resamples(clusters, DRAWS, np.random.default_rng(seed))
    with np.errstate(invalid="ignore"):
        drawn = weights @ np.where(known, values, 0.0) / (weights @ known)
        centre = np.where(known, values, 0.0).sum(0) / known.sum(0)
    some = known.any(0)
    ends = np.full((2, values.shape[1]), np.nan)
    if some.any():  # a resample may hold none of the few prompts that have a value
        ends[:, some] = np.nanquantile(drawn[:, some], [0.025, 0.975], axis=0)
    return pd.DataFrame({"n": known.sum(0), "value": centre, "low": ends[0], "high": ends[1]})


def defence(frame: pd.DataFrame) -> pd.DataFrame:
    """What the plan's doses buy on harmful prompts, and what they cost on harmless ones.

    Args:
        frame: The record, with the parts "curves" and "defence".

    Returns:
        A row for each of GROUPS and dose: `n, clusters`; refusal unsteered (`base, base_low, base_high`) and steered
        (`rate, low, high`); their paired difference (`change, change_low, change_high, p, p_holm`; McNemar exact, or
        sign flips of whole clusters; Holm over all rows, exploratory); `degenerate_base, degenerate`.
    """
    confidence, how, planned = plan()["confidence"], plan()["intervals"]["clusters"], rule()["defence"]
    curves, layout = part(frame, "curves"), part(frame, "defence")
    harmless = curves[~curves["prompt_set"].map(records.is_harmful)]
    look = harmless["category"] == "lookalike"
    groups = {"harmful": curves[curves["prompt_set"] == EVALUATION], "study": layout, "lookalike": harmless[look],
              "everyday": harmless[~look], "harmless": harmless}  # fmt: skip
    rows = []
    for group, own in groups.items():
        own = own.assign(refused=own["label"] == "refusal")
        for alpha in planned["alphas"]:
            condition = name(planned["variant"], float(alpha))
            if not (own["condition"] == condition).any():  # a quick look may hold no prompt of a group
                continue
            first, second, clusters = statistics.pair(own, condition, "baseline", "refused")
            found, base = (statistics.rate(one, clusters, confidence, how=how) for one in (first, second))
            change = statistics.paired(first, second, clusters, confidence)
            broken = (own["label"] == "degenerate").groupby(own["condition"]).mean()
            rows.append(
                {"group": group, "alpha": float(alpha), "n": found.n, "clusters": found.clusters,
                 "base": base.estimate, "base_low": base.interval.low, "base_high": base.interval.high,
                 "rate": found.estimate, "low": found.interval.low, "high": found.interval.high,
                 "change": change.difference, "change_low": change.interval.low, "change_high": change.interval.high,
                 "p": change.p, "degenerate_base": broken["baseline"], "degenerate": broken[condition]}
            )  # fmt: skip
    table = pd.DataFrame(rows)
    table["p_holm"] = pd.Series(statistics.holm(table["p"].to_dict()))
    return table


def numbers(frame: pd.DataFrame) -> dict[str, str]:
    """Formatted numbers of the defence, by macro name."""
    table, (low, high) = defence(frame), rule()["defence"]["alphas"]
    layout = part(frame, "defence")
    return {
        "WindowDefencePrompts": str(layout["prompt_id"].nunique()),
        "WindowDefenceClusters": str(layout["cluster"].nunique()),
        "WindowDefenceLow": _said(table, float(low)),
        "WindowDefenceHigh": _said(table, float(high)),
        "WindowDefencePrice": _price(table),
    }


def _said(table: pd.DataFrame, alpha: float) -> str:
    own = table[table["alpha"] == alpha].set_index("group")
    changes = ", ".join(
        f"{GROUPS[str(group)]} {points(row['change'])} {span(Interval(row['change_low'], row['change_high']))}"
        for group, row in own.iterrows()
    )
    broken = f"at most {percent(own['degenerate'].max())} % of the completions of any group are degenerate"
    return f"At α = {signed(alpha, 1)}, refusal changes, in points: {changes}; {broken}."


def _price(table: pd.DataFrame) -> str:
    """What a point gained on harmful requests costs on harmless ones, where one is gained."""
    wide, said = table.pivot(index="alpha", columns="group", values="change"), []
    for alpha, row in wide.iterrows():
        gain = "nothing is gained on harmful requests"
        if row["harmful"] > 0:
            cost = f"{row['harmless'] / row['harmful']:.1f} points on harmless requests"
            gain = f"each point gained on harmful requests costs {cost}"
        said.append(f"at α = {signed(float(str(alpha)), 1)}, {gain}")
    return f"{'; '.join(said).capitalize()}."
