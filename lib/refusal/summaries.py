"""Every number and table of the paper as strings, ready to print; notebooks take their prose from the same place."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from refusal import (
    __version__,
    calibration,
    collapse,
    cone_words,
    directions,
    hierarchy,
    hierarchy_order,
    hierarchy_words,
    judging,
    records,
    specificity,
    statistics,
    sweeps,
    validation,
    window_words,
)
from refusal.analyses import (
    LABELS,
    auroc_by_layer,
    by_count,
    by_layer,
    comparisons,
    effect,
    in_words,
    plan,
    rates,
    screen_means,
    seed_rule_rates,
    selected_layer,
    sign_verdict,
    study_file,
    study_table,
)
from refusal.files import CompendiumError
from refusal.wording import (
    detectable,
    p_equals,
    p_value,
    people,
    percent,
    points,
    rated,
    source_format,
    source_name,
    span,
)

DEFAULT_MODEL = "qwen2.5-coder-0.5b"
SETS = {
    "harmful_evaluation": "harmful requests",
    "harmful_study": "study's layout",
    "harmless_evaluation": "harmless requests",
    "user": "your prompts",
}
# The modules that say in numbers and words what the record of a notebook holds; 01 and 03 are below.
REPORTS = {
    "00_can_we_trust_the_labels": (validation, calibration),
    "02_orthogonal_controls": (specificity,),
    "04_llama_threshold": (collapse,),
    "05_polyhedral_cones": (cone_words,),
    "06_layer_sweep": (sweeps,),
    "07_therapeutic_window": (window_words,),
    "08_robustness_hierarchy": (hierarchy_words,),
}
HEADLINES = {
    "SelectedLayer": "selected layer",
    "RefusalBaseline": "refusal of harmful requests, %",
    "RefusalPlus": "refusal of harmful requests at alpha = +1, %",
    "RefusalMinus": "refusal of harmful requests at alpha = -1, %",
    "DegenerationBaseline": "degeneration, %",
    "DegenerationPlus": "degeneration at alpha = +1, %",
    "DegenerationMinus": "degeneration at alpha = -1, %",
    "SignPlusHolm": "p of the rise at +1 (McNemar exact, Holm)",
    "SignMinusHolm": "p of the fall at -1 (McNemar exact, Holm)",
    "StudyLayoutPlusP": "p at +1, study's layout (cluster flips)",
    "StudyLayoutMinusP": "p at -1, study's layout (cluster flips)",
    "HarmlessBaseline": "refusal of harmless requests, %",
    "HarmlessPlus": "refusal of harmless requests at alpha = +1, %",
    "SignVerdict": "verdict on sign inversion",
    **{name: words for modules in REPORTS.values() for module in modules for name, words in module.HEADLINES.items()},
}
FIGURES = {
    "fig_labels": "00_can_we_trust_the_labels",
    "fig_calibration": "00_can_we_trust_the_labels",
    "fig_layers": "01_extraction",
    "fig_prompts": "01_extraction",
    "fig_cosine": "01_extraction",
    "fig_controls": "02_orthogonal_controls",
    "fig_controls_rates": "02_orthogonal_controls",
    "fig_sign": "03_sign_inversion",
    "fig_study": "03_sign_inversion",
    "fig_threshold": "04_llama_threshold",
    "fig_threshold_random": "04_llama_threshold",
    "fig_threshold_study": "04_llama_threshold",
    "fig_cones": "05_polyhedral_cones",
    "fig_cones_counts": "05_polyhedral_cones",
    "fig_cones_layers": "05_polyhedral_cones",
    "fig_sweep": "06_layer_sweep",
    "fig_sweep_prediction": "06_layer_sweep",
    "fig_window": "07_therapeutic_window",
    "fig_window_pilot": "07_therapeutic_window",
    "fig_window_defence": "07_therapeutic_window",
    "fig_window_formats": "07_therapeutic_window",
    "fig_hierarchy": "08_robustness_hierarchy",
    "fig_specification": "08_robustness_hierarchy",
}
ENOUGH_COSINE = 0.95


@dataclass(frozen=True)
class _Records:
    first: pd.DataFrame
    metrics: pd.DataFrame
    sign: pd.DataFrame
    about_first: Mapping[str, Any]
    about: Mapping[str, Any]


def _read(root: Path, model: str) -> _Records:
    first, metrics = (root / model / f"01_extraction{tail}.parquet" for tail in ("", ".metrics"))
    frame, about_first = records.read(first)
    sign, about = records.read(root / model / "03_sign_inversion.parquet")
    return _Records(frame, records.read(metrics)[0], sign, about_first, about)


def extraction_numbers(metrics: pd.DataFrame, about: Mapping[str, Any]) -> dict[str, str]:
    """Formatted numbers of notebook 01, by macro name."""
    rule, n_layers = plan()["direction"]["layer_rule"], int(about["facts"]["layers"])
    layer = selected_layer(metrics, n_layers)
    at = {m: by_layer(metrics, m).set_index("layer").loc[layer]
          for m in ("d_prime", "raw_norm", "residual_norm", "split_half_cosine")}  # fmt: skip
    auroc = auroc_by_layer(metrics, about).set_index("layer")
    best = int(auroc["value"].idxmax())
    screen = screen_means(metrics).set_index(["layer", "alpha"])
    screened = {"Baseline": screen.loc[(-1, 0.0)], "Plus": screen.loc[(layer, 1.0)], "Minus": screen.loc[(layer, -1.0)]}
    pairs = int(study_file()["extraction_pairs"].iloc[0])
    few = {m: by_count(metrics, m, layer).set_index("prompts") for m in ("auroc", "cosine_to_full")}
    enough = few["cosine_to_full"].index[few["cosine_to_full"]["value"] >= ENOUGH_COSINE]
    candidates = directions.candidate_layers(n_layers)
    gram = metrics[metrics["metric"] == "layer_cosine"]
    neighbours = [float(gram[(gram["direction_id"] == f"extracted@{i}") & (gram["layer"] == i + 1)]["value"].iloc[0])
                  for i in candidates[:-1]]  # fmt: skip

    def interval(row: "pd.Series[Any]", digits: int) -> str:
        return span(statistics.Interval(row["low"], row["high"]), 1, digits)

    halves = metrics[(metrics["metric"] == "split_half_cosine") & (metrics["direction_id"] == "extracted")]
    return {
        "LayerLow": f"{100 * rule['low']:.0f}",
        "LayerHigh": f"{100 * rule['high']:.0f}",
        "SelectedLayer": str(layer),
        "SelectedDepth": f"{100 * layer / n_layers:.0f}",
        "RawNorm": f"{at['raw_norm']['value']:.2f}",
        "RawNormRelative": percent(at["raw_norm"]["value"] / at["residual_norm"]["value"]),
        "RawNormInterval": interval(at["raw_norm"], 2),
        "SelectedAuroc": f"{auroc.loc[layer, 'value']:.3f}",
        "SelectedAurocInterval": interval(auroc.loc[layer], 3),
        "SelectedDprime": f"{at['d_prime']['value']:.1f}",
        "SelectedDprimeInterval": interval(at["d_prime"], 1),
        "SplitHalfDraws": str(halves["draw"].nunique()),
        "SplitHalf": f"{at['split_half_cosine']['value']:.3f}",
        "SplitHalfInterval": interval(at["split_half_cosine"], 3),
        **{f"Screen{name}": f"{row['value']:+.1f}" for name, row in screened.items()},
        **{f"Screen{name}Interval": interval(row, 1) for name, row in screened.items()},
        "BestAuroc": f"{auroc.loc[best, 'value']:.3f}",
        "BestAurocInterval": interval(auroc.loc[best], 3),
        "BestLayer": str(best),
        "PairsStudy": str(pairs),
        "PairsStudyAuroc": f"{few['auroc'].loc[pairs, 'value']:.3f}",
        "PairsStudyAurocInterval": interval(few["auroc"].loc[pairs], 3),
        "PairsStudyCosine": f"{few['cosine_to_full'].loc[pairs, 'value']:.2f}",
        "PairsStudyCosineInterval": interval(few["cosine_to_full"].loc[pairs], 2),
        "EnoughCosine": f"{ENOUGH_COSINE:.2f}",
        "EnoughPrompts": str(enough[0]) if len(enough) else "more than measured",
        "AdjacentCosine": f"{np.median(neighbours):.2f}",
    }


def sign_numbers(frame: pd.DataFrame) -> dict[str, str]:
    """Formatted numbers of notebook 03, by macro name."""
    shares, tests = rates(frame), comparisons(frame)
    steered = tests["first"].to_dict()
    lookup = shares.set_index(["prompt_set", "condition", "label"])
    names = {"Baseline": "baseline", "Plus": steered["plus"], "Minus": steered["minus"]}
    numbers: dict[str, str] = {}

    def note(macro: str, row: "pd.Series[Any]") -> None:
        numbers.update(rated(macro, row["rate"], row["low"], row["high"]))

    seed = seed_rule_rates(frame).set_index("condition")
    for tail, condition in names.items():
        note(f"Refusal{tail}", lookup.loc[("harmful_evaluation", condition, "refusal")])
        note(f"Degeneration{tail}", lookup.loc[("harmful_evaluation", condition, "degenerate")])
        note(f"StudyLayout{tail}", lookup.loc[("harmful_study", condition, "refusal")])
        note(f"Harmless{tail}", lookup.loc[("harmless_evaluation", condition, "refusal")])
        note(f"SeedRule{tail}", seed.loc[condition])
    note("ComplianceMinus", lookup.loc[("harmful_evaluation", names["Minus"], "compliance")])
    kinds = frame[frame["prompt_set"] == "harmless_evaluation"]
    look = kinds["category"] == "lookalike"
    for macro, part in (("Lookalike", look), ("Everyday", ~look)):
        table = rates(kinds[part]).set_index(["condition", "label"])
        note(f"{macro}Plus", table.loc[(names["Plus"], "refusal")])
    for name, row in tests.loc[["plus", "minus"]].iterrows():
        sign = f"Sign{str(name).capitalize()}"
        numbers |= {f"{sign}Difference": points(row["difference"]),
                    f"{sign}Interval": span(statistics.Interval(row["low"], row["high"])),
                    f"{sign}Gained": str(row["gained"]),
                    f"{sign}Lost": str(row["lost"]), f"{sign}P": p_value(row["p"]),
                    f"{sign}MidP": p_value(row["p_mid"]),
                    f"{sign}Holm": p_value(row["p_holm"]), f"{sign}Effect": effect(row)}  # fmt: skip
    base = lookup.loc[("harmful_study", "baseline", "refusal")]
    verdict = sign_verdict(tests, shares)
    return numbers | {
        "SignFamily": str(len(tests)),
        "SignVerdict": verdict,
        "SignRule": in_words(plan()["03_sign_inversion"]["verdict"], "replicated"),
        "SignConclusion": _conclusion(numbers, verdict),
        "PowerSentence": _power(lookup.loc[("harmful_evaluation", "baseline", "refusal")]),
        "StudyLayoutPlusP": p_value(tests.loc["study_plus", "p"]),
        "StudyLayoutMinusP": p_value(tests.loc["study_minus", "p"]),
        "StudyLayoutSmallestP": p_value(2.0 ** (1 - int(base["clusters"]))),
        "StudyLayoutEffective": f"{base['effective_n']:.0f}",
        "HarmlessPlusEffect": effect(tests.loc["harmless_plus"]),
        "HarmlessPlusP": p_value(tests.loc["harmless_plus", "p"]),
    }


def sign_prose(frame: pd.DataFrame) -> str:
    """What notebook 03 says in words, from its record (the plan's sets, or the user's own prompts)."""
    tests, shares = comparisons(frame), rates(frame)
    lines = []
    for _, row in tests.iterrows():
        part = shares[(shares["prompt_set"] == row["prompt_set"]) & (shares["label"] == "refusal")]
        share = part.set_index("condition")["rate"]
        lines.append(
            f"- **{SETS[row['prompt_set']]}, {row['first']}**: refusal {effect(row)}, from "
            f"{percent(share[row['second']])} to {percent(share[row['first']])} % ({points(row['difference'])} points, "
            f"{span(statistics.Interval(row['low'], row['high']))}; {row['gained']} prompts gained, "
            f"{row['lost']} lost; "
            f"n = {row['n']} prompts in {row['clusters']} clusters; {p_equals(row['p'])}, "
            f"Holm {p_value(row['p_holm'])})."
        )
    broken = shares[shares["label"] == "degenerate"]
    worst = broken.loc[broken["rate"].idxmax()]
    lines.append(
        f"- Degenerate completions: at most {percent(worst['rate'])} % ({SETS[worst['prompt_set']]}, "
        f"{worst['condition']})."
    )
    base = shares[(shares["prompt_set"] == tests.loc["plus", "prompt_set"]) & (shares["condition"] == "baseline")]
    lines.append(f"- {_power(base[base['label'] == 'refusal'].iloc[0])}")
    rule = in_words(plan()["03_sign_inversion"]["verdict"], "replicated")
    lines.append(f"\n**Verdict by the plan's rule: {sign_verdict(tests, shares)}.** The rule: {rule}.")
    return "\n".join(lines)


def _conclusion(numbers: Mapping[str, str], verdict: str) -> str:
    both = (
        f"refusal of harmful requests {numbers['SignPlusEffect']} when the direction was added (from "
        f"{numbers['RefusalBaseline']} to {numbers['RefusalPlus']} %) and {numbers['SignMinusEffect']} when it was "
        f"subtracted (to {numbers['RefusalMinus']} %)"
    )
    return {
        "replicated": f"The sign is as published, and as expected: {both}.",
        "contradicted": f"The sign is not as published: {both}.",
        "inconclusive": f"The measurement does not settle the sign: {both}.",
    }[verdict]


def _power(base: "pd.Series[Any]") -> str:
    return detectable(
        int(base["n"]),
        float(base["rate"]),
        "With {n} prompts, a change of {points} points or more would be found with a probability of 80 % (if the "
        "answers to a prompt under two conditions were independent, which is cautious).",
        "With {n} prompts, no change of this rate would be found with a probability of 80 %.",
    )


def study_numbers() -> dict[str, str]:
    """Formatted numbers of the study's own table, by macro name."""
    table = study_table().set_index(["model", "condition"])
    numbers: dict[str, str] = {}
    for name, model in {"Mistral": "mistral-7b-v0.3", "Qwen": "qwen2-7b"}.items():
        numbers[f"Study{name}Name"] = source_name(model)
        for tail, condition in {"Baseline": "baseline", "Plus": "standard_plus", "Minus": "standard_minus",
                                "Inverted": "inverted_plus"}.items():  # fmt: skip
            numbers[f"Study{name}{tail}"] = f"{100 * table.loc[(model, condition), 'rate']:.0f}"
    plus, minus = table.loc[("mistral-7b-v0.3", "standard_plus")], table.loc[("qwen2-7b", "standard_minus")]
    base = table.loc[("mistral-7b-v0.3", "baseline")]
    again = [table.loc[("mistral-7b-v0.3", name)] for name in ("standard_minus", "inverted_plus")]
    redraw = statistics.two_proportions(again[0]["k"], again[0]["n"], again[1]["k"], again[1]["n"])[1]
    return numbers | {
        "StudyAlpha": f"{plus['alpha']:.0f}",
        "StudyN": str(plus["n"]),
        "StudyClusters": str(plus["clusters"]),
        "StudyMistralPlusZ": f"{plus['z']:.3f}",
        "StudyMistralPlusFisher": f"{plus['fisher']:.3f}",
        "StudyMistralPlusPower": f"{100 * statistics.power_two_proportions(base['rate'], plus['rate'], plus['n']):.0f}",
        "StudyQwenMinusZ": f"{minus['z']:.3f}",
        "StudyQwenMinusFisher": f"{minus['fisher']:.4f}",
        "StudyRedrawFisher": f"{redraw:.2f}",
    }


