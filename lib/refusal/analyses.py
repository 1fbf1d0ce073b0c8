"""The analyses that a notebook shows and the paper prints: tables of numbers, made in one place, from records only."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray
from scipy import optimize, stats

from refusal import directions, prompts, statistics
from refusal.files import ROOT, CompendiumError
from refusal.statistics import Interval

LABELS = ("refusal", "compliance", "degenerate")


@functools.cache
def plan() -> dict[str, Any]:
    """The analysis plan."""
    path = ROOT / "data" / "analysis_plan.yaml"
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise CompendiumError(f"{path} is damaged ({said}): restore it with git.") from error


def in_words(rules: Mapping[str, str], *names: str) -> str:
    """Rules of the plan as one text, e.g. "replicated, if ...; contradicted, if ...".

    Args:
        rules: What each verdict asks for.
        names: The verdicts, in order; by default all.
    """
    return "; ".join(f"{name}, if {' '.join(rules[name].split())}" for name in names or rules)


def rates(frame: pd.DataFrame) -> pd.DataFrame:
    """Rates of the three labels by prompt set and condition, with intervals.

    Args:
        frame: A record.

    Returns:
        A row for each prompt set, condition and label: `k, n, clusters, rate, low, high, effective_n, method`.
    """
    rows = []
    how = plan()["intervals"]["clusters"]
    for (prompt_set, condition), part in frame.groupby(["prompt_set", "condition"], sort=False):
        for label in LABELS:
            found = statistics.rate(part["label"] == label, part["cluster"], plan()["confidence"], how=how)
            rows.append(
                {
                    "prompt_set": prompt_set,
                    "condition": condition,
                    "label": label,
                    "k": found.k,
                    "n": found.n,
                    "clusters": found.clusters,
                    "rate": found.estimate,
                    "low": found.interval.low,
                    "high": found.interval.high,
                    "effective_n": found.effective_n,
                    "method": found.method,
                }
            )
    return pd.DataFrame(rows)


def family(frame: pd.DataFrame, notebook: str = "03_sign_inversion") -> list[dict[str, str]]:
    """The comparisons that are corrected together: the plan's, or the first of them on the user's own prompts."""
    signs = {"extracted +1": "extracted +", "extracted -1": "extracted -"}  # another dose has another name
    found = {planned: next((name for name in frame["condition"].unique() if name.startswith(sign)), planned)
             for planned, sign in signs.items()}  # fmt: skip
    planned = [{**one, "first": found[one["first"]]} for one in plan()[notebook]["comparisons"]]
    if set(frame["prompt_set"]) == {"user"}:
        return [{**one, "prompt_set": "user"} for one in planned if one["name"] in ("plus", "minus")]
    return planned


def comparisons(frame: pd.DataFrame, notebook: str = "03_sign_inversion") -> pd.DataFrame:
    """The plan's comparisons of refusal rates, paired, with Holm's correction over the family.

    Args:
        frame: A record that holds the plan's prompt sets and conditions, or the user's prompts alone.
        notebook: Whose family it is.

    Returns:
        A row a comparison, indexed by its name: the paired counts, difference, interval, exact p, mid-p, Holm p, and
        the study's own tests (pooled z, Fisher), which take prompts as independent and unpaired.
    """
    rows = {}
    for wanted in family(frame, notebook):
        part = frame[frame["prompt_set"] == wanted["prompt_set"]]
        part = part.assign(refused=part["label"] == "refusal")
        first, second, clusters = statistics.pair(part, wanted["first"], wanted["second"], "refused")
        found = statistics.paired(first, second, clusters, plan()["confidence"])
        z, fisher = statistics.two_proportions(int(first.sum()), len(first), int(second.sum()), len(second))
        equal = statistics.equivalence(first, second, clusters, plan()["margin"])
        rows[wanted["name"]] = {
            "prompt_set": wanted["prompt_set"],
            "first": wanted["first"],
            "second": wanted["second"],
            "n": found.n,
            "clusters": found.clusters,
            "gained": found.only_first,
            "lost": found.only_second,
            "difference": found.difference,
            "low": found.interval.low,
            "high": found.interval.high,
            "p": found.p,
            "p_mid": found.p_mid,
            "p_equivalence": equal.p,
            "z": z,
            "fisher": fisher,
            "method": found.method,
        }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.insert(12, "p_holm", pd.Series(statistics.holm(table["p"].to_dict())))
    return table


def effect(row: "pd.Series[Any]") -> str:
    """What a comparison says, as a verb."""
    if row["p_holm"] >= plan()["level"]:
        return "did not change detectably"
    return "rose" if row["difference"] > 0 else "fell"


def sign_verdict(tests: pd.DataFrame, shares: pd.DataFrame) -> str:
    """The plan's rule for sign inversion: replicated, contradicted or inconclusive.

    Args:
        tests: From `comparisons`.
        shares: From `rates`.
    """
    wanted = {"plus": "rose", "minus": "fell"}
    effects = {name: effect(tests.loc[name]) for name in wanted}
    limit = plan()["03_sign_inversion"]["degeneration_limit"]
    steered = shares[
        (shares["prompt_set"] == tests.loc["plus", "prompt_set"])
        & (shares["label"] == "degenerate")
        & shares["condition"].isin(tests.loc[list(wanted), "first"])
    ]
    if effects == wanted and (steered["rate"] <= limit).all():
        return "replicated"
    opposite = any({effects[name], wanted[name]} == {"rose", "fell"} for name in wanted)
    nothing = all(tests.loc[name, "p_equivalence"] < plan()["level"] for name in wanted)
    return "contradicted" if opposite or nothing else "inconclusive"


@functools.cache
def study_file() -> pd.DataFrame:
    """The study's published counts, as the data file has them."""
    return pd.read_csv(ROOT / "data" / "study_sign_inversion.csv")


