"""Cones: the geometry of several directions (methods, section 7). Arrays only, no model.

Inner products of mean differences follow from those of the prompts, so that a resample, a permutation or a subset is
nothing but other weights on the prompts. Every statistic but the unbiased ones is a function of one Gram matrix; those
are functions of a second one, corrected for noise. None is evidence beside another from the same matrix.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
STATISTICS = ("entropy_rank", "participation", "top_share", "mean_abs_cosine", "mean_cosine")


# ---- inner products


def kernel(activations: ArrayLike) -> Floats:
    """Inner products of prompts, float64 `[layers, n, n]`.

    They are taken about the mean of all prompts, which contrasts do not see, and without which they lose no digits.

    Args:
        activations: `[n, layers, width]`.
    """
    values = np.asarray(activations)
    made = np.empty((values.shape[1], len(values), len(values)))
    for layer in range(len(made)):
        one = values[:, layer].astype(np.float64)
        one -= one.mean(0)
        made[layer] = one @ one.T
    return made


def weigh(groups: Sequence[ArrayLike], total: int) -> Floats:
    """Weights of the means of several groups of prompts, `[groups, total]`; a prompt may occur more than once.

    Args:
        groups: Numbers of prompts, each group with one or more.
        total: Prompts in all.
    """
    members = [np.asarray(group, dtype=np.int64) for group in groups]
    return np.stack([np.bincount(group, minlength=total) / len(group) for group in members])


def products(inner: Floats, weights: Floats, sizes: Sequence[float] | None = None) -> tuple[Floats, Floats]:
    """Inner products between the means of groups, plain and unbiased, each `[draws, layers, groups, groups]`.

    A mean's product with itself holds its own noise, which makes directions from few prompts look unlike each other.
    The unbiased one leaves out every prompt's product with itself: it is the mean over all ways of splitting the group
    in halves of the product between the halves' means. NaN for a group of one prompt.

    Args:
        inner: From `kernel`.
        weights: `[draws, groups, n]`, of groups that share no prompt.
        sizes: Where groups are independent draws with replacement, how many each holds, inf for one that is taken as it
            is; a prompt that is drawn twice then counts as two. None: all of a group's prompts are different, or are
            not to count as different.
    """
    plain = np.empty((len(weights), len(inner), weights.shape[1], weights.shape[1]))
    own = np.empty(plain.shape[:-1])
    each = None if sizes is None else np.asarray(sizes, dtype=float)
    squares = weights**2 if each is None else weights / each[:, None]
    for layer, one in enumerate(inner):
        plain[:, layer] = (weights.reshape(-1, weights.shape[-1]) @ one).reshape(weights.shape) @ weights.swapaxes(1, 2)
        own[:, layer] = squares @ one.diagonal()
    diagonal = np.einsum("dlgg->dlg", plain)
    left = 1 - (squares.sum(-1) if each is None else np.broadcast_to(1 / each, squares.shape[:-1]))
    left = np.repeat(left[:, None], len(inner), axis=1)
    unbiased = plain.copy()
    corrected = np.divide(diagonal - own, left, out=np.full_like(own, np.nan), where=left > 1e-12)
    np.einsum("dlgg->dlg", unbiased)[...] = corrected
    return plain, unbiased


def gram(products: Floats, contrasts: Floats) -> Floats:
    """The Gram matrix `[..., K, K]` of K differences of means.

    Args:
        products: Of `products`, `[..., groups, groups]`.
        contrasts: `[K, groups]`, from `shared`, `apart` or `planting`; a layer's own where there is a dimension more.
    """
    return contrasts @ products @ np.swapaxes(contrasts, -1, -2)


def shared(count: int) -> Floats:
    """Contrasts of `count` groups against one more, the baseline of all."""
    return np.concatenate([np.eye(count), -np.ones((count, 1))], axis=1)


def apart(count: int) -> Floats:
    """Contrasts of `count` groups, each against a baseline of its own."""
    return np.concatenate([np.eye(count), -np.eye(count)], axis=1)


def planting(count: int, strength: Floats) -> Floats:
    """`shared`, with the difference of two more groups planted into each contrast, `[layers, count, count + 3]`.

    Args:
        count: Contrasts.
        strength: Of what is planted, one a layer.
    """
    planted = np.asarray(strength)[:, None, None] * np.ones((1, count, 1))
    return np.concatenate(
        [np.broadcast_to(shared(count), (len(planted), count, count + 1)), planted, -planted], axis=-1
    )


# ---- statistics of a Gram matrix


def cosines(gram: Floats) -> Floats:
    """Signed cosines `[..., K, K]`; NaN where a squared norm is not positive, as an unbiased one may be."""
    squared = np.diagonal(gram, axis1=-2, axis2=-1)
    norm = np.sqrt(np.where(squared > 0, squared, np.nan))
    return gram / (norm[..., :, None] * norm[..., None, :])


def pairs(matrix: Floats) -> Floats:
    """The entries above the diagonal, `[..., K (K - 1) / 2]`: 12, 13, ... 23, ..."""
    above = np.triu_indices(matrix.shape[-1], 1)
    return matrix[..., above[0], above[1]]


def entropy_rank(cosine: Floats) -> Floats:
    """exp(H(sigma / sum sigma)) of unit vectors' singular values, from their cosines: the pilot's dimension."""
    singular = np.sqrt(np.linalg.eigvalsh(cosine).clip(min=0))
    share = singular / singular.sum(-1, keepdims=True)
    return np.exp(-special.xlogy(share, share).sum(-1))


def participation(cosine: Floats) -> Floats:
    """Participation ratio of the eigenvalues, (sum)^2 / sum of squares: K for orthogonal directions, 1 for a single."""
    return cosine.shape[-1] ** 2 / (cosine**2).sum((-2, -1))


def top_share(cosine: Floats) -> Floats:
    """The share of the largest eigenvalue: 1 / K for orthogonal directions, 1 for a single one."""
    return np.linalg.eigvalsh(cosine)[..., -1] / cosine.shape[-1]


def specificities(cosine: Floats) -> Floats:
    """The pilot's specificity of each direction, `[..., K]`: 1 - mean |cos| to the others."""
    others = cosine.shape[-1] - 1
    return 1 - (np.abs(cosine).sum(-1) - 1) / others


