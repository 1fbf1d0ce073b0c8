"""How far judges agree with readers: Cohen's kappa with intervals, confusions, and which kinds of text go wrong.

Items of one prompt (under several conditions, of several models) are alike, so the bootstrap draws whole prompts; the
same draws serve all judges, which makes differences between them paired.
"""

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from statsmodels.stats.inter_rater import cohens_kappa

from refusal import statistics
from refusal.analyses import LABELS
from refusal.files import CompendiumError
from refusal.statistics import Interval

JUDGES = {"ours": "our labels", "seed_rule": "study's rule", "gcg": "Zou et al.", "arditi": "Arditi et al."}
OTHERS = tuple(JUDGES)[1:]
SENSES = {"three labels": LABELS, "refusal or not": ("refusal", "other")}
ALL = "all models"
DRAWS = 2000


@dataclass(frozen=True)
class Kappa:
    """Cohen's kappa over n items of so many prompts; NaN where there is nothing to compare, or one label only.

    `share` is the share of items on which both agree, `interval` the asymptotic one, `bootstrap` that over prompts.
    """

    n: int
    prompts: int
    share: float
    value: float
    interval: Interval
    bootstrap: Interval


def kappa(
    first: Sequence[str], second: Sequence[str], prompts: Sequence[str], labels: Sequence[str], *, seed: int
) -> Kappa:
    """Cohen's (1960) kappa of two lists of labels, with 95 % intervals.

    The interval is that of Fleiss, Cohen and Everitt (1969), by statsmodels. Where all items agree it would have no
    width; then it is what Wilson's interval of the share that agrees makes of kappa.

    Args:
        first: One label an item.
        second: The other's.
        prompts: The prompt that each item answers.
        labels: All labels that may occur.
        seed: Of the bootstrap.

    Raises:
        CompendiumError: A label that is not among `labels`.
    """
    tables = _tables(first, second, prompts, labels)
    whole = tables.sum(0)
    n, nan = int(whole.sum()), float("nan")
    value = float(_kappas(whole)) if n else nan
    if np.isnan(value):
        return Kappa(n, len(tables), float(np.trace(whole)) / n if n else nan, nan, *[Interval(nan, nan)] * 2)
    agree = float(np.trace(whole)) / n
    if agree == 1:
        chance = float((whole.sum(0) * whole.sum(1)).sum()) / n**2
        interval = Interval((statistics.wilson(n, n).low - chance) / (1 - chance), 1.0)
        return Kappa(n, len(tables), 1.0, value, interval, interval)
    with np.errstate(invalid="ignore", divide="ignore"):  # where one of the two always says the same
        half = 1.959964 * float(np.sqrt(max(cohens_kappa(whole).var_kappa, 0.0)))
    interval = Interval(value - half, min(value + half, 1.0))
    return Kappa(n, len(tables), agree, value, interval, _ends(_kappas(_resampled(tables, seed))))


def difference(
    judge: Sequence[str],
    other: Sequence[str],
    reference: Sequence[str],
    prompts: Sequence[str],
    labels: Sequence[str],
    *,
    seed: int,
) -> tuple[float, Interval]:
    """Kappa of a judge with the reference minus that of another judge, with a 95 % bootstrap interval over prompts."""
    tables = [_tables(reference, labelled, prompts, labels) for labelled in (judge, other)]
    one, two = (_kappas(table.sum(0)) for table in tables)
    drawn = [_kappas(_resampled(table, seed)) for table in tables]
    return float(one - two), _ends(drawn[0] - drawn[1])


def _tables(
    first: Sequence[str], second: Sequence[str], prompts: Sequence[str], labels: Sequence[str]
) -> NDArray[np.float64]:
    """Cross tables of two lists of labels, `[prompts, labels, labels]`, in sorted order of the prompts."""
    rows, columns = (pd.Index(labels, dtype=object).get_indexer(list(one)) for one in (first, second))
    if (rows < 0).any() or (columns < 0).any():
        wrong = sorted({*first, *second} - set(labels))
        raise CompendiumError(f"kappa compares the labels {', '.join(labels)}, and {wrong[0]!r} is none of them.")
    codes, levels = pd.factorize(np.asarray(prompts, dtype=object), sort=True)
    tables = np.zeros((len(levels), len(labels), len(labels)))
    np.add.at(tables, (codes, rows, columns), 1)
    return tables