def study_table() -> pd.DataFrame:
    """The study's table of sign inversion: jailbreak counts by its own rule, with Wilson intervals from the counts.

    The tests against the baseline take prompts as independent, as the study does.
    """
    table = study_file().copy()
    intervals = [statistics.wilson(row.k, row.n) for row in table.itertuples()]
    table["rate"], table["low"], table["high"] = (
        table["k"] / table["n"], [i.low for i in intervals], [i.high for i in intervals]
    )  # fmt: skip
    base = table[table["condition"] == "baseline"].set_index("model")
    tests = [
        statistics.two_proportions(row.k, row.n, base.loc[row.model, "k"], base.loc[row.model, "n"])
        for row in table.itertuples()
    ]
    table["z"], table["fisher"] = [t[0] for t in tests], [t[1] for t in tests]
    return table


def seed_rule_rates(frame: pd.DataFrame) -> pd.DataFrame:
    """Jailbreak rates by the study's keyword rule on its own layout, with cluster-level intervals."""
    rows = []
    for condition, part in frame[frame["prompt_set"] == "harmful_study"].groupby("condition", sort=False):
        found = statistics.rate(part["seed_rule"] == "jailbreak", part["cluster"], how=plan()["intervals"]["clusters"])
        rows.append({"condition": condition, "k": found.k, "n": found.n, "clusters": found.clusters,
                     "rate": found.estimate, "low": found.interval.low, "high": found.interval.high})  # fmt: skip
    return pd.DataFrame(rows)


