"""The engine on the real default model, held against the plain way through nnsight."""

import pytest
import twin

from refusal import directions, models, prompts, steering, summaries
from refusal.files import ROOT

pytestmark = pytest.mark.slow
MODEL = summaries.DEFAULT_MODEL


def test_the_engine_equals_the_plain_way_on_the_real_model() -> None:
    """In float32, token for token, up to the first step at which the two top logits lie within 1e-4."""
    model = models.load(MODEL, "float32")
    made, layer = directions.load(ROOT / "data" / "directions" / f"{MODEL}.safetensors", expect={"model": MODEL})
    conditions = [
        steering.baseline(),
        steering.add(made, layer, 1.0),
        steering.add(made, layer, -1.0),
        steering.add(made, [layer - 8, layer], 0.5),
        steering.ablate(made, layer),
    ]
    harmful = prompts.load("harmful_evaluation")["text"]
    texts = [harmful.loc[harmful.str.len().idxmin()], "Write one line about rain. " * 4]
    rows = steering.generate(model, texts, conditions, max_new_tokens=10)
    for text, row, steps in zip(texts, rows, (10, 4), strict=True):  # the twin takes a second a step
        for condition, completion in zip(conditions, row, strict=True):
            ids, reason, gaps = twin.generate(model, text, condition, steps)
            pairs = list(zip(completion.token_ids, ids, strict=False))
            same = next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
            whole = (completion.token_ids, completion.stop_reason) == (ids, reason)
            equal = whole or (reason == "length" and completion.token_ids[:steps] == ids)
            assert equal or gaps[same] < 1e-4, (condition.name, same, gaps[same])
    assert len({completion.token_ids for row in rows for completion in row}) > 5
    ids = rows[0][1].token_ids
    expected = twin.reference_nll(model, texts[0], ids, conditions[0])
    assert rows[0][1].reference_nll == pytest.approx(expected, abs=1e-3, nan_ok=True)
