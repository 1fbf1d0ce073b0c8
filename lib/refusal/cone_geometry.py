"""The geometry of the category directions at every layer, and its nulls, as metric rows (methods, section 7).

Kept apart from `cone_tables`, which says what the rows mean: a change of wording there measures nothing anew.

Rows, by `metric`:

- `gram`, `gram_unbiased`: inner products at each layer, direction_id "weapons|fraud"; "about weapons" is the direction
  from harmless questions. `reliability`: of each category's direction. `halves_cosine`: the mean cosine of the
  categories from random halves, which the unbiased one should equal.
- `<statistic>_low`, `_high` of direction_id "bootstrap": 95 % intervals; of a pair at the selected layer: `cosine_low`.
- `<statistic>_low`, `_median`, `_high` of "permuted[64]" and the like: the central 95 % of a family's draws, at so many
  prompts a category, or at the pilot's; `polyhedral`: the share of draws that the pilot's toolkit calls so.
  `<statistic>` alone, with `draw`: the draws that a p value needs.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from refusal import chunks, cone_designs, cone_study, cones
from refusal.cone_designs import Layout
from refusal.cones import Floats
from refusal.files import CompendiumError

ABOUT = "about "
FAMILIES = ("observed", "own", "permuted", "topics", "planted", "random")  # a place is part of a seed: append
NULLS = ("permuted", "topics", "planted")  # with prompts; random has none
STUDY_LAYER = 2  # beside the selected layer: where the pilot found its highest rank
LEAST = 2  # prompts a category, without which there is no unbiased product
ENDS = (0.025, 0.975)


@dataclass(frozen=True)
class Counts:
    """How much is drawn (analysis plan): prompts a category, draws of a null, subsets, halves, resamples."""

    per_category: tuple[int, ...]
    draws: int
    subsamples: int
    splits: int
    bootstraps: int = 1000


def measure(
    store: chunks.Store, sides: Sequence[pd.DataFrame], about: pd.DataFrame, layer: int, counts: Counts, seed: int
) -> pd.DataFrame:
    """All rows of the geometry.

    Args:
        store: Gives the activations, measured once.
        sides: The harmful and the harmless extraction prompts.
        about: Harmless questions about the categories.
        layer: The selected one.
        counts: How much is drawn.
        seed: Of everything random.
    """
    frames = [*sides, about]
    activations = np.concatenate([chunks.last_tokens(store, frame).numpy() for frame in frames])
    where = cone_designs.layout(*(frame["category"].tolist() for frame in frames))
    return rows(cones.kernel(activations), where, activations.shape[-1], layer, counts, seed)


def rows(inner: Floats, where: Layout, width: int, layer: int, counts: Counts, seed: int) -> pd.DataFrame:
    """The rows of `measure`, from the prompts' inner products.

    Raises:
        CompendiumError: Fewer than two prompts of some category.
    """
    least = min(len(one) for one in (*where.harmful, *where.about))
    if least < LEAST or len(where.harmless) < LEAST:
        raise CompendiumError(f"a category has {least} prompts, and its geometry needs {LEAST}: use more prompts.")
    parts = [
        pd.DataFrame({"metric": ["selected_layer"], "direction_id": "", "layer": layer, "draw": 0, "value": layer}),
        *_whole(inner, where, layer, counts, seed),
        *_random(len(where.categories), width, counts, seed),
    ]
    full = min(len(one) for one in where.harmful)
    numbers = sorted({n for n in counts.per_category if n <= full} | {full})
    for family in FAMILIES[:-1]:
        fitting = [n for n in numbers if family != "topics" or cone_designs.topics_allow(where, _equal(where, n))]
        for n in fitting:
            every = n == fitting[-1]  # the most prompts: at all layers
            parts += _family(inner, where, family, _equal(where, n), str(n), layer, every, counts, seed)
        studied = _studied(where)
        if studied and (family != "topics" or cone_designs.topics_allow(where, studied)):
            parts += _family(inner, where, family, studied, "pilot", layer, False, counts, seed)
    return pd.concat(parts, ignore_index=True)


def _equal(where: Layout, n: int) -> list[int]:
    return [n] * len(where.categories)


def _studied(where: Layout) -> list[int]:
    """The pilot's numbers of prompts, where these are its categories and there are as many."""
    known = all(f"prompts_{category}" in cone_study.published().index for category in where.categories)
    wanted = cone_study.sizes(where.categories) if known else []
    return wanted if all(size <= len(one) for size, one in zip(wanted, where.harmful, strict=False)) else []


