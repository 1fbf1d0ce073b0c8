"""The peers: ways to complete prompts under one condition after another, on a model as transformers loads it.

They get token ids, so that all see the same prompts.
"""

import contextlib
import functools
import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.summary import LLAMA
from benchmarks.timing import profiled, timed

Generate = Callable[..., torch.Tensor]
Steer = Callable[[Any, int, torch.Tensor], contextlib.AbstractContextManager[Generate]]
# A model of the study's scale: shapes of Llama 3.1 8B, but the vocabulary of the tokenizer at hand.
LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}


# --- how each peer adds a vector to the output of a layer: a context that yields what to generate with


@contextlib.contextmanager
def transformers_hook(hf: Any, layer: int, vector: torch.Tensor) -> Iterator[Generate]:  # noqa: ANN401
    handle = hf.model.layers[layer].register_forward_hook(lambda module, inputs, output: output + vector)
    try:
        yield hf.generate
    finally:
        handle.remove()


@functools.cache
def traced(hf: Any) -> Any:  # noqa: ANN401
    from nnsight import TransformersModel
    from transformers import AutoTokenizer

    warnings.filterwarnings("ignore", message=".*was never reached")  # how an open `iter[:]` ends, by design
    return TransformersModel(hf, tokenizer=AutoTokenizer.from_pretrained(hf.name_or_path), task="text-generation")


@contextlib.contextmanager
def nnsight(hf: Any, layer: int, vector: torch.Tensor) -> Iterator[Generate]:  # noqa: ANN401
    lm = traced(hf)

    def generate(input_ids: torch.Tensor, attention_mask: torch.Tensor, **settings: Any) -> torch.Tensor:  # noqa: ANN401
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        # Without a streamer, which would copy the tokens at every step. The result has an invoke of its own, because
        # nothing that follows an open `iter[:]` runs.
        with lm.generate(streamer=None, **settings) as tracer:
            with tracer.invoke(inputs):
                for _ in tracer.iter[:]:
                    lm.model.layers[layer].output += vector
            with tracer.invoke():
                ids = tracer.result.save()
        return ids

    yield generate


@contextlib.contextmanager
def steering_vectors(hf: Any, layer: int, vector: torch.Tensor) -> Iterator[Generate]:  # noqa: ANN401
    from steering_vectors import SteeringVector

    with SteeringVector({layer: vector}).apply(hf):
        yield hf.generate


@contextlib.contextmanager
def repeng(hf: Any, layer: int, vector: torch.Tensor) -> Iterator[Generate]:  # noqa: ANN401
    from repeng import ControlModel, ControlVector

    control = ControlModel(hf, [layer])
    try:
        control.set_control(ControlVector(hf.config.model_type, {layer: vector.float().cpu().numpy()}), 1.0)
        yield control.generate
    finally:
        control.unwrap()


PEERS: dict[str, Steer] = {
    "study": transformers_hook,
    "transformers": transformers_hook,
    "nnsight": nnsight,
    "steering-vectors": steering_vectors,
    "repeng": repeng,
}


# --- what a peer does


