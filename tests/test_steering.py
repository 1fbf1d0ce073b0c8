"""The steering gates: what steering must do, held against plain transformers and torch hooks, in float32."""

import collections
import copy
import dataclasses
import hashlib
import math

import numpy as np
import pytest
import scopes
import torch
import twin
from plain import PROMPTS, Plain, one_sentence
from scipy import stats

from refusal import engine, models, prefixes, steering
from refusal.directions import Directions
from refusal.files import CompendiumError
from refusal.steering import Condition

NEW = 24


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def model(tiny_models, architecture):
    return tiny_models[architecture]


@pytest.fixture(scope="module")
def plain(architecture):
    return Plain(architecture)


@pytest.fixture(scope="module")
def directions():
    """A random direction a layer, of different norms, large enough to change what the tiny models say."""
    unit = torch.nn.functional.normalize(torch.randn(4, 32, generator=torch.Generator().manual_seed(1)), dim=-1)
    return Directions("random", unit, torch.tensor([3.0, 6.0, 9.0, 12.0]), torch.tensor([8.0, 10.0, 12.0, 15.0]))


@pytest.fixture(scope=scopes.module)
def conditions(directions):
    """Different operations, layers, signs and positions, to be rows of one batch."""
    return [
        steering.baseline(),
        steering.add(directions, 1, 1.0),
        steering.add(directions, 1, -1.0),
        steering.add(directions, 0, 2.0),
        steering.add(directions, 3, 1.5),
        steering.add(directions, [0, 2, 3], 0.7),
        steering.add(directions, 1, 1.0, position="last"),
        steering.add(directions, [1, 2], -0.8, position="last"),
        steering.ablate(directions, 1),
        ablate_at(directions, 2),
    ]


def ablate_at(directions, layer, position="all"):
    """Ablation at one layer only, which the library offers through `Condition`."""
    return Condition(
        f"ablate@{layer}", "ablate", "random", (layer,), vectors=directions.unit[[layer]], position=position
    )


def tokens(rows):
    return [[(completion.token_ids, completion.stop_reason) for completion in row] for row in rows]


OPENINGS = [5, 17, 60, 201]


def log_odds(plain, conditions):
    """Of an opening at the first token, float64 `[prompts, conditions]`."""
    p = [[plain.logits(text, one).softmax(-1)[OPENINGS].sum() for one in conditions] for text in PROMPTS]
    return torch.tensor(p, dtype=torch.float64).logit()


def says_and_begins_as(plain, conditions, made, model):
    """Completions of 12 tokens, and the screen, are those of the plain model."""
    for text, row in zip(PROMPTS, tokens(made), strict=True):
        assert row == [plain.generate(text, condition, 12) for condition in conditions]
    screened = steering.screen(model, PROMPTS, conditions, OPENINGS).double()
    torch.testing.assert_close(screened, log_odds(plain, conditions), rtol=0, atol=1e-3)


# ---- against plain transformers


def test_alpha_zero_equals_plain_generation(model, plain, directions):
    untouched = [steering.baseline(), steering.add(directions, 1, 0.0), steering.add(directions, [0, 1, 2, 3], 0)]
    for text, row in zip(
        PROMPTS, tokens(steering.generate(model, PROMPTS, untouched, max_new_tokens=NEW)), strict=True
    ):
        assert row == [plain.generate(text, Condition("plain"), NEW)] * 3


def test_nnsight_equals_plain_hooks(model, plain, conditions):
    made = steering.generate(model, PROMPTS, conditions, max_new_tokens=NEW)
    for text, row in zip(PROMPTS, tokens(made), strict=True):
        for condition, completion in zip(conditions, row, strict=True):
            assert completion == plain.generate(text, condition, NEW), condition.name
    # The comparison says something only where conditions and prompts lead to different tokens.
    assert len({completion.token_ids for row in made for completion in row}) > 0.8 * len(PROMPTS) * len(conditions)
    assert np.mean([len(completion.token_ids) for row in made for completion in row]) > NEW / 2
    stopped = next((c for row in made for c in row if c.stop_reason == "stop"), None)
    assert stopped is None or not set(stopped.token_ids) & set(model.stop_ids)