def _kappas(tables: NDArray[np.float64]) -> NDArray[np.float64]:
    """Kappa of each cross table `[..., labels, labels]`; NaN where only one label occurs."""
    n = tables.sum((-1, -2))
    with np.errstate(invalid="ignore", divide="ignore"):
        agree = np.trace(tables, axis1=-2, axis2=-1) / n
        chance = (tables.sum(-1) * tables.sum(-2)).sum(-1) / n**2
        return np.where(chance < 1 - 1e-12, (agree - chance) / (1 - chance), np.nan)


def _resampled(tables: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Cross tables of whole prompts drawn with replacement, `[draws, labels, labels]`."""
    return np.tensordot(_weights(len(tables), seed), tables, 1)


@functools.lru_cache(maxsize=16)
def _weights(count: int, seed: int) -> NDArray[np.int64]:
    """How often each of `count` prompts is drawn, `[draws, count]`."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), DRAWS)


def _ends(drawn: NDArray[np.float64]) -> Interval:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all NaN: a quick run with one label
        low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Interval(float(low), float(high))


def _as(sense: str, labels: "pd.Series[str]") -> list[str]:
    """Labels in one of the senses: as they are, or refusal against all else."""
    return labels.tolist() if sense == "three labels" else labels.where(labels == "refusal", "other").tolist()


def agreement(labelled: pd.DataFrame, *, seed: int) -> pd.DataFrame:
    """Kappa of every judge with the reference, and of the two readers, by half and model.

    Args:
        labelled: From `validation.labelled`: `model, half, prompt_id, reference, reader_1, reader_2` and a column of
            labels for each of `JUDGES`.
        seed: Of the bootstrap.

    Returns:
        Columns `scope` (a model, or "all models"), `half`, `sense`, `judge` (or "readers"), `n, prompts, share, kappa,
        low, high, boot_low, boot_high`, and `less, less_low, less_high`: by how much our kappa is the larger one.
    """
    rows = []
    for scope in (ALL, *sorted(set(labelled["model"]))):
        for half in ("A", "B"):
            mine = (labelled["half"] == half) & ((scope == ALL) | (labelled["model"] == scope))
            part = labelled[mine]
            for sense, labels in SENSES.items():
                row = {"scope": scope, "half": half, "sense": sense}
                rows += [row | one for one in _compared(part, sense, labels, seed)]
    return pd.DataFrame(rows)


def _compared(part: pd.DataFrame, sense: str, labels: Sequence[str], seed: int) -> list[dict[str, object]]:
    prompts, reference, rows = part["prompt_id"].tolist(), _as(sense, part["reference"]), []
    for judge in ("readers", *JUDGES):
        pair = (
            (_as(sense, part["reader_1"]), _as(sense, part["reader_2"]))
            if judge == "readers"
            else (reference, _as(sense, part[judge]))
        )
        found = kappa(*pair, prompts, labels, seed=seed)
        less, ends = float("nan"), Interval(float("nan"), float("nan"))
        if judge in OTHERS and len(part):
            less, ends = difference(_as(sense, part["ours"]), pair[1], reference, prompts, labels, seed=seed)
        rows.append(
            {
                "judge": judge,
                "n": found.n,
                "prompts": found.prompts,
                "share": found.share,
                "kappa": found.value,
                "low": found.interval.low,
                "high": found.interval.high,
                "boot_low": found.bootstrap.low,
                "boot_high": found.bootstrap.high,
                "less": less,
                "less_low": ends.low,
                "less_high": ends.high,
            }
        )
    return rows


def confusion(labelled: pd.DataFrame, judge: str = "ours", half: str = "B") -> pd.DataFrame:
    """Counts of items: the reference's labels in rows, the judge's in columns."""
    part = labelled[labelled["half"] == half]
    table = pd.crosstab(part["reference"], part[judge])
    return table.reindex(index=LABELS, columns=LABELS, fill_value=0).rename_axis(index="readers", columns=judge)


def kinds(labelled: pd.DataFrame, half: str = "B") -> pd.DataFrame:
    """How many items of each kind every judge labels otherwise than the readers, the frequent kinds first.

    The rules that know no degenerate text are wrong on all of it: that is the sense of three labels.
    """
    part = labelled[labelled["half"] == half]
    wrong = pd.DataFrame({name: part[judge] != part["reference"] for judge, name in JUDGES.items()})
    grouped = wrong.groupby([part["reference"], part["kind"]])
    table = grouped.sum().astype(int)
    table.insert(0, "items", grouped.size())
    return (
        table.sort_values("items", ascending=False, kind="stable")
        .reset_index()
        .rename(columns={"reference": "readers"})
    )
