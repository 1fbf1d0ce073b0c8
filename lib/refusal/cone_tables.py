"""The geometry of the category directions beside its nulls, from the rows of `cone_geometry` (methods, section 7)."""

import math
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from refusal import cones, controls
from refusal.cone_geometry import ABOUT, FAMILIES, NULLS, derived
from refusal.cones import Floats
from refusal.wording import p_value

NAMES = {
    "entropy_rank": "entropy rank",
    "participation": "participation ratio",
    "top_share": "share of the top eigenvalue",
    "mean_abs_cosine": "mean |cosine|",
    "mean_cosine": "mean cosine",
    "unbiased_cosine": "unbiased mean cosine",
    "unbiased_participation": "unbiased participation ratio",
}


def geometry(metrics: pd.DataFrame) -> pd.DataFrame:
    """The rows of the geometry among a record's metrics."""
    return metrics[metrics["experiment"] == "geometry"]


def selected(metrics: pd.DataFrame) -> int:
    """The layer that the rule of notebook 01 chose, as noted beside the geometry."""
    part = geometry(metrics)
    return int(part.loc[part["metric"] == "selected_layer", "layer"].iloc[0])


def categories(metrics: pd.DataFrame) -> list[str]:
    """The categories, in their order."""
    part = geometry(metrics)
    return part[part["metric"] == "reliability"]["direction_id"].drop_duplicates().tolist()


def grams(metrics: pd.DataFrame, metric: str = "gram") -> Floats:
    """Gram matrices of all layers, `[layers, 2K, 2K]`: the categories, then the questions about them.

    Args:
        metrics: The record's metrics.
        metric: "gram", or "gram_unbiased".
    """
    part = geometry(metrics)
    part = part[part["metric"] == metric]
    names = categories(metrics)
    place = {name: i for i, name in enumerate([*names, *(f"{ABOUT}{name}" for name in names)])}
    first, second = ([place[name] for name in part["direction_id"].str.split("|").str[end]] for end in (0, 1))
    made = np.full((part["layer"].max() + 1, len(place), len(place)), np.nan)
    made[part["layer"], first, second] = part["value"]
    made[part["layer"], second, first] = part["value"]
    return made


def by_layer(metrics: pd.DataFrame) -> pd.DataFrame:
    """Every statistic at every layer: `layer, statistic, value, low, high`, with 95 % bootstrap intervals.

    Values follow from the two Gram matrices and nothing else, `corrected_cosine` from the reliabilities too.
    """
    plain, unbiased, k = grams(metrics), grams(metrics, "gram_unbiased"), len(categories(metrics))
    found = cones.statistics(plain[:, :k, :k]) | derived(unbiased)
    found["corrected_cosine"] = _mean_pair(corrected(metrics))
    part = geometry(metrics)
    ends = part[part["direction_id"] == "bootstrap"].set_index(["metric", "layer"])["value"]
    table = pd.DataFrame(found).rename_axis("layer").stack().rename("value").rename_axis(["layer", "statistic"])
    made = table.reset_index()
    for end in ("low", "high"):
        keys = pd.MultiIndex.from_arrays([made["statistic"] + f"_{end}", made["layer"]])
        made[end] = ends.reindex(keys).to_numpy()
    return made


def reliability(metrics: pd.DataFrame) -> pd.DataFrame:
    """Split-half reliability by layer (rows) and category (columns)."""
    part = geometry(metrics)
    wide = part[part["metric"] == "reliability"].pivot(index="layer", columns="direction_id", values="value")
    return wide[categories(metrics)]


def corrected(metrics: pd.DataFrame) -> Floats:
    """Cosines of the categories corrected for attenuation, `[layers, K, K]`."""
    k = len(categories(metrics))
    return cones.disattenuated(cones.cosines(grams(metrics)[:, :k, :k]), reliability(metrics).to_numpy())


def _mean_pair(cosine: Floats) -> Floats:
    return cones.pairs(cosine).mean(-1)


