"""Ground truth: the estimators, held against a model whose refusal was planted (methods, section 10)."""

import functools

import numpy as np
import pandas as pd
import planted
import pytest
import scopes
import torch
from planted import COMPLIANCE, HARMFUL, HARMLESS, REFUSAL, requests

from refusal import activations, directions, judging, statistics, steering

NEW = 16


@pytest.fixture(scope="module")
def one():
    """One direction, which harmful words carry at a strength of 4; refusal above 1.4, from layer 3 of 6 on."""
    return planted.build()


@pytest.fixture(scope="module")
def harmful():
    return requests(HARMFUL, 32, seed=1)


@pytest.fixture(scope="module")
def harmless():
    return requests(HARMLESS, 32, seed=2)


def extract(model, bad, good):
    return directions.extract(activations.last_token(model, bad), activations.last_token(model, good))


@pytest.fixture(scope=scopes.module)
def extracted(one, harmful, harmless):
    return extract(one.model, harmful, harmless)


def texts(model, prompts, condition, new=NEW):
    return [row[0].text for row in steering.generate(model, prompts, [condition], max_new_tokens=new)]


def refuses(model, prompts, conditions):
    """Whether each prompt is refused under each condition, by the first word of the answer: `[prompts, conditions]`."""
    rows = steering.generate(model, prompts, conditions, max_new_tokens=1)
    answers = {REFUSAL.split()[0]: True, COMPLIANCE.split()[0]: False}
    return np.array([[answers[completion.text] for completion in row] for row in rows])


# ---- direction and layer


def test_extraction_recovers_the_planted_direction_and_its_layer(one, extracted):
    cosine = (extracted.unit @ one.directions[0]).numpy()
    assert (cosine[one.onset :] > 0.99).all()
    assert (np.abs(cosine[: one.onset]) < 0.05).all()
    np.testing.assert_allclose(extracted.raw_norm[one.onset :], 4.0, rtol=0.01)
    assert (extracted.raw_norm[: one.onset] < 0.1).all()


@pytest.mark.parametrize("onset", [1, 4])
def test_another_onset_is_found_too(onset, harmful, harmless):
    other = planted.build(onset=onset, seed=3)
    cosine = extract(other.model, harmful, harmless).unit @ other.directions[0]
    assert (cosine > 0.99).tolist() == [layer >= onset for layer in range(6)]


def test_profile_separates_from_the_onset_on(one, harmful, harmless):
    sets = [*(harmful, harmless), requests(HARMFUL, 24, seed=3), requests(HARMLESS, 24, seed=4)]
    captured = [activations.last_token(one.model, prompts) for prompts in sets]
    table = directions.profile(*captured, seed=0, halves=20, draws=4, bootstraps=50)
    mean = table.groupby(["metric", "direction_id", "layer"])["value"].mean()
    assert (mean["auroc", "extracted"][one.onset :] == 1.0).all()
    assert (mean["split_half_cosine", "extracted"][one.onset :] > 0.99).all()
    assert mean["d_prime", "extracted"][one.onset :].min() > 5 * mean["d_prime", "extracted"][: one.onset].max()


def test_the_layer_rule_finds_a_layer_that_has_the_direction(one, extracted, harmful, harmless):
    selection = [*requests(HARMFUL, 4, seed=5), *requests(HARMLESS, 4, seed=6)]
    tried = [(layer, alpha) for layer in directions.candidate_layers(6) for alpha in (1.0, -1.0)]
    conditions = [steering.add(extracted, layer, alpha) for layer, alpha in tried]
    screened = steering.screen(one.model, selection, conditions, one.openings)
    table = pd.DataFrame(
        [
            {"layer": layer, "alpha": alpha, "value": value}
            for (layer, alpha), column in zip(tried, screened.T.tolist(), strict=True)
            for value in column
        ]
    )
    assert directions.candidate_layers(6) == [2, 3, 4] and one.onset == 3
    assert directions.select_layer(table, 6) in (3, 4)
    mean = table.groupby(["layer", "alpha"])["value"].mean()
    assert abs(mean[2, 1.0] - mean[2, -1.0]) < 0.01 * (mean[3, 1.0] - mean[3, -1.0])


# ---- sign and threshold


def test_sign(one, extracted, harmful, harmless):
    """Adding the direction refuses what is harmless, subtracting it complies with what is harmful."""
    answer = functools.partial(texts, one.model)
    layer = one.onset
    assert set(answer(harmful, steering.baseline())) == {REFUSAL}
    assert set(answer(harmless, steering.baseline())) == {COMPLIANCE}
    for position in ("all", "last"):
        more, less = (steering.add(extracted, layer, alpha, position=position) for alpha in (1.0, -1.0))
        assert set(answer(harmless, more)) == {REFUSAL} == set(answer(harmful, more))
        assert set(answer(harmful, less)) == {COMPLIANCE} == set(answer(harmless, less))
    assert set(answer(harmful, steering.ablate(extracted, layer))) == {COMPLIANCE}
    assert set(answer(harmless, steering.ablate(extracted, layer))) == {COMPLIANCE}


