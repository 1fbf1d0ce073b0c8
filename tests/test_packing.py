"""Packed weights, held against the plain layers that they replace."""

import conftest
import pytest
import torch

from refusal import models, packing

needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor does not multiply bfloat16"
)


def pair(architecture, dtype=torch.bfloat16):
    """The same random model twice."""
    vocabulary = len(conftest.make_tokenizer())
    return [conftest.make_hf(architecture, vocabulary).to(dtype).eval() for _ in range(2)]


@needs_bfloat16
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "gemma2"])
def test_a_packed_model_computes_what_it_did(architecture):
    packed, plain = pair(architecture)
    linear = [module for module in plain.modules() if isinstance(module, torch.nn.Linear)]
    assert packing.pack(packed) == len(linear) == 4 * 7 + 1
    assert not any(isinstance(module, torch.nn.Linear) for module in packed.modules())
    ids = torch.randint(0, 400, (5, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = packed(ids).logits, plain(ids).logits
    torch.testing.assert_close(ours, theirs)
    assert theirs.std() > 0.1
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@needs_bfloat16
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (96,), (3, 5), (2, 0)])
def test_a_packed_layer_multiplies_any_shape(bias, shape):
    """Strided states too; plain layers multiply those in a batch, which rounds otherwise."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(40, 24, bias=bias, dtype=torch.bfloat16)
    layer = packing.Packed(linear)
    states = torch.randn(*shape, 40, dtype=torch.bfloat16)
    strided = torch.randn(*shape[:-1], 40, shape[-1], dtype=torch.bfloat16).transpose(-1, -2)
    with torch.no_grad():
        torch.testing.assert_close(layer(states), linear(states))
        torch.testing.assert_close(layer(strided), linear(strided.contiguous()))
    assert (layer.in_features, layer.out_features) == (40, 24)


@needs_bfloat16
def test_weights_lie_in_memory_once():
    """But for those of the embeddings, which the head of this model shares."""
    packed, plain = pair("llama")
    packing.pack(packed)
    left = {name for name, _ in packed.named_parameters()}
    layers = {name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    assert left == {name for name, _ in plain.named_parameters()} - {f"{name}.weight" for name in layers}
    assert "model.embed_tokens.weight" in left
    torch.testing.assert_close(packed.model.embed_tokens.weight, plain.model.embed_tokens.weight)


def test_float32_stays_as_it_is():
    hf, _ = pair("qwen2", torch.float32)
    before = dict(hf.named_modules())
    assert packing.pack(hf) == 0
    assert dict(hf.named_modules()) == before


def test_a_processor_without_bfloat16_is_left_alone(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert packing.pack(pair("llama")[0]) == 0


@needs_bfloat16
def test_interventions_reach_packed_layers():
    """nnsight wraps the model after it was packed."""
    tokenizer = conftest.make_tokenizer()
    packed, plain = pair("qwen2")
    packing.pack(packed)
    ours, theirs = (models.wrap(hf, tokenizer, "tiny", stop=("<|endoftext|>",)) for hf in (packed, plain))
    batch = models.encode(theirs, ["How do I bake bread?"])
    kept = []
    for model in (ours, theirs):
        with torch.no_grad(), model.lm.trace(batch):
            model.lm.model.layers[1].mlp.down_proj.output[:] = 0
            kept.append(model.lm.lm_head.output.save())
    torch.testing.assert_close(*kept)
