"""Contrastive directions: made from activations, profiled over layers, saved with a description of themselves."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.stats import rankdata

from refusal import __version__
from refusal.files import CompendiumError, atomic

PROMPT_COUNTS = (5, 8, 16, 32, 64, 128, 256)
SIGN = "mean(harmful) - mean(harmless)"
HOOK_POINT = "output of the decoder block"


@dataclass(frozen=True, eq=False)
class Directions:
    """One direction for each layer, all from the same prompts.

    Attributes:
        id: Name, e.g. "extracted".
        unit: float32 `[layers, width]`, rows of norm 1.
        raw_norm: float32 `[layers]`, the norm of the mean difference, in activation units.
        residual_norm: float32 `[layers]`, the mean norm of the activations themselves.
    """

    id: str
    unit: torch.Tensor
    raw_norm: torch.Tensor
    residual_norm: torch.Tensor


def mean_difference(harmful: torch.Tensor, harmless: torch.Tensor) -> torch.Tensor:
    """`mean(harmful) - mean(harmless)` (Arditi et al. 2024, section 2.3), summed in float64.

    Args:
        harmful: `[n, layers, width]`.
        harmless: `[m, layers, width]`.

    Returns:
        float64 `[layers, width]`, not normalised.
    """
    return harmful.double().mean(0) - harmless.double().mean(0)


def extract(harmful: torch.Tensor, harmless: torch.Tensor, name: str = "extracted") -> Directions:
    """The contrastive direction of every layer.

    Args:
        harmful: Last-token activations `[n, layers, width]`.
        harmless: The same of harmless prompts, `[m, layers, width]`.
        name: The direction's id.

    Raises:
        CompendiumError: Shapes that do not match, or two means that are equal.
    """
    if harmful.ndim != 3 or harmful.shape[1:] != harmless.shape[1:]:
        raise CompendiumError(
            f"activations of shape {tuple(harmful.shape)} and {tuple(harmless.shape)} give no direction: "
            "both must be [prompts, layers, width] of the same model."
        )
    difference = mean_difference(harmful, harmless)
    norm = difference.norm(dim=-1)
    if not bool((norm > 0).all()):
        raise CompendiumError("the two sets of activations have the same mean at some layer: use different prompts.")
    everything = torch.cat([harmful, harmless]).double()
    return Directions(
        name,
        (difference / norm[:, None]).float(),
        norm.float(),
        everything.norm(dim=-1).mean(0).float(),
    )


def candidate_layers(n_layers: int) -> list[int]:
    """The layers between 25 and 80 % of the depth, among which the layer rule chooses (analysis plan)."""
    return list(range(math.ceil(0.25 * n_layers), math.floor(0.80 * n_layers) + 1))


def select_layer(screen: pd.DataFrame, n_layers: int) -> int:
    """The layer rule: where the screen differs most between alpha = +1 and alpha = -1; ties go to the lower layer.

    Args:
        screen: Rows with `layer, alpha, value` (log-odds of a refusal opening on selection prompts).
        n_layers: Number of decoder blocks.
    """
    mean = screen.groupby(["layer", "alpha"])["value"].mean().unstack("alpha")
    gap = (mean[1.0] - mean[-1.0]).reindex(candidate_layers(n_layers)).dropna()
    if gap.empty:
        raise CompendiumError("the screen holds none of the layers between 25 and 80 % of the depth: measure it again.")
    return int(gap.index[int(gap.to_numpy().argmax())])


def profile(
    harmful: torch.Tensor,
    harmless: torch.Tensor,
    held_out_harmful: torch.Tensor,
    held_out_harmless: torch.Tensor,
    *,
    seed: int,
    halves: int = 200,
    draws: int = 50,
    bootstraps: int = 1000,
) -> pd.DataFrame:
    """What the direction looks like at every layer, and how much of it a small number of prompts would have shown.

    Held-out prompts give the separation: AUROC of the projection, and d' (difference of means over the pooled standard
    deviation), which goes on growing where AUROC saturates. Split halves give the reliability (analysis plan).

    Args:
        harmful: Extraction activations `[n, layers, width]`.
        harmless: The same, harmless, `[n, layers, width]`.
        held_out_harmful: Activations of prompts that had no part in the direction.
        held_out_harmless: The same, harmless.
        seed: Of the random halves, subsets and bootstrap draws.
        halves: Random splits for the split-half cosine.
        draws: Random subsets for each number of prompts.
        bootstraps: Resamples for the intervals of d' and raw_norm.

    Returns:
        Long frame `metric, direction_id, layer, draw, value`. A statistic's interval are rows of the same metric with
        `_low` and `_high`; a statistic from n prompts a side has direction_id `extracted[n]`.
    """
    rng = np.random.default_rng(seed)
    rows: list[pd.DataFrame] = []
    layers = np.arange(harmful.shape[1])

    def note(metric: str, values: np.ndarray, direction_id: str = "extracted", draw: int = 0) -> None:
        rows.append(
            pd.DataFrame(
                {"metric": metric, "direction_id": direction_id, "layer": layers, "draw": draw, "value": values}
            )
        )

    direction = extract(harmful, harmless)
    note("raw_norm", direction.raw_norm.numpy())
    note("residual_norm", direction.residual_norm.numpy())
    projections = _project(held_out_harmful, direction.unit), _project(held_out_harmless, direction.unit)
    note("auroc", _auroc(*projections))
    note("d_prime", _d_prime(*projections))

    boots = np.stack([_d_prime(*(p[rng.integers(0, len(p), len(p))] for p in projections)) for _ in range(bootstraps)])
    resampled = (rng.multinomial(len(x), np.full(len(x), 1 / len(x)), size=bootstraps) for x in (harmful, harmless))
    norms = _differences(harmful, harmless, *resampled).norm(dim=-1).numpy()
    for tail, share in (("low", 0.025), ("high", 0.975)):
        note(f"d_prime_{tail}", np.quantile(boots, share, axis=0))
        # Noise lengthens a mean difference, and resampling adds as much again: percentiles would lie above the truth,
        # and even above raw_norm. So they are reflected, as squares, because there the two lengths add up.
        squared = 2 * direction.raw_norm.numpy() ** 2 - np.quantile(norms**2, 1 - share, axis=0)
        note(f"raw_norm_{tail}", np.sqrt(np.maximum(squared, 0)))

    smaller = min(len(harmful), len(harmless))
    for draw, cosine in enumerate(_half_cosines(harmful, harmless, smaller // 2, halves, rng)):
        note("split_half_cosine", cosine, draw=draw)
    for count in [n for n in PROMPT_COUNTS if n <= smaller]:
        name, many = f"extracted[{count}]", draws if count < smaller else 1
        subsets = _differences(harmful, harmless, *(_subset(len(x), count, many, rng) for x in (harmful, harmless)))
        norms = subsets.norm(dim=-1)
        for draw, (norm, unit) in enumerate(zip(norms, (subsets / norms[..., None]).float(), strict=True)):
            some = _project(held_out_harmful, unit), _project(held_out_harmless, unit)
            note("auroc", _auroc(*some), name, draw)
            note("d_prime", _d_prime(*some), name, draw)
            note("raw_norm", norm.float().numpy(), name, draw)
            note("cosine_to_full", (unit * direction.unit).sum(-1).numpy(), name, draw)
        if 2 * count <= smaller:
            for draw, cosine in enumerate(_half_cosines(harmful, harmless, count, many, rng)):
                note("split_half_cosine", cosine, name, draw)
    gram = direction.unit @ direction.unit.T
    for layer in layers:
        note("layer_cosine", gram[layer].numpy(), f"extracted@{layer}")
    return pd.concat(rows, ignore_index=True)


def _subset(size: int, count: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Random subsets of `count` prompts, as rows of zeros and ones `[draws, size]`."""
    return (_orders(size, draws, rng) < count).astype(float)