@pytest.mark.parametrize("layers", [(1,), (0, 2, 3)])
def test_adding_equals_a_bias_of_the_module_before(model, plain, directions, layers):
    """The vector as the bias of down_proj, whose output is added to the residual stream at the block's end."""
    folded = copy.deepcopy(plain)
    condition = steering.add(directions, list(layers), 0.9)
    for layer, vector in zip(condition.layers, condition.vectors, strict=True):
        folded.hf.model.layers[layer].mlp.down_proj.bias = torch.nn.Parameter(vector.clone(), requires_grad=False)
    rows = tokens(steering.generate(model, PROMPTS, [condition], max_new_tokens=NEW))
    assert rows == [[folded.generate(text, Condition("plain"), NEW)] for text in PROMPTS]
    assert rows != [[plain.generate(text, Condition("plain"), NEW)] for text in PROMPTS]


def without(weight, unit):
    """A matrix that writes to the residual stream, and now writes nothing along `unit`."""
    return weight - torch.outer(unit, unit @ weight)


def test_ablating_equals_orthogonalised_weights(architecture, directions):
    """Arditi et al. (2024), equation 5: ablation is the same as weights that cannot write the direction.

    Ours ablates at the embeddings and at the blocks' outputs, so a block's MLP still reads what its attention wrote.
    For the two to be the same, no attention may write the direction in either model.
    """
    unit = directions.unit[2]
    base, folded = Plain(architecture), Plain(architecture)
    for hf in (base.hf, folded.hf):
        hf.lm_head.weight = torch.nn.Parameter(hf.lm_head.weight.clone(), requires_grad=False)  # no longer tied
        for block in hf.model.layers:
            block.self_attn.o_proj.weight.copy_(without(block.self_attn.o_proj.weight, unit))
    embedded = folded.hf.model.embed_tokens.weight
    folded.hf.model.embed_tokens.weight = torch.nn.Parameter(without(embedded.T, unit).T, requires_grad=False)
    for block in folded.hf.model.layers:
        block.mlp.down_proj.weight.copy_(without(block.mlp.down_proj.weight, unit))
    plainly = [[base.generate(text, Condition("plain"), NEW)] for text in PROMPTS]
    expected = [[folded.generate(text, Condition("plain"), NEW)] for text in PROMPTS]
    model = models.wrap(base.hf, base.tokenizer, "tiny", stop=("<|endoftext|>",))
    assert tokens(steering.generate(model, PROMPTS, [steering.ablate(directions, 2)], max_new_tokens=NEW)) == expected
    assert plainly != expected


@pytest.mark.parametrize("architecture", ["gemma2", "mistral"])
def test_other_architectures_of_the_registry(architecture, conditions):
    """Gemma 2 and Mistral: windows shorter than the prompts, capped logits, scaled embeddings, norms after the MLP."""
    plain, other = Plain(architecture), Plain(architecture)
    model = models.wrap(other.hf, other.tokenizer, "tiny", stop=("<|endoftext|>",))
    some = [*conditions[:7], conditions[8]]
    says_and_begins_as(plain, some, steering.generate(model, PROMPTS, some, max_new_tokens=12), model)


# ---- cache and batch


def test_with_cache_and_sharing_equals_without(model, conditions):
    """Keys and values, the trunk and the prompts' common beginning against passes that begin anew at every token."""
    made = steering.generate(model, PROMPTS, conditions, max_new_tokens=8)
    for text, row in zip(PROMPTS, made, strict=True):
        for condition, completion in zip(conditions, row, strict=True):
            ids, reason, _ = twin.generate(model, text, condition, 8)
            assert (completion.token_ids, completion.stop_reason) == (ids, reason), condition.name


