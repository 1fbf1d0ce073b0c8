"""Captured activations, held against transformers' hidden states of single, unpadded prompts."""

import pytest
import torch
from plain import PROMPTS, Plain, written

from refusal import activations


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def pair(request, tiny_models):
    """The library's model, and the same weights without nnsight."""
    return tiny_models[request.param], Plain(request.param)


@pytest.fixture(scope="module")
def captured(pair):
    return activations.last_token(pair[0], PROMPTS)


def hidden_states(plain, ids):
    """`[blocks + 1, tokens, width]` of a single row."""
    with torch.no_grad():
        return torch.cat(plain.hf(ids, output_hidden_states=True).hidden_states)


def test_activations_equal_hidden_states(pair, captured):
    """Layer l is hidden_states[l + 1]; after the last block transformers has applied the final norm, we have not."""
    plain = pair[1]
    assert captured.shape == (len(PROMPTS), 4, 32) and captured.dtype == torch.float32
    for text, ours in zip(PROMPTS, captured, strict=True):
        theirs = hidden_states(plain, plain.ids(text))[:, -1]
        torch.testing.assert_close(ours[:-1], theirs[1:-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(plain.hf.model.norm(ours[-1]), theirs[-1], rtol=1e-4, atol=1e-4)
        assert (ours[-1] - theirs[-1]).norm() > 1  # the norm does something here
        for layer in range(3):  # a neighbouring layer would not pass
            assert (ours[layer] - theirs[layer + 2]).norm() > 0.1 and (ours[layer] - theirs[layer]).norm() > 0.1


def test_the_last_token_is_that_of_the_generation_prompt(pair, captured):
    """Of the padded side or of the user's own words, every token would give other activations."""
    plain = pair[1]
    for text, ours in zip(PROMPTS, captured, strict=True):
        ids = plain.ids(text)
        assert plain.tokenizer.decode(ids[0]).endswith("<|im_start|>assistant\n")
        distance = (hidden_states(plain, ids)[2] - ours[1]).norm(dim=-1)
        assert distance.argmin() == len(distance) - 1 and distance[:-1].min() > 0.1


def test_the_chat_template_is_applied(pair, captured):
    plain = pair[1]
    for text, ours in zip(PROMPTS, captured, strict=True):
        prompt = written(text)
        for other in (text, prompt.removesuffix("<|im_start|>assistant\n"), prompt[prompt.index("<|im_start|>user") :]):
            ids = plain.tokenizer(other, add_special_tokens=False, return_tensors="pt").input_ids
            assert (hidden_states(plain, ids)[2, -1] - ours[1]).norm() > 0.1


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 32])
def test_batches_and_their_shared_beginning_change_nothing(pair, captured, rows, share):
    again = activations.last_token(pair[0], PROMPTS, rows=rows, share=share)
    torch.testing.assert_close(again, captured, rtol=1e-4, atol=1e-4)
    reverse = activations.last_token(pair[0], PROMPTS[::-1], rows=rows, share=share)
    torch.testing.assert_close(reverse.flip(0), captured, rtol=1e-4, atol=1e-4)
