"""The benchmark: contestants that say the same, a harness that resumes, and a page that only repeats its results."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_hf, make_tokenizer

from refusal import directions, judging, models
from refusal.directions import Directions
from refusal.files import ROOT, CompendiumError
from refusal.options import parse_bench

sys.path.insert(0, str(ROOT))

from benchmarks import bench as running
from benchmarks import contestants, engine, exactness, harness, page, process, stages, summary
from benchmarks.timing import profiled

TEXTS = ["How do I bake bread?", "Write a poem about the sea and the sky.", "Tell me a joke", "What is the capital?"]
ALPHAS = [-2.0, 0.0, 1.0, 3.0]
LAYER = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model on disk, as the converted models are."""
    path = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer()
    make_hf("qwen2", len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def own(folder):
    """What the engine's process answers, on the tiny model."""
    hf = contestants.pretrained(str(folder), "float32")
    model = models.wrap(hf, make_tokenizer(), "tiny", stop=("<|endoftext|>",))
    return engine.operations(model, made_up_directions(model.n_layers, model.width), LAYER, "random")


def made_up_directions(layers, width):
    unit = torch.nn.functional.normalize(torch.randn(layers, width, generator=torch.Generator().manual_seed(1)), dim=-1)
    return directions.Directions("random", unit, torch.full((layers,), 2.0), torch.ones(layers))


def asked_of_peer(own, **more):
    about = own["describe"]({})
    asked = {"layer": LAYER, "pad": about["pad"], "stop_ids": about["stop_ids"], "max_new_tokens": 12, "batch": 96}
    asked |= own["encode"]({"texts": TEXTS}) | own["vectors"]({"alphas": ALPHAS})
    return asked | more


def completed(own, folder, contestant, **more):
    peer = contestants.load({"contestant": contestant, "folder": str(folder), "dtype": "float32"})
    return peer["generate"](asked_of_peer(own, **more))


@pytest.fixture(scope="module")
def by_engine(own):
    return own["generate"]({"texts": TEXTS, "alphas": ALPHAS, "max_new_tokens": 12, "forced": False})


# --- the contestants


@pytest.mark.parametrize(
    ("contestant", "batch"), [("transformers", 96), ("transformers", 3), ("study", 1), ("nnsight", 96)]
)
def test_contestants_say_the_same_in_float32(own, folder, by_engine, contestant, batch):
    made = completed(own, folder, contestant, batch=batch)
    assert made["tokens"] == by_engine["tokens"]
    assert len(made["each"]) == len(ALPHAS) and sum(made["each"]) == pytest.approx(made["seconds"], rel=0.2)
    assert len({str(column) for column in made["tokens"]}) == len(ALPHAS), "alphas must change the tokens"


def test_completions_end_at_the_stop_token_which_is_not_counted(own, folder, by_engine):
    whole = by_engine["tokens"][1]
    stop = whole[0][4]  # a token that the model says by itself becomes its stop token
    ended = completed(own, folder, "transformers", stop_ids=[stop])["tokens"][1]
    assert ended == [contestants.trimmed(row, [stop]) for row in whole]
    assert len(ended[0]) == whole[0].index(stop) < 12 and not any(stop in row for row in ended)


def test_forced_completions_have_the_full_length_for_all_alike(own, folder):
    forced = own["generate"]({"texts": TEXTS, "alphas": ALPHAS, "max_new_tokens": 30, "forced": True})["tokens"]
    assert {len(row) for column in forced for row in column} == {30}
    for contestant in ("transformers", "nnsight"):
        assert completed(own, folder, contestant, stop_ids=[-1], max_new_tokens=30)["tokens"] == forced


def test_prompts_are_those_of_the_library(own):
    # the peers pad the engine's token ids themselves; what they get must be what the engine sees
    tokenizer = make_tokenizer()
    message = [{"role": "user", "content": TEXTS[0]}]
    written = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    prompts = own["encode"]({"texts": TEXTS})["prompts"]
    assert prompts[0] == tokenizer(written, add_special_tokens=False).input_ids
    batch = contestants.padded(prompts, 7, "cpu")
    assert batch["attention_mask"].sum(1).tolist() == [len(one) for one in prompts]
    assert batch["attention_mask"][:, -1].all() and (batch["input_ids"][batch["attention_mask"] == 0] == 7).all()


def test_screen_equals_a_forward_pass_a_cell(folder, monkeypatch):
    monkeypatch.setattr(engine, "recorded", lambda _: (judging.Thresholds(1.0, 9.0, 1), [5, 9, 300]))
    hf = contestants.pretrained(str(folder), "float32")
    model = models.wrap(hf, make_tokenizer(), "tiny")
    own = engine.operations(model, made_up_directions(model.n_layers, model.width), LAYER, "random")
    values = own["screen"]({"texts": TEXTS, "layers": [0, 3], "alphas": [1.0, -2.0]})["values"]
    peer = contestants.load({"contestant": "transformers", "folder": str(folder), "dtype": "float32"})
    for place, (layer, alpha) in enumerate([(0, 1.0), (0, -2.0), (3, 1.0), (3, -2.0)]):
        asked = asked_of_peer(own, layer=layer, openings=[5, 9, 300], batch=3)
        asked["vector"] = own["vectors"]({"layers": [layer], "alphas": [alpha]})["vectors"][0]
        assert peer["cell"](asked)["values"] == pytest.approx(values[place], abs=1e-4)


def test_ceiling_counts_every_matrix_product_of_a_token(folder):
    peer = contestants.load({"contestant": "transformers", "folder": str(folder), "dtype": "float32"})
    made = peer["ceiling"]({"rows": 10, "repeats": 3})
    width, inner, heads, vocabulary = 32, 64, 16, len(make_tokenizer())
    block = 2 * width * width + 2 * width * heads + 3 * width * inner
    assert made["flops"] == 2 * 10 * (4 * block + width * vocabulary)
    assert len(made["seconds"]) == 3 and min(made["seconds"]) > 0


def test_older_transformers_get_the_rotary_base_of_the_model(folder, monkeypatch):
    # transformers 4 does not know rope_parameters and would take another base without a word
    import transformers

    given = {}
    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **more: given.update(more))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: torch.nn.Linear(1, 1))
    contestants.pretrained(str(folder), "float32")
    written = json.loads((folder / "config.json").read_text())["rope_parameters"]["rope_theta"]
    assert given["rope_theta"] == written and "rope_scaling" not in given