@pytest.mark.parametrize("score", [True, False])
def test_what_is_shared_changes_nothing(model, conditions, monkeypatch, score):
    """Without a common beginning, in passes of one prompt, and with a trunk row a row: the same tokens."""
    usual = steering.generate(model, PROMPTS, conditions, max_new_tokens=NEW, score=score)
    encode, divide = engine.encode, steering._divide

    def alone(node, token, running):
        """Rows that say the same part all the same: the token is told from its neighbours' by its row."""
        row = torch.arange(len(node))
        parents, both = divide(node, token + (row << 16), running)
        return parents, both & (2**16 - 1)

    monkeypatch.setattr(engine, "PASS_TOKENS", 1)
    monkeypatch.setattr(engine, "HEAD_ROWS", 7)
    assert tokens(steering.generate(model, PROMPTS, conditions, max_new_tokens=NEW, score=score)) == tokens(usual)
    monkeypatch.setattr(engine, "encode", lambda model, texts, room=0: encode(model, texts, room, share=False))
    monkeypatch.setattr(steering, "_divide", alone)
    again = steering.generate(model, PROMPTS, conditions, max_new_tokens=NEW, score=score)
    assert tokens(again) == tokens(usual)
    for rows, others in zip(again, usual, strict=True):
        for one, other in zip(rows, others, strict=True):
            assert one.reference_nll == pytest.approx(other.reference_nll, rel=1e-4, nan_ok=True)
            assert score or math.isnan(one.reference_nll)


def test_rows_that_say_the_same_share_the_trunk(model, directions, monkeypatch):
    """Four times the same condition costs the trunk no more rows than once."""
    counts, step = [], engine.step

    def counted(model, keys, token, valid, **where):
        counts.append((where["top"], len(token)))
        return step(model, keys, token, valid, **where)

    monkeypatch.setattr(engine, "step", counted)
    same = [steering.add(directions, 2, 1.0)] * 4
    made = steering.generate(dataclasses.replace(model, stop_ids=(-1,)), PROMPTS, same, max_new_tokens=6, score=False)
    assert counts == [(2, len(PROMPTS)), (3, 4 * len(PROMPTS))] * 5
    assert all(row == [row[0]] * 4 for row in tokens(made))


def test_rows_that_part_keep_their_nodes_and_as_many_as_can_their_places():
    """Rows are at one node as long as they have said the same; a node whose parent had its place is not copied."""
    rng = np.random.default_rng(2)
    for rows, nodes, vocabulary in [(1, 1, 5), (40, 7, 3), (40, 12, 2), (60, 30, 151_936)]:
        node, token = torch.tensor(rng.integers(nodes, size=rows)), torch.tensor(rng.integers(vocabulary, size=rows))
        running = torch.tensor(rng.random(rows) < 0.8)
        old = node.clone()
        parents, said = steering._divide(node, token, running)
        assert node[~running].tolist() == old[~running].tolist()
        assert parents[node[running]].tolist() == old[running].tolist()
        assert said[node[running]].tolist() == token[running].tolist()
        apart = set(zip(old[running].tolist(), token[running].tolist(), strict=True))
        assert sorted(zip(parents.tolist(), said.tolist(), strict=True)) == sorted(apart)
        stay = {parent for parent, _ in apart if parent < len(apart)}
        assert {place for place, parent in enumerate(parents.tolist()) if place == parent} == stay


@pytest.mark.parametrize("pick", [["ablate random"], ["ablate random", "random +2"], ["random -1"], ["random +1.5"]])
def test_without_an_unsteered_row_or_a_score_the_trunk_ends_early(model, plain, conditions, pick):
    """At the embeddings, at a layer, at the last one; then its logits are not there."""
    some = [next(one for one in conditions if one.name == name) for name in pick]
    made = steering.generate(model, PROMPTS, some, max_new_tokens=12, score=False)
    assert all(math.isnan(completion.reference_nll) for row in made for completion in row)
    says_and_begins_as(plain, some, made, model)


