"""The study's models, by tiny ones of the same four architectures: loaded as from the hub, and held to every gate."""

import json

import hub
import pytest
import torch
from plain import PROMPTS, one_sentence

# The gates of steering, which run here on this module's `model` and `plain`.
from test_steering import (  # noqa: F401
    NEW,
    conditions,
    directions,
    test_alpha_zero_equals_plain_generation,
    test_every_token_but_padding_is_steered,
    test_nnsight_equals_plain_hooks,
    test_reference_nll_is_that_of_the_unsteered_model,
    test_screen_equals_hooked_logits,
    test_what_is_shared_changes_nothing,
    test_what_padding_holds_changes_nothing,
    tokens,
)

from refusal import activations, chunks, models, registry, steering, weights

ARCHITECTURES = sorted(hub.FAMILIES)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A filled cache and its registry, without a network and without a token; a folder an architecture."""
    root = tmp_path_factory.mktemp("hub")
    folders, entries = hub.fill(root)
    hub.write_registry(root / "models.yaml", entries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setenv("HF_TOKEN", "hf_none")
        yield root, folders


@pytest.fixture
def tiny_registry(cache, monkeypatch):
    """The tiny models' registry in place of the compendium's."""
    monkeypatch.setattr(registry, "REGISTRY", cache[0] / "models.yaml")
    return cache[1]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def model(cache, architecture):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "REGISTRY", cache[0] / "models.yaml")
        return models.load(f"tiny-{architecture}", "float32")


@pytest.fixture(scope="module")
def plain(cache, architecture):
    return hub.Twin(cache[1][architecture], hub.FAMILIES[architecture])


@pytest.fixture(autouse=True)
def openings(monkeypatch):
    """Words in all four vocabularies: the gates' own tokens are bytes in two of them, which are hardly said."""
    monkeypatch.setattr("test_steering.OPENINGS", [300, 317, 360, 401])


# ---- loading


def test_the_tiny_models_stand_for_all_of_the_study():
    """Every hub model of the registry is of an architecture that is tried here."""
    study = {known.id for known in registry.registry().values() if known.source == "hub"}
    qwen2 = {"qwen2-7b", "qwen2.5-7b", "qwen2.5-0.5b"}  # one architecture, by their config.json
    assert study == {family.real for family in hub.FAMILIES.values()} | qwen2


def test_the_pinned_snapshot_is_loaded_as_it_was_published(tiny_registry, model, plain, architecture):
    folder, family = tiny_registry[architecture], hub.FAMILIES[architecture]
    assert weights.fetch(model.id) == folder and folder.name == registry.entry(model.id).revision
    assert (folder / "model.safetensors.index.json").is_file() and len(list(folder.glob("model-*.safetensors"))) > 1
    assert type(model.hf).__name__ == f"{family.name}ForCausalLM"
    assert (model.n_layers, model.width, model.dtype) == (hub.LAYERS, hub.WIDTH, "float32")
    assert model.weights_sha256 == weights.identity(folder) and len(model.weights_sha256) == 64
    for text in PROMPTS:
        ids = models.encode(model, [text])["input_ids"]
        assert torch.equal(ids, plain.ids(text))  # the template by hand, and no second beginning
        assert model.tokenizer.decode(ids[0]) == family.written.format(text)
        torch.testing.assert_close(model.hf(ids).logits, plain.hf(ids).logits, rtol=0, atol=1e-5)


def test_our_generation_settings_hold_not_the_repositorys(tiny_registry, model, architecture):
    family, settings = hub.FAMILIES[architecture], model.hf.generation_config
    shipped = json.loads((tiny_registry[architecture] / "generation_config.json").read_text())
    assert family.settings.items() <= shipped.items()
    assert settings.do_sample is False and settings.repetition_penalty in (None, 1.0)
    for name in ("temperature", "top_p", "top_k", "cache_implementation"):
        assert not getattr(settings, name, None), name
    names = model.tokenizer.convert_ids_to_tokens(list(model.stop_ids))
    assert set(names) == {*registry.entry(model.id).stop, family.special["eos_token"]}
    assert settings.eos_token_id == list(model.stop_ids)


def test_the_weights_are_bfloat16_unless_asked_otherwise(tiny_registry, architecture):
    loaded = models.load(f"tiny-{architecture}", "bfloat16")
    assert loaded.dtype == "bfloat16" and {p.dtype for p in loaded.hf.parameters()} == {torch.bfloat16}
    made = steering.generate(loaded, PROMPTS[:2], [steering.baseline()], max_new_tokens=4)
    assert all(len(completion.token_ids) <= 4 for row in made for completion in row)