def _orders(size: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Random orders of the prompts, `[draws, size]`."""
    return rng.permuted(np.tile(np.arange(size), (draws, 1)), axis=1)


def _differences(harmful: torch.Tensor, harmless: torch.Tensor, *weights: np.ndarray) -> torch.Tensor:
    """`mean_difference` of weighted prompts, float64 `[draws, layers, width]`: all draws in one product a side."""
    means = []
    for side, weight in zip((harmful, harmless), weights, strict=True):
        share = torch.from_numpy(weight / weight.sum(1, keepdims=True))
        means.append((share @ side.double().flatten(1)).unflatten(1, side.shape[1:]))
    return means[0] - means[1]


def _half_cosines(
    harmful: torch.Tensor, harmless: torch.Tensor, count: int, draws: int, rng: np.random.Generator
) -> np.ndarray:
    """Cosines `[draws, layers]` between the directions from two disjoint random sets of `count` prompts a side."""
    orders = [_orders(len(x), draws, rng) for x in (harmful, harmless)]
    first = _differences(harmful, harmless, *((order < count).astype(float) for order in orders))
    second = _differences(
        harmful, harmless, *(((count <= order) & (order < 2 * count)).astype(float) for order in orders)
    )
    return torch.nn.functional.cosine_similarity(first, second, dim=-1).numpy()


def _project(activations: torch.Tensor, unit: torch.Tensor) -> np.ndarray:
    return torch.einsum("nlw,lw->nl", activations, unit).numpy()


def _auroc(harmful: np.ndarray, harmless: np.ndarray) -> np.ndarray:
    """AUROC of every layer at once, from ranks (Mann and Whitney): scikit-learn takes a layer at a time."""
    n, m = len(harmful), len(harmless)
    ranks = rankdata(np.concatenate([harmful, harmless]), axis=0)[:n]
    return (ranks.sum(0) - n * (n + 1) / 2) / (n * m)


def _d_prime(harmful: np.ndarray, harmless: np.ndarray) -> np.ndarray:
    pooled = np.sqrt((harmful.var(0, ddof=1) + harmless.var(0, ddof=1)) / 2)
    return (harmful.mean(0) - harmless.mean(0)) / pooled


def save(directions: Directions, path: str | Path, *, layer: int, about: Mapping[str, str]) -> None:
    """Writes directions as safetensors that describe themselves.

    Args:
        directions: What to save.
        path: The file.
        layer: The layer that the rule selected.
        about: `model`, `weights_sha256`, `template_sha256`, `prompts_sha256`.
    """
    description = {
        "id": directions.id,
        "layer": str(layer),
        "position": "last token of the templated prompt",
        "hook_point": HOOK_POINT,
        "sign": SIGN,
        "library": __version__,
        **about,
    }
    tensors = {
        "unit": directions.unit.contiguous(),
        "raw_norm": directions.raw_norm.contiguous(),
        "residual_norm": directions.residual_norm.contiguous(),
    }
    with atomic(path) as temporary:
        # One JSON string: safetensors writes several keys in no fixed order, and the file must be reproducible.
        save_file(tensors, temporary, metadata={"refusal": json.dumps(description, sort_keys=True)})


def load(path: str | Path, *, expect: Mapping[str, str], shape: Sequence[int] | None = None) -> tuple[Directions, int]:
    """Reads directions and refuses those of another model.

    Args:
        path: The file.
        expect: Entries of the description that must agree, e.g. `model`, `weights_sha256`, `template_sha256`.
        shape: Expected (layers, width), where known.

    Returns:
        The directions, and the layer that the rule selected.

    Raises:
        CompendiumError: A missing or damaged file, another model, template, sign or shape.
    """
    path = Path(path)
    if not path.is_file():
        raise CompendiumError(f"no direction at {path}: run notebook 01_extraction for this model first.")
    try:
        with safe_open(path, framework="pt") as stream:
            about = json.loads(stream.metadata()["refusal"])
            unit, *norms = (stream.get_tensor(key) for key in ("unit", "raw_norm", "residual_norm"))
            name, layer = str(about["id"]), int(about["layer"])
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CompendiumError(f"{path} is cut short or no direction file: run notebook 01_extraction again.") from error
    for key, wanted in {"sign": SIGN, "hook_point": HOOK_POINT, **expect}.items():
        if about.get(key) != wanted:
            raise CompendiumError(
                f"{path} was made for {key} {about.get(key)!r}, not {wanted!r}: run notebook 01_extraction for it."
            )
    fits = unit.ndim == 2 and all(norm.shape == unit.shape[:1] for norm in norms) and 0 <= layer < len(unit)
    if not fits or (shape is not None and tuple(unit.shape) != tuple(shape)):
        raise CompendiumError(
            f"{path} holds directions of shape {tuple(unit.shape)}, but the model needs {tuple(shape or ())}: "
            "run notebook 01_extraction for this model."
        )
    return Directions(name, unit, *norms), layer
