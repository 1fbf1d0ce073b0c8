"""Each mistake of this table, made in a copy of the library, turns a test red: so the tests can see it."""

import concurrent.futures
import re
import shutil
from dataclasses import dataclass

import pytest
from forked import pytest_in

from refusal import prompts
from refusal.files import ROOT

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Mutation:
    """`old`, which stands in `file` exactly once, becomes `new`; one of `tests` must then fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def line(file, start):
    """The one line of a file that begins so, with its line break."""
    (found,) = (text for text in (ROOT / file).read_text(encoding="utf-8").splitlines(True) if text.startswith(start))
    return found


def unquoted(prompt_set):
    """The first prompt that a CSV file writes without quotes."""
    return next(text for text in prompts.load(prompt_set)["text"] if "," not in text and '"' not in text)


STEERING, ENGINE, CONDITIONS = (f"lib/refusal/{name}.py" for name in ("steering", "engine", "conditions"))
HOOKS = "test_steering.py::test_nnsight_equals_plain_hooks[llama]"
EVERY = "test_steering.py::test_every_token_but_padding_is_steered[llama-{}]"
ENDING = "test_steering.py::test_rows_that_end_leave_the_others_as_they_are[llama]"
NLL = "test_steering.py::test_reference_nll_is_that_of_the_unsteered_model[llama]"
HIDDEN = "test_activations.py::test_activations_equal_hidden_states[llama]"
MUTATIONS = [
    Mutation(
        "sign flipped",
        "lib/refusal/directions.py",
        "harmful.double().mean(0) - harmless.double().mean(0)",
        "harmless.double().mean(0) - harmful.double().mean(0)",
        ("test_directions.py::test_extraction_by_hand", "test_planted.py::test_sign"),
    ),
    Mutation(
        "layer shifted by one when steering",
        ENGINE,
        "every[layer].output = edit(every[layer].output, layer)",
        "every[layer].output = edit(every[layer].output, layer - 1)",
        ("test_steering.py::test_adding_equals_a_bias_of_the_module_before[llama-layers1]",),
    ),
    Mutation(
        "branch leaves the trunk one layer early",
        ENGINE,
        "tap = trunk.taps.index(first) if own else 0",
        "tap = max(trunk.taps.index(first) - 1, 0) if own else 0",
        (HOOKS,),
    ),
    Mutation(
        "layer shifted by one when capturing",
        "lib/refusal/activations.py",
        "trunk.rest[:, :, -1]",
        "trunk.rest.roll(1, 0)[:, :, -1]",
        (HIDDEN,),
    ),
    Mutation(
        "chat template dropped",
        "lib/refusal/models.py",
        "    if template:\n",
        "    if False:\n",
        ("test_activations.py::test_the_chat_template_is_applied[llama]", HIDDEN),
    ),
    Mutation(
        "only the prefill steered",
        ENGINE,
        "steered = 1 if mask is None else mask[:, :, None]",
        "steered = 0 if mask is None else mask[:, :, None]",
        (HOOKS, "test_planted.py::test_every_generated_token_is_decided_anew"),
    ),
    Mutation(
        "padding steered",
        ENGINE,
        "mask = valid.clone()",
        "mask = torch.ones_like(valid)",
        (EVERY.format("True"), EVERY.format("False")),
    ),
    Mutation(
        "shared beginning not steered",
        ENGINE,
        "mask = few.prompt_mask(valid, last_column=False)",
        "mask = torch.zeros_like(valid)",
        (EVERY.format("True"),),
    ),
    Mutation(
        "whole prompt steered where only its last token should be",
        ENGINE,
        "mask[self.last_only[self.row], : -1 if last_column else None] = False",
        "pass",
        (HOOKS,),
    ),
    Mutation(
        "last token of the padded side taken",
        ENGINE,
        "tapped[:, :, -columns:]",
        "tapped[:, :, :columns]",
        ("test_activations.py::test_the_last_token_is_that_of_the_generation_prompt[llama]",),
    ),
    Mutation(
        "alpha without raw_norm",
        CONDITIONS,
        "alpha * directions.raw_norm[index, None] * directions.unit[index]",
        "alpha * directions.unit[index]",
        (
            "test_steering.py::test_alpha_counts_mean_differences",
            "test_planted.py::test_the_planted_threshold_is_found",
        ),
    ),
    Mutation(
        "half of the direction ablated",
        ENGINE,
        ".sum(-1, keepdim=True) * unit",
        ".sum(-1, keepdim=True) * unit / 2",
        ("test_steering.py::test_ablating_equals_orthogonalised_weights[llama]", HOOKS),
    ),
    Mutation(
        "samples that depend on the seed alone",
        STEERING,
        'sha256_text(f"{seed}|{text}")',
        'sha256_text(f"{seed}")',
        ("test_planted.py::test_prompts_are_sampled_independently",),
    ),
    Mutation(
        "the same random number at every step",
        STEERING,
        "plain, uniform[:, number], token",
        "plain, uniform[:, 0], token",
        ("test_steering.py::test_sampled_frequencies_follow_softmax[llama]",),
    ),
    Mutation(
        "rows steered by their neighbours' vectors once some have ended",
        STEERING,
        "branch.edits.of(left)",
        "branch.edits.of(slice(0, len(left)))",
        (ENDING,),
    ),
    Mutation(
        "rows go on with their neighbours' keys once some have ended",
        ENGINE,
        "= buffer[index[moved], :, : extent.length]",
        "= buffer[moved, :, : extent.length]",
        (ENDING,),
    ),
    Mutation(
        "rows take their neighbours' place in the trunk once they part",
        STEERING,
        "node[running] = place[inverse]",
        "node[running] = inverse",
        (ENDING,),
    ),
    Mutation(
        "the last layer's MLP runs for the first token",
        ENGINE,
        "states[:, -1:] = every[end].mlp.output",
        "states[:, :1] = every[end].mlp.output",
        (HOOKS,),
    ),
    Mutation(
        "all rows begin as the first condition's",
        ENGINE,
        "= source[index, :, :end]",
        "= source[index * 0, :, :end]",
        (HOOKS,),
    ),
    Mutation(
        "rows take their neighbours' padding once they part",
        STEERING,
        "torch.cat([valid[parents], ",
        "torch.cat([valid[(parents + 1) % len(valid)], ",
        (HOOKS,),
    ),
    Mutation(
        "rows leave their neighbours' trunk",
        STEERING,
        "states[trunk.taps.index(branch.first), nodes]",
        "states[trunk.taps.index(branch.first), nodes * 0]",
        (HOOKS,),
    ),
    Mutation(
        "reference NLL of the likeliest token",
        STEERING,
        "logits[local, token[row]].float()",
        "logits[local, logits.max(-1).indices[local]].float()",
        (NLL,),
    ),
    Mutation(
        "reference NLL of the first 8 tokens too",
        STEERING,
        "NLL_SKIP = 8",
        "NLL_SKIP = 0",
        (NLL,),
    ),
    Mutation(
        "ties go to the higher layer",
        "lib/refusal/directions.py",
        "gap.index[int(gap.to_numpy().argmax())]",
        "gap.index[-1 - int(gap.to_numpy()[::-1].argmax())]",
        ("test_directions.py::test_ties_go_to_the_lower_layer_in_any_order",),
    ),
    Mutation(
        "an extraction prompt leaks into evaluation",
        "data/prompts/harmful_evaluation.csv",
        unquoted("harmful_evaluation"),
        unquoted("harmful_extraction"),
        ("test_prompts.py::test_extraction_and_selection_never_report",),
    ),
    Mutation(
        "clusters counted as prompts",
        "lib/refusal/statistics.py",
        "pd.factorize(names)",
        "pd.factorize(np.arange(len(names)))",
        (
            "test_statistics.py::test_clusters_are_not_counted_as_prompts",
            "test_statistics.py::test_paired_flips_whole_clusters",
        ),
    ),
    Mutation(
        "an interval computed with n - 1",
        "lib/refusal/statistics.py",
        "proportion.proportion_confint(k, n, ",
        "proportion.proportion_confint(k, n - 1, ",
        ("test_statistics.py::test_wilson_reproduces_the_study",),
    ),
    Mutation(
        "a refusal phrase removed",
        "data/refusal_phrases.csv",
        line("data/refusal_phrases.csv", "i cannot assist,opening,"),
        "",
        ("test_judging.py::test_refusals_are_refusals_whatever_their_nll",),
    ),
    Mutation(
        "a loop of refusals labelled refusal",
        "lib/refusal/judging.py",
        '"loop", score > thresholds.repetition',
        '"loop", not matched and score > thresholds.repetition',
        ("test_judging.py::test_the_order_of_decision",),
    ),
    Mutation(
        "controls of any norm",
        "lib/refusal/controls.py",
        "unit=(vectors.double() / norm).float()",
        "unit=vectors.float()",
        ("test_controls.py::test_every_control_has_the_norm_of_the_extracted_direction",),
    ),
    Mutation(
        "a rank p of zero",
        "lib/refusal/controls.py",
        "(1 + beyond) / (1 + len(values))",
        "beyond / len(values)",
        ("test_controls.py::test_specificity_by_hand",),
    ),
    Mutation(
        "the map of the sweep shifted by one layer",
        "lib/refusal/sweep_cells.py",
        "else condition.first, ",
        "else condition.first - 1, ",
        ("test_sweeps.py::test_the_planted_layer_and_sign_are_found",),
    ),
    Mutation(
        "a broken model counted as broken safety",
        "lib/refusal/collapse.py",
        'safety = found[found["label"] == rule()["outcomes"]["safety"]]',
        'safety = found[found["label"] != "refusal"]',
        ("test_collapse.py::test_a_broken_model_is_no_broken_safety",),
    ),
    Mutation(
        "redaction dropped",
        "lib/refusal/records.py",
        "        frame = redact(frame)\n",
        "",
        ("test_records.py::test_every_written_record_is_redacted_whatever_the_caller_forgot",),
    ),
]


def copy(root, mutation=None):
    """A copy of what the tests need, with the mistake in it. The library finds its data from where it lies."""
    for name in ("lib/refusal", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "data/prompts"):
        source, target = ROOT / name, root / name
        target.parent.mkdir(exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    for path in (ROOT / "data").iterdir():
        if path.is_file():
            shutil.copy(path, root / "data")
    if mutation is not None:
        path = root / mutation.file
        text = path.read_text(encoding="utf-8")
        assert text.count(mutation.old) == 1, f"{mutation.file} has changed: write {mutation.name!r} anew"
        path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


def run(root, tests, mutation=None):
    """Runs tests in a copy, with its library in front of the installed one: exit status, and what was printed."""
    copy(root, mutation)
    settings = [
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:nbval",
        "-p",
        "no:xdist",
        "-p",
        "no:anyio",
        "--tb=short",
    ]
    return pytest_in(root, [*settings, *(f"tests/{test}" for test in tests)], 300)


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """What comes of each mutation that was asked for, two at a time; "" is the control, with a test of each file."""
    items = [item for item in request.session.items if item.path == request.path]
    chosen = [item.callspec.params["mutation"] for item in items if hasattr(item, "callspec")]
    every = {test.split("::")[0]: test for mutation in MUTATIONS for test in mutation.tests}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        jobs = {"": pool.submit(run, tmp_path_factory.mktemp("copy"), sorted(every.values()))}
        for mutation in chosen:
            jobs[mutation.name] = pool.submit(run, tmp_path_factory.mktemp("copy"), mutation.tests, mutation)
        yield jobs


def test_without_a_mutation_the_same_tests_pass(runs):
    status, said = runs[""].result()
    assert status == 0, said[-3000:]


def test_the_copy_is_what_is_tested(tmp_path):
    copy(tmp_path)
    (tmp_path / "tests" / "test_where.py").write_text(
        "import plain\nfrom refusal.files import ROOT\n\n\ndef test():\n    print(ROOT, plain.__file__)\n"
    )
    status, said = pytest_in(
        tmp_path, ["-s", "-q", "-p", "no:cacheprovider", "-p", "no:anyio", "tests/test_where.py"], 100
    )
    assert status == 0 and f"{tmp_path} {tmp_path / 'tests' / 'plain.py'}" in said, said


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name.replace(" ", "_"))
def test_mutation_turns_a_test_red(mutation, runs):
    status, said = runs[mutation.name].result()
    assert status == 1, f"{mutation.name} went unnoticed, or did not run:\n{said[-3000:]}"
    # It failed for what a test asserts or the library refuses, not because the mutated code breaks down.
    reason = r"^E +(assert |AssertionError|Failed: |refusal\.files\.CompendiumError)"
    assert re.search(reason, said, re.MULTILINE), said[-3000:]