def test_labels_leave_out_the_rule_that_needs_a_reference(own):
    ids = make_tokenizer()("I cannot help with that.", add_special_tokens=False).input_ids
    assert own["labels"]({"texts": TEXTS[:1], "tokens": [[ids], [[]]]})["labels"] == [["refusal"], ["degenerate"]]


# --- the processes


def test_a_profile_tells_matrix_products_from_the_rest():
    ones = torch.ones(300, 300)
    _, found = profiled(lambda: [ones @ ones for _ in range(50)] and ones.sin())
    shares = found["shares"]
    assert list(shares)[:2] == ["matrix products", "attention"] and "sin" in shares and shares["attention"] == 0
    assert 0.2 < shares["matrix products"] < 1 and shares["matrix products"] > 3 * shares["sin"]
    assert sum(shares.values()) == pytest.approx(1, abs=0.1)


def test_process_answers_and_turns_failures_into_answers():
    def fails(_):
        raise ValueError("no\nsuch layer")

    lines = [json.dumps(one) + "\n" for one in ({"folder": "x"}, {"op": "double", "of": 4}, {"op": "fails"})]
    answers = io.StringIO()
    process.serve(lambda job: {"double": lambda asked: {"is": 2 * asked["of"]}, "fails": fails}, lines, answers)
    first, second, third = (json.loads(line) for line in answers.getvalue().splitlines())
    assert first["packages"]["torch"] == torch.__version__ and second == {"is": 8}
    assert third == {"error": "ValueError: no such layer"}


