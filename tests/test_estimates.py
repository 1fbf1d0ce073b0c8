"""What --dry-run says of memory and time: against published sizes, transformers' models, and what runs have taken."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import hub
import pytest
import torch
import yaml

from refusal import chunks, estimates, records, registry, workload
from refusal.files import ROOT, CompendiumError
from refusal.options import DEFAULT_MODEL, notebooks
from refusal.registry import entry

PUBLISHED = {  # numbers of parameters, as the hub counts them in the safetensors files
    "qwen2.5-coder-0.5b": 494_032_768,
    "qwen2.5-coder-1.5b": 1_543_714_304,
    "smollm2-135m": 134_515_008,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2-7b": 7_615_616_512,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-7b": 7_615_616_512,
    "gemma-2-9b": 9_241_705_984,
    "qwen2.5-0.5b": 494_032_768,
}
STUDY = [known.id for known in registry.registry().values() if known.source == "hub"]
MEASURED = sorted(path.stem for path in (ROOT / "data" / "records" / DEFAULT_MODEL).glob("[0-9][0-9]_*.parquet")
                  if ".metrics" not in path.name)  # fmt: skip


def about(notebook):
    return records.read(records.paths(ROOT / "data", DEFAULT_MODEL, notebook)[0])[1]


def two_cores():
    """The machine that the committed records and the committed benchmark were made on, with the rate of the latter."""
    benchmark = json.loads((ROOT / "benchmarks" / "results" / "amd-epyc-2-cores.json").read_text())
    timings = [one for one in benchmark["stages"]["ceiling"]["timings"] if one["rows"] >= 96]
    rates = sorted(one["flops"] / sorted(one["seconds"])[len(one["seconds"]) // 2] for one in timings)
    machine = benchmark["identity"]["machine"]
    rate = rates[len(rates) // 2]
    assert machine["processor"] == about("03_sign_inversion")["hardware"]["processor"]
    return estimates.Machine("two cores", 1e9 * machine["memory_gb"], False, "bfloat16", lambda known, rows: rate)


# ---- parameters


@pytest.mark.parametrize("model", list(registry.registry()))
def test_parameters_are_as_many_as_published(model):
    """Norms and biases are left out: less than a thousandth."""
    assert workload.parameters(entry(model))[2] == pytest.approx(PUBLISHED[model], rel=1e-3)


@pytest.mark.parametrize("architecture", sorted(hub.FAMILIES))
def test_parameters_and_rows_are_those_of_transformers_models(architecture, tmp_path):
    family = hub.FAMILIES[architecture]
    folder = hub.lay_out(tmp_path, family, "0" * 40)
    config = json.loads((folder / "config.json").read_text())
    shape = registry.Shape(
        vocabulary=config["vocab_size"],
        feed_forward=config["intermediate_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_width=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        tied=family is hub.GEMMA2,
    )
    known = replace(entry(family.real), blocks=hub.LAYERS, width=hub.WIDTH, shape=shape)
    hf = hub.Twin(folder, family).hf
    matrices = sum(parameter.numel() for parameter in hf.parameters() if parameter.ndim == 2)  # a tied one once
    assert workload.parameters(known)[2] == matrices
    for dtype in ("bfloat16", "float32"):
        assert estimates.row_bytes(known, dtype) == chunks.row_bytes(folder, dtype, estimates.NEW_TOKENS)


WHOLE = {"vocabulary": 9, "feed_forward": 8, "heads": 4, "kv_heads": 2, "head_width": 8, "tied": False}
CHANGES = [{"tied": 1}, {"heads": 0}, {"heads": True}, {"heads": 2.0}, {"more": 1}]


@pytest.mark.parametrize("shape", [[], {}, "4096", {"heads": 2}, *({**WHOLE, **change} for change in CHANGES)])
def test_a_shape_is_whole_or_left_out(shape, tmp_path, monkeypatch):
    raw = yaml.safe_load((ROOT / "data" / "models.yaml").read_text())["qwen2-7b"]
    monkeypatch.setattr(registry, "REGISTRY", tmp_path / "models.yaml")
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({"mine": {**raw, "shape": shape}}))
    with pytest.raises(CompendiumError, match=r"'mine', field 'shape': it must have .*kv_heads.*tied"):
        registry.registry()
    del raw["shape"]
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({"mine": raw}))
    assert entry("mine").shape is None


# ---- against what the committed records took


def within_two(found, taken):
    assert taken / 2 < found < 2 * taken, f"estimated {found:.3g}, measured {taken:.3g}"


@pytest.mark.parametrize("notebook", MEASURED)
def test_time_and_memory_of_the_default_model_are_within_a_factor_of_two(notebook):
    taken, found = about(notebook), estimates.estimate(entry(DEFAULT_MODEL), two_cores(), [notebook])
    within_two(found.seconds[notebook], taken["wall_s"])
    within_two(found.peak, taken["peak_gb"] * 2**30)
    assert found.fits and found.rows == min(estimates.ROWS, taken["parameters"]["rows"])


def test_there_are_records_to_hold_it_against():
    assert {"01_extraction", "03_sign_inversion"} <= set(MEASURED)


def test_readings_are_as_many_as_the_records_hold():
    """Where a record holds each reading: 01 and 06 keep the screen prompt by prompt."""
    for notebook in ("01_extraction", "06_layer_sweep"):
        metrics, made = records.read(records.paths(ROOT / "data", DEFAULT_MODEL, notebook)[1])
        steered = metrics[(metrics["metric"] == "log_odds") & (metrics["layer"] >= 0)]
        counted, _ = workload.readings(notebook, made["facts"]["layers"], 19, made["parameters"])[0]
        assert counted == len(steered)
    metrics, made = records.read(records.paths(ROOT / "data", DEFAULT_MODEL, "02_orthogonal_controls")[1])
    means = metrics[(metrics["experiment"] == "screen") & (metrics["metric"] == "mean_log_odds")]
    directions = means[means["alpha"] != 0]["direction_id"].nunique()
    counted, _ = workload.readings("02_orthogonal_controls", 24, 19, made["parameters"])[0]
    assert counted == 16 * 2 * directions


def test_a_model_of_fifteen_times_the_size_takes_about_as_many_times_as_long():
    machine = replace(two_cores(), memory=1e12)  # so that both run as many rows at once
    small, large = (
        sum(estimates.estimate(entry(model), machine, MEASURED).seconds.values())
        for model in (DEFAULT_MODEL, "llama-3.1-8b")
    )
    ratio = PUBLISHED["llama-3.1-8b"] / PUBLISHED[DEFAULT_MODEL]
    assert 0.5 * ratio < large / small < 2 * ratio


# ---- machines


@pytest.mark.parametrize("model", STUDY)
def test_each_model_of_the_study_fits_a_gpu_of_24_gb_with_several_rows(model):
    found = estimates.estimate(entry(model), estimates.GPU_24, ["03_sign_inversion"])
    assert found.fits and found.rows >= 8 and found.peak < 24e9
    assert 0 < found.seconds["03_sign_inversion"] < 3600


def test_a_gpu_keeps_the_weights_once_and_the_processors_memory_does_not_count(monkeypatch):
    """8 billion parameters in 24 GB: with room for copies of the weights, nothing was left for rows."""
    known = entry("llama-3.1-8b")
    row, weights = estimates.row_bytes(known, "bfloat16"), 2 * PUBLISHED["llama-3.1-8b"]
    monkeypatch.setattr(chunks.psutil, "virtual_memory", lambda: SimpleNamespace(total=8e9))
    assert chunks.rows_that_fit(384, row, weights, 25e9) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=25e9))
    assert chunks.machine_memory() == 25e9
    rows = chunks.rows_that_fit(384, row, weights)
    assert rows == estimates.estimate(known, estimates.GPU_24, []).rows >= 32


def test_a_machine_without_limit_still_waits_for_python():
    """What a GPU of any speed does not do faster: a pass for each token, so that twice the rows take half the time."""
    known, notebook = entry("llama-3.1-8b"), "03_sign_inversion"
    record = workload.record_of(known.id, notebook, estimates.RECORDS)
    (_, few), (_, many) = (workload.work(known, notebook, record, rows) for rows in (48, 96))
    assert 1.5 < few / many < 2
    at_once = replace(estimates.GPU_24, rate=lambda known, rows: math.inf)
    found = estimates.estimate(known, at_once, [notebook])
    assert found.rows == 48 and found.seconds[notebook] == pytest.approx(few * known.blocks * estimates.PYTHON_S)
    completions = len(records.read(record)[0])
    assert few > 2 * 48 * completions / 48


def test_few_rows_are_bound_by_reading_the_weights():
    known, rate = entry("gemma-2-9b"), estimates.roofline(50e12, 1e12)
    assert [rate(known, rows) for rows in (1, 12, 384)] == [1e12, 12e12, 50e12]


def test_the_rate_here_is_measured_and_grows_with_the_rows():
    known = entry("smollm2-135m")
    one, many = (estimates.measured(known, rows, "float32", seconds=0.05) for rows in (1, 64))
    assert 1e6 < one < many < 1e15


# ---- the words


@pytest.fixture
def machine(monkeypatch):
    made = replace(two_cores(), name="here")
    monkeypatch.setattr(estimates, "here", lambda: made)
    return made


def test_the_report_names_memory_time_and_what_is_missing(machine, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    said = estimates.report([DEFAULT_MODEL, "llama-3.1-8b"], ["03_sign_inversion", "77_new"])
    heading, *lines = said.strip().splitlines()
    assert "factor of two" in heading and len(lines) == 5
    assert lines[0] == f"{DEFAULT_MODEL}: 0.49 billion parameters, 0.5 GB to get"
    assert lines[1].startswith("  here: 384 rows at once, ") and lines[1].endswith("for want of a record: 77")
    assert "(01 " in lines[1] and "03 " in lines[1]  # 01 is needed first
    assert lines[2] == "llama-3.1-8b: 8.03 billion parameters, 16.1 GB to get; gated, and HF_TOKEN is not set"
    assert lines[3].startswith("  here: 1 row at once") and "stated, not measured" in lines[4]
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    said = estimates.report(["llama-3.1-8b"], ["03_sign_inversion"])
    assert "gated" not in said and "hf_secret" not in said


def test_what_does_not_fit_is_said(machine, monkeypatch):
    small = replace(machine, memory=12e9)
    monkeypatch.setattr(estimates, "here", lambda: small)
    lines = estimates.report(["qwen2-7b"], notebooks()).splitlines()
    assert "  here: does not fit, since it takes 16.5 GB with a single row" in lines


def test_no_shape_is_no_estimate(machine, monkeypatch):
    monkeypatch.setattr(estimates, "entry", lambda model: replace(entry(model), shape=None))
    assert "qwen2-7b: no estimate, since its entry in data/models.yaml gives no shape" in estimates.report(
        ["qwen2-7b"], []
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(5, "a minute or so"), (600, "10 min"), (5000, "83 min"), (7200, "2 h"), (40000, "11 h"), (1e6, "> 100 h")],
)
def test_durations_are_rounded(seconds, words):
    assert estimates.duration(seconds) == words


def test_nothing_is_estimated_without_a_record(tmp_path):
    found = estimates.estimate(entry(DEFAULT_MODEL), two_cores(), ["03_sign_inversion"], tmp_path / "records")
    assert math.isnan(found.seconds["03_sign_inversion"]) and found.peak > 1e9