def by_layer(metrics: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One statistic of the direction from all prompts, by layer: `value, low, high` (NaN where it has no interval)."""
    whole = metrics[(metrics["experiment"] == "geometry") & (metrics["direction_id"] == "extracted")]
    columns = {name: whole[whole["metric"] == f"{metric}{tail}"].set_index("layer")["value"]
               for name, tail in {"value": "", "low": "_low", "high": "_high"}.items()}  # fmt: skip
    if metric == "split_half_cosine":
        draws = whole[whole["metric"] == metric].groupby("layer")["value"]
        columns = {"value": draws.median(), "low": draws.quantile(0.025), "high": draws.quantile(0.975)}
    return pd.DataFrame(columns).reset_index()


def mean_interval(values: NDArray[np.float64]) -> tuple[float, Interval]:
    """A mean over prompts with its t interval."""
    mean, error = float(np.mean(values)), float(stats.sem(values)) if len(values) > 1 else np.nan
    reach = error * float(stats.t.isf((1 - plan()["confidence"]) / 2, max(len(values) - 1, 1)))
    return mean, Interval(mean - reach, mean + reach)


def auroc_interval(value: float, positives: int, negatives: int) -> Interval:
    """Interval of an AUROC at the plan's level, from the AUROC alone: records hold no projections of single prompts.

    It holds the areas that are no further away than a normal quantile of their own standard errors (Hanley and McNeil,
    1982, Radiology 143, 29-36), as Wilson's interval holds rates.
    """
    quantile = float(stats.norm.isf((1 - plan()["confidence"]) / 2))
    start = float(np.clip(value, 1e-9, 1 - 1e-9))  # 0 and 1 have an error of 0, and would be roots themselves

    def error(area: float) -> float:
        first, second = area / (2 - area) - area**2, 2 * area**2 / (1 + area) - area**2
        spread = area * (1 - area) + (positives - 1) * first + (negatives - 1) * second
        return float(np.sqrt(max(spread, 0.0) / (positives * negatives)))

    def end(limit: float) -> float:
        if value == limit:
            return limit
        sign = np.sign(limit - value)
        return float(optimize.brentq(lambda area: value - area + sign * quantile * error(area), start, limit))

    return Interval(end(0.0), end(1.0))


def auroc_by_layer(metrics: pd.DataFrame, about: Mapping[str, Any]) -> pd.DataFrame:
    """AUROC of the held-out prompts by layer, for the direction from all prompts: `layer, value, low, high`.

    Args:
        metrics: Of notebook 01.
        about: Metadata of its record, which says how many prompts of each set were taken.
    """
    count = about["parameters"].get("n_prompts") or None
    sizes = [len(prompts.load(name)[:count]) for name in plan()["01_extraction"]["held_out"]]
    table = by_layer(metrics, "auroc")
    intervals = [auroc_interval(float(value), *sizes) for value in table["value"]]
    return table.assign(low=[one.low for one in intervals], high=[one.high for one in intervals])


def by_count(metrics: pd.DataFrame, metric: str, layer: int) -> pd.DataFrame:
    """One statistic against the number of prompts a side, at a layer: median and central 95 % of the random subsets."""
    part = metrics[(metrics["experiment"] == "geometry") & (metrics["metric"] == metric) & (metrics["layer"] == layer)]
    part = part[part["direction_id"].str.contains("[", regex=False)]
    counts = part["direction_id"].str.extract(r"\[(\d+)\]")[0].astype(int)
    grouped = part["value"].groupby(counts.to_numpy())
    table = pd.DataFrame({"value": grouped.median(), "low": grouped.quantile(0.025), "high": grouped.quantile(0.975)})
    return table.rename_axis("prompts").reset_index()


def selected_layer(metrics: pd.DataFrame, n_layers: int) -> int:
    """The layer rule applied to a record's screen."""
    screen = metrics[(metrics["experiment"] == "screen") & (metrics["metric"] == "log_odds")]
    return directions.select_layer(screen, n_layers)


def openings(counts: pd.DataFrame) -> pd.DataFrame:
    """Which tokens count as a refusal opening, by the plan's rule.

    Args:
        counts: From `runs.openings`.

    Returns:
        Index token id; columns opens with, refusals (of harmful prompts), precision, share, chosen (bool).

    Raises:
        CompendiumError: The model never refused.
    """
    table = counts.pivot(index="draw", columns="metric", values="value").rename_axis("token", columns=None)
    if table.empty or not table["refusals"].sum():
        raise CompendiumError("the model refused no extraction prompt, so a refusal opening cannot be derived from it.")
    table.insert(0, "opens with", counts.drop_duplicates("draw").set_index("draw")["prompt_id"])
    table["precision"] = table["all_refusals"] / table["completions"]
    table["share"] = table["refusals"] / table["refusals"].sum()
    rule = plan()["direction"]["openings"]
    frequent = table["share"] >= rule["share"]
    table["chosen"] = frequent & (table["precision"] >= rule["precision"])
    if not table["chosen"].any():
        table["chosen"] = table.index == table[frequent]["precision"].idxmax()
    return table.sort_values("refusals", ascending=False)


def opening_tokens(metrics: pd.DataFrame) -> list[int]:
    """The token ids that count as a refusal opening, from the metrics of notebook 01; errors as in `openings`."""
    table = openings(metrics[metrics["experiment"] == "openings"])
    return [int(token) for token in table.index[table["chosen"]]]


def screen_means(metrics: pd.DataFrame) -> pd.DataFrame:
    """Mean log-odds of a refusal opening by layer and alpha, with t intervals over prompts; layer -1 is unsteered.

    Returns:
        `layer, alpha, value, low, high`.
    """
    screen = metrics[(metrics["experiment"] == "screen") & (metrics["metric"] == "log_odds")]
    rows = []
    for (layer, alpha), values in screen.groupby(["layer", "alpha"])["value"]:
        mean, interval = mean_interval(values.to_numpy(dtype=float))
        rows.append((layer, alpha, mean, interval.low, interval.high))
    return pd.DataFrame(rows, columns=["layer", "alpha", "value", "low", "high"])
