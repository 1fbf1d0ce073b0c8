"""What the tests of claims stand on: a model's records, and the few rules that turn numbers into a verdict.

The rules are those at the head of data/claims.yaml. Nothing here knows of a single claim.
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from refusal import records, statistics
from refusal.analyses import plan
from refusal.files import CompendiumError
from refusal.statistics import Interval
from refusal.wording import detectable, p_equals, p_value, percent, points, span

REPLICATED, CONTRADICTED, INCONCLUSIVE = "replicated", "contradicted", "inconclusive"
NOT_TESTABLE, NOT_MEASURED = "not testable here", "not measured yet"
VERDICTS = (REPLICATED, CONTRADICTED, INCONCLUSIVE, NOT_TESTABLE, NOT_MEASURED)
NAMES = {"baseline": "baseline", "plus": "extracted +1", "minus": "extracted -1"}  # conditions, as claims name them


@dataclass(frozen=True)
class Finding:
    """What a test says: one of VERDICTS, the numbers it follows from, and the power there was where inconclusive."""

    verdict: str
    numbers: str
    power: str = ""


class NotMeasuredError(Exception):
    """A record that a test needs is not there, or is none in full. The message is a sentence."""


@dataclass(frozen=True)
class Record:
    """One notebook's record of a model."""

    frame: pd.DataFrame
    metrics: pd.DataFrame
    about: dict[str, Any]

    @property
    def seed(self) -> int:
        """The seed that the notebook was run with."""
        return int(self.about["parameters"]["seed"])


@dataclass(frozen=True, eq=False)
class Evidence:
    """The records of one model below a folder; what has been read or computed is kept.

    Attributes:
        root: The folder with a folder of records for each model.
        model: Registry id.
        kept: What `once` has made, for this model and those reached by `of`.
    """

    root: Path
    model: str
    kept: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def of(self, model: str) -> "Evidence":
        """The evidence on another model."""
        return Evidence(self.root, model, self.kept)

    def models(self, notebook: str) -> list[str]:
        """All models with a record of a notebook."""
        return sorted(path.parent.name for path in self.root.glob(f"*/{notebook}.parquet"))

    def once(self, name: str, make: Callable[[], Any]) -> Any:  # noqa: ANN401
        """What `make` returns, made once for this model and name."""
        key = (self.model, name)
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def record(self, notebook: str) -> Record:
        """A notebook's record of this model.

        Raises:
            NotMeasuredError: There is none, or it comes from a quick run or the user's own prompts.
            CompendiumError: It is damaged.
        """
        return self.once(notebook, lambda: self._read(notebook))

    def _read(self, notebook: str) -> Record:
        paths = [self.root / self.model / f"{notebook}{tail}.parquet" for tail in ("", ".metrics")]
        if not all(path.is_file() for path in paths):
            raise NotMeasuredError(f"there is no record of {notebook} on {self.model}.")
        (frame, about), (metrics, _) = (records.read(path) for path in paths)
        if about.get("quick") or about.get("user"):
            raise NotMeasuredError(f"the record of {notebook} on {self.model} is none of a run in full.")
        return Record(frame, metrics, about)


# ---- rules


def decide(wanted: object, against: object) -> str:
    """Replicated where what is wanted holds, else contradicted where what speaks against it does, else inconclusive."""
    return REPLICATED if wanted else CONTRADICTED if against else INCONCLUSIVE


def by_change(row: "pd.Series[Any]", claimed: str) -> str:
    """The rule on changes of a rate.

    Args:
        row: `difference, p_holm, p_equivalence` (two one-sided tests at the plan's margin) and, for "no rise", `upper`
            (the upper end of the 90 % interval).
        claimed: "rises", "falls", "same" or "no rise".

    Raises:
        CompendiumError: Another word.
    """
    level, margin = plan()["level"], plan()["margin"]
    clear, same = bool(row["p_holm"] < level), bool(row["p_equivalence"] < level)
    rose, fell = clear and row["difference"] > 0, clear and row["difference"] < 0
    if claimed in ("rises", "falls"):
        wanted, other = (rose, fell) if claimed == "rises" else (fell, rose)
        return decide(wanted, other or same)
    if claimed == "same":
        return decide(same, clear)
    if claimed == "no rise":
        return decide(row["upper"] < margin and not rose, rose)
    raise CompendiumError(f"a change cannot be claimed as {claimed!r}: write rises, falls, same or no rise.")