def padded(prompts: list[list[int]], pad: int, device: Any) -> dict[str, torch.Tensor]:  # noqa: ANN401
    """Token ids as a left-padded batch."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(one)) + one for one in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def trimmed(row: list[int], stop_ids: list[int]) -> list[int]:
    """What was generated, up to and without the first stop token."""
    return row[: next((place for place, token in enumerate(row) if token in stop_ids), len(row))]


def complete(hf: Any, steer: Steer, asked: dict) -> dict:  # noqa: ANN401
    """Completes the prompts under one condition after another, `batch` prompts at a time.

    Args:
        hf: The transformers model.
        steer: One of `PEERS`.
        asked: prompts (token ids), vectors (one a condition), layer, max_new_tokens, stop_ids, pad, batch. The stop id
            -1, which no token has, forces the full length.

    Returns:
        tokens (conditions x prompts x ids, without the stop token) and seconds, peak_gb, and the seconds a condition.
    """
    settings = {"do_sample": False, "max_new_tokens": asked["max_new_tokens"]}
    settings |= {"eos_token_id": asked["stop_ids"], "pad_token_id": asked["pad"]}
    prompts, batch, each = asked["prompts"], asked["batch"], []

    def work() -> list[list[list[int]]]:
        made: list[list[list[int]]] = []
        for values in asked["vectors"]:
            start = time.perf_counter()
            made.append([])
            with steer(hf, asked["layer"], torch.tensor(values).to(hf.device, hf.dtype)) as generate:
                for first in range(0, len(prompts), batch):
                    inputs = padded(prompts[first : first + batch], asked["pad"], hf.device)
                    ids = generate(**inputs, **settings)
                    made[-1] += ids[:, inputs["input_ids"].shape[1] :].tolist()
            each.append(time.perf_counter() - start)
        return made

    made, measured = (profiled if asked.get("profile") else timed)(work)
    return {"tokens": [[trimmed(row, asked["stop_ids"]) for row in rows] for rows in made], "each": each, **measured}


def log_odds(logits: torch.Tensor, openings: list[int]) -> torch.Tensor:
    opening = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    opening[openings] = True
    return logits[:, opening].logsumexp(-1) - logits[:, ~opening].logsumexp(-1)


def forward_cell(hf: Any, steer: Steer, asked: dict) -> dict:  # noqa: ANN401
    """One cell of the screen: a full forward pass of all prompts, logits at the last position only."""

    def work() -> list[float]:
        values: list[float] = []
        with steer(hf, asked["layer"], torch.tensor(asked["vector"]).to(hf.device, hf.dtype)), torch.no_grad():
            for first in range(0, len(asked["prompts"]), asked["batch"]):
                inputs = padded(asked["prompts"][first : first + asked["batch"]], asked["pad"], hf.device)
                inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
                logits = hf(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float()
                values += log_odds(logits, asked["openings"]).tolist()
        return values

    values, measured = timed(work)
    return {"values": values, **measured}


def ceiling(hf: Any, asked: dict) -> dict:  # noqa: ANN401
    """The time of one token's matrix products for so many rows: every linear layer, in the model's order and dtype.

    Attention, norms and everything else are left out, so that no way that multiplies every row by every weight can be
    faster. All weights take part, as they do in a step: one weight multiplied over and over would stay in the
    processor's cache.
    """
    linear = [module for module in hf.modules() if isinstance(module, torch.nn.Linear)]
    sizes = {module.in_features for module in linear}
    inputs = {size: torch.randn(asked["rows"], size).to(hf.device, hf.dtype) for size in sizes}

    def work() -> None:
        with torch.no_grad():
            for module in linear:
                torch.nn.functional.linear(inputs[module.in_features], module.weight)

    work()
    flops = 2 * asked["rows"] * sum(module.weight.numel() for module in linear)
    return {"flops": flops, "seconds": [timed(work)[1]["seconds"] for _ in range(asked["repeats"])]}


def load(job: dict) -> dict[str, Callable[[dict], dict]]:
    """Loads the model as transformers gives it. Gradients stay on, as they do for a user: `generate` asks for none."""
    steer = PEERS[job["contestant"]]
    hf = random_llama(job) if job["folder"] == LLAMA else pretrained(job["folder"], job["dtype"])
    return {
        "generate": lambda asked: complete(hf, steer, asked),
        "cell": lambda asked: forward_cell(hf, steer, asked),
        "ceiling": lambda asked: ceiling(hf, asked),
    }


def pretrained(folder: str, dtype: str) -> Any:  # noqa: ANN401
    from transformers import AutoConfig, AutoModelForCausalLM, __version__

    more = {}
    rope = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("rope_parameters")
    if rope and int(__version__.split(".")[0]) < 5:  # it would not know this name, and take another theta
        more["rope_theta"] = rope["rope_theta"]
        if rope["rope_type"] != "default":
            more["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    config = AutoConfig.from_pretrained(folder, local_files_only=True, **more)
    place = "auto" if torch.cuda.is_available() else None
    return AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=getattr(torch, dtype), device_map=place, local_files_only=True
    ).eval()


def random_llama(job: dict) -> Any:  # noqa: ANN401
    """A model of the shapes of Llama 3.1 8B with random weights, the same in every process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, job["dtype"]))
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(LlamaConfig(vocab_size=job["vocabulary"], **LLAMA_8B)).eval()
    finally:
        torch.set_default_dtype(torch.float32)
