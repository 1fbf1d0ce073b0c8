"""Curves: how a label's rate changes along a direction, and what kind of change that is (methods, section 6)."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import expit

from refusal import analyses, statistics, thresholds
from refusal.files import CompendiumError
from refusal.grids import part, rule, signs

KINDS = {"threshold": "a threshold", "graded": "graded", "not resolved": "width not resolved"}
DRAWS, STEEPEST_DRAWS = 300, 2000  # of each bootstrap: a replay fits thirty curves and more


@dataclass(frozen=True, eq=False)
class Curve:
    """How often one label is given along a direction with one sign, and what is fitted to that.

    Attributes:
        direction_id: The direction.
        sign: 1 where it is added, -1 where it is subtracted.
        label: refusal, compliance or degenerate.
        alphas: `[k]`, signed, from 0 outwards.
        relative: `[k]`, alpha_relative of these.
        answers: Bool `[prompts, k]`: who was given the label.
        found: The fits to all alphas, and their verdict.
        limb: The same up to the peak, for a rate that rises and falls again, which no shape of `found` does; else None.
            It is what is said of such a rate: compliance that gives way to broken text has risen before.
    """

    direction_id: str
    sign: int
    label: str
    alphas: NDArray[np.float64]
    relative: NDArray[np.float64]
    answers: NDArray[np.bool_]
    found: thresholds.Threshold
    limb: thresholds.Threshold | None = None

    @property
    def described(self) -> thresholds.Threshold:
        """The fits that are reported: those to the rising limb, where there is one."""
        return self.limb or self.found

    @property
    def answer(self) -> str:
        """What happens to the rate, in a few words."""
        what, kind = change(self.described), self.described.verdict
        if what == "no change":
            return "flat" if kind == "flat" else "too few prompts to tell"
        return f"{what} ({KINDS[kind]}){', then falls' if self.limb else ''}"


def rises(found: thresholds.Threshold) -> bool:
    """Whether the rate is higher far from alpha = 0 than near it; a flat one is not."""
    return found.outer > found.inner


def change(found: thresholds.Threshold) -> str:
    """Whether the rate "rises", "falls" or shows "no change" on the way outwards."""
    if math.isnan(found.alpha50):
        return "no change"
    return "rises" if rises(found) else "falls"


def fit(frame: pd.DataFrame, seed: int) -> list[Curve]:
    """Every label along every direction and sign, with its fits; the baseline is the alpha of 0 of each.

    Args:
        frame: A record with the part "curves".
        seed: Of the bootstraps.

    Raises:
        CompendiumError: A prompt without a label at some alpha, or what `thresholds.describe` raises.
    """
    rows = part(frame, "curves")
    base, steered, made = rows[rows["operation"] == "none"], rows[rows["operation"] == "add"], []
    for name in steered["direction_id"].unique():
        for sign in signs(name):
            own = steered[(steered["direction_id"] == name) & (np.sign(steered["alpha"]) == sign)]
            labels = pd.concat([base, own]).pivot(index="prompt_id", columns="alpha", values="label")
            if own.empty or labels.isna().any(axis=None):
                raise CompendiumError(f"the record lacks labels along {name} at some alpha: measure notebook 04 again.")
            labels = labels[sorted(labels.columns, key=abs)]
            alphas = labels.columns.to_numpy(dtype=float)
            relative = alphas * float(own["alpha_relative"].iloc[0] / own["alpha"].iloc[0])
            for label in analyses.LABELS:
                given = (labels == label).to_numpy(dtype=bool)
                made.append(describe(str(name), sign, label, alphas, relative, given, seed))
    return made


def describe(
    direction_id: str,
    sign: int,
    label: str,
    alphas: NDArray[np.float64],
    relative: NDArray[np.float64],
    answers: NDArray[np.bool_],
    seed: int,
) -> Curve:
    """A curve with its fits, by the plan's limit and level; the same answers are fitted once a process."""
    places = [len(alphas), *([top + 1] if (top := hump(answers)) else [])]
    fits = [_describe(answers[:, :k].tobytes(), tuple(alphas[:k].tolist()), seed) for k in places]
    return Curve(direction_id, sign, label, alphas, relative, answers, *fits)


def hump(answers: NDArray[np.bool_]) -> int | None:
    """The place of the peak of a rate that rises and falls again, or None.

    The last of the highest rates differs from both ends of the grid by McNemar's exact test, at the plan's level after
    Bonferroni's correction for its choice; two alphas at least lie before it, for otherwise nothing can be fitted.

    Args:
        answers: `[prompts, k]`.
    """
    counts = answers.sum(0)
    top, last = int(np.flatnonzero(counts == counts.max())[-1]), answers.shape[1] - 1
    if not 2 <= top < last:
        return None
    steps = answers[:, [top]].astype(int) - answers[:, [0, last]]
    p = max(statistics.sign_flips(column)[0] for column in steps.T)
    up = bool((steps.sum(0) > 0).all())
    return top if up and p * last <= analyses.plan()["level"] else None