def by_interval(interval: Interval, limit: float, claimed: str) -> str:
    """The rule on sizes: on which side of a limit an interval lies; an undefined one settles nothing.

    Raises:
        CompendiumError: `claimed` is neither "above" nor "below".
    """
    if claimed not in ("above", "below"):
        raise CompendiumError(f"a size cannot be claimed as {claimed!r}: write above or below.")
    sides = {"above": interval.low > limit, "below": interval.high < limit}
    other = "below" if claimed == "above" else "above"
    return decide(sides[claimed], sides[other])


def by_all(verdicts: list[str]) -> str:
    """The rule on several parts of one claim: all must be replicated, and one that is contradicted is enough."""
    return decide(set(verdicts) == {REPLICATED}, CONTRADICTED in verdicts)


# ---- words


def change_words(row: "pd.Series[Any]") -> str:
    """A paired change: difference with interval, the two rates, n, p.

    Args:
        row: `difference, low, high, before, after, n, clusters, p, p_holm`.
    """
    return (
        f"{points(row['difference'])} points {span(Interval(row['low'], row['high']))}, from {percent(row['before'])} "
        f"to {percent(row['after'])} %; {prompts_words(int(row['n']), int(row['clusters']))}; {p_equals(row['p'])}, "
        f"Holm {p_value(row['p_holm'])}"
    )


def prompts_words(n: int, clusters: int) -> str:
    """How many prompts, and how many clusters."""
    return f"n = {n} prompts in {clusters} clusters"


def rate_words(rate: statistics.Rate) -> str:
    """A rate with its interval and n."""
    return f"{percent(rate.estimate)} % {span(rate.interval)}; {prompts_words(rate.n, rate.clusters)}"


def change_power(n: float, base: float) -> str:
    """The smallest change of a rate that would be found at 80 %, before correction.

    Args:
        n: Prompts, or the effective number of them.
        base: The rate that may change.
    """
    return detectable(
        max(int(n), 1),
        base,
        "With {n} prompts (effective number), a change of {points} points or more would be found with a probability of "
        "80 % before correction.",
        "With {n} prompts (effective number), no change of this rate would be found with a probability of 80 %.",
    )


def share_power(n: float, limit: float, claimed: str) -> str:
    """How far beyond a limit a share has to lie, for its Wilson interval to clear the limit in 80 % of cases.

    Args:
        n: Prompts, or the effective number of them.
        limit: A share.
        claimed: "above" or "below".
    """
    size = max(int(n), 1)
    ends = [statistics.wilson(k, size, plan()["confidence"]) for k in range(size + 1)]
    clears = [k for k, end in enumerate(ends) if by_interval(end, limit, claimed) == REPLICATED]
    start = math.ceil(100 * limit) if claimed == "above" else math.floor(100 * limit)
    for step in range(101):
        share = (start + step if claimed == "above" else start - step) / 100
        if not 0 <= share <= 1:
            break
        if stats.binom.pmf(clears, size, share).sum() >= 0.8:
            side = "more" if claimed == "above" else "less"
            return (
                f"With {size} prompts (effective number), a share of {100 * share:.0f} % or {side} would be told from "
                f"{100 * limit:g} % with a probability of 80 %."
            )
    return f"With {size} prompts (effective number), no share would be told from {100 * limit:g} % that surely."


def finding(verdict: str, numbers: str, power: str) -> Finding:
    """A finding, which tells the power only where the verdict is inconclusive."""
    return Finding(verdict, numbers, power if verdict == INCONCLUSIVE else "")