def _note(metric: str, direction_id: str, layers: Iterable[int], values: Floats) -> pd.DataFrame:
    """Rows of values `[layers]`, or `[draws, layers]`."""
    every = np.atleast_2d(values)
    draw, layer = np.indices(every.shape)
    return pd.DataFrame(
        {"metric": metric, "direction_id": direction_id, "layer": np.array(list(layers))[layer.ravel()],
         "draw": draw.ravel(), "value": every.ravel()}
    )  # fmt: skip


def _quantiles(values: Floats, shares: Sequence[float]) -> Floats:
    """Over the draws `[draws, ...]` that have a value; NaN where none has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of those
        return np.nanquantile(values, shares, axis=0)


# ---- all prompts: Gram matrices, reliability, intervals


def _whole(inner: Floats, where: Layout, layer: int, counts: Counts, seed: int) -> list[pd.DataFrame]:
    k, layers, rng = len(where.categories), range(len(inner)), np.random.default_rng([seed, 0])
    names = [*where.categories, *(f"{ABOUT}{category}" for category in where.categories)]
    groups = [*where.harmful, *where.about, where.harmless]
    plain, unbiased = (
        cones.gram(one[0], cones.shared(2 * k)) for one in cones.products(inner, cones.weigh(groups, where.total)[None])
    )
    parts = [
        _note(metric, f"{names[i]}|{names[j]}", layers, gram[:, i, j])
        for metric, gram in (("gram", plain), ("gram_unbiased", unbiased))
        for i in range(2 * k)
        for j in range(i, 2 * k)
    ]
    split = [*where.harmful, where.harmless]
    reliability, across = cones.split_half(inner, cones.halves(split, where.total, counts.splits, rng), cones.shared(k))
    parts += [_note("reliability", name, layers, reliability[:, i]) for i, name in enumerate(where.categories)]
    parts.append(_note("halves_cosine", "halves", layers, cones.pairs(cones.cosines(across)).mean(-1)))
    drawn, drawn_unbiased = (
        cones.gram(one, cones.shared(2 * k))
        for one in cones.products(inner, cone_designs.bootstrap(groups, where.total, counts.bootstraps, rng))
    )
    return parts + _intervals(plain, unbiased, drawn, drawn_unbiased, where.categories, layer)


def _intervals(
    gram: Floats, unbiased: Floats, drawn: Floats, drawn_unbiased: Floats, categories: Sequence[str], layer: int
) -> list[pd.DataFrame]:
    """Bootstrap intervals of every statistic at every layer, and of the unbiased cosines at the selected one.

    Noise biases the plain statistics, and resampling as much again, so their percentiles are reflected. The unbiased
    ones leave out a prompt's products with itself in every resample, and need no reflection.
    """
    k, layers = len(categories), range(len(gram))
    parts: list[pd.DataFrame] = []

    def note(metric: str, direction_id: str, where: Iterable[int], low: Floats, high: Floats) -> None:
        for end, values in (("low", low), ("high", high)):
            parts.append(_note(f"{metric}_{end}", direction_id, where, values))

    plain = cones.statistics(gram[:, :k, :k])
    for name, values in cones.statistics(drawn[:, :, :k, :k]).items():
        low, high = _quantiles(values, ENDS)
        least, most = cones.bounds(name, k)
        note(name, "bootstrap", layers, *np.clip([2 * plain[name] - high, 2 * plain[name] - low], least, most))
    for name, values in derived(drawn_unbiased).items():
        note(name, "bootstrap", layers, *_quantiles(values, ENDS))
    cosine = cones.cosines(drawn_unbiased[:, layer])
    for i, name in enumerate(categories):
        others = [*range(i + 1, k), k + i]
        for j in others:
            other = categories[j] if j < k else f"{ABOUT}{name}"
            note("cosine", f"{name}|{other}", [layer], *_quantiles(cosine[:, i, j], ENDS))
    return parts


def derived(unbiased: Floats) -> dict[str, Floats]:
    """Statistics `[...]` of unbiased Gram matrices `[..., 2K, 2K]`, the K categories before the K topics.

    Returns:
        `unbiased_cosine`, `unbiased_participation` of the categories; `about_cosine`, the mean cosine of the topics;
        `topic_cosine`, the mean cosine of a category with its topic; `matched_cosine`, that of the categories where
        each has the questions about it as its baseline, which takes the topic out.
    """
    k = unbiased.shape[-1] // 2
    own, topic, between = unbiased[..., :k, :k], unbiased[..., k:, k:], unbiased[..., :k, k:]
    matched = own + topic - between - np.swapaxes(between, -1, -2)
    together = np.diagonal(cones.cosines(unbiased)[..., :k, k:], axis1=-2, axis2=-1)
    return {
        **cones.unbiased_statistics(own),
        "about_cosine": cones.pairs(cones.cosines(topic)).mean(-1),
        "matched_cosine": cones.pairs(cones.cosines(matched)).mean(-1),
        "topic_cosine": together.mean(-1),
    }


# ---- draws of a family


def _family(
    inner: Floats,
    where: Layout,
    family: str,
    sizes: Sequence[int],
    named: str,
    layer: int,
    every: bool,
    counts: Counts,
    seed: int,
) -> list[pd.DataFrame]:
    """Bands of a family, at all layers or at two; where at all, the draws at the selected layer too."""
    layers = range(len(inner)) if every else sorted({min(STUDY_LAYER, len(inner) - 1), layer})
    few, k = inner[list(layers)], len(sizes)
    size = 0 if named == "pilot" else int(named)
    rng = np.random.default_rng([seed, 1 + FAMILIES.index(family), size])
    whole = named == str(min(len(one) for one in where.harmful))
    draws = counts.draws if family in NULLS else 1 if whole else counts.subsamples
    weights = getattr(cone_designs, family)(where, sizes, draws, rng)
    contrasts, drawn = cones.shared(k), None
    if family == "own":
        contrasts = cones.apart(k)
    if family == "planted":  # its noise is drawn with replacement, and what is planted is not noise
        contrasts, drawn = cones.planting(k, _strength(few, where)), [*sizes, sum(sizes), np.inf, np.inf]
    plain, unbiased = (cones.gram(one, contrasts) for one in cones.products(few, weights, drawn))
    found = cones.statistics(plain) | cones.unbiased_statistics(unbiased)
    name = f"{family}[{named}]"
    parts = _bands(name, layers, found)
    if every and family in NULLS:
        for metric, values in found.items():
            kept = list(layers) if (family, metric) == ("permuted", "entropy_rank") else [layer]  # all, for the trend
            parts.append(_note(metric, name, kept, values[:, kept]))
    return parts


def _strength(inner: Floats, where: Layout) -> Floats:
    """At each layer, the factor by which noise makes the difference of all harmful and harmless prompts too long."""
    both = cones.weigh([np.concatenate(where.harmful), where.harmless], where.total)[None]
    plain, unbiased = (cones.gram(one, cones.shared(1))[0, :, 0, 0] for one in cones.products(inner, both))
    return np.sqrt(np.divide(np.maximum(unbiased, 0), plain, out=np.zeros_like(plain), where=plain > 0))


def _bands(name: str, layers: Iterable[int], found: Mapping[str, Floats]) -> list[pd.DataFrame]:
    parts = []
    for metric, values in found.items():
        low, median, high = _quantiles(values, (ENDS[0], 0.5, ENDS[1]))
        for end, one in (("low", low), ("median", median), ("high", high)):
            parts.append(_note(f"{metric}_{end}", name, layers, one))
    called = cone_study.polyhedral(found["mean_abs_cosine"], found["entropy_rank"]).mean(0)
    return [*parts, _note("polyhedral", name, layers, called)]


def _random(k: int, width: int, counts: Counts, seed: int) -> list[pd.DataFrame]:
    """Isotropic random directions, the same at every layer (-1) and for any number of prompts."""
    drawn = np.random.default_rng([seed, 1 + FAMILIES.index("random"), 0]).standard_normal((counts.draws, k, width))
    found = {name: values[:, None] for name, values in cones.statistics(drawn @ drawn.swapaxes(1, 2)).items()}
    draws = [_note(metric, "random", [-1], values) for metric, values in found.items()]
    return _bands("random", [-1], found) + draws