@functools.lru_cache(maxsize=256)  # figures, tables, prose and paper ask for the same fits
def _describe(answers: bytes, alphas: tuple[float, ...], seed: int) -> thresholds.Threshold:
    y, level = np.frombuffer(answers, dtype=bool).reshape(-1, len(alphas)), analyses.plan()["level"]
    return thresholds.describe(y, alphas, limit=rule()["width_limit"], seed=seed, draws=DRAWS, level=level)


@functools.lru_cache(maxsize=64)
def _steepest(answers: bytes, alphas: tuple[float, ...], seed: int) -> thresholds.Steepest:
    y = np.frombuffer(answers, dtype=bool).reshape(-1, len(alphas))
    return thresholds.steepest_pair(y, alphas, limit=rule()["width_limit"], seed=seed, draws=STEEPEST_DRAWS)


def steepest(curve: Curve, seed: int) -> dict[str, Any]:
    """The steepest adjacent pair (of the rising limb, where there is one): the study's tests beside the smooth curve's.

    Returns:
        `first, second` (alphas), `difference`, `z` and `fisher` as if the pair had been chosen beforehand and two
        groups of prompts compared, `p` of the smooth curve, `dependence` (see `thresholds.Steepest`).
    """
    k = len(curve.described.descriptions["constant"].rates)
    pair = _steepest(curve.answers[:, :k].tobytes(), tuple(curve.alphas[:k].tolist()), seed)
    counts = dict(zip(curve.alphas.tolist(), curve.answers.sum(0).tolist(), strict=True))
    n = len(curve.answers)
    z, fisher = statistics.two_proportions(counts[pair.first], n, counts[pair.second], n)
    return {"first": pair.first, "second": pair.second, "difference": pair.difference, "z": z, "fisher": fisher,
            "p": pair.p, "dependence": pair.dependence}  # fmt: skip


def fitted(found: thresholds.Threshold, alphas: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The fitted logistic's rates at any alphas `x` of its side; the mean rate where it is flat.

    Args:
        found: The fit.
        alphas: Those that it was made with.
        x: Where it is wanted.
    """
    distance = np.abs(x)
    if math.isnan(found.width):
        return np.full(len(x), found.inner)
    if not math.isfinite(found.width):  # half way lies at or before zero: the rates on the grid are all there is
        return np.interp(distance, np.abs(alphas), found.descriptions["logistic"].rates)
    scale = found.width * abs(found.alpha50) / thresholds.WIDTH
    share = expit((distance - abs(found.alpha50)) / scale)
    return found.inner + (found.outer - found.inner) * share


def table(made: Sequence[Curve], limbs: bool = True) -> pd.DataFrame:
    """A row for each curve: what changes, where (alpha50, and relative to the residual norm), how abruptly.

    `best` is the shape with the lowest AIC, which counts all answers as if they were independent. `peak` is the highest
    rate, at `peak_relative`. Where the rate rises and falls again (`humped`), the row describes its rise.

    Args:
        made: From `fit`.
        limbs: False describes whole grids throughout.
    """
    rows = []
    for curve in made:
        found, rate = curve.described if limbs else curve.found, curve.answers.mean(0)
        unit = float(curve.relative[-1] / curve.alphas[-1])
        aic = {name: shape.aic for name, shape in found.descriptions.items()}
        middle, width = found.alpha50_interval, found.width_interval
        rows.append(
            {
                "direction_id": curve.direction_id,
                "sign": curve.sign,
                "label": curve.label,
                "n": found.n,
                "change": change(found),
                "verdict": found.verdict,
                "p_flat": found.p_flat,
                "inner": found.inner,
                "outer": found.outer,
                "alpha50": found.alpha50,
                "alpha50_low": middle.low,
                "alpha50_high": middle.high,
                "relative50": found.alpha50 * unit,
                "relative50_low": middle.low * unit,
                "relative50_high": middle.high * unit,
                "width": found.width,
                "width_low": width.low,
                "width_high": width.high,
                "width_upper": found.width_upper,
                "resolution": found.resolution,
                **{f"aic_{name}": value for name, value in aic.items()},
                "best": min(aic, key=lambda name: aic[name]),
                "start": float(rate[0]),
                "peak": float(rate.max()),
                "peak_relative": float(curve.relative[rate.argmax()]),
                "end_relative": float(curve.relative[-1]),
                "humped": curve.limb is not None,
            }
        )
    return pd.DataFrame(rows)


def rates(frame: pd.DataFrame) -> pd.DataFrame:
    """Rates of the three labels with intervals, by direction and alpha; the baseline is repeated for each direction.

    Returns:
        Columns of `analyses.rates`, and `direction_id, alpha, alpha_relative`.
    """
    rows = part(frame, "curves")
    about = rows.drop_duplicates("condition")[["condition", "direction_id", "alpha", "alpha_relative"]]
    shares = analyses.rates(rows).merge(about, on="condition", validate="many_to_one")
    base, steered = shares[shares["direction_id"] == ""], shares[shares["direction_id"] != ""]
    repeated = [base.assign(direction_id=name) for name in steered["direction_id"].unique()]
    return pd.concat([steered, *repeated]).sort_values(["direction_id", "label", "alpha"], ignore_index=True)