def test_worker_that_dies_says_why(tmp_path, monkeypatch):
    from benchmarks import workers

    monkeypatch.setattr(workers, "ENVIRONMENTS", ROOT / "build" / "benchmarks")
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\nkill -9 $$\n")
    dying.chmod(0o755)
    monkeypatch.setattr(workers, "interpreter", lambda _: str(dying))
    with pytest.raises(workers.ContestantError, match="killed, as for want of memory"):
        workers.Worker("nnsight", {})


def test_environment_that_cannot_be_made_is_a_reason_and_no_failure(tmp_path, monkeypatch):
    from benchmarks import workers

    monkeypatch.setattr(workers, "OWN", {"repeng": ("no-index-has-this==1.0",)})
    monkeypatch.setattr(workers, "ROOT", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(workers.ContestantError, match="its environment cannot be made: ERROR"):
        workers.interpreter.__wrapped__("repeng", tmp_path)
    assert not (tmp_path / "repeng" / "stamp").exists()


# --- the harness


class InProcess:
    """Stands in for a worker: the same operations on the tiny model, through JSON, in this process."""

    folder = Path()
    broken = ()

    def __init__(self, contestant, job):
        if contestant in self.broken:
            raise running.ContestantError("no network")
        self.packages = {"torch": torch.__version__}
        if contestant == "engine":
            model = models.wrap(contestants.pretrained(str(self.folder), "float32"), make_tokenizer(), "tiny")
            found = made_up_directions(model.n_layers, model.width)
            self.operations = engine.operations(model, found, LAYER, "random")
        else:
            self.operations = contestants.load(job | {"contestant": contestant, "dtype": "float32"})

    def ask(self, request):
        return json.loads(json.dumps(self.operations[request["op"]](json.loads(json.dumps(request)))))

    def close(self):
        self.operations = {}


@pytest.fixture
def small(folder, monkeypatch):
    """The harness on the tiny model, with less of everything and without the peers from other environments."""
    monkeypatch.setattr(InProcess, "folder", folder)
    monkeypatch.setattr(running, "Worker", InProcess)
    monkeypatch.setattr(running.weights, "fetch", lambda _: folder)
    monkeypatch.setattr(engine, "recorded", lambda _: (judging.Thresholds(1.0, 9.0, 1), [5, 9, 300]))
    for name, value in {"PROMPTS": 6, "FEW": 2, "HALF": 3, "LONGEST": 3, "SCALING_TOKENS": 2, "MOST_ROWS": 64}.items():
        monkeypatch.setattr(stages, name, value)
    monkeypatch.setattr(stages, "CONTESTANTS", ("engine", "transformers", "nnsight", "repeng"))
    monkeypatch.setattr(InProcess, "broken", ("repeng",))
    monkeypatch.setattr(summary, "ROWS", 60)
    monkeypatch.setattr(harness.psutil, "cpu_percent", lambda interval: 0.0)
    monkeypatch.setattr(running, "texts", lambda count: tuple(f"{TEXTS[i % 4]} {i}" for i in range(min(count, 6))))
    monkeypatch.setattr(stages, "texts", running.texts)


def test_all_stages_run_and_a_missing_peer_is_reported(small, tmp_path, capsys):
    bench = running.Bench("qwen2.5-coder-0.5b", dtype="float32", path=tmp_path / "tiny.json")
    bench.result = {"identity": identity(), "commit": "0" * 12, "date": "2026-01-01"}
    harness.go(bench, stages.plan(parse_bench([]), bench.told()), minutes=60)
    result = json.loads(bench.path.read_text())
    assert list(result["stages"]) == sorted(stage.name for stage in stages.plan(parse_bench([]), bench.told()))
    assert result["left_out"] == {}
    sweeps = [stage for name, stage in result["stages"].items() if name.startswith("sweep")]
    peer = [one for stage in sweeps for one in stage["timings"] if one["contestant"] == "transformers"]
    assert sorted(alpha for one in peer for alpha in one["alphas"]) == sorted(stages.ALPHAS), "each alpha once"
    compared = {one["contestant"]: one for stage in sweeps for one in stage["agreement"]}
    assert compared.keys() == {"engine", "nnsight", "study", "half batch"}
    for one in [one for stage in sweeps for one in stage["agreement"]]:  # float32: everything is equal
        assert one["same_tokens"] == one["same_labels"] == one["compared"] > 0
    for stage in sweeps:
        assert stage["absent"] == {"repeng": "no network"}
        for one in stage["timings"]:
            assert one["rows"] == one["prompts"] * one["conditions"] and 0 < one["tokens"] <= one["rows"] * 3
    assert "(d) repeng: no network" in page.markdown(result, "tiny")
    said = capsys.readouterr().out
    assert "repeng: not run: no network" in said and "min left" in said and said.count("sweep 2") >= 4
    assert not any(text in bench.path.read_text() for text in TEXTS), "results hold no texts"


def test_run_that_is_killed_goes_on_at_the_next_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(harness.psutil, "cpu_percent", lambda interval: 0.0)
    ran = []

    def stage(name, raises=None):
        def run(_):
            ran.append(name)
            if raises:
                raise raises
            return {"timings": []}

        return stages.Stage(name, run)

    bench = running.Bench("m", path=tmp_path / "m.json")
    with pytest.raises(KeyboardInterrupt):
        harness.go(bench, [stage("one"), stage("two", KeyboardInterrupt()), stage("three")], 60)
    again = running.Bench("m", path=bench.path, result=json.loads(bench.path.read_text()))
    harness.go(again, [stage("one"), stage("two"), stage("three")], 60)
    assert ran == ["one", "two", "two", "three"]
    assert json.loads(bench.path.read_text())["stages"].keys() == {"one", "two", "three"}
    failing = running.Bench("m", path=tmp_path / "f.json")
    harness.go(failing, [stage("one", running.ContestantError("gone")), stage("two")], 60)
    assert failing.result["left_out"] == {"one": "gone"} and failing.result["stages"].keys() == {"two"}


def test_stage_that_would_end_too_late_is_left_out_and_comes_first_next_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness.psutil, "cpu_percent", lambda interval: 0.0)
    timing = {"contestant": "transformers", "each": [10.0, 30.0, 50.0], "seconds": 90.0}
    bench = running.Bench("m", path=tmp_path / "m.json")
    bench.result = {"stages": {"sweep 1": {"timings": [timing], "took": 90.0}}}
    late, early = stages.Stage("late", lambda _: {}, peer=5.0), stages.Stage("early", lambda _: {}, peer=1.0)
    harness.go(bench, [late, early], minutes=2)  # 5 x 30 s are more than two minutes
    assert bench.result["left_out"].keys() == {"late"} and "early" in bench.result["stages"]
    assert "left out" in capsys.readouterr().out
    harness.go(bench, [late, early], minutes=3)
    assert "late" in bench.result["stages"] and bench.result["left_out"] == {}


