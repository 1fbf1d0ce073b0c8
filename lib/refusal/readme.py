"""The README's table of results and its ledger of claims, from the committed records, so that no number is typed."""

from collections.abc import Sequence
from pathlib import Path

from refusal import claims, options, summaries
from refusal.files import CompendiumError, atomic

BEGIN, END = "<!-- results: written by ./run_all.sh --publish -->", "<!-- /results -->"
CLAIMS_BEGIN, CLAIMS_END = "<!-- claims: written by ./run_all.sh --publish -->", "<!-- /claims -->"
ROWS = (
    ("agreement of our labels with readers (kappa: 1 is perfect, 0 is chance), on text that was not used for writing "
     "the rules: this model's; all models'",
     "{LabelsKappaOwn}; {LabelsKappa} {LabelsKappaInterval} (the study's rule {LabelsSeedKappa})", "00"),
    ("AUROC of held-out harmful and harmless prompts",
     "{SelectedAuroc} {SelectedAurocInterval} at layer {SelectedLayer}", "01"),
    ("cosine of a direction from {PairsStudy} pairs with the one from all prompts",
     "{PairsStudyCosine} {PairsStudyCosineInterval}", "01"),
    ("swing of the log-odds of a refusal from −1 to +1, beside {ControlsDraws} random directions",
     "{ControlsSwing} {ControlsSwingInterval}; z = {ControlsRandomZ}, rank p {ControlsRandomP}", "02"),
    ("is the direction special, by the plan's rule", "**{ControlsVerdict}**", "02"),
    ("refusal of harmful requests, unsteered", "{RefusalBaseline} % {RefusalBaselineInterval}", "03"),
    ("… one mean difference added", "{RefusalPlus} % {RefusalPlusInterval}, Holm p {SignPlusHolm}", "03"),
    ("… one mean difference subtracted", "{RefusalMinus} % {RefusalMinusInterval}, Holm p {SignMinusHolm}", "03"),
    ("degenerate completions at 0, +1, −1", "{DegenerationBaseline}, {DegenerationPlus}, {DegenerationMinus} %", "03"),
    ("refusal on the study's 10 x 10 layout at 0, +1, −1",
     "{StudyLayoutBaseline}, {StudyLayoutPlus}, {StudyLayoutMinus} %, cluster p {StudyLayoutPlusP} and "
     "{StudyLayoutMinusP}",
     "03"),
    ("refusal of *harmless* requests at 0, +1", "{HarmlessBaseline}, {HarmlessPlus} %", "03"),
    ("sign inversion, by the plan's rule", "**{SignVerdict}**", "03"),
    ("collapse of safety at a threshold, regardless of direction, by the plan's rule", "**{ThresholdVerdict}**", "04"),
    ("a separate direction for each kind of harm, by the plan's rule", "**{ConesVerdict}**", "05"),
    ("own minus other categories' directions, log-odds of a refusal",
     "{ConesContrast} {ConesContrastInterval}, Holm p {ConesHolm}", "05"),
    ("rank correlation of the screen with the generated refusal rate, {SweepConfirmed} cells",
     "{SweepCorrelation} {SweepCorrelationInterval}", "06"),
    ("no useful window of doses exists (many layers; one layer), by the plan's rule",
     "**{WindowVerdict}**; **{WindowOneVerdict}**", "07"),
    ("swing of compliance from +d to −d over {HierarchySpecs} choices of judge, dose, layer, position and prompts",
     "median {HierarchyMedian} points, {HierarchyAbove} % above zero, joint p {HierarchyJointP}: "
     "**{HierarchyCurveVerdict}**",
     "08"),
    ("a hierarchy of robustness between models, by the plan's rule", "**{HierarchyVerdict}**", "08"),
)  # fmt: skip


def table(records: Path, models: Sequence[str]) -> str:
    """The results table as Markdown, a column for each model.

    Args:
        records: The folder with a folder of records for each model.
        models: Registry ids. The first one's numbers, of draws or cells, are in the descriptions of the rows.
    """
    values = [summaries.numbers(records, model) for model in models]
    lines = [
        f"| measured | {' | '.join(one['ModelName'] for one in values)} | command |",
        f"| --- | {'--- | ' * len(values)}--- |",
    ]
    for what, result, notebook in ROWS:
        cells = [
            result.format(**one) if list((records / model).glob(f"{notebook}_*.parquet")) else "not measured yet"
            for model, one in zip(models, values, strict=True)
        ]
        lines.append(f"| {what.format(**values[0])} | {' | '.join(cells)} | `./run_all.sh --only {notebook}` |")
    return "\n".join(lines)


def ledger(records: Path) -> str:
    """The ledger of claims as Markdown, with the verdicts on all models that have records."""
    return claims.markdown(claims.all_verdicts(records, options.measured(records)))


def refresh(path: Path, records: Path) -> None:
    """Puts the table of results and the ledger, of all models with records, into a README, each between its markers.

    Raises:
        CompendiumError: The markers are missing.
    """
    text = path.read_text(encoding="utf-8")
    for begin, end in ((BEGIN, END), (CLAIMS_BEGIN, CLAIMS_END)):
        if text.count(begin) != 1 or text.count(end) != 1:
            raise CompendiumError(f"{path} must hold the lines {begin!r} and {end!r} once each.")
    parts = {(BEGIN, END): table(records, options.measured(records)), (CLAIMS_BEGIN, CLAIMS_END): ledger(records)}
    for (begin, end), made in parts.items():
        before, after = text.partition(begin)[0], text.partition(end)[2]
        text = f"{before}{begin}\n{made}\n{end}{after}"
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
