"""What control directions do at the first generated token, as metric rows (methods, section 3).

Kept apart from `specificity`, which says what the rows mean: a change of wording there measures nothing anew.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from refusal import chunks, controls, steering
from refusal.conditions import MAX_ALPHA, Condition
from refusal.directions import Directions
from refusal.models import Model

FAMILIES = ("random", "orthogonal", "shuffled", "topics")  # those that the plan compares
MATCHED = ("random", "shuffled", "topics")  # in many dimensions, orthogonal is random once more
SIGNS = (1.0, -1.0)
BY_PROMPT = ("", "extracted", "random")  # of these, values are kept prompt by prompt; of all, means
LIMIT = 2.0  # largest alpha_relative at which KL is matched
TOLERANCE = 0.05  # of the match, relative to the target


def family_of(direction_id: str) -> str:
    """The family of a draw, e.g. "random" of `random[3]`."""
    return direction_id.partition("[")[0]


def draw_of(direction_id: str) -> int:
    """The number of a draw, e.g. 3 of `random[3]`; 0 for the extracted direction."""
    return int(direction_id.partition("[")[2].rstrip("]") or 0)


def families(
    store: chunks.Store,
    extracted: Directions,
    sides: Sequence[pd.DataFrame],
    counts: Mapping[str, int],
    seed: int,
) -> dict[str, list[Directions]]:
    """Control directions of several families.

    Args:
        store: Gives the activations of the extraction prompts, measured once.
        extracted: The direction of these prompts.
        sides: The harmful and the harmless extraction prompts; the categories of the latter are the topics.
        counts: Draws of each family that is wanted.
        seed: Draw i of a seed is always the same.
    """
    harmful, harmless = (chunks.last_tokens(store, frame) for frame in sides)
    make = {
        "random": lambda n: controls.random(extracted, n, seed=seed),
        "orthogonal": lambda n: controls.orthogonal(extracted, n, seed=seed),
        "shuffled": lambda n: controls.shuffled(extracted, harmful, harmless, n, seed=seed),
        "balanced": lambda n: controls.shuffled(extracted, harmful, harmless, n, seed=seed, balanced=True),
        "topics": lambda n: controls.topics(extracted, harmless, sides[1]["category"].tolist(), n, seed=seed),
    }
    return {family: make[family](n) for family, n in counts.items()}


def _all(made: Mapping[str, Sequence[Directions]]) -> list[Directions]:
    return [one for family in made.values() for one in family]


def screen(
    model: Model,
    prompts: pd.DataFrame,
    extracted: Directions,
    made: Mapping[str, Sequence[Directions]],
    layer: int,
    openings: Sequence[int],
) -> pd.DataFrame:
    """The screen of every direction at alpha = +1 and -1, all at the norm of the extracted one.

    Args:
        model: The model.
        prompts: One or more prompt sets.
        extracted: The direction under test.
        made: From `families`.
        layer: Where directions are added.
        openings: Token ids with which the model's refusals open.

    Returns:
        Metric rows. `mean_log_odds` is the mean over a prompt set, whose name stands in `prompt_id`; `log_odds` is a
        prompt's own, for the baseline, the extracted direction and the random ones; `cosine` is a draw's with the
        extracted direction at this layer.
    """
    directions = [extracted, *_all(made)]
    conditions = [steering.baseline(), *(steering.add(one, layer, sign) for one in directions for sign in SIGNS)]
    values = steering.screen(model, prompts["text"].tolist(), conditions, openings)
    cosines = pd.DataFrame(
        {
            "metric": "cosine",
            "direction_id": one.id,
            "layer": layer,
            "draw": draw_of(one.id),
            "value": float(one.unit[layer].double() @ extracted.unit[layer].double()),
        }
        for one in directions[1:]
    )
    return pd.concat([_rows(prompts, conditions, values, layer), cosines], ignore_index=True)


def ablation(
    model: Model,
    prompts: pd.DataFrame,
    extracted: Directions,
    made: Mapping[str, Sequence[Directions]],
    layer: int,
    openings: Sequence[int],
) -> pd.DataFrame:
    """The screen where this layer's direction is ablated everywhere, one direction at a time; rows as in `screen`."""
    conditions = [steering.ablate(one, layer) for one in [extracted, *_all(made)]]
    return _rows(prompts, conditions, steering.screen(model, prompts["text"].tolist(), conditions, openings), layer)


def _rows(prompts: pd.DataFrame, conditions: Sequence[Condition], values: torch.Tensor, layer: int) -> pd.DataFrame:
    """Metric rows of values `[prompts, conditions]`."""
    about = pd.DataFrame(
        {
            "operation": condition.operation,
            "direction_id": condition.direction_id,
            "layer": -1 if condition.vectors is None else layer,
            "alpha": condition.alpha,
            "draw": draw_of(condition.direction_id),
        }
        for condition in conditions
    )
    table = pd.DataFrame(values.double().numpy(), index=prompts["prompt_id"].tolist())
    means = table.groupby(prompts["prompt_set"].tolist(), sort=False).mean()
    own = table[[i for i, one in enumerate(conditions) if family_of(one.direction_id) in BY_PROMPT]]
    parts = []
    for metric, part in (("mean_log_odds", means), ("log_odds", own)):
        long = part.rename_axis(index="prompt_id", columns="condition").stack().rename("value").reset_index()
        parts.append(long.assign(metric=metric).join(about, on="condition").drop(columns="condition"))
    return pd.concat(parts, ignore_index=True)