def statistics(gram: Floats) -> dict[str, Floats]:
    """All of `STATISTICS`, each `[...]`, of Gram matrices `[..., K, K]`."""
    cosine = cosines(gram)
    return {
        "entropy_rank": entropy_rank(cosine),
        "participation": participation(cosine),
        "top_share": top_share(cosine),
        "mean_abs_cosine": np.abs(pairs(cosine)).mean(-1),
        "mean_cosine": pairs(cosine).mean(-1),
    }


def bounds(statistic: str, count: int) -> tuple[float, float]:
    """The least and the largest value that one of `STATISTICS` can have, of `count` directions."""
    if statistic in ("entropy_rank", "participation"):
        return 1.0, float(count)
    return {"top_share": 1 / count, "mean_abs_cosine": 0.0, "mean_cosine": -1 / (count - 1)}[statistic], 1.0


def unbiased_statistics(gram: Floats) -> dict[str, Floats]:
    """Of unbiased Gram matrices: the mean cosine, and the participation ratio, a number of directions."""
    cosine = cosines(gram)
    return {"unbiased_cosine": pairs(cosine).mean(-1), "unbiased_participation": participation(cosine)}


def trend(values: Floats) -> Floats:
    """Spearman's correlation of values `[..., layers]` with the layer; NaN where all are equal."""
    ranks = stats.rankdata(values, axis=-1)
    ranks -= ranks.mean(-1, keepdims=True)
    layer = np.arange(values.shape[-1]) - (values.shape[-1] - 1) / 2
    size = np.sqrt((ranks**2).sum(-1) * (layer**2).sum())
    return np.divide((ranks * layer).sum(-1), size, out=np.full_like(size, np.nan), where=size > 0)


# ---- reliability


def halves(groups: Sequence[ArrayLike], total: int, splits: int, rng: np.random.Generator) -> Floats:
    """Weights of the groups' random halves, `[splits, 2 groups, total]`: all first halves, then all second ones."""
    made = []
    for _ in range(splits):
        orders = [rng.permutation(np.asarray(group)) for group in groups]
        sides = [[order[: len(order) // 2] for order in orders], [order[len(order) // 2 :] for order in orders]]
        made.append(np.concatenate([weigh(side, total) for side in sides]))
    return np.stack(made)


def split_half(inner: Floats, weights: Floats, contrasts: Floats) -> tuple[Floats, Floats]:
    """How reliable each direction is, `[layers, K]`, and the Gram matrix between halves, `[layers, K, K]`.

    Reliability is the mean cosine between the directions from two halves of all prompts, carried to the whole by
    Spearman and Brown's formula. The Gram matrix is the mean over the splits of first halves against second ones: it
    has no noise in common on its two sides, and approaches the unbiased one of `products` as splits are added.

    Args:
        inner: From `kernel`.
        weights: From `halves`.
        contrasts: `[K, groups]`.
    """
    count, groups = contrasts.shape
    both = np.zeros((2 * count, 2 * groups))
    both[:count, :groups] = both[count:, groups:] = contrasts
    whole = gram(products(inner, weights)[0], both)
    across = whole[..., :count, count:]
    own = np.sqrt(np.diagonal(whole, axis1=-2, axis2=-1))
    half = (np.diagonal(across, axis1=-2, axis2=-1) / (own[..., :count] * own[..., count:])).mean(0)
    return 2 * half / (1 + half), (across + across.swapaxes(-1, -2)).mean(0) / 2


def disattenuated(cosine: Floats, reliability: Floats) -> Floats:
    """Cosines `[..., K, K]` corrected for attenuation, cos / sqrt(rel_j rel_k); NaN where one has no reliability.

    This undoes what noise takes off a cosine. What a shared baseline's noise adds to it stays, unlike in the unbiased.
    """
    root = np.sqrt(np.where(reliability > 0, reliability, np.nan))
    made = cosine / (root[..., :, None] * root[..., None, :])
    np.einsum("...kk->...k", made)[...] = 1.0
    return made