def test_a_sampled_row_may_be_steered(model, directions):
    """At alpha 0 it says what the unsteered row of the same seed says; at alpha 1 something else."""
    nothing, something = (dataclasses.replace(steering.add(directions, 1, a), seed=4) for a in (0.0, 1.0))
    for row in tokens(steering.generate(model, PROMPTS, [steering.sampled(4), nothing, something], max_new_tokens=NEW)):
        assert row[0] == row[1] != row[2]


def test_directions_of_another_model_are_refused(model):
    for layers, make in (
        (6, lambda made: steering.add(made, 5, 1.0)),
        (3, lambda made: steering.ablate(made, 1)),
        (6, lambda made: steering.ablate(made, 1)),
    ):
        other = Directions("other", torch.eye(layers, 32), torch.ones(layers), torch.ones(layers))
        condition = make(other)
        one_sentence(lambda c=condition: steering.generate(model, ["Hi"], [c], max_new_tokens=2), "last layer is 3")
        one_sentence(lambda c=condition: steering.screen(model, ["Hi"], [c], [5]), "last layer is 3")


@pytest.mark.parametrize("count", [1, 2, 200])
def test_any_number_of_rows(model, plain, directions, count):
    """One row, two, and 200 (50 conditions), which divide, move and end in one batch."""
    steered = [steering.add(directions, 1 + n % 2, (n - 25) / 10) for n in range(50)]
    texts = PROMPTS if count == 200 else PROMPTS[3:]
    wanted = steered[:count]
    for text, row in zip(texts, tokens(steering.generate(model, texts, wanted, max_new_tokens=12)), strict=True):
        assert row == [plain.generate(text, condition, 12) for condition in wanted]


def test_a_batch_equals_single_prompts_and_conditions(model, conditions):
    """Prompts of 1 to 50 words and conditions of different layers, all in one batch and each alone."""
    some = [*conditions, steering.sampled(5)]
    together = tokens(steering.generate(model, PROMPTS, some, max_new_tokens=12))
    alone = [[tokens(steering.generate(model, [t], [c], max_new_tokens=12))[0][0] for c in some] for t in PROMPTS]
    assert together == alone
    assert tokens(steering.generate(model, PROMPTS[::-1], some[::-1], max_new_tokens=12)) == [
        row[::-1] for row in together[::-1]
    ]


def test_rows_that_end_leave_the_others_as_they_are(model, conditions, monkeypatch):
    """Common words as stop tokens, so that rows, greedy and sampled, end at many different steps."""
    some = [*conditions, steering.sampled(1), steering.sampled(2)]
    whole = tokens(steering.generate(dataclasses.replace(model, stop_ids=(-1,)), PROMPTS, some, max_new_tokens=NEW))
    common = collections.Counter(token for row in whole for ids, _ in row for token in set(ids[3:]))
    stops = tuple(token for token, _ in common.most_common(5))
    ends = dataclasses.replace(model, stop_ids=stops)
    ran, step = {True: 0, False: 0}, engine.step

    def counted(model, keys, token, valid, edits=None, **where):
        ran[edits is None] += len(token)
        return step(model, keys, token, valid, edits=edits, **where)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", counted)
        made = tokens(steering.generate(ends, PROMPTS, some, max_new_tokens=NEW))
    said = [(text, one, ids) for text, row in enumerate(made) for one, (ids, _) in zip(some, row, strict=True)]
    assert ran[False] == sum(min(len(ids), NEW - 1) for _, one, ids in said if one.first is not None)
    assert ran[True] == len({(text, ids[: n + 1]) for text, _, ids in said for n in range(min(len(ids), NEW - 1))})
    for row, unstopped in zip(made, whole, strict=True):
        for (ids, reason), (all_ids, _) in zip(row, unstopped, strict=True):
            first = next((place for place, token in enumerate(all_ids) if token in stops), NEW)
            assert (ids, reason) == (all_ids[:first], "stop" if first < NEW else "length")
    for text, row in zip(PROMPTS, made, strict=True):
        alone = [steering.generate(ends, [text], [condition], max_new_tokens=NEW) for condition in some]
        assert row == [tokens(one)[0][0] for one in alone]
    lengths = [len(ids) for row in made for ids, _ in row]
    assert len(set(lengths)) > 6 and max(lengths) > NEW / 2


