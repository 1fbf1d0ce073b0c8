"""Which prompts stand behind the directions: the true categories, their nulls, and resamples (methods, section 7).

Each design gives weights `[draws, groups, n]` for `cones.products`. All take matched numbers of prompts: `sizes[k]` for
direction k, and as many in all for a shared baseline.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refusal.cones import Floats, Indices, weigh


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the prompts of a kernel belong; all are numbers of prompts.

    Attributes:
        categories: Names of the categories, in the order of their first prompts.
        harmful: The harmful prompts of each.
        about: Harmless questions about each.
        harmless: The baseline of all.
        beside: For each category, the harmless prompts at the places of their file which the category's harmful ones
            have in theirs: the baseline that the pilot's toolkit takes.
        everyday: The harmless prompts by topic.
        total: Prompts in all.
    """

    categories: tuple[str, ...]
    harmful: tuple[Indices, ...]
    about: tuple[Indices, ...]
    harmless: Indices
    beside: tuple[Indices, ...]
    everyday: tuple[Indices, ...]
    total: int


def layout(harmful: Sequence[str], harmless: Sequence[str], about: Sequence[str]) -> Layout:
    """The layout of harmful prompts, harmless ones and questions about the categories, one behind the other.

    Args:
        harmful: Category of each harmful prompt.
        harmless: Topic of each harmless one.
        about: Category that each question is about.
    """
    names, n, m = tuple(dict.fromkeys(harmful)), len(harmful), len(harmless)
    places = [np.flatnonzero(np.asarray(harmful) == name) for name in names]
    return Layout(
        names,
        tuple(places),
        tuple(n + m + np.flatnonzero(np.asarray(about) == name) for name in names),
        n + np.arange(m),
        tuple(n + place % m for place in places),
        tuple(n + np.flatnonzero(np.asarray(harmless) == name) for name in dict.fromkeys(harmless)),
        n + m + len(about),
    )


def _some(prompts: Indices, count: int, rng: np.random.Generator) -> Indices:
    return rng.choice(prompts, min(count, len(prompts)), replace=False)


def observed(where: Layout, sizes: Sequence[int], draws: int, rng: np.random.Generator) -> Floats:
    """The true categories: random prompts of each, and of the shared baseline; contrasts `cones.shared`."""
    made = []
    for _ in range(draws):
        groups = [_some(one, size, rng) for one, size in zip(where.harmful, sizes, strict=True)]
        made.append(weigh([*groups, _some(where.harmless, sum(sizes), rng)], where.total))
    return np.stack(made)


def own(where: Layout, sizes: Sequence[int], draws: int, rng: np.random.Generator) -> Floats:
    """The pilot's variant: each category against other harmless prompts at the same places; contrasts `cones.apart`."""
    made = []
    for _ in range(draws):
        pairs = [
            np.stack([a, b])[:, rng.permutation(len(a))[:size]]
            for a, b, size in zip(where.harmful, where.beside, sizes, strict=True)
        ]
        made.append(weigh([*(a for a, _ in pairs), *(b for _, b in pairs)], where.total))
    return np.stack(made)


def permuted(where: Layout, sizes: Sequence[int], draws: int, rng: np.random.Generator) -> Floats:
    """Category labels permuted over the harmful prompts, so that no category differs; contrasts `cones.shared`."""
    pool, ends = np.concatenate(where.harmful), np.cumsum(sizes)
    made = []
    for _ in range(draws):
        groups = np.split(rng.permutation(pool)[: ends[-1]], ends[:-1])
        made.append(weigh([*groups, _some(where.harmless, sum(sizes), rng)], where.total))
    return np.stack(made)


def topics(where: Layout, sizes: Sequence[int], draws: int, rng: np.random.Generator) -> Floats:
    """No harm at all: some everyday topics in place of the categories, against all others; contrasts `cones.shared`.

    Where whole topics are taken, there are no more draws than choices of topics.
    """
    choices = list(itertools.combinations(range(len(where.everyday)), len(sizes)))
    order = rng.permutation(len(choices))
    whole = all(size >= len(one) for one in where.everyday for size in sizes)
    made = []
    for draw in range(min(draws, len(choices)) if whole else draws):
        which = choices[order[draw % len(choices)]]
        groups = [_some(where.everyday[topic], size, rng) for topic, size in zip(which, sizes, strict=True)]
        rest = np.concatenate([one for topic, one in enumerate(where.everyday) if topic not in which])
        made.append(weigh([*groups, _some(rest, sum(sizes), rng)], where.total))
    return np.stack(made)


def topics_allow(where: Layout, sizes: Sequence[int]) -> bool:
    """Whether the everyday topics are enough, and large enough, for `topics` at these sizes."""
    return len(where.everyday) >= 2 * len(sizes) and max(sizes) <= min(len(one) for one in where.everyday)


def planted(where: Layout, sizes: Sequence[int], draws: int, rng: np.random.Generator) -> Floats:
    """One shared direction in harmless prompts' noise; contrasts `cones.planting`.

    Means of harmless prompts drawn with replacement differ by noise and nothing else. To each of their differences, the
    one between all harmful and all harmless prompts is added, which are the last two groups.
    """
    whole = weigh([np.concatenate(where.harmful), where.harmless], where.total)
    made = []
    for _ in range(draws):
        noise = weigh([rng.choice(where.harmless, size) for size in [*sizes, sum(sizes)]], where.total)
        made.append(np.concatenate([noise, whole]))
    return np.stack(made)


def bootstrap(groups: Sequence[Indices], total: int, draws: int, rng: np.random.Generator) -> Floats:
    """Each group's prompts drawn anew with replacement."""
    return np.stack([weigh([rng.choice(group, len(group)) for group in groups], total) for _ in range(draws)])
