"""What the category directions do to the model: directions, swings as metric rows, conditions (methods, section 7).

Kept apart from `cone_effects`, which says what the rows mean: a change of wording there measures nothing anew.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from refusal import chunks, controls, directions, steering
from refusal.conditions import Condition
from refusal.control_screens import SIGNS
from refusal.directions import Directions
from refusal.files import CompendiumError
from refusal.models import Model

GENERATED_RANDOM = 2  # random directions with completions (analysis plan)
COMBINED_PROMPTS = 12  # a category, with completions under combinations (analysis plan)


def names(family: str, members: Sequence[str] | int) -> list[str]:
    """The ids of a family's directions, such as "category[weapons]" or "random[3]"."""
    return [f"{family}[{one}]" for one in (range(members) if isinstance(members, int) else members)]


def member_of(direction_id: str) -> str:
    """E.g. "weapons" of `category[weapons]`."""
    return direction_id.partition("[")[2].removesuffix("]")


def families(
    store: chunks.Store, sides: Sequence[pd.DataFrame], about: pd.DataFrame, counts: Mapping[str, int], seed: int
) -> dict[str, list[Directions]]:
    """The directions under test and beside it.

    Args:
        store: Gives the activations, measured once.
        sides: The harmful and the harmless extraction prompts.
        about: Harmless questions about the categories.
        counts: How many of "random" and "combination".
        seed: Draw i of a seed is always the same.

    Returns:
        "category": r_k, each at its own raw norm. "topic": t_k, from the questions. "rest": r_k without its part along
        t_k, as long as what is left. "random": Gaussian, at the mean raw norm of the categories. "combination": of the
        categories with weights |N(0, 1)|, at the same norm.
    """
    harmful, harmless, asked = (chunks.last_tokens(store, frame) for frame in (*sides, about))
    kinds = list(dict.fromkeys(sides[0]["category"]))
    own, topic = (
        [
            directions.extract(values[np.flatnonzero(frame["category"] == kind)], harmless, name)
            for kind, name in zip(kinds, names(family, kinds), strict=True)
        ]
        for family, values, frame in (("category", harmful, sides[0]), ("topic", asked, about))
    )
    base = replace(own[0], raw_norm=torch.stack([one.raw_norm for one in own]).mean(0))
    return {
        "category": own,
        "topic": topic,
        "rest": [without(r, t, name) for r, t, name in zip(own, topic, names("rest", kinds), strict=True)],
        "random": controls.random(base, counts["random"], seed=seed),
        "combination": combinations(own, base, weights(counts["combination"], len(own), seed)),
    }


def without(one: Directions, other: Directions, name: str) -> Directions:
    """A direction without its part along another, as long as what is left of it.

    Raises:
        CompendiumError: Nothing is left at some layer.
    """
    unit, along = one.unit.double(), other.unit.double()
    left = unit - (unit * along).sum(-1, keepdim=True) * along
    norm = left.norm(dim=-1)
    if not bool((norm > 1e-6).all()):
        raise CompendiumError(f"{one.id} lies along {other.id} at some layer, so that nothing is left of it.")
    return replace(one, id=name, unit=(left / norm[:, None]).float(), raw_norm=(one.raw_norm.double() * norm).float())


def weights(draws: int, count: int, seed: int) -> NDArray[np.float64]:
    """Weights `[draws, count]` of combinations: |N(0, 1)|, normed to sum 1, after Wollschlaeger et al. (2025)."""
    drawn = np.stack([np.abs(np.random.default_rng([seed, i]).standard_normal(count)) for i in range(draws)])
    return drawn / drawn.sum(1, keepdims=True)


def combinations(own: Sequence[Directions], base: Directions, shares: NDArray[np.float64]) -> list[Directions]:
    """Weighted sums of mean differences, at the norm of `base`."""
    vectors = torch.stack([one.raw_norm.double()[:, None] * one.unit.double() for one in own])
    made = []
    for name, share in zip(names("combination", len(shares)), shares, strict=True):
        mixed = torch.einsum("k,klw->lw", torch.from_numpy(share), vectors)
        made.append(replace(base, id=name, unit=torch.nn.functional.normalize(mixed, dim=-1).float()))
    return made


