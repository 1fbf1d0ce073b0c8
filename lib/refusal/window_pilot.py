"""The pilot's own doses: its published table, and where they lie on our curves (methods, section 8).

The pilot is Failure-First's first experiment with steering vectors (report 183): one vector at eight layers at once,
and a therapeutic window that it calls narrow. Whether its alpha multiplies a unit vector or the raw mean difference is
not published, so both readings are shown.
"""

import functools

import numpy as np
import pandas as pd

from refusal import statistics
from refusal.files import ROOT
from refusal.statistics import Interval
from refusal.window_answers import Answers
from refusal.wording import people, percent, span

READINGS = {"difference": "multiples of the raw mean difference", "unit": "multiples of a unit vector"}


@functools.cache
def counts() -> pd.DataFrame:
    """The published counts by alpha, as the data file has them, with rates and Wilson intervals of both.

    Returns:
        The file's columns; `refused_rate, refused_low, refused_high` and the same of `coherent`.
    """
    table = pd.read_csv(ROOT / "data" / "study_window.csv")
    for what, n in (("refused", "n"), ("coherent", "n_coherent")):
        ends = [statistics.wilson(k, total) for k, total in zip(table[what], table[n], strict=True)]
        table[f"{what}_rate"] = table[what] / table[n]
        table[f"{what}_low"], table[f"{what}_high"] = [one.low for one in ends], [one.high for one in ends]
    return table


def readings(of: Answers) -> pd.DataFrame:
    """Where the pilot's doses lie on our curves, under either reading of its alpha.

    Its model, prompts and judges were others, so only the place on our own curve is ours to say.

    Args:
        of: Our answers in the variant "many".

    Returns:
        A row for each reading and dose: `reading, pilot_alpha, alpha` (ours); `refused` (of harmful requests) and
        `coherent` (of all completions) there, on straight lines between our alphas; NaN outside of our grid.
    """
    doses = counts()["alpha"].to_numpy(float)
    size = {"difference": 1.0, "unit": 1 / of.units["alpha_absolute"]}
    curves = {"refused": of.harmful.mean(0), "coherent": 1 - of.broken.mean(0)}
    return pd.concat(
        [
            pd.DataFrame({"reading": reading, "pilot_alpha": doses, "alpha": doses * size[reading]}).assign(
                **{
                    column: np.interp(doses * size[reading], of.alphas, rate, left=np.nan, right=np.nan)
                    for column, rate in curves.items()
                }
            )
            for reading in READINGS
        ],
        ignore_index=True,
    )


def numbers(of: Answers) -> dict[str, str]:
    """Formatted numbers of the pilot's doses, by macro name.

    Args:
        of: Our answers in the variant "many".
    """
    table, ours = counts(), readings(of)
    base, other = table[table["alpha"] == 0].iloc[0], table[table["alpha"] != 0].iloc[0]
    layers = [int(layer) for layer in str(base["layers"]).split()]
    least = statistics.smallest_detectable_difference(int(base["n"]), float(base["refused_rate"]))
    values = {
        "Model": people(str(base["model"])),
        "Prompts": str(base["n"]),
        "Texts": str(base["n_coherent"]),
        "Layers": f"{layers[0]}–{layers[-1]}",
        "Doses": ", ".join(f"{alpha:g}" for alpha in table["alpha"]),
        "Coherent": _list(table["coherent_rate"]),
        "Refused": _list(table["refused_rate"]),
        "Base": percent(base["refused_rate"]),
        "BaseInterval": span(Interval(base["refused_low"], base["refused_high"])),
        "NoneInterval": span(Interval(other["refused_low"], other["refused_high"])),
        "Detectable": percent(least),
        "Largest": f"{table['alpha'].abs().max() / of.units['alpha_absolute']:.2f}",
    }
    for macro, reading in (("Difference", "difference"), ("Unit", "unit")):
        own = ours[ours["reading"] == reading]
        values |= {f"{macro}Coherent": _list(own["coherent"]), f"{macro}Refused": _list(own["refused"])}
    return {f"WindowPilot{name}": value for name, value in values.items()}


def _list(rates: "pd.Series[float]") -> str:
    return ", ".join("beyond our doses" if np.isnan(rate) else f"{round(100 * rate, 1):g}" for rate in rates)
