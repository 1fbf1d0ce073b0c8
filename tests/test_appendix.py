"""The paper's appendices, from the committed records."""

import re

import pandas as pd
import pytest

from refusal import appendix, claims, records, summaries
from refusal.files import ROOT

RECORDS, MODEL = ROOT / "data" / "records", "qwen2.5-coder-0.5b"


def test_the_studys_signs_stand_as_published_and_ours_count_clusters():
    table = appendix.study_sign(RECORDS, [MODEL]).set_index("model")
    mistral, ours = (table.loc[name] for name in table.index if "Mistral" in name or "ours" in name)
    assert list(mistral) == [
        "15.0 [9.3, 23.3]",
        "6.0 [2.8, 12.5]; p = 0.038",
        "96.0 [90.2, 98.4]; p < 0.0001",
        "99.0 [94.6, 99.8]; p < 0.0001",
    ]
    frame, _ = records.read(RECORDS / MODEL / "03_sign_inversion.parquet")
    part = frame[(frame["prompt_set"] == "harmful_study") & (frame["condition"] == "extracted -1")]
    assert ours["standard −α"].startswith(f"{100 * (part['seed_rule'] == 'jailbreak').mean():.1f} [")
    low, high = map(float, re.search(r"\[(.*), (.*)\]", ours["baseline"]).groups())
    assert high - low > 30  # ten clusters tell far less than a hundred prompts, whose interval would be 20 wide
    assert ours["inverted +α"] == "as standard −α"


def test_the_studys_doses_stand_beside_ours_in_the_order_of_alpha():
    table = appendix.study_threshold(RECORDS, MODEL)
    published, ours = (table[table["model"].str.endswith(end)] for end in ("published", "ours"))
    assert dict(zip(published["α"], published["jailbreak, %"], strict=True))["10"] == "66.0 [52.2, 77.6]"
    alphas = ours["α"].astype(float)
    assert alphas.is_monotonic_increasing and alphas.min() < 0 < alphas.max()
    assert (ours["in mean norms"].astype(float) * alphas >= 0).all()
    ends = ours["compliance, %"].str.split(" ").str[0].astype(float)
    assert ends[alphas == 0].iloc[0] > ends.iloc[-1]  # adding the direction takes compliance away


def test_compute_adds_up():
    table = appendix.compute(RECORDS, [MODEL]).set_index("notebook").iloc[:, 0]
    minutes = table.drop("all").str.split(" ").str[0].astype(float).sum()
    assert float(table["all"].split(" ")[0]) == pytest.approx(minutes, abs=1)


def test_every_figure_of_the_library_has_its_command():
    table = appendix.figures()
    assert list(table["figure"]) == list(summaries.FIGURES)
    assert (table["command"].str[-2:] == table["notebook"].str[:2]).all()


def test_verdicts_are_grouped_by_model():
    first = claims.verdicts(RECORDS, MODEL)
    other = first.assign(verdict=first["verdict"].where(first["claim"] != "sign-inversion", "inconclusive"))
    made = appendix.across({MODEL: first, "smollm2-135m": other})
    verdict = first.set_index("claim").loc["sign-inversion", "verdict"]
    assert (
        made["AcrossSign"].startswith(f"{verdict} on Qwen2.5-Coder-0.5B")
        and "; inconclusive on Smol" in made["AcrossSign"]
    )
    assert " and " in made["AcrossSpecial"] and ";" not in made["AcrossSpecial"]
    assert set(made) == {*appendix.VERDICTS, "AcrossModels", "LedgerEvery"}


def test_claims_that_the_abstract_names_are_in_the_ledger():
    known = set(pd.Series([claim.id for claim in claims.claim_file.read().claims]))
    assert set(appendix.VERDICTS.values()) <= known