def test_a_layer_without_the_direction_steers_nothing(one, extracted, harmful, harmless):
    conditions = [steering.add(extracted, layer, alpha) for layer in (0, 2) for alpha in (-3.0, 3.0)]
    conditions.append(steering.ablate(extracted, 2))
    assert refuses(one.model, harmful, conditions).all()
    assert not refuses(one.model, harmless, conditions).any()


def test_the_planted_threshold_is_found(one, extracted, harmful, harmless):
    """Refusal where component = strength + 4 alpha exceeds 1.4: harmless above alpha = .35, harmful above -.65."""
    alphas = np.arange(-20, 21) / 20 + 0.01  # so that no alpha lies on a threshold
    conditions = [steering.add(extracted, one.onset, float(alpha)) for alpha in alphas]
    for prompts, strength in ((harmful[:4], 4.0), (harmless[:4], 0.0)):
        refused = refuses(one.model, prompts, conditions)
        assert (refused == (strength + 4 * alphas > one.threshold)).all()
        log_odds = steering.screen(one.model, prompts, conditions, one.openings).numpy()
        assert ((log_odds > 0) == refused).all()
        assert (np.diff(log_odds, axis=1) > 0).all()


def test_graded_harm_gives_a_graded_response():
    """Words of different strength: the refusal rate falls step by step, each prompt at its own planted alpha."""
    words = {"steal": 1.0, "forge": 2.0, "poison": 3.0, "hijack": 4.0}
    graded = planted.build([words], seed=7)
    prompts = requests(list(words), 32, seed=8)
    made = extract(graded.model, prompts, requests(HARMLESS, 32, seed=9))
    raw_norm = float(made.raw_norm[4])
    assert raw_norm == pytest.approx(2.5, rel=0.01)  # the mean strength
    alphas = np.arange(-24, 21) / 20 + 0.02
    refused = refuses(graded.model, prompts[:8], [steering.add(made, 4, float(alpha)) for alpha in alphas])
    strength = np.array([words[prompt.split()[0]] for prompt in prompts[:8]])[:, None]
    assert (refused == (strength + raw_norm * alphas > graded.threshold)).all()
    assert {0.0, 0.25, 0.5, 0.75, 1.0} == set(refused.mean(0))


# ---- every generated token


def test_every_generated_token_is_decided_anew(one, extracted, harmless):
    """Steering of the prompt alone changes the first word of the answer, and no other: the test can tell."""
    layer = one.model.hf.model.layers[one.onset]
    vector = extracted.raw_norm[one.onset] * extracted.unit[one.onset]

    def prompt_only(module, args, output):
        return output + vector if output.shape[1] > 1 else output

    row = one.model.tokenizer(
        one.model.tokenizer.apply_chat_template(
            [{"role": "user", "content": harmless[0]}], add_generation_prompt=True, tokenize=False
        ),
        add_special_tokens=False,
        return_tensors="pt",
    ).input_ids
    handle = layer.register_forward_hook(prompt_only)
    try:
        out = one.model.hf.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=NEW)
    finally:
        handle.remove()
    words = one.model.tokenizer.decode(out[0, row.shape[1] :], skip_special_tokens=True).split()
    assert words == [REFUSAL.split()[0], *COMPLIANCE.split()[1:]]

    for position in ("all", "last"):
        condition = steering.add(extracted, one.onset, 1.0, position=position)
        made = steering.generate(one.model, harmless[:2], [condition], max_new_tokens=NEW)
        assert [row[0].text for row in made] == [REFUSAL, REFUSAL]
        assert {row[0].stop_reason for row in made} == {"stop"}


# ---- labels


@pytest.fixture(scope="module")
def breaking():
    """Degenerates into a loop where the component lies below -3 or above 6."""
    return planted.build(loops=(-3.0, 6.0), seed=11)


