"""The pilot's six cosines, and what follows from them and from nothing else (methods, section 7)."""

import functools

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import optimize

from refusal import cones
from refusal.cones import Floats
from refusal.files import ROOT

CATEGORIES = ("cyber", "fraud", "intrusion", "weapons")
RHOS = (0.0, 0.132, 0.4, 0.8, 0.95)
RANDOM_DRAWS, RANDOM_SEED = 400, 0


@functools.cache
def published() -> "pd.Series[float]":
    """What the pilot and its toolkit state, by name; the data file has the source of each."""
    return pd.read_csv(ROOT / "data" / "study_cones.csv").set_index("name")["value"]


def sizes(categories: tuple[str, ...]) -> list[int]:
    """The pilot's numbers of prompts for these categories, in their order."""
    return [int(published()[f"prompts_{category}"]) for category in categories]


def gram() -> Floats:
    """The matrix of the six published cosines, `[4, 4]`; they are absolute values."""
    made = np.eye(len(CATEGORIES))
    for i, j in zip(*np.triu_indices(len(CATEGORIES), 1), strict=True):
        made[i, j] = made[j, i] = published()[f"cosine_{CATEGORIES[i]}_{CATEGORIES[j]}"]
    return made


def solid_angle(cosine: Floats) -> float:
    """The toolkit's solid angle in sr: a cap around the mean direction, in three dimensions, whatever the width is."""
    to_mean = cosine.mean(-1) / np.sqrt(cosine.mean())
    return float(2 * np.pi * (1 - np.abs(to_mean).min()))


def equicorrelated(rho: float, count: int = len(CATEGORIES)) -> float:
    """The entropy rank of `count` directions with the same cosine between any two."""
    return float(cones.entropy_rank(np.full((count, count), rho) + (1 - rho) * np.eye(count)))


def equal_cosine(rank: float, count: int = len(CATEGORIES)) -> float:
    """The cosine at which equicorrelated directions have this entropy rank."""
    return float(optimize.brentq(lambda rho: equicorrelated(rho, count) - rank, 0.0, 1.0 - 1e-12))


def polyhedral(mean_abs_cosine: ArrayLike, rank: ArrayLike) -> np.ndarray:
    """What the toolkit calls polyhedral: a mean |cosine| below its limit, *or* an entropy rank above another."""
    limits = published()
    return (np.asarray(mean_abs_cosine) < limits["polyhedral_cosine"]) | (np.asarray(rank) > limits["polyhedral_rank"])


def linear_needs() -> float:
    """The cosine that equicorrelated directions need for what the toolkit calls linear."""
    return max(float(published()["linear_cosine"]), equal_cosine(float(published()["linear_rank"])))


@functools.cache
def random_directions() -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of the statistics of as many isotropic random directions of the pilot's width."""
    rng = np.random.default_rng(RANDOM_SEED)
    drawn = rng.standard_normal((RANDOM_DRAWS, len(CATEGORIES), int(published()["width"])))
    found = cones.statistics(drawn @ drawn.swapaxes(1, 2))
    return {name: (float(values.mean()), float(values.std(ddof=1))) for name, values in found.items()}


def table() -> pd.DataFrame:
    """What the six cosines give, beside what the pilot states: `statistic, published, from the six cosines`."""
    found, each = cones.statistics(gram()), cones.specificities(cones.cosines(gram()))
    stated = published()
    rows = [
        ("entropy rank (its dimensionality)", stated["rank_highest"], found["entropy_rank"]),
        ("mean |cosine|", stated["mean_cosine"], found["mean_abs_cosine"]),
        *(
            (f"specificity, {name}", stated[f"specificity_{name}"], one)
            for name, one in zip(CATEGORIES, each, strict=True)
        ),
        ("solid angle, sr", stated["solid_angle"], solid_angle(gram())),
        ("mean specificity (1 - mean |cosine|)", np.nan, each.mean()),
        ("participation ratio of eigenvalues", np.nan, found["participation"]),
        ("share of the top eigenvalue", np.nan, found["top_share"]),
    ]
    return pd.DataFrame(rows, columns=["statistic", "published", "from the six cosines"])


def equicorrelation_table() -> pd.DataFrame:
    """The entropy rank of four directions by their common cosine, and of more directions, to show what K does."""
    return pd.DataFrame(
        {f"K = {count}": [equicorrelated(rho, count) for rho in RHOS] for count in (4, 8)},
        index=pd.Index(RHOS, name="cosine of any two"),
    )


def numbers() -> dict[str, str]:
    """Formatted numbers of the pilot's claim, by macro name."""
    stated, found = published(), cones.statistics(gram())
    each, drawn = cones.specificities(cones.cosines(gram())), random_directions()
    counts = sorted(int(stated[name]) for name in stated.index if name.startswith("prompts_"))
    return {
        "ConesStudyRank": f"{found['entropy_rank']:.3f}",
        "ConesStudyCosine": f"{found['mean_abs_cosine']:.3f}",
        "ConesStudySpecificities": ", ".join(f"{one:.3f}" for one in each),
        "ConesStudyAngle": f"{solid_angle(gram()):.2f}",
        "ConesStudyPrompts": ", ".join(map(str, counts)),
        "ConesStudyHighest": f"{stated['rank_highest']:.2f}",
        "ConesStudyHighestLayer": f"{stated['rank_highest_layer']:.0f}",
        "ConesStudyLowest": f"{stated['rank_lowest']:.2f}",
        "ConesStudyLowestLayer": f"{stated['rank_lowest_layer']:.0f}",
        "ConesStudyHighestEqual": f"{equal_cosine(stated['rank_highest']):.2f}",
        "ConesStudyLowestEqual": f"{equal_cosine(stated['rank_lowest']):.2f}",
        "ConesStudyLinearNeeds": f"{linear_needs():.4f}",
        "ConesStudyWidth": f"{stated['width']:.0f}",
        "ConesStudyRandomRank": f"{drawn['entropy_rank'][0]:.3f}",
        "ConesStudyRandomCosine": f"{drawn['mean_abs_cosine'][0]:.3f}",
    }