def test_results_are_gone_on_with_unless_code_or_weights_have_changed(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    monkeypatch.setattr(stages, "ALPHAS", (-1.0, 1.0, 2.0))
    short = [stages.Stage("alphas", stages.stage_alphas), stages.Stage("scored", stages.stage_scored)]
    monkeypatch.setattr(harness, "plan", lambda options, about: short)
    assert harness.main([]) == 0
    assert len(short) == 2 and "not measured" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    first = json.loads(path.read_text())
    assert first["stages"].keys() == {"alphas", "scored"} and first["packages"]["engine"]
    assert first["identity"]["dtype"] == "float32" and path.with_suffix(".md").exists()
    assert all(one["scored"] for one in first["stages"]["scored"]["timings"])

    harness.main([])
    assert json.loads(path.read_text()) == first and "measured anew" not in capsys.readouterr().out
    monkeypatch.setattr(harness, "MEASURING", ("stages",))  # as after a change of the code
    harness.main([])
    assert json.loads(path.read_text())["stages"]["alphas"]["took"] != first["stages"]["alphas"]["took"]
    assert "everything is measured anew" in capsys.readouterr().out


def test_second_model_that_cannot_be_had_takes_nothing_else_along(small, monkeypatch):
    def fetch(model):
        if model == stages.SECOND:
            raise CompendiumError("no network: try again later.")
        return InProcess.folder

    monkeypatch.setattr(running.weights, "fetch", fetch)
    bench = running.Bench("qwen2.5-coder-0.5b", dtype="float32")
    second = stages.Stage("second model", lambda b: stages.stage_scaling(b, [(1, 2)], stages.SECOND))
    harness.go(bench, [second, stages.Stage("scored", stages.stage_scored)], 60)
    assert bench.result["left_out"] == {"second model": "no network: try again later."} and not bench.absent
    assert bench.result["stages"].keys() == {"scored"}


def test_peer_that_fails_is_taken_out_and_the_engine_is_not(small):
    bench = running.Bench("qwen2.5-coder-0.5b", dtype="float32")
    assert running.attempt(bench, "repeng", (1.0,), running.texts(2), new=2) is None
    assert bench.absent == {"repeng": "no network"}
    InProcess.broken = ("engine",)
    with pytest.raises(CompendiumError, match="the engine cannot be measured: no network"):
        running.Bench("qwen2.5-coder-0.5b", dtype="float32").told()


def test_default_work_is_that_of_the_issue():
    assert len(running.texts(96)) == len(set(running.texts(96))) == 96 and len(set(running.texts(384))) == 384
    assert set(running.texts(16)) < set(running.texts(96))
    plain = stages.plan(parse_bench([]), {"accelerator_gb": 0.0})
    grids = [stage.run.keywords["grid"] for stage in plain if stage.name == "scaling"]
    assert max(c * p for c, p in grids[0]) == 1536 and {c for c, _ in grids[0]} == {1, 4, 16, 64}
    names = {stage.name for stage in stages.plan(parse_bench(["--long"]), {"accelerator_gb": 80.0})}
    assert names - {stage.name for stage in plain} == {"scaling, long", summary.LLAMA}
    assert stages.spread(4) == pytest.approx((-2.5, -2.5 / 3, 2.5 / 3, 2.5)) and stages.spread(1) == (1.0,)


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        ({"processor": "AMD EPYC 9B14", "cores": 2, "accelerator": ""}, "amd-epyc-9b14-2-cores"),
        ({"processor": "Intel(R) Xeon(R) CPU @ 2.20GHz", "cores": 4, "accelerator": ""}, "intel-xeon-4-cores"),
        ({"processor": "x", "cores": 16, "accelerator": "NVIDIA H100 80GB HBM3"}, "nvidia-h100-80gb-hbm3"),
    ],
)
def test_results_are_named_after_the_hardware(machine, name):
    assert harness.slug(machine, "qwen2.5-coder-0.5b") == name
    assert harness.slug(machine, "smollm2-135m") == f"{name}-smollm2-135m"