def bands(metrics: pd.DataFrame) -> pd.DataFrame:
    """The central 95 % of the families' draws: `family, size, n, layer, statistic, low, median, high`.

    The `size` is that of direction_id, and `n` the same as a number, NaN for the pilot's.
    """
    part = geometry(metrics)
    named = part["direction_id"].str.extract(r"^(\w+)(?:\[(\w+)\])?$")
    ending = part["metric"].str.extract(r"^(.*)_(low|median|high)$")
    rows = part.assign(family=named[0], size=named[1].fillna(""), statistic=ending[0], end=ending[1])
    rows = rows[rows["family"].isin(FAMILIES) & rows["end"].notna()]
    wide = rows.pivot(index=["family", "size", "layer", "statistic"], columns="end", values="value").reset_index()
    wide["n"] = pd.to_numeric(wide["size"], errors="coerce")
    return wide[["family", "size", "n", "layer", "statistic", "low", "median", "high"]].rename_axis(columns=None)


def called_polyhedral(metrics: pd.DataFrame) -> pd.DataFrame:
    """The share of each family's draws that the pilot's toolkit calls polyhedral: `family, size, layer, share`."""
    part = geometry(metrics)
    part = part[part["metric"] == "polyhedral"]
    named = part["direction_id"].str.extract(r"^(\w+)(?:\[(\w+)\])?$")
    return pd.DataFrame(
        {"family": named[0], "size": named[1].fillna(""), "layer": part["layer"], "share": part["value"]}
    ).reset_index(drop=True)  # fmt: skip


def largest(metrics: pd.DataFrame, family: str) -> str:
    """The largest number of prompts a category at which a family was drawn, "" where it was not."""
    found = (re.fullmatch(rf"{family}\[(\d+)\]", name) for name in geometry(metrics)["direction_id"].unique())
    return max((one[1] for one in found if one), key=int, default="")


def draws(metrics: pd.DataFrame, family: str, statistic: str) -> pd.DataFrame:
    """A family's draws at its most prompts: draws in rows, layers in columns."""
    part, size = geometry(metrics), largest(metrics, family)
    name = f"{family}[{size}]" if size else family
    part = part[(part["direction_id"] == name) & (part["metric"] == statistic)]
    return part.pivot(index="draw", columns="layer", values="value")


def rank_p(value: float, drawn: Sequence[float] | Floats) -> float:
    """Two-sided rank p of a value among draws; draws without a value count against it, and 1 where it has none."""
    known = np.asarray(drawn, dtype=float)
    if not math.isfinite(value) or np.isnan(known).all():
        return 1.0
    return controls.specificity(value, known).p


def table(metrics: pd.DataFrame) -> pd.DataFrame:
    """Every statistic at the selected layer beside its nulls, each with a two-sided rank p.

    A null of topics has fewer prompts: it stands beside the median of as small subsets of the categories.

    Returns:
        Index statistic; columns value, low, high; for each family `<family>` (median), `<family>_low`, `<family>_high`,
        `<family>_p`; and `few` (the value beside topics).
    """
    layer, few = selected(metrics), largest(metrics, "topics")
    here = by_layer(metrics)
    made = here[here["layer"] == layer].set_index("statistic")[["value", "low", "high"]].loc[list(NAMES)]
    found = bands(metrics)
    found = found[found["layer"].isin([layer, -1])].set_index(["family", "size", "statistic"]).sort_index()
    if few:
        made["few"] = found.loc[("observed", few), "median"]
    part = geometry(metrics)
    part = part[part["metric"].isin(list(NAMES)) & part["layer"].isin([layer, -1])]
    drawn = {key: values.to_numpy() for key, values in part.groupby(["direction_id", "metric"])["value"]}
    for family in (*NULLS, "random"):
        size = largest(metrics, family)
        for name in NAMES:
            values = drawn.get((f"{family}[{size}]" if size else family, name))
            if values is None:
                continue
            band, own = found.loc[(family, size, name)], made.loc[name, "few" if family == "topics" else "value"]
            made.loc[name, family] = band["median"]
            made.loc[name, f"{family}_low"] = band["low"]
            made.loc[name, f"{family}_high"] = band["high"]
            made.loc[name, f"{family}_p"] = rank_p(float(own), values)
    return made