def screen(
    model: Model,
    prompts: pd.DataFrame,
    made: Mapping[str, Sequence[Directions]],
    layer: int,
    openings: Sequence[int],
) -> pd.DataFrame:
    """The screen of every direction at alpha = +1 and -1.

    Args:
        model: The model.
        prompts: Harmful prompts with categories.
        made: From `families`.
        layer: Where directions are added.
        openings: Token ids with which the model's refusals open.

    Returns:
        Metric rows: `swing` by prompt (log-odds at +1 minus those at -1); `log_odds` of the unsteered model by prompt;
        `mean_log_odds` at +1 and -1, whose `prompt_id` is a category; `raw_norm` of every direction.
    """
    everyone = [one for family in made.values() for one in family]
    conditions = [steering.baseline(), *(steering.add(one, layer, sign) for one in everyone for sign in SIGNS)]
    values = steering.screen(model, prompts["text"].tolist(), conditions, openings).double().numpy()
    ids, about = [one.id for one in everyone], prompts["prompt_id"].tolist()
    plus, minus = (pd.DataFrame(values[:, first::2], about, ids) for first in (1, 2))
    unsteered = {"metric": "log_odds", "operation": "none", "layer": -1, "prompt_id": about, "value": values[:, 0]}
    norms = [float(one.raw_norm[layer]) for one in everyone]
    length = {"metric": "raw_norm", "operation": "none", "layer": layer, "direction_id": ids, "value": norms}
    kinds = prompts["category"].tolist()
    parts = [pd.DataFrame(unsteered), pd.DataFrame(length), _long(plus - minus, "swing", 1.0, layer)]
    for sign, side in zip(SIGNS, (plus, minus), strict=True):
        parts.append(_long(side.groupby(kinds, sort=False).mean(), "mean_log_odds", sign, layer))
    return pd.concat(parts, ignore_index=True).fillna({"direction_id": "", "prompt_id": "", "alpha": 0.0})


def _long(wide: pd.DataFrame, metric: str, alpha: float, layer: int) -> pd.DataFrame:
    """Metric rows of a frame with prompts (or categories) in rows and directions in columns."""
    long = wide.rename_axis(index="prompt_id", columns="direction_id").stack().rename("value").reset_index()
    return long.assign(metric=metric, operation="add", alpha=alpha, layer=layer)


# ---- conditions with completions


def tried(
    store: chunks.Store | None,
    extracted: Directions,
    sides: Sequence[pd.DataFrame],
    about: pd.DataFrame,
    counts: Mapping[str, int],
    seed: int,
) -> dict[str, list[Directions]]:
    """The directions with completions, for `conditions` and `combined`.

    Args:
        store: None in a replay. That has no activations to make directions of, and compares the names of conditions
            with those of the record: the vectors are then all the extracted one's, and nothing may be measured by them.
        extracted: The direction of notebook 01.
        sides: As in `families`, like the rest.
        about: See there.
        counts: See there.
        seed: See there.
    """
    if store is not None:
        return families(store, sides, about, counts, seed)
    kinds = list(dict.fromkeys(sides[0]["category"]))
    ids = {"category": names("category", kinds), "random": names("random", counts["random"]),
           "combination": names("combination", counts["combination"])}  # fmt: skip
    return {family: [replace(extracted, id=name) for name in some] for family, some in ids.items()}


def conditions(made: Mapping[str, Sequence[Directions]], layer: int) -> list[Condition]:
    """The baseline; every category's direction and the first random ones, added, subtracted and ablated."""
    some = [*made["category"], *made["random"][:GENERATED_RANDOM]]
    added = [steering.add(one, layer, sign) for one in some for sign in SIGNS]
    return [steering.baseline(), *added, *(steering.ablate(one, layer) for one in some)]


def combined(made: Mapping[str, Sequence[Directions]], layer: int, count: int) -> list[Condition]:
    """The first combinations, added and subtracted: for `COMBINED_PROMPTS` prompts a category."""
    return [steering.add(one, layer, sign) for one in made["combination"][:count] for sign in SIGNS]
