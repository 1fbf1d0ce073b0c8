"""Last-token residual-stream activations of every layer, from one unsteered pass."""

from collections.abc import Sequence

import torch

from refusal import engine
from refusal.files import progress
from refusal.models import Model


def last_token(model: Model, texts: Sequence[str], rows: int = 64, share: bool = True) -> torch.Tensor:
    """Activations at the last prompt token, at the output of every decoder block.

    The last token is that of the chat-templated prompt with the generation prompt added; padding stands before it, so
    it is the last column of every row. Entry `l` equals `hidden_states[l + 1]` of transformers, except for the last
    block, where transformers has already applied the final norm.

    Args:
        model: The model, unsteered.
        texts: n prompts, without chat template.
        rows: Prompts at once.
        share: Compute the prompts' common beginning once (False is the slow twin, for tests).

    Returns:
        float32 tensor `[n, layers, width]` on the CPU. The values are those of the model's own dtype.
    """
    made = torch.empty(len(texts), model.n_layers, model.width)
    with progress(len(texts), "activations", "prompt") as bar, torch.no_grad():
        for start in range(0, len(texts), rows):
            batch = engine.encode(model, texts[start : start + rows], share=share)
            trunk = engine.start_trunk(model, batch, range(model.n_layers), model.n_layers - 1, last_only=True)
            made[torch.tensor(batch.order) + start] = trunk.rest[:, :, -1].transpose(0, 1).float().cpu()
            bar.update(len(batch.order))
    return made