def test_on_a_gpu_the_whole_model_lies_there_in_bfloat16(tiny_registry, architecture, monkeypatch):
    """Of the loading itself only what is asked of transformers can be seen without one."""
    import transformers

    asked = []

    def refuse(**given):
        asked.append(given)
        raise ValueError("no such device here")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    one_sentence(lambda: models.load(f"tiny-{architecture}"), f"tiny-{architecture}", "no such device here")
    (given,) = asked
    assert given["device_map"] == {"": 0} and given["dtype"] == torch.bfloat16
    assert given["use_safetensors"] is True and given["local_files_only"] is True
    assert given["trust_remote_code"] is False
    assert given["pretrained_model_name_or_path"] == tiny_registry[architecture]


def test_a_gated_model_needs_a_token_and_others_none(tiny_registry, architecture, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    if hub.FAMILIES[architecture] in (hub.LLAMA, hub.GEMMA2):
        one_sentence(lambda: models.fetch(f"tiny-{architecture}"), "gated", "HF_TOKEN")
    else:
        assert models.fetch(f"tiny-{architecture}") == tiny_registry[architecture]


def test_another_revision_is_not_taken_for_the_pinned_one(cache, tmp_path, monkeypatch, architecture):
    text = (cache[0] / "models.yaml").read_text()
    monkeypatch.setattr(registry, "REGISTRY", tmp_path / "models.yaml")
    revision = cache[1][architecture].name
    (tmp_path / "models.yaml").write_text(text.replace(revision, "f" * 40))
    one_sentence(lambda: models.fetch(f"tiny-{architecture}"), "cannot be reached")


# ---- what the architectures have of their own


def test_gemma_2_is_computed_with_its_caps_and_no_system_turn(cache, monkeypatch):
    """Torch's fused attention knows no cap on its scores, so that it must not be taken for this architecture."""
    family = hub.GEMMA2
    plain = hub.Twin(cache[1]["gemma2"], family)  # which reads the compendium's registry
    monkeypatch.setattr(registry, "REGISTRY", cache[0] / "models.yaml")
    model = models.load("tiny-gemma2", "float32")
    assert model.hf.config._attn_implementation == "eager"
    ids = plain.ids(PROMPTS[1])
    whole = plain.hf(ids).logits
    assert whole.abs().max() < family.config["final_logit_softcapping"]
    for block in plain.hf.model.layers:
        block.self_attn.attn_logit_softcapping = None
    assert (plain.hf(ids).logits - whole).abs().max() > 0.05  # the cap on the scores matters to these weights
    with pytest.raises(Exception, match="System role not supported"):
        model.tokenizer.apply_chat_template([{"role": "system", "content": "a"}], tokenize=False)
    assert "system" not in model.tokenizer.decode(models.encode(model, ["Hi"])["input_ids"][0])


def test_adding_equals_adding_to_the_blocks_last_summand(model, plain, directions):  # noqa: F811
    """Where the MLP's output, normed once more in Gemma 2, goes into the residual stream: another place than ours."""
    condition = steering.add(directions, [1, 2], 0.9)
    handles = []
    for layer, vector in zip(condition.layers, condition.vectors, strict=True):
        block = plain.hf.model.layers[layer]
        summand = getattr(block, "post_feedforward_layernorm", None) or block.mlp
        handles.append(summand.register_forward_hook(lambda module, args, output, added=vector: output + added))
    try:
        expected = [[plain.generate(text, steering.baseline(), NEW)] for text in PROMPTS]
    finally:
        for handle in handles:
            handle.remove()
    assert tokens(steering.generate(model, PROMPTS, [condition], max_new_tokens=NEW)) == expected
    assert expected != [[plain.generate(text, steering.baseline(), NEW)] for text in PROMPTS]


def test_activations_are_the_residual_stream_after_each_block(model, plain):
    found = activations.last_token(model, PROMPTS)
    assert found.shape == (len(PROMPTS), hub.LAYERS, hub.WIDTH)
    for row, text in zip(found, PROMPTS, strict=True):
        with torch.no_grad():
            states = plain.hf(plain.ids(text), output_hidden_states=True).hidden_states
            final = plain.hf.model.norm(row[-1])
        for layer in range(hub.LAYERS - 1):
            torch.testing.assert_close(row[layer], states[layer + 1][0, -1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(final, states[-1][0, -1], rtol=1e-4, atol=1e-4)


def test_a_row_is_reckoned_by_the_architectures_own_heads(tiny_registry, architecture):
    """Gemma 2's heads are wider than its residual stream over their number."""
    each = 2 * hub.LAYERS * 2 * (16 if architecture == "gemma2" else 8)
    assert chunks.row_bytes(tiny_registry[architecture], "bfloat16", 48) == 2.0 * each * 2 * (128 + 48)