def _setup_numbers(data: _Records, model: str) -> dict[str, str]:
    def count(frame: pd.DataFrame, name: str) -> str:
        return str(frame[frame["prompt_set"] == name]["prompt_id"].nunique())

    study = data.sign[data.sign["prompt_set"] == "harmful_study"]
    screened = data.metrics[(data.metrics["experiment"] == "screen") & (data.metrics["metric"] == "log_odds")]
    return {
        "ModelName": people(model),
        "ModelDtype": data.about["facts"]["dtype"],
        "ModelBlocks": str(data.about["facts"]["layers"]),
        "ModelWidth": str(data.about["facts"]["width"]),
        "SourceFormat": source_format(model),
        "NewTokens": str(data.about["parameters"]["max_new_tokens"]),
        "PromptsExtraction": count(data.first, "harmful_extraction"),
        "PromptsSelection": str(screened[screened["prompt_id"].str.startswith("harmful")]["prompt_id"].nunique()),
        "PromptsEvaluation": count(data.sign, "harmful_evaluation"),
        "PromptsHarmless": count(data.sign, "harmless_evaluation"),
        "StudyBases": str(study["cluster"].nunique()),
        "StudyPrefixes": str(study["prompt_id"].nunique() // max(study["cluster"].nunique(), 1)),
        "StudyPrompts": count(data.sign, "harmful_study"),
        "CalibrationCompletions": str(data.about_first["thresholds"]["n"]),
        "ThresholdPercentile": str(plan()["labels"]["threshold_percentile"]),
        "RepetitionLeast": f"{judging.LEAST_REPETITION:.2f}",
        "ConfidenceLevel": f"{100 * plan()['confidence']:.0f}",
        "LibraryVersion": __version__,
    }


def numbers(root: Path, model: str) -> dict[str, str]:
    """Every number of the paper, by macro name, ready to print.

    Args:
        root: The folder with a folder of records for each model.
        model: Registry id.

    Raises:
        CompendiumError: A record is missing or damaged, or 01 and 03 were made with different weights.
    """
    data = _read(root, model)
    if data.about["facts"]["weights_sha256"] != data.about_first["facts"]["weights_sha256"]:
        raise CompendiumError(f"the records of {model} in {root} come from different weights: measure both again.")
    extraction = extraction_numbers(data.metrics, data.about_first)
    made = _setup_numbers(data, model) | extraction | sign_numbers(data.sign) | study_numbers()
    for notebook in REPORTS:
        if (root / model / f"{notebook}.parquet").exists():  # a model may have been measured by some notebooks only
            made |= report(root, model, notebook)
    return made


def report(root: Path, model: str, notebook: str) -> dict[str, str]:
    """The numbers of one notebook of `REPORTS`, by macro name, from a model's record of it."""
    frame, about = records.read(root / model / f"{notebook}.parquet")
    metrics, _ = records.read(root / model / f"{notebook}.metrics.parquet")
    made: dict[str, str] = {}
    for module in REPORTS[notebook]:
        others = {"root": root} if module is hierarchy_words else {}  # it reads this model's other records too
        made |= module.numbers(frame, metrics, about, **others)
    return made


def sign_table(shares: pd.DataFrame) -> pd.DataFrame:
    """Rates by prompt set and condition, as strings."""
    rows = []
    for (prompt_set, condition), part in shares.groupby(["prompt_set", "condition"], sort=False):
        cells = {row.label: f"{percent(row.rate)} {span(statistics.Interval(row.low, row.high))}"
                 for row in part.itertuples()}  # fmt: skip
        size = f"{part['n'].iloc[0]} ({part['clusters'].iloc[0]})"
        rows.append([SETS.get(str(prompt_set), str(prompt_set)), condition, size, *(cells[label] for label in LABELS)])
    return pd.DataFrame(rows, columns=["prompts", "condition", "n (clusters)", *(f"{label}, %" for label in LABELS)])


def tests_table(tests: pd.DataFrame) -> pd.DataFrame:
    """The plan's comparisons, as strings."""
    rows = [
        [SETS[row.prompt_set], row.first, f"{points(row.difference)} {span(statistics.Interval(row.low, row.high))}",
         *(p_value(p) for p in (row.p, row.p_mid, row.p_holm, row.z, row.fisher))]
        for row in tests.itertuples()
    ]  # fmt: skip
    columns = ["prompts", "condition", "change, points", "exact p", "mid-p", "Holm p", "z", "Fisher"]
    return pd.DataFrame(rows, columns=columns)


def setup_table(data: _Records, model: str) -> pd.DataFrame:
    """What was measured on, as strings."""
    facts, limits = data.about["facts"], data.about["thresholds"]
    extraction = extraction_numbers(data.metrics, data.about_first)
    values = {
        "model": people(model),
        "source format of the weights": source_format(model),
        "weights, sha256": facts["weights_sha256"][:12],
        "chat template, sha256": facts["template_sha256"][:12],
        "dtype": facts["dtype"],
        "stop tokens": ", ".join(facts["stop_tokens"]),
        "layer": extraction["SelectedLayer"],
        "raw norm": extraction["RawNorm"],
        "repetition above which a text is a loop": f"{limits['repetition']:.3f}",
        "NLL per token above which it is incoherent": f"{limits['nll']:.2f}",
        "rows a batch": str(data.about["rows"]),
        **{f"prompts {name}, sha256": digest[:12] for name, digest in data.about["prompts"].items()},
        **dict(data.about["packages"]),
    }
    return pd.DataFrame({"quantity": list(values), "value": list(values.values())})


def tables(root: Path, model: str) -> dict[str, pd.DataFrame]:
    """The paper's tables, as strings: hierarchy (models side by side), pairs (of models), sign, tests and setup."""
    data = _read(root, model)
    folders = hierarchy.sources(root, model)
    return {
        "hierarchy": hierarchy_words.shown(hierarchy.side_by_side(folders), list(folders)),
        "pairs": hierarchy_words.pairs(hierarchy_order.compared(folders)),
        "sign": sign_table(rates(data.sign)),
        "tests": tests_table(comparisons(data.sign)),
        "setup": setup_table(data, model),
    }