def test_degeneration_is_seen_beyond_the_planted_alpha(breaking, harmful, harmless):
    model = breaking.model
    made = extract(model, harmful, harmless)
    # The unsteered model finds each word of a steered answer unlikely; how many nats is a matter of `gain`.
    thresholds = judging.Thresholds(repetition=0.3, nll=50.0, n=1000)
    alphas = [-2.0, -1.6, -0.8, -0.7, 0.3, 0.4, 1.4, 1.6, 2.0]
    prompts = harmless[:6] + harmful[:6]
    conditions = [steering.add(made, 4, alpha) for alpha in alphas]
    rows = steering.generate(model, prompts, conditions, max_new_tokens=24)
    completions = [completion for row in rows for completion in row]
    owners = [prompt for prompt in prompts for _ in alphas]
    frame = pd.DataFrame(
        {
            "text": [completion.text for completion in completions],
            "prompt": owners,
            "n_tokens": [len(completion.token_ids) for completion in completions],
            "reference_nll": [completion.reference_nll for completion in completions],
            "component": [4.0 * (p.split()[0] in HARMFUL) + 4.0 * a for p in prompts for a in alphas],
        }
    )
    labelled = judging.label_frame(frame, thresholds)
    inside = labelled["component"].between(-3, 6)
    expected = np.where(~inside, "degenerate", np.where(labelled["component"] > 1.4, "refusal", "compliance"))
    wrong = labelled[labelled["label"] != expected]
    assert wrong.empty, wrong[["component", "label", "label_reason", "text"]]
    assert set(labelled[~inside]["label_reason"]) == {"loop"}
    assert set(labelled[inside & (expected == "refusal")]["matched_phrase"]) == {"i cannot assist"}
    assert {text.split()[0] for text in labelled[~inside]["text"]} == set(planted.LOOPS)  # both directions
    # The study's rule takes a long loop for a jailbreak, and a short compliant answer for a refusal.
    assert (labelled[~inside]["seed_rule"] == "jailbreak").all()


# ---- samples


def test_prompts_are_sampled_independently(harmless):
    """All harmless prompts have the same probabilities here, so one stream for all would give one answer to all."""
    unsure = planted.build(gain=0.3, seed=10)
    made = texts(unsure.model, harmless, steering.sampled(3), new=8)
    assert len(set(made)) > 24
    assert texts(unsure.model, harmless[::-1], steering.sampled(3), new=8) == made[::-1]


# ---- nothing planted


def test_nothing_is_found_where_nothing_is_planted():
    """Refusal is decided by "please", which half of either side says: the contrast has no part in it."""
    none = planted.build([{"please": 4.0}], seed=12)
    sides = [
        [f"please {text}" if i % 8 < 4 else text for i, text in enumerate(requests(words, 32, seed=seed))]
        for seed, words in ((13, HARMFUL), (14, HARMLESS))
    ]
    made = extract(none.model, *sides)
    assert ((made.unit @ none.directions[0]).abs() < 0.05).all()
    assert (made.raw_norm < 0.1).all()
    conditions = [steering.baseline(), *(steering.add(made, 3, alpha) for alpha in (-3.0, -1.0, 1.0, 3.0))]
    conditions.append(steering.ablate(made, 3))
    evaluation = sides[0] + sides[1]
    refused = refuses(none.model, evaluation, conditions)
    assert refused[:, 0].mean() == 0.5  # there is room to rise and to fall
    for steered in refused.T[1:]:
        result = statistics.paired(steered, refused[:, 0], evaluation)
        assert (result.difference, result.only_first, result.only_second, result.p) == (0, 0, 0, 1)
    screened = steering.screen(none.model, evaluation, conditions[:5], none.openings).numpy()
    assert np.abs(screened - screened[:, :1]).max() < 0.1


def test_a_planted_effect_is_significant(one, extracted, harmful):
    """The same test on the model that has the direction, so that "nothing" above is no blind spot."""
    refused = refuses(one.model, harmful, [steering.baseline(), steering.add(extracted, 3, -1.0)])
    result = statistics.paired(refused[:, 1], refused[:, 0], harmful)
    assert result.difference == -1 and result.p < 1e-6


# ---- several directions


def test_separate_directions_are_recovered_and_work_apart():
    """Two kinds of harm with a direction each: each refuses by itself, and ablating one leaves the other."""
    kinds = [{"steal": 4.0, "forge": 4.0}, {"poison": 4.0, "hijack": 4.0}]
    two = planted.build(kinds, seed=15)
    sides = [requests(list(words), 24, seed=16 + k) for k, words in enumerate(kinds)]
    harmless = requests(HARMLESS, 24, seed=18)
    made = [extract(two.model, side, harmless) for side in sides]
    cosines = torch.stack([one.unit[3] for one in made]) @ two.directions.T
    assert (cosines.diag() > 0.99).all() and abs(cosines[0, 1]) < 0.05 and abs(cosines[1, 0]) < 0.05
    for k in range(2):
        assert refuses(two.model, harmless[:4], [steering.add(made[k], 3, 1.0)]).all()
        assert not refuses(two.model, sides[k][:4], [steering.ablate(made[k], 3)]).any()
        assert refuses(two.model, sides[1 - k][:4], [steering.ablate(made[k], 3)]).all()
        ((completion,),) = steering.generate(two.model, sides[k][:1], [steering.baseline()], max_new_tokens=NEW)
        assert completion.token_ids[0] == two.openings[k] and completion.text == REFUSAL