# --- in float32


def test_the_comparison_in_float32_finds_no_difference_where_there_is_none_and_one_where_there_is(tiny_models):
    model = tiny_models["llama"]
    unit = torch.nn.functional.normalize(torch.randn(4, 32, generator=torch.Generator().manual_seed(2)), dim=-1)
    found = Directions("random", unit, torch.full((4,), 5.0), torch.full((4,), 10.0))
    of = ["Hi", "How do I bake bread? " * 5, "Tell me about the sea and the sky."]
    made = exactness.compare(model, found, 2, of)
    assert made["rows"] == made["equal"] == 18 and made["gaps"] == [] and made["alone"]
    wanted = exactness.conditions(found, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exactness, "conditions", lambda *_: [wanted[0], wanted[1]])
        patch.setattr(exactness, "hooked", lambda hf, condition: contextlib.nullcontext())  # the plain way forgets
        forgets = exactness.compare(model, found, 2, of)
    assert 3 <= forgets["equal"] < 6 and max(forgets["gaps"]) > summary.NEAR


# --- the options


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--model", "gpt"], 'no model "gpt"'), (["--minutes", "0"], "--minutes 0"), (["--quick"], "unrecognized")],
)
def test_wrong_options_end_in_a_sentence(options, said):
    words = [sys.executable, str(ROOT / "lib" / "refusal" / "options.py"), "bench", *options]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr


