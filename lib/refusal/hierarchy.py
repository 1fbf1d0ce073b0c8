"""Models side by side: what the notebooks found on each that has records, in one table (methods, sections 2 to 9).

Nothing is estimated here: each row is what the notebook's own module says of the record. A model without a record of a
notebook has no row of it.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from refusal import (
    analyses,
    collapse,
    cone_effects,
    curves,
    grids,
    records,
    registry,
    specification,
    specification_runs,
    specificity,
    statistics,
    sweep_cells,
    sweeps,
    window_answers,
    windows,
)
from refusal.files import CompendiumError
from refusal.statistics import Interval

RECORDS = records.COMMITTED
UNITS = ("alpha", "alpha_relative", "alpha_absolute")
NOTHING = Interval(math.nan, math.nan)


class Found(NamedTuple):
    """A quantity of a model: in which unit, its value and interval (NaN where it has none), and what is said of it."""

    quantity: str
    unit: str
    value: float
    interval: Interval = NOTHING
    said: str = ""


def sources(root: Path, own: str, committed: Path = RECORDS) -> dict[str, Path]:
    """The folder of each model that has records, in the registry's order: its own, and the committed ones of others.

    Args:
        root: The folder with this model's records.
        own: Its id.
        committed: The folder with the records of the others.
    """
    known = [*registry.registry(), own]
    folders = {model: (root if model == own else committed) / model for model in dict.fromkeys(known)}
    return {model: folder for model, folder in folders.items() if any(folder.glob("*.parquet"))}


def read(folder: Path, notebook: str) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]] | None:
    """A model's completions, metrics and metadata of one notebook; None where it has not been measured."""
    if not (folder / f"{notebook}.parquet").is_file():
        return None
    frame, about = records.read(folder / f"{notebook}.parquet")
    return frame, records.read(folder / f"{notebook}.metrics.parquet")[0], about


def _scaled(quantity: str, sizes: Mapping[str, float], value: float, interval: Interval, said: str = "") -> list[Found]:
    """A quantity in units of alpha, in each unit."""
    return [
        Found(quantity, unit, size * value, Interval(size * interval.low, size * interval.high), said)
        for unit, size in sizes.items()
    ]


def _extraction(frame: pd.DataFrame, metrics: pd.DataFrame, about: Mapping[str, Any]) -> Iterator[Found]:
    n_layers = int(about["facts"]["layers"])
    layer = analyses.selected_layer(metrics, n_layers)
    at = {name: analyses.by_layer(metrics, name).set_index("layer").loc[layer]
          for name in ("raw_norm", "residual_norm", "d_prime")}  # fmt: skip
    raw, residual = at["raw_norm"], float(at["residual_norm"]["value"])
    sizes = {"alpha_absolute": 1.0, "alpha_relative": 1 / residual}
    yield Found("depth", "share", layer / n_layers)
    yield from _scaled("dose", sizes, float(raw["value"]), Interval(float(raw["low"]), float(raw["high"])))
    d_prime = at["d_prime"]
    yield Found("d_prime", "sd", float(d_prime["value"]), Interval(float(d_prime["low"]), float(d_prime["high"])))


def _controls(frame: pd.DataFrame, metrics: pd.DataFrame, about: Mapping[str, Any]) -> Iterator[Found]:
    test = specificity.table(metrics)
    swing, interval = specificity.swing(metrics)
    yield Found("swing", "log-odds", swing, interval)
    yield Found("z", "sd", float(test.loc["random", "z"]))
    yield Found("special", "verdict", math.nan, said=specificity.verdict(test))


def _sign(frame: pd.DataFrame, metrics: pd.DataFrame, about: Mapping[str, Any]) -> Iterator[Found]:
    shares, tests = analyses.rates(frame), analyses.comparisons(frame)
    rate = shares.set_index(["prompt_set", "condition", "label"])
    plus, minus = (str(tests.loc[name, "first"]) for name in ("plus", "minus"))
    for quantity, prompt_set, condition, label in (
        ("baseline", "harmful_evaluation", "baseline", "refusal"),
        ("refusal_plus", "harmful_evaluation", plus, "refusal"),
        ("refusal_minus", "harmful_evaluation", minus, "refusal"),
        ("degenerate_minus", "harmful_evaluation", minus, "degenerate"),
        ("harmless", "harmless_evaluation", "baseline", "refusal"),
        ("harmless_plus", "harmless_evaluation", plus, "refusal"),
    ):
        row = rate.loc[(prompt_set, condition, label)]
        yield Found(quantity, "share", float(row["rate"]), Interval(float(row["low"]), float(row["high"])))
    for quantity, name in {"plus": "plus", "minus": "minus", "over_refusal": "harmless_plus"}.items():
        row = tests.loc[name]
        yield Found(quantity, "points", float(row["difference"]), Interval(float(row["low"]), float(row["high"])))
    yield Found("sign", "verdict", math.nan, said=analyses.sign_verdict(tests, shares))


def _threshold(frame: pd.DataFrame, metrics: pd.DataFrame, about: Mapping[str, Any]) -> Iterator[Found]:
    table = curves.table(curves.fit(frame, int(about["parameters"]["seed"])))
    safety = grids.rule()["outcomes"]["safety"]
    own = table[(table["direction_id"] == "extracted") & (table["sign"] < 0) & (table["label"] == safety)].iloc[0]
    steered = grids.part(frame, "curves")
    far = steered[steered["direction_id"] == "extracted"].iloc[0]
    sizes = {unit: float(far[unit] / far["alpha"]) for unit in UNITS}
    said = "" if own["change"] == "rises" else str(own["change"])
    middle = Interval(float(own["alpha50_low"]), float(own["alpha50_high"]))
    yield from _scaled("alpha50", sizes, float(own["alpha50"]), middle, said)
    width = Interval(float(own["width_low"]), float(own["width_high"]))
    yield Found("width", "alpha50", float(own["width"]), width, said)
    yield Found("collapse", "verdict", math.nan, said=collapse.verdict(table))