def first_token_kl(model: Model, texts: Sequence[str], conditions: Sequence[Condition]) -> torch.Tensor:
    """KL(unsteered || steered) of the first generated token, in nats.

    Args:
        model: The model.
        texts: n prompts, without chat template.
        conditions: m conditions.

    Returns:
        float32 `[n, m]`.
    """
    kept: dict[int, torch.Tensor] = {}

    def keep(logits: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        kept.update(zip(prompts.tolist(), logits.log_softmax(-1), strict=True))
        return torch.zeros(len(logits), device=logits.device)

    def divergence(logits: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        unsteered = torch.stack([kept[prompt] for prompt in prompts.tolist()])
        # A token that the unsteered model excludes adds nothing, also where the steered one excludes it too.
        terms = unsteered.exp() * (unsteered - logits.log_softmax(-1))
        return terms.masked_fill(unsteered == -torch.inf, 0.0).sum(-1).clamp(min=0.0)

    steering.first_token(model, texts, [steering.baseline()], keep, "unsteered")
    return steering.first_token(model, texts, conditions, divergence, "KL")


def equal_kl(
    model: Model,
    matching: pd.DataFrame,
    prompts: pd.DataFrame,
    extracted: Directions,
    made: Mapping[str, Sequence[Directions]],
    layer: int,
    openings: Sequence[int],
) -> pd.DataFrame:
    """The screen of controls that are scaled until they disturb the first token as much as the extracted direction.

    Args:
        model: The model.
        matching: Prompts over which KL is averaged.
        prompts: One prompt set for the screen.
        extracted: The direction under test, at alpha = +1 and -1.
        made: From `families`.
        layer: Where directions are added.
        openings: Token ids with which the model's refusals open.

    Returns:
        Metric rows. `kl` is the mean KL at alpha = +1 and -1, for all directions; `matched_kl` and `mean_log_odds` are
        a draw's at its own alpha. A draw that does not reach the KL has the largest alpha tried, and no log-odds.
    """
    draws, texts = _all(made), matching["text"].tolist()
    entries = [(one, sign) for sign in SIGNS for one in draws]

    def conditions(which: Sequence[int], scales: NDArray[np.float64]) -> list[Condition]:
        chosen = [entries[i] for i in which]
        return [steering.add(one, layer, float(s * scale)) for (one, s), scale in zip(chosen, scales, strict=True)]

    def kl_of(scales: NDArray[np.float64], which: NDArray[np.int64]) -> NDArray[np.float64]:
        return first_token_kl(model, texts, conditions(which.tolist(), scales)).double().mean(0).numpy()

    own = [steering.add(extracted, layer, sign) for sign in SIGNS]
    everyone = [*own, *conditions(range(len(entries)), np.ones(len(entries)))]
    at_norm = first_token_kl(model, texts, everyone).double().mean(0).numpy()
    target = at_norm[: len(own)].repeat(len(draws))
    limit = min(LIMIT * float(extracted.residual_norm[layer] / extracted.raw_norm[layer]), MAX_ALPHA)
    # KL grows about as the square of a small scale, so what it is at scale 1 says where to start.
    start = np.minimum(np.sqrt(target / np.maximum(at_norm[len(own) :], 1e-12)), limit)
    found = controls.match_kl(kl_of, target, start, limit, TOLERANCE)
    scales = np.where(found.reached, found.scale, limit)
    reached = np.flatnonzero(found.reached)
    screened = [steering.baseline(), *conditions(reached.tolist(), scales[reached])]
    log_odds = np.full(len(entries), np.nan)
    values = steering.screen(model, prompts["text"].tolist(), screened, openings).double().mean(0).numpy()
    log_odds[reached] = values[1:]
    (screened_set,), (matching_set,) = prompts["prompt_set"].unique(), matching["prompt_set"].unique()
    ids, signs = [one.id for one, _ in entries], np.array([sign for _, sign in entries])
    parts = [
        pd.DataFrame({"metric": "kl", "direction_id": [extracted.id] * len(own) + ids, "value": at_norm,
                      "alpha": np.concatenate([SIGNS, signs]), "prompt_id": matching_set}),
        pd.DataFrame({"metric": "matched_kl", "direction_id": ids, "value": found.kl, "alpha": signs * scales,
                      "prompt_id": matching_set}),
        pd.DataFrame({"metric": "mean_log_odds", "direction_id": ids, "value": log_odds, "alpha": signs * scales,
                      "prompt_id": screened_set}),
    ]  # fmt: skip
    rows = pd.concat(parts, ignore_index=True).assign(operation="add", layer=layer)
    return rows.assign(draw=rows["direction_id"].map(draw_of))


def generated_conditions(
    store: chunks.Store | None,
    extracted: Directions,
    sides: Sequence[pd.DataFrame],
    layer: int,
    draws: int,
    seed: int,
) -> list[Condition]:
    """What completions are generated under: baseline, the extracted direction, and the first draws of each family.

    Every direction is added at alpha = +1 and -1; the extracted one and the first draw of each family are ablated too.

    Args:
        store: None in a replay. That has no activations to make controls of, and compares the names of conditions with
            those of the record: the vectors are then all the extracted one's, and nothing may be measured with them.
        extracted: The direction under test.
        sides: The harmful and the harmless extraction prompts.
        layer: Where directions are added.
        draws: Of each family.
        seed: That of the screen, so that the draws are the same.
    """
    if store is None:
        made = {family: [replace(extracted, id=f"{family}[{i}]") for i in range(draws)] for family in FAMILIES}
    else:
        made = families(store, extracted, sides, dict.fromkeys(FAMILIES, draws), seed)
    added = [steering.add(one, layer, sign) for one in [extracted, *_all(made)] for sign in SIGNS]
    ablated = [steering.ablate(one, layer) for one in [extracted, *(family[0] for family in made.values())]]
    return [steering.baseline(), *added, *ablated]