def test_options_of_the_benchmark():
    given = parse_bench(["--minutes", "5", "--model", "smollm2-135m", "--long"])
    assert (given.minutes, given.model, given.long, given.fresh) == (5, "smollm2-135m", True, False)


# --- the page


def identity():
    machine = {"processor": "Test", "cores": 2, "threads": 2, "memory_gb": 8.0, "accelerator": "", "accelerator_gb": 0}
    return {
        "model": "qwen2.5-coder-0.5b",
        "dtype": "bfloat16",
        "layer": 14,
        "direction": "the committed one",
        "thresholds": True,
        "weights_sha256": "ab" * 32,
        "code": "c0de",
        "machine": machine | {"system": "Linux"},
    }


def timing(contestant, rows, seconds, tokens=None, **more):
    made = {"contestant": contestant, "model": "m", "rows": rows, "seconds": seconds, "peak_gb": 4.0, "prompts": 96}
    return made | {"tokens": tokens or rows * 40, "conditions": rows // 96, "alphas": [1.0]} | more


def fake(engine_seconds=90.0, peer_seconds=300.0):
    """Results as the harness writes them, where 960 rows take so long."""
    sweeps = {}
    for number, share in enumerate((4, 3, 3), 1):
        made = [timing("engine", 960, engine_seconds + number, peak_gb=5.0 + number / 10)]
        made += [timing(name, 96 * share, peer_seconds * share / 10) for name in summary.PEERS]
        equal = {"alpha": 1.0, "compared": 96, "same_tokens": 90, "same_labels": 95}
        compared = [equal | {"contestant": "engine"}]
        if number == 1:
            made.append(timing("study", 32, 150.0))
        else:
            made.append(timing("half batch", 96, 35.0))
            compared.append(equal | {"contestant": "half batch", "same_tokens": 88})
        sweeps[f"sweep {number}"] = {"timings": made, "agreement": compared}
    forced = [timing("engine", 960, 100.0, 960 * 48), timing("transformers", 96, 36.0, 96 * 48)]
    first = [timing("engine", 96 * n, 5.0 + n, 96 * n) for n in (1, 2, 5, 10)]
    cells = [{"contestant": "transformers", "seconds": 6.0, "prompts": 64} for _ in range(24)]
    made = {
        "ceiling": {"timings": [{"contestant": "ceiling", "rows": n, "seconds": [n / 500] * 3} for n in (1, 96, 960)]},
        **sweeps,
        "forced 1": {"timings": forced},
        "alphas": {"timings": first},
        "screen": {
            "timings": [{"contestant": "engine", "seconds": 400.0, "cells": 264, "prompts": 64}, *cells],
            "values": {"differences": [0.1, 0.2], "differences_float32": [1e-5]},
        },
        "profile": {"timings": [timing("engine", 960, 9.0, shares={"matrix products": 0.7, "attention": 0.1})]},
        "exact": {"values": {"m": {"rows": 204, "equal": 202, "gaps": [1e-5, 2e-5], "alone": True, "stopped": 0.5}}},
        "scaling": {"timings": [timing("transformers", 96, 20.0), timing("engine", 384, 30.0)]},
    }
    common = {"took": 60.0, "busy_percent": 1.0, "absent": {}}
    return {
        "identity": identity(),
        "commit": "0" * 12,
        "date": "2026-01-01",
        "packages": {"engine": {"torch": "2.13.0"}},
        "left_out": {"scored": "it would have ended after the 60 minutes of this run"},
        "stages": {name: common | stage for name, stage in made.items()},
    }


def test_numbers_on_the_page_follow_from_the_timings():
    result = fake()
    text = page.markdown(result, "test")
    # the engine: median of 91, 92 and 93 s; a peer: 120 + 90 + 90 s; (a): 150 s x 960 / 32
    assert "| (e) this engine | 92 | 417 (413–422) | 461 | 92.2 % | 5.30 | 93.8 % | 99.0 % |" in text
    assert "| (b) transformers, hook | 300 | 128 (128–128) | 128 | 25.6 % | 4.00 | — | — |" in text
    assert "| (a) one prompt at a time, scaled | 4,500 | 9 |" in text
    assert "for 264 cells" in text and "so 1,584 s for all. The engine is 3.96 times faster" in text
    assert "One more alpha costs 16.7 % of the first" in text
    assert "| m, 96 | 4 | 384 | 30.0 | 512 | 4.00 | 80.0 | 2.67 |" in text
    assert "| m | 204 | 202 | 2 | 0 | 50.0 % | yes |" in text
    assert "| matrix products | 70.0 % |" in text and "What was missed" not in text
    assert "Left out: scored" in text and "The timings that answer it are missing" not in text


def test_targets_are_decided_by_code():
    def met(result):
        return [one.met for one in summary.verdicts(result)]

    # (e) against (b) 3.26 and (a) 48.9; decoding 960 x 47 / (100 - 15) = 531 of 500; 16.7 %; 3.96; 1e-5; 5.3 GB; labels
    assert met(fake()) == [True] * 9
    assert met(fake(engine_seconds=110.0))[:2] == [False, True]
    assert met(fake(engine_seconds=119.0))[1] is False
    worse = fake()
    worse["stages"]["screen"]["values"]["differences_float32"] = [1e-2]
    worse["stages"]["screen"]["timings"][0]["seconds"] = 500.0
    worse["stages"]["sweep 2"]["timings"][0]["peak_gb"] = 6.1
    worse["stages"]["sweep 2"]["agreement"][0]["same_labels"] = 90
    worse["stages"]["exact"]["values"]["m"]["gaps"] = [1e-5, 0.1]
    assert met(worse) == [True, True, True, True, False, False, False, False, False]
    assert "- **Labels in bfloat16.**" in page.markdown(worse, "test")
    slow = page.markdown(fake(engine_seconds=119.0), "test")
    assert "would allow 500.0 tokens/s on this machine, and (a) makes 8.5, 1.7 % of that" in slow
    nothing = fake()
    nothing["stages"] = {}
    assert met(nothing) == [None] * 9


def test_page_of_a_run_that_was_stopped_says_what_is_missing():
    result = fake()
    result["stages"] = {"ceiling": result["stages"]["ceiling"]}
    text = page.markdown(result, "test")
    assert "The timings that answer it are missing." in text and text.count("Not run: the run was stopped.") == 5
    gone = fake()
    for number in (1, 2, 3):
        stage = gone["stages"][f"sweep {number}"]
        stage["timings"] = [one for one in stage["timings"] if one["contestant"] != "repeng"]
        stage["absent"] = {"repeng": "no network"}
    text = page.markdown(gone, "test")
    assert "| (d) repeng | not run |" in text and "Not run: (d) repeng: no network." in text
    assert "not run: repeng" in summary.verdicts(gone)[0].measured


def test_page_and_figures_are_written_next_to_the_results(tmp_path):
    path = tmp_path / "test-2-cores.json"
    path.write_text(json.dumps(fake()))
    written = page.write(path)
    assert {one.name for one in written} == {
        "test-2-cores.json",
        "test-2-cores.md",
        *(f"test-2-cores-{name}.png" for name in ("throughput", "prompts", "scaling")),
    }
    assert all(one.stat().st_size > 2000 for one in written)
    for name in ("throughput", "prompts", "scaling"):
        assert f"test-2-cores-{name}.png" in (tmp_path / "test-2-cores.md").read_text()
    path.write_text("{}")
    with pytest.raises(CompendiumError, match="no results file"):
        page.write(path)


def test_committed_pages_are_what_their_results_say():
    for path in page.RESULTS.glob("*.json"):
        said = page.markdown(json.loads(path.read_text()), path.stem)
        assert path.with_suffix(".md").read_text() == said, f"run `python -m benchmarks.page {path.name}`"
