"""Who answered how at each dose of notebook 07: from the record to arrays, rates and resamples (methods, section 8)."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from refusal import records, statistics
from refusal.analyses import plan
from refusal.files import CompendiumError
from refusal.window_runs import NOTEBOOK, steered

UNITS = {"alpha": "mean differences", "alpha_absolute": "units of activation", "alpha_relative": "mean residual norms"}


@dataclass(frozen=True, eq=False)
class Answers:
    """Who said what at each dose of a variant.

    Attributes:
        variant: "one", "many" or "own".
        alphas: `[k]`, ascending, 0 among them.
        units: What alpha = 1 is in each unit of UNITS.
        layers: The steered layers, as the record has them.
        harmful: Bool `[n, k]`: which harmful requests are refused.
        harmless: Bool `[m, k]`: which harmless ones are.
        broken: Bool `[n + m, k]`: which completions are degenerate, harmful prompts first.
        clusters: Of the harmful prompts `[n]`, and of the harmless ones `[m]`.
    """

    variant: str
    alphas: NDArray[np.float64]
    units: dict[str, float]
    layers: str
    harmful: NDArray[np.bool_]
    harmless: NDArray[np.bool_]
    broken: NDArray[np.bool_]
    clusters: tuple[NDArray, NDArray]

    @property
    def zero(self) -> int:
        """The place of alpha = 0."""
        return int(np.flatnonzero(self.alphas == 0)[0])


def part(frame: pd.DataFrame, *words: str) -> pd.DataFrame:
    """The completions of some parts of a record, "curves", "defence" ...; CompendiumError where there are none."""
    found = frame[frame["experiment"].isin([f"{NOTEBOOK} {word}" for word in words])]
    if found.empty:
        raise CompendiumError(f"the record has no completions of the part {words[0]!r}: measure {NOTEBOOK} again.")
    return found


def answers(frame: pd.DataFrame, variant: str) -> Answers:
    """The answers of one variant; the baseline is its alpha of 0.

    Args:
        frame: A record with the part "curves" (and "own", where that variant was measured).
        variant: A key of `window_runs.VARIANTS`.

    Raises:
        CompendiumError: No such variant, no harmful or no harmless prompt, or a prompt without a label at some alpha.
    """
    rows = part(frame, "curves", "own")
    own = rows[rows["condition"].str.startswith(f"{steered(variant)} ")]
    if own.empty:
        raise CompendiumError(f"the record has no variant {variant!r}: measure {NOTEBOOK} with it.")
    base = rows[rows["operation"] == "none"].assign(alpha=0.0)
    rows = pd.concat([own, base])
    labels = rows.pivot(index="prompt_id", columns="alpha", values="label").sort_index(axis=1)
    about = rows.drop_duplicates("prompt_id").set_index("prompt_id").loc[labels.index]
    is_harmful = about["prompt_set"].map(records.is_harmful).to_numpy(bool)
    if labels.isna().any(axis=None) or 0.0 not in labels or is_harmful.all() or not is_harmful.any():
        raise CompendiumError(f"the record lacks labels of {variant!r} at some alpha: measure {NOTEBOOK} again.")
    far, cluster = own.loc[own["alpha"].abs().idxmax()], about["cluster"].to_numpy(object)
    refused, broken = ((labels == label).to_numpy(bool) for label in ("refusal", "degenerate"))
    return Answers(
        variant,
        labels.columns.to_numpy(float),
        {unit: float(far[unit] / far["alpha"]) for unit in UNITS},
        str(far["layers"]),
        refused[is_harmful],
        refused[~is_harmful],
        np.concatenate([broken[is_harmful], broken[~is_harmful]]),
        (cluster[is_harmful], cluster[~is_harmful]),
    )


def resamples(clusters: ArrayLike, draws: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """How often each prompt is drawn, `[draws, prompts]`: whole clusters are drawn, with replacement."""
    codes, levels = pd.factorize(np.asarray(clusters, dtype=object))
    return rng.multinomial(len(levels), np.full(len(levels), 1 / len(levels)), size=draws)[:, codes].astype(float)


def rises(of: Answers, *weights: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Three curves `[draws, k]`: refusal of harmful and of harmless requests minus the baseline's; degeneration.

    Args:
        of: The answers.
        *weights: Of the harmful and of the harmless prompts, `[draws, prompts]`; none for the prompts as they are.
    """
    first, second = weights or (np.ones((1, len(of.harmful))), np.ones((1, len(of.harmless))))
    harmful, harmless = (w @ y / w.sum(1, keepdims=True) for w, y in ((first, of.harmful), (second, of.harmless)))
    both = np.concatenate([first, second], axis=1)
    zero = slice(of.zero, of.zero + 1)
    return harmful - harmful[:, zero], harmless - harmless[:, zero], both @ of.broken / both.sum(1, keepdims=True)


def curves(of: Answers) -> pd.DataFrame:
    """The three rates at every alpha, with intervals, and how they change from the baseline, paired.

    Returns:
        A row for each of `outcome` (harmful, harmless: refused; degenerate) and alpha: the three units, `variant, k, n,
        clusters, rate, low, high, change, change_low, change_high`.
    """
    confidence, how = plan()["confidence"], plan()["intervals"]["clusters"]
    both = np.concatenate(of.clusters)
    outcomes = {"harmful": (of.harmful, of.clusters[0]), "harmless": (of.harmless, of.clusters[1]),
                "degenerate": (of.broken, both)}  # fmt: skip
    rows = []
    for outcome, (values, clusters) in outcomes.items():
        for place, alpha in enumerate(of.alphas.tolist()):
            found = statistics.rate(values[:, place], clusters, confidence, how=how)
            change = statistics.paired(values[:, place], values[:, of.zero], clusters, confidence)
            rows.append(
                {"variant": of.variant, "outcome": outcome}
                | {unit: alpha * size for unit, size in of.units.items()}
                | {"k": found.k, "n": found.n, "clusters": found.clusters, "rate": found.estimate,
                   "low": found.interval.low, "high": found.interval.high, "change": change.difference,
                   "change_low": change.interval.low, "change_high": change.interval.high}
            )  # fmt: skip
    return pd.DataFrame(rows)


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, e.g. "−0.25"; zero has none."""
    rounded = round(value, digits)
    return f"{rounded:+.{digits}f}" if rounded else f"{0:.{digits}f}"
