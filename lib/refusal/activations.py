"""Last-token residual-stream activations of every layer, from one forward pass through nnsight."""

from collections.abc import Sequence

import torch
from nnsight import save

from refusal import prefixes
from refusal.files import progress
from refusal.models import Model, blocks


def last_token(model: Model, texts: Sequence[str], rows: int = 32, share: bool = True) -> torch.Tensor:
    """Activations at the last prompt token, at the output of every decoder block.

    The last token is that of the chat-templated prompt with the generation prompt added; padding stands on the left,
    so it is the last column of every row. Entry `l` equals `hidden_states[l + 1]` of transformers, except for the last
    block, where transformers has already applied the final norm.

    Args:
        model: The model, unsteered.
        texts: n prompts, without chat template.
        rows: Prompts a forward pass.
        share: Compute the prompts' common beginning once (False is the slow twin, for tests).

    Returns:
        float32 tensor `[n, layers, width]` on the CPU. The values are those of the model's own dtype.
    """
    parts = []
    with progress(len(texts), "activations", "prompt") as bar, torch.no_grad():
        for start in range(0, len(texts), rows):
            prefix, inputs = prefixes.batch(model, texts[start : start + rows], share)
            cache = prefixes.unsteered_cache(model, prefix, len(inputs["input_ids"]))
            inputs = prefixes.rest_of(inputs, prefix.shape[1])
            with model.lm.trace(inputs, past_key_values=cache) as tracer:
                # A plain slice would be a view that keeps the whole [rows, tokens, width] tensor alive, hence clone.
                outputs = [block.output[:, -1].clone() for block in blocks(model)]
                stacked = save(torch.stack(outputs, dim=1).float().cpu())
                tracer.stop()  # nothing above the last block is needed
            parts.append(stacked)
            bar.update(len(stacked))
    return torch.cat(parts)