def unbiased_test(metrics: pd.DataFrame) -> "pd.Series[float]":
    """The plan's comparison of geometry: the unbiased mean cosine at the selected layer among permuted categories.

    Returns:
        `value, low, high, p`.
    """
    here, layer = by_layer(metrics), selected(metrics)
    row = here[(here["layer"] == layer) & (here["statistic"] == "unbiased_cosine")].iloc[0][["value", "low", "high"]]
    drawn = draws(metrics, "permuted", "unbiased_cosine")[layer].to_numpy()
    return pd.Series({**row, "p": rank_p(float(row["value"]), drawn)}, dtype=float)


def trend(metrics: pd.DataFrame) -> tuple[float, float, float]:
    """Spearman's correlation of the entropy rank with the layer, its median under permuted categories, and a rank p."""
    here = by_layer(metrics)
    own = here[here["statistic"] == "entropy_rank"].sort_values("layer")["value"].to_numpy()
    drawn = draws(metrics, "permuted", "entropy_rank").sort_index(axis=1).to_numpy()
    rho = float(cones.trend(own))
    null = cones.trend(drawn)
    return rho, float(np.median(null)), rank_p(rho, null)


def pairs(metrics: pd.DataFrame) -> pd.DataFrame:
    """Unbiased cosines at the selected layer: `first, second, value, low, high`; the second may be a topic."""
    layer, names = selected(metrics), categories(metrics)
    cosine = cones.cosines(grams(metrics, "gram_unbiased")[layer])
    part = geometry(metrics).set_index(["metric", "direction_id"])["value"]
    rows = []
    for i, first in enumerate(names):
        for j in [*range(i + 1, len(names)), len(names) + i]:
            second = [*names, *(f"{ABOUT}{name}" for name in names)][j]
            low, high = (part[f"cosine_{end}", f"{first}|{second}"] for end in ("low", "high"))
            rows.append({"first": first, "second": second, "value": cosine[i, j], "low": low, "high": high})
    made = pd.DataFrame(rows)
    return made.sort_values("second", key=lambda name: name.str.startswith(ABOUT), kind="stable", ignore_index=True)


def halves_cosine(metrics: pd.DataFrame) -> float:
    """The mean cosine of the categories at the selected layer from random halves, a check of the unbiased one."""
    part = geometry(metrics)
    part = part[(part["metric"] == "halves_cosine") & (part["layer"] == selected(metrics))]
    return float(part["value"].iloc[0])


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """`table` for people: a value with its interval, and each null's median with its p."""

    def cell(row: "pd.Series[float]", family: str) -> str:
        if family not in row or math.isnan(row[family]):
            return "–"
        return f"{row[family]:.3f} (p {p_value(row[f'{family}_p'])})"

    columns = {"value": [f"{r['value']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for _, r in table.iterrows()]}
    for family in ("permuted", "planted", "random"):
        columns[family] = [cell(row, family) for _, row in table.iterrows()]
    if "few" in table:
        columns["value, fewer prompts"] = [f"{value:.3f}" for value in table["few"]]
        columns["topics"] = [cell(row, "topics") for _, row in table.iterrows()]
    return pd.DataFrame(columns, index=[NAMES[name] for name in table.index])


def study_sized(metrics: pd.DataFrame) -> pd.DataFrame:
    """What the pilot's numbers of prompts give here: `family, layer, statistic, low, median, high, polyhedral`.

    At the layer of its highest rank. Empty where the categories are not the pilot's, or too few prompts were taken.
    """
    found, called = bands(metrics), called_polyhedral(metrics)
    found = found[(found["size"] == "pilot") & found["statistic"].isin(["entropy_rank", "mean_abs_cosine"])]
    called = called[called["size"] == "pilot"]
    layer, keys = found["layer"].min(), ["family", "size", "layer"]
    made = found[found["layer"] == layer].merge(called[called["layer"] == layer], on=keys)
    return made.rename(columns={"share": "polyhedral"}).drop(columns=["size", "n"])