def _window(frame: pd.DataFrame, metrics: pd.DataFrame, about: Mapping[str, Any]) -> Iterator[Found]:
    for variant in ("one", "many"):
        found = windows.find(window_answers.answers(frame, variant), int(about["parameters"]["seed"]))
        if variant == "one":
            sizes = {unit: found.answers.units[unit] for unit in UNITS}
            for quantity, key, side in (("window_low", "low", 0), ("window_high", "high", 1), ("useful", "useful", 1)):
                ended = quantity == "useful" or found.stops[side] != windows.STOPS[-1]
                value, interval = getattr(found, key), found.intervals[key]
                yield from _scaled(quantity, sizes, value, interval, "" if ended else "beyond the grid")
        yield Found(f"window_{variant}", "verdict", math.nan, said=found.verdict)


def _cones(frame: pd.DataFrame, metrics: pd.DataFrame, about: Mapping[str, Any]) -> Iterator[Found]:
    seed, kinds = int(about["parameters"]["seed"]), cone_effects.kinds_of(frame)
    found = cone_effects.contrast(cone_effects.swings(metrics, "category"), kinds, seed)
    own = found.own if found.own > 0 else math.nan
    yield Found("cones", "share", found.value / own, Interval(found.interval.low / own, found.interval.high / own))
    yield Found("separate", "verdict", math.nan, said=cone_effects.judged(metrics, kinds, seed))


def _sweep(frame: pd.DataFrame, metrics: pd.DataFrame, about: Mapping[str, Any]) -> Iterator[Found]:
    table = sweep_cells.gates(frame, metrics, bool(about["parameters"]["n_prompts"]))
    whole = sweeps.predictions(table, int(about["parameters"]["seed"])).iloc[0]
    yield Found("screen", "rho", float(whole["rho"]), Interval(float(whole["low"]), float(whole["high"])))


def _doses(frame: pd.DataFrame, metrics: pd.DataFrame, about: Mapping[str, Any]) -> Iterator[Found]:
    planned, confidence = specification_runs.rule(), analyses.plan()["confidence"]
    made = {arm.spec: arm for arm in specification.arms(frame, metrics)}
    for unit in UNITS:
        arm = made.get(tuple({**planned["ours"], "unit": unit}[factor] for factor in specification.FACTORS))
        if arm is not None:
            how = analyses.plan()["intervals"]["clusters"]
            rate = statistics.rate(arm.minus, arm.clusters, confidence, how=how)
            yield Found("level", unit, rate.estimate, rate.interval)
            for quantity, values in {"rise": arm.minus, "fall": arm.plus}.items():
                change = statistics.paired(values, arm.base, arm.clusters, confidence)
                yield Found(quantity, unit, change.difference, change.interval)


FROM: dict[str, Callable[[pd.DataFrame, pd.DataFrame, Mapping[str, Any]], Iterator[Found]]] = {
    "01_extraction": _extraction,
    "02_orthogonal_controls": _controls,
    "03_sign_inversion": _sign,
    "04_llama_threshold": _threshold,
    "05_polyhedral_cones": _cones,
    "06_layer_sweep": _sweep,
    "07_therapeutic_window": _window,
    specification_runs.NOTEBOOK: _doses,
}


@functools.lru_cache(maxsize=256)  # curves and windows are found by bootstraps, and are asked for more than once
def _quantities(folder: Path, notebook: str, stamp: tuple[int, ...]) -> tuple[Found, ...]:
    measured = read(folder, notebook)
    assert measured is not None and stamp
    return tuple(FROM[notebook](*measured))


def quantities(folder: Path, notebook: str) -> tuple[Found, ...]:
    """What a notebook found on a model; nothing where it has no record, or too few answers for an estimate.

    Args:
        folder: The model's records.
        notebook: One of FROM.
    """
    paths = [folder / f"{notebook}{tail}.parquet" for tail in ("", ".metrics")]
    if not all(path.is_file() for path in paths):
        return ()
    try:
        return _quantities(folder, notebook, tuple(path.stat().st_mtime_ns for path in paths))
    except CompendiumError as error:
        return (Found("fault", "verdict", math.nan, said=f"{notebook}: {error}"),)


def side_by_side(folders: Mapping[str, Path]) -> pd.DataFrame:
    """All quantities of all models.

    Args:
        folders: From `sources`.

    Returns:
        `model, notebook, quantity, unit, value, low, high, said`; NaN where there is no number or no interval.
    """
    rows = [
        {"model": model, "notebook": notebook, "quantity": one.quantity, "unit": one.unit, "value": one.value,
         "low": one.interval.low, "high": one.interval.high, "said": one.said}
        for model, folder in folders.items() for notebook in FROM for one in quantities(folder, notebook)
    ]  # fmt: skip
    columns = ["model", "notebook", "quantity", "unit", "value", "low", "high", "said"]
    return pd.DataFrame(rows, columns=columns).replace({"value": {np.inf: np.nan, -np.inf: np.nan}})


def missing(folders: Mapping[str, Path]) -> dict[str, list[str]]:
    """For each model, the numbers of the notebooks that it has no record of."""
    found = {model: [nb[:2] for nb in FROM if not (folder / f"{nb}.parquet").is_file()]
             for model, folder in folders.items()}  # fmt: skip
    return {model: numbers for model, numbers in found.items() if numbers}
