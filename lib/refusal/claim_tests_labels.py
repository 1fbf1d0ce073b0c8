"""Tests of claims about labels, intervals and the direction itself, from notebooks 00 and 01; rules in claims.yaml."""

from collections.abc import Sequence

import pandas as pd

from refusal import agreement, analyses, calibration, readers, summaries, validation
from refusal.analyses import plan
from refusal.claim_evidence import (
    Evidence,
    Finding,
    Record,
    by_all,
    by_interval,
    decide,
    finding,
)
from refusal.cone_prose import interval_of, number
from refusal.statistics import Interval
from refusal.wording import percent, span

LABELS, FIRST = "00_can_we_trust_the_labels", "01_extraction"


def _selected(record: Record) -> int:
    return analyses.selected_layer(record.metrics, int(record.about["facts"]["layers"]))


def few_pairs(evidence: Evidence) -> Finding:
    """Does the direction from the study's few pairs differ from that of all prompts?"""
    record, pairs = evidence.record(FIRST), int(analyses.study_file()["extraction_pairs"].iloc[0])
    table = analyses.by_count(record.metrics, "cosine_to_full", _selected(record)).set_index("prompts")
    row = table.loc[pairs]
    interval, enough = Interval(row["low"], row["high"]), summaries.ENOUGH_COSINE
    said = f"cosine {row['value']:.2f} {span(interval, 1, 2)} from {pairs} prompts a side (enough: {enough})"
    return finding(
        by_interval(interval, enough, "below"),
        said,
        "The interval holds the central 95 % of random subsets of prompts.",
    )


def separated(evidence: Evidence) -> Finding:
    """Do projections tell held-out harmful requests from harmless ones?"""
    record = evidence.record(FIRST)
    layer = _selected(record)
    row = analyses.by_layer(record.metrics, "d_prime").set_index("layer").loc[layer]
    auroc = analyses.auroc_by_layer(record.metrics, record.about).set_index("layer").loc[layer]
    interval = Interval(row["low"], row["high"])
    area = f"AUROC {auroc['value']:.3f} {span(Interval(auroc['low'], auroc['high']), 1, 3)}"
    said = f"d' = {row['value']:.1f} {span(interval, 1, 1)}, {area} at layer {layer}"
    return finding(by_interval(interval, 0.0, "above"), said, "The interval is a bootstrap over held-out prompts.")


def judge(evidence: Evidence, judges: Sequence[str], claimed: str) -> Finding:
    """Do judges say what readers say?"""

    def table() -> pd.DataFrame:
        record = evidence.record(LABELS)
        pooled, _ = validation.pooled(readers.items(), record.frame, record.metrics)
        return agreement.agreement(pooled, seed=record.seed)

    found, hoped = evidence.once("agreement", table), plan()[LABELS]["kappa_hoped"]
    at = found[(found["half"] == "B") & (found["scope"] == agreement.ALL) & (found["sense"] == "three labels")]
    at, side = at.set_index("judge").loc[list(judges)], {"reliable": "above", "unreliable": "below"}[claimed]
    ends = {name: Interval(row["boot_low"], row["boot_high"]) for name, row in at.iterrows()}
    verdict = by_all([by_interval(interval, hoped, side) for interval in ends.values()])
    kappas = "; ".join(
        f"{agreement.JUDGES[str(name)]}: kappa {number(at.loc[name, 'kappa'])} {interval_of(interval)}"
        for name, interval in ends.items()
    )
    said = f"{kappas} (hoped for: {hoped}); {at['n'].iloc[0]} answers to {at['prompts'].iloc[0]} prompts"
    return finding(verdict, said, "The intervals resample whole prompts; more answers read would narrow them.")


def coverage(evidence: Evidence) -> Finding:
    """Do intervals that take few base requests' prompts as independent cover what they say?"""
    record = evidence.record(LABELS)
    table = calibration.table(record.metrics)
    part = table[(table["method"] == "independent") & (table["clusters"] == calibration.CLUSTERS[0])]
    verdict = decide(part["band"].all(), not part["band"].any())
    low, high = (percent(part["coverage"].agg(end)) for end in ("min", "max"))
    band = " to ".join(f"{100 * end:.0f}" for end in calibration.BAND)
    draws = record.about["parameters"]["draws"]
    said = f"coverage {low} to {high} % over {len(part)} rates and correlations (band: {band} %), {draws} draws each"
    return finding(verdict, said, "Some cases lie within the band and some do not.")


TESTS = (few_pairs, separated, judge, coverage)