def test_nothing_to_do_is_done(model):
    assert steering.generate(model, [], [steering.baseline()], max_new_tokens=2) == []
    assert steering.generate(model, ["Hi"], [], max_new_tokens=2) == [[]]


# ---- which tokens are steered


@pytest.mark.parametrize("share", [True, False])
def test_every_token_but_padding_is_steered(model, plain, directions, share, monkeypatch):
    """The residual stream's change at every position and step, shared beginning included; padding is left alone.

    What enters the block after the steered one is held against what an unsteered model makes of the same tokens there:
    blocks up to the steered one cannot know of the steering but through the tokens.
    """
    layer, new = 1, 6
    conditions = [
        steering.add(directions, layer, 1.0),
        steering.add(directions, layer, -2.0, position="last"),
        ablate_at(directions, layer),
        ablate_at(directions, layer, position="last"),
        steering.add(directions, layer, 0.0),
    ]
    model = dataclasses.replace(model, stop_ids=(-1,))  # so that no row ends
    encode, seen, padding = engine.encode, [], []
    monkeypatch.setattr(engine, "encode", lambda model, texts, room=0: encode(model, texts, room, share))
    monkeypatch.setattr(engine, "PASS_TOKENS", 10_000)  # all rows in a pass, so that the shorter prompts are padded
    run = engine.run

    def watched(model, keys, inputs, **where):
        if where.get("first") == layer:
            kept = []
            hook = model.hf.model.layers[layer + 1].register_forward_pre_hook(
                lambda module, args, kwargs: kept.append(kwargs.get("hidden_states", args[0] if args else None)),
                with_kwargs=True,
            )
            try:
                done = run(model, keys, inputs, **where)
            finally:
                hook.remove()
            (entered,) = kept
            pads = inputs["attention_mask"][:, -entered.shape[1] :] == 0
            padding.append((entered - where["entering"])[pads])
            seen.append((where["edits"].row, inputs, entered))
            return done
        return run(model, keys, inputs, **where)

    monkeypatch.setattr(engine, "run", watched)
    made = steering.generate(model, PROMPTS, conditions, max_new_tokens=new)
    # the padding's stream is that of the trunk
    assert sum(len(pads) for pads in padding) > 100 and all(not pads.any() for pads in padding)
    if share:
        beginning, *seen = seen
        common = encode(model, PROMPTS).prefix.shape[1]  # Mistral and Gemma have no system prompt to share
        assert beginning[2].shape[:2] == (len(conditions), common) and common > 1
    order = encode(model, PROMPTS, share=share).order
    unit, kinds = directions.unit[layer], set()
    for row in range(len(PROMPTS) * len(conditions)):
        prompt, condition = order[row // len(conditions)], row % len(conditions)
        streams = []
        for rows, inputs, entered in seen:
            valid = inputs["attention_mask"][row, -entered.shape[1] :].bool()
            assert rows[row] == condition, (row, rows, len(seen))
            streams.append(entered[row][valid])
        stream = torch.cat(streams)
        if share:
            stream = torch.cat([beginning[2][condition], stream])
        ids = torch.cat([plain.ids(PROMPTS[prompt])[0], torch.tensor(made[prompt][condition].token_ids[:-1])])
        assert len(stream) == len(ids)
        with torch.no_grad():
            before = plain.hf(ids[None], output_hidden_states=True).hidden_states[layer + 1][0]
        steered = torch.ones(len(ids), 1)
        if conditions[condition].position == "last":
            steered[: len(ids) - new] = 0
        added = directions.raw_norm[layer] * unit
        shadow = -(before @ unit)[:, None] * unit
        expected = [added, -2 * added, shadow, shadow, 0 * added][condition] * steered
        torch.testing.assert_close(stream - before, expected.expand_as(before), rtol=0, atol=2e-4)
        kinds.add(condition)
    assert kinds == set(range(len(conditions)))


def test_what_padding_holds_changes_nothing(model, conditions, monkeypatch):
    openings, whole = [5, 17, 60], prefixes.batch
    made = tokens(steering.generate(model, PROMPTS, conditions, max_new_tokens=8))
    screened = steering.screen(model, PROMPTS, conditions, openings)
    padded = 0

    def littered(*args):
        nonlocal padded
        prefix, batch = whole(*args)
        pads = batch["attention_mask"] == 0
        padded += int(pads.sum())
        litter = torch.randint(3, 400, pads.shape, generator=torch.Generator().manual_seed(3))
        return prefix, {**batch, "input_ids": torch.where(pads, litter, batch["input_ids"])}

    monkeypatch.setattr(prefixes, "batch", littered)
    monkeypatch.setattr(engine, "PASS_TOKENS", 10_000)  # all prompts in a pass, so that padding is computed
    assert tokens(steering.generate(model, PROMPTS, conditions, max_new_tokens=8)) == made
    torch.testing.assert_close(steering.screen(model, PROMPTS, conditions, openings), screened, rtol=0, atol=1e-4)
    assert padded > 200


# ---- sampling


def test_samples_depend_on_seed_and_text_alone(model, directions):
    def sample(prompts, seeds, new=12, others=()):
        rows = [*others, *(steering.sampled(seed) for seed in seeds)]
        made = steering.generate(model, prompts, rows, max_new_tokens=new)
        return [[completion.token_ids for completion in row[len(others) :]] for row in made]

    ((alone,),) = sample(PROMPTS[:1], [3])
    among = sample([PROMPTS[2], PROMPTS[0]], [8, 3, 4], others=[steering.baseline(), steering.add(directions, 1, 1.0)])
    assert among[1][1] == alone
    assert sample(PROMPTS[:1], [3], new=5)[0][0] == alone[:5]
    assert len({ids for row in among for ids in row}) == 6
    greedy = steering.generate(model, PROMPTS[:1], [steering.baseline()], max_new_tokens=12)[0][0].token_ids
    mixed = steering.generate(model, PROMPTS[:1], [steering.sampled(3), steering.baseline()], max_new_tokens=12)[0]
    assert [completion.token_ids for completion in mixed] == [alone, greedy] and alone != greedy


def test_random_numbers_are_drawn_from_the_row_s_seed_and_prompt():
    """By this very rule, since committed records hang on it."""
    some = [steering.sampled(3), steering.baseline(), steering.sampled(12)]
    drawn = steering._uniforms(PROMPTS[:2], some, 5)
    assert drawn.dtype == torch.float64 and bool(drawn[[1, 4]].isnan().all())
    for row, (text, seed) in enumerate((text, seed) for text in PROMPTS[:2] for seed in (3, None, 12)):
        if seed is not None:
            own = int(hashlib.sha256(f"{seed}|{text}".encode()).hexdigest()[:15], 16)
            slow = torch.rand(5, generator=torch.Generator().manual_seed(own), dtype=torch.float64)
            assert drawn[row].tolist() == slow.tolist()


def frequencies_fit(drawn, probabilities):
    """Chi-square p value of drawn token ids, tokens that are expected less than 8 times taken together."""
    expected = probabilities * len(drawn)
    common = expected >= 8
    counts = torch.bincount(torch.tensor(drawn), minlength=len(expected)).double()
    assert common.sum() >= 4
    seen, wanted = ([*x[common].tolist(), float(x[~common].sum())] for x in (counts, expected))
    return stats.chisquare(seen, wanted).pvalue


def test_sampled_frequencies_follow_softmax(model, plain):
    """Of the first token, and of the second one after the commonest first (so that steps are drawn independently)."""
    # In one batch with a stop token at the first place, a completion is empty; that token is counted as the first stop.
    text, total = "How do I bake bread?", 4000
    made = steering.generate(model, [text], [steering.sampled(seed) for seed in range(total)], max_new_tokens=2)[0]
    probabilities = plain.logits(text, Condition("plain")).softmax(-1)
    keep = torch.ones(len(probabilities), dtype=torch.bool)
    keep[plain.stop_ids] = False
    first = [completion.token_ids[0] for completion in made if completion.token_ids]
    stops = total - len(first)
    assert abs(stops - total * float(probabilities[~keep].sum())) <= 4 * math.sqrt(total * 0.25)
    assert frequencies_fit(first, probabilities * keep / probabilities[keep].sum()) > 0.001

    commonest = int((probabilities * keep).argmax())
    ids = torch.cat([plain.ids(text), torch.tensor([[commonest]])], dim=1)
    after = plain.hf(ids).logits[0, -1].double().softmax(-1)
    second = [
        c.token_ids[1] if len(c.token_ids) > 1 else plain.stop_ids[0] for c in made if c.token_ids[:1] == (commonest,)
    ]
    after[plain.stop_ids[0]] += after[plain.stop_ids[1]]
    after[plain.stop_ids[1]] = 0
    assert len(second) > 200
    assert frequencies_fit(second, after) > 0.001


# ---- reference NLL and screen


def test_sampling_inverts_the_cdf_of_a_vocabulary_of_several_blocks():
    logits = 3 * torch.randn(4, 1300, generator=torch.Generator().manual_seed(0))
    logits[1, :700] = logits[2, 900:] = logits[3, [*range(600), *range(800, 1300)]] = -torch.inf
    logits[0, [511, 1023, 1299]] = 9  # each the last of its block, and likely
    logits[2] += 300  # rows differ in scale by more than float32 can hold
    width = logits.shape[1] + -logits.shape[1] % steering.BLOCK
    weights, lse = steering._weights(logits, torch.empty(4, width))
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    edges = logits.double().softmax(-1).cumsum(-1).numpy()
    drawn = [0.0, 1e-9, *np.random.default_rng(1).random(300), np.nextafter(1, 0)]
    for uniform in drawn:
        rows = [3, 0, 2, 1]
        found = steering._sample(weights, rows, torch.full((4,), uniform, dtype=torch.float64))
        slow = [np.searchsorted(edges[row] / edges[row, -1], uniform, side="right") for row in rows]
        assert found.tolist() == slow
    with pytest.raises(ValueError, match="shorter"):
        steering._sample(weights, [0, 1], torch.zeros(1, dtype=torch.float64))


def test_a_reader_of_first_tokens_is_told_whose_they_are(model, conditions):
    read = steering.first_token(model, PROMPTS, conditions, lambda logits, prompt: prompt + logits[:, 0] * 0)
    assert torch.equal(read, torch.arange(len(PROMPTS)).float()[:, None].expand(-1, len(conditions)))


def test_reference_nll_is_that_of_the_unsteered_model(model, conditions):
    """Whatever was done to the row: read off the trunk, which sees the same tokens."""
    some = [*conditions, steering.sampled(3)]
    texts = PROMPTS[1:]
    made = steering.generate(model, texts, some, max_new_tokens=14)
    nothing, values = steering.baseline(), []
    for text, row in zip(texts, made, strict=True):
        for completion in row:
            values.append(completion.reference_nll)
            expected = twin.reference_nll(model, text, completion.token_ids, nothing)
            assert completion.reference_nll == pytest.approx(expected, rel=1e-3, nan_ok=True)
    assert np.isfinite(values).mean() > 0.7
    # under the model as it was steered it would be another
    ids = made[0][1].token_ids
    own = twin.reference_nll(model, texts[0], ids, conditions[1])
    assert abs(own - made[0][1].reference_nll) > 0.01
    short = steering.generate(model, texts, some, max_new_tokens=8)
    assert all(math.isnan(completion.reference_nll) for row in short for completion in row)


def test_a_score_needs_no_unsteered_row_nor_an_unsteered_row_a_score(model, directions):
    """Where no row is steered at the last layer, up to which the trunk would run for its sake."""
    steered = [steering.add(directions, 1, 1.0), steering.add(directions, 0, -2.0)]
    mixed = [steering.baseline(), steering.sampled(3), *steered]
    scored = steering.generate(model, PROMPTS, mixed, max_new_tokens=14)
    assert tokens(steering.generate(model, PROMPTS, mixed, max_new_tokens=14, score=False)) == tokens(scored)
    alone = steering.generate(model, PROMPTS, steered, max_new_tokens=14)
    assert tokens(alone) == [row[2:] for row in tokens(scored)]
    expected = np.array([[one.reference_nll for one in row[2:]] for row in scored])
    assert np.isfinite(expected).mean() > 0.7
    np.testing.assert_allclose([[one.reference_nll for one in row] for row in alone], expected, rtol=1e-4)


def test_screen_equals_hooked_logits(model, plain, conditions, monkeypatch):
    expected = log_odds(plain, conditions)
    for rows, at_once in ((512, 64), (7, 64), (512, 3), (1, 1)):
        monkeypatch.setattr(steering, "ROWS", rows)
        monkeypatch.setattr(steering, "PROMPTS", at_once)
        screened = steering.screen(model, PROMPTS, conditions, OPENINGS)
        assert screened.dtype == torch.float32
        torch.testing.assert_close(screened.double(), expected, rtol=1e-3, atol=1e-3)
    assert expected.std(dim=1).min() > 0.1
    with pytest.raises(CompendiumError, match="no refusal openings"):
        steering.screen(model, PROMPTS, conditions, [])


# ---- conditions


def test_alpha_counts_mean_differences(directions):
    condition = steering.add(directions, [1, 3], -1.5)
    for row, layer in enumerate((1, 3)):
        expected = -1.5 * directions.raw_norm[layer] * directions.unit[layer]
        torch.testing.assert_close(condition.vectors[row], expected)
    assert condition.alpha_absolute == pytest.approx(-9.0)
    assert condition.alpha_relative == pytest.approx(-0.9)
    assert (condition.name, condition.layers, condition.alpha) == ("random -1.5", (1, 3), -1.5)


def test_key_is_of_what_decides_tokens(directions):
    conditions = [
        steering.baseline(),
        steering.sampled(1),
        steering.sampled(2),
        steering.add(directions, 1, 1.0),
        steering.add(directions, 1, -1.0),
        steering.add(directions, 2, 1.0),
        steering.add(directions, 1, 1.0, position="last"),
        steering.ablate(directions, 1),
        steering.ablate(directions, 2),
    ]
    assert len({condition.key() for condition in conditions}) == len(conditions)
    again = Condition("other", "add", "x", (1,), 9.0, conditions[3].vectors.clone())
    assert again.key() == conditions[3].key()


@pytest.mark.parametrize("layer", [-1, 4, True, 1.0, "1", None, [], [1, 1], [0, 4], [0, True], [0.5], math.nan])
@pytest.mark.parametrize("make", [lambda d, layer: steering.add(d, layer, 1.0), steering.ablate], ids=["add", "ablate"])
def test_a_layer_must_be_one_of_the_model_s(directions, make, layer):
    one_sentence(lambda: make(directions, layer), "layer")


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf, 100.5, -1e9, "1", None, True, [1.0], 1j])
def test_alpha_must_be_a_number_in_range(directions, alpha):
    one_sentence(lambda: steering.add(directions, 1, alpha), f"alpha is {alpha!r}", "100")


@pytest.mark.parametrize("position", ["first", "", None, 1])
def test_position_is_all_or_last(directions, position):
    one_sentence(lambda: steering.add(directions, 1, 1.0, position=position), f"position is {position!r}", "'last'")


def test_vectors_must_have_the_model_s_width(tiny_models):
    wide = Directions("wide", torch.eye(4, 48), torch.ones(4), torch.ones(4))
    condition = steering.add(wide, 1, 1.0)
    for call in (
        lambda: steering.generate(tiny_models["llama"], ["Hi"], [condition], max_new_tokens=2),
        lambda: steering.screen(tiny_models["llama"], ["Hi"], [condition], [5]),
    ):
        one_sentence(call, "'wide +1'", "(1, 48)", "(1, 32)")
