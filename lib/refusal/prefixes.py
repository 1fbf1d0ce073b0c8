"""The common beginning of a batch's prompts (the chat template's system prompt, for one), computed once for all rows.

Its keys and values depend on no later token, so sharing them changes no result but rounding. On the default model it is
more than half of a prompt's tokens.
"""

from collections.abc import Sequence

import torch

from refusal.models import Model, encode


def batch(model: Model, texts: Sequence[str], share: bool = True) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Encodes prompts with their common prefix moved to the front.

    Args:
        model: The model.
        texts: Prompts, without chat template.
        share: False leaves the prefix empty (the plain twin).

    Returns:
        The prefix `[1, p]` (p may be 0), and the whole batch: `input_ids` and `attention_mask` `[rows, p + rest]`. The
        padding stands between the prefix and the rest of each prompt; at least one token belongs to the rest.
    """
    inputs = encode(model, texts)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    lengths = mask.sum(1)
    shortest = int(lengths.min())
    starts = torch.stack([row[-length:][:shortest] for row, length in zip(ids, lengths.tolist(), strict=True)])
    same = (starts == starts[0]).all(0).int().cumprod(0).sum()
    length = min(int(same), shortest - 1) if share else 0
    if length == 0:
        return ids[:1, :0], inputs
    rest = ids.shape[1] - length
    prefix = starts[:1, :length]
    whole = torch.cat([prefix.expand(len(ids), -1), ids[:, -rest:]], dim=1)
    # Where a prompt is shorter than the longest, its own copy of the prefix lies in these columns: it becomes padding.
    kept = torch.arange(rest, device=ids.device)[None] >= rest - (lengths - length)[:, None]
    whole[:, length:][~kept] = model.tokenizer.pad_token_id
    return prefix, {"input_ids": whole, "attention_mask": torch.cat([torch.ones_like(whole[:, :length]), kept], dim=1)}


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """The position of every token in its own row, counted without padding."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)
