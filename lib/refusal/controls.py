"""Control directions, matched in norm or in KL, and how the extracted direction ranks among them (methods, section 3).

Every family is made at all layers, so that a control at one layer is the same whichever layers are steered, and draw i
of a seed is the same however many draws are asked for.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from refusal.directions import Directions
from refusal.files import CompendiumError

FAMILIES = ("random", "orthogonal", "shuffled", "balanced", "topics")  # a family's place is part of its seed: append
MAX_CALLS = 40
GROWTH = 8.0  # of a scale from one call to the next, where no bracket is known


def _rng(family: str, seed: int, draw: int = 0) -> np.random.Generator:
    return np.random.default_rng([seed, FAMILIES.index(family), draw])


def _control(extracted: Directions, name: str, vectors: torch.Tensor) -> Directions:
    """Vectors `[layers, width]` of any length, at the norm of the extracted direction: alpha means the same length."""
    norm = vectors.double().norm(dim=-1, keepdim=True)
    if not bool((norm > 0).all()):
        raise CompendiumError(f"{name} has no direction at some layer, because both of its sides have the same mean.")
    return replace(extracted, id=name, unit=(vectors.double() / norm).float())


def _gaussian(extracted: Directions, family: str, seed: int, draw: int) -> torch.Tensor:
    return torch.from_numpy(_rng(family, seed, draw).standard_normal(tuple(extracted.unit.shape)))


def opposite(extracted: Directions) -> Directions:
    """The extracted direction turned round: `opposite` at alpha is the extracted one at -alpha."""
    return replace(extracted, id="opposite", unit=-extracted.unit)


def random(extracted: Directions, draws: int, *, seed: int) -> list[Directions]:
    """Gaussian directions, independent at each layer: uniform on the sphere.

    Args:
        extracted: Gives shape, raw_norm and residual_norm.
        draws: How many.
        seed: Draw i of a seed is always the same.

    Returns:
        Directions `random[0]`, `random[1]` ..., unit rows float32 `[layers, width]`, raw_norm that of `extracted`.
    """
    return [_control(extracted, f"random[{i}]", _gaussian(extracted, "random", seed, i)) for i in range(draws)]


def orthogonal(extracted: Directions, draws: int, *, seed: int) -> list[Directions]:
    """Gaussian directions made orthogonal to the extracted one at each layer (Gram-Schmidt); else like `random`."""
    unit = torch.nn.functional.normalize(extracted.unit.double(), dim=-1)
    made = []
    for i in range(draws):
        vectors = _gaussian(extracted, "orthogonal", seed, i)
        made.append(_control(extracted, f"orthogonal[{i}]", vectors - (vectors * unit).sum(-1, keepdim=True) * unit))
    return made


def shuffled(
    extracted: Directions,
    harmful: torch.Tensor,
    harmless: torch.Tensor,
    draws: int,
    *,
    seed: int,
    balanced: bool = False,
) -> list[Directions]:
    """Directions re-extracted after permuting the labels harmful and harmless over prompts; both keep their number.

    A permutation keeps a chance share of the contrast: at n prompts a side, a mean difference of norm d, and a spread
    of the prompts about their means of norm s, its cosine with the extracted direction has a standard deviation of
    about d / sqrt(d^2 + 4 s^2), whatever n is. At the extracted norm that share is scaled up too. `balanced` takes
    equal shares of both true classes to either side, so that the contrast cancels and other differences remain.

    Args:
        extracted: The direction of these prompts with their true labels.
        harmful: Last-token activations `[n, layers, width]`.
        harmless: The same of harmless prompts, `[m, layers, width]`.
        draws: How many.
        seed: Draw i of a seed is always the same.
        balanced: Permute within the true classes. Its draws are called `balanced[i]`, the others `shuffled[i]`.

    Raises:
        CompendiumError: Activations of another shape than the direction's.
    """
    family = "balanced" if balanced else "shuffled"
    pool = _pool(extracted, harmful, harmless)
    n, total = len(harmful), len(harmful) + len(harmless)
    made = []
    for i in range(draws):
        rng = _rng(family, seed, i)
        called = rng.permutation(total)[:n]  # prompts that are called harmful in this draw
        if balanced:
            share = _round(rng, n * n / total)
            called = np.r_[rng.permutation(n)[:share], n + rng.permutation(total - n)[: n - share]]
        made.append(_control(extracted, f"{family}[{i}]", _contrast(pool, called, np.setdiff1d(range(total), called))))
    return made


def _round(rng: np.random.Generator, value: float) -> int:
    """A whole number whose mean is the value: an odd prompt goes to either side as often."""
    return math.floor(value + rng.random())


def topic_sides(labels: Sequence[str], draws: int, *, seed: int) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Which topics stand against which in each draw of `topics`: as many on either side, from one to half of them.

    No two draws compare the same topics, whichever way round.

    Raises:
        CompendiumError: Fewer than two topics, or more draws than there are contrasts.
    """
    names = sorted(set(labels))
    n = len(names)
    possible = sum(math.comb(n, k) * math.comb(n - k, k) // 2 for k in range(1, n // 2 + 1))
    if draws > possible:
        raise CompendiumError(
            f"{n} topics give {possible} different contrasts, and {draws} were asked for: use fewer draws."
        )
    rng = _rng("topics", seed)  # one stream, because a draw must differ from all before it
    seen: dict[frozenset[tuple[str, ...]], tuple[tuple[str, ...], tuple[str, ...]]] = {}
    while len(seen) < draws:
        size, order = int(rng.integers(1, n // 2 + 1)), rng.permutation(n)
        first, second = (tuple(sorted(names[j] for j in order[a : a + size])) for a in (0, size))
        seen.setdefault(frozenset({first, second}), (first, second))
    return list(seen.values())


def topics(
    extracted: Directions, harmless: torch.Tensor, labels: Sequence[str], draws: int, *, seed: int
) -> list[Directions]:
    """Contrasts of harmless prompts on some topics with harmless prompts on others: mean differences without harm.

    Args:
        extracted: Gives raw_norm and residual_norm.
        harmless: Last-token activations of harmless prompts `[n, layers, width]`.
        labels: The topic of each prompt.
        draws: How many.
        seed: Draw i of a seed is always the same.

    Returns:
        Directions `topics[0]`, ...; `topic_sides` with the same labels and seed says which topics they compare.

    Raises:
        CompendiumError: Activations that fit neither the labels nor the direction; too few topics.
    """
    if len(labels) != len(harmless):
        raise CompendiumError(f"{len(labels)} topics were given for {len(harmless)} prompts: give one for each prompt.")
    pool, topic = _pool(extracted, harmless), np.asarray(labels)
    made = []
    for i, sides in enumerate(topic_sides(labels, draws, seed=seed)):
        first, second = (np.flatnonzero(np.isin(topic, side)) for side in sides)
        made.append(_control(extracted, f"topics[{i}]", _contrast(pool, first, second)))
    return made


def _pool(extracted: Directions, *sides: torch.Tensor) -> torch.Tensor:
    """All prompts' activations, float64 `[prompts, layers, width]`."""
    wrong = [tuple(side.shape) for side in sides if side.ndim != 3 or side.shape[1:] != extracted.unit.shape]
    if wrong or not all(len(side) for side in sides):
        raise CompendiumError(
            f"activations of shape {[tuple(side.shape) for side in sides]} do not fit a direction of shape "
            f"{tuple(extracted.unit.shape)}: both must be [prompts, layers, width] of the same model."
        )
    return torch.cat(sides).double()


def _contrast(pool: torch.Tensor, first: NDArray, second: NDArray) -> torch.Tensor:
    """Mean of some prompts minus mean of others, as one weighted sum: no copy of the chosen rows is made."""
    weights = torch.zeros(len(pool), dtype=torch.float64)
    weights[torch.from_numpy(first)] = 1 / len(first)
    weights[torch.from_numpy(second)] = -1 / len(second)
    return (weights @ pool.reshape(len(pool), -1)).reshape(pool.shape[1:])


def scaled(directions: Directions, factor: float | ArrayLike) -> Directions:
    """The same direction with another raw_norm, so that alpha = 1 adds `factor` times as much.

    Args:
        directions: What to scale; its id stays.
        factor: Positive; one number, or one a layer.

    Raises:
        CompendiumError: A factor that is not a positive finite number, or another number of factors than of layers.
    """
    factors = np.asarray(factor, dtype=np.float64)
    if factors.shape not in ((), (len(directions.raw_norm),)) or not (np.isfinite(factors) & (factors > 0)).all():
        raise CompendiumError(
            f"{directions.id} cannot be scaled by {factor!r}: give one positive number, or one for each of its "
            f"{len(directions.raw_norm)} layers."
        )
    return replace(directions, raw_norm=(directions.raw_norm.double() * torch.as_tensor(factors)).float())


@dataclass(frozen=True, eq=False)
class Matched:
    """Scales at which draws reach a KL; one entry a draw.

    Attributes:
        scale: The scale, NaN where none was found.
        kl: KL at the scale; where none was found, at the last scale tried.
        reached: Whether KL is within the tolerance. The others are counted, not dropped.
        calls: Calls of `kl_of`.
        evaluations: KLs that were computed in them.
    """

    scale: NDArray[np.float64]
    kl: NDArray[np.float64]
    reached: NDArray[np.bool_]
    calls: int
    evaluations: int


def match_kl(
    kl_of: Callable[[NDArray[np.float64], NDArray[np.int64]], ArrayLike],
    target: ArrayLike,
    start: ArrayLike,
    limit: ArrayLike,
    tolerance: float = 0.05,
) -> Matched:
    """For each draw, the scale at which its KL is within `tolerance` of the target: all draws at once, in few calls.

    KL grows about as the square of a small scale, so the steps are secants of log KL over log scale, the first with
    slope 2. Once the target lies between two scales, bisection (of the logarithms) replaces a step that leaves them,
    and every third of those that hardly close in.

    Args:
        kl_of: `kl_of(scales, which)`: KL of the draws number `which` (int `[some]`) at `scales` (`[some]`). Draws that
            have reached the target are not asked for again.
        target: KL to reach; one number, or one a draw, as the next two.
        start: First scale.
        limit: Largest scale allowed.
        tolerance: Relative to the target.

    Raises:
        CompendiumError: A target, start or limit that is not positive and finite, or a KL that is no number.
    """
    wanted, begin, most = np.broadcast_arrays(*(np.atleast_1d(np.asarray(x, float)) for x in (target, start, limit)))
    if begin.ndim != 1 or not all((np.isfinite(x) & (x > 0)).all() for x in (wanted, begin, most)):
        raise CompendiumError("KL is matched from a positive target, start and limit for each draw: check all three.")
    n, goal, ends = len(begin), np.log(wanted), np.log(most)
    scale = np.minimum(np.log(begin), ends)  # logarithms from here on
    low, high = np.full((n, 2), -np.inf), np.full((n, 2), np.inf)  # scale and KL nearest to the target on either side
    kl, reached, given_up = np.full(n, np.nan), np.zeros(n, bool), np.zeros(n, bool)
    slow, calls, evaluations = np.zeros(n, int), 0, 0
    while calls < MAX_CALLS and len(which := np.flatnonzero(~reached & ~given_up)):
        scales = np.minimum(np.exp(scale), most)
        found = np.asarray(kl_of(scales[which], which), dtype=np.float64)
        if found.shape != which.shape or np.isnan(found).any():
            raise CompendiumError("KL is no number at some scale: the model overflows there, so choose a lower limit.")
        calls, evaluations, kl[which] = calls + 1, evaluations + len(which), found
        reached[which] = np.abs(found / wanted[which] - 1) <= tolerance
        for i in which[~reached[which]]:
            point, width = np.array([scale[i], np.log(max(kl[i], 1e-300))]), high[i, 0] - low[i, 0]
            below = point[1] < goal[i]
            near, far = (low, high) if below else (high, low)
            aim = point[0] + (goal[i] - point[1]) / _slope(point, far[i] if np.isfinite(far[i, 0]) else near[i])
            near[i] = point
            closed = high[i, 0] - low[i, 0]
            given_up[i] = (below and point[0] >= ends[i]) or closed < 1e-9  # out of reach, or jumped over
            if math.isinf(closed):
                scale[i] = np.clip(aim, point[0] - math.log(GROWTH), min(point[0] + math.log(GROWTH), ends[i]))
                continue
            slow[i] = slow[i] + 1 if closed > width / 2 else 0
            if slow[i] > 2 or not low[i, 0] < aim < high[i, 0]:
                aim, slow[i] = (low[i, 0] + high[i, 0]) / 2, 0
            scale[i] = aim
    return Matched(np.where(reached, np.minimum(np.exp(scale), most), np.nan), kl, reached, calls, evaluations)


def _slope(point: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Of log KL over log scale between two points; 2 where there is no second one, and never far from it."""
    if not np.isfinite([*point, *other]).all() or point[0] == other[0]:
        return 2.0
    return float(np.clip((point[1] - other[1]) / (point[0] - other[0]), 0.2, 20.0))


@dataclass(frozen=True)
class Specificity:
    """The extracted effect among a family's: `p` two-sided by rank, `z` in the family's standard deviations.

    n counts all draws, `missing` those without an effect, which count against the extracted one; z is NaN where the
    effects of the family do not differ.
    """

    p: float
    z: float
    n: int
    missing: int
    mean: float
    sd: float


def specificity(extracted: float, controls: ArrayLike) -> Specificity:
    """Rank p = (1 + #) / (1 + n) and z score of an effect against the distribution of a family's effects.

    # are the draws at least as far from the mean of all n + 1 effects as the extracted one is: that statistic treats
    all of them alike, so p is exact where the extracted direction is just another draw. Ties count as far as far.

    Args:
        extracted: The effect of the extracted direction, e.g. a change of the refusal rate.
        controls: The effects of the draws `[n]`; NaN for a draw that has none (one that cannot reach the KL), which
            is counted as farther out than the extracted one.

    Raises:
        CompendiumError: No draw with an effect, or an extracted effect that is no number.
    """
    values = np.asarray(controls, dtype=np.float64).ravel()
    known = values[~np.isnan(values)]
    if not len(known) or not math.isfinite(extracted):
        raise CompendiumError("specificity compares a finite effect with those of controls: measure at least one draw.")
    centre = float(np.append(known, extracted).mean())
    spread = np.abs(known - centre)
    beyond = int((spread >= abs(extracted - centre) - 1e-12).sum()) + len(values) - len(known)
    mean, sd = float(known.mean()), float(known.std(ddof=1)) if len(known) > 1 else 0.0
    z = (float(extracted) - mean) / sd if sd > 1e-12 else math.nan
    return Specificity((1 + beyond) / (1 + len(values)), z, len(values), len(values) - len(known), mean, sd)
