"""Models: loading one as an nnsight model with settings of our own, and turning texts into its inputs."""

import argparse
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refusal.conversion import quiet
from refusal.files import CompendiumError, atomic, cli, sha256_text
from refusal.registry import Entry, entry, registry
from refusal.weights import cache_dir, fetch, identity

if TYPE_CHECKING:  # imported where used: they take seconds, and `list` and replays need none of them
    import torch
    from nnsight import Envoy, TransformersModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Entry", "Model", "blocks", "cache_dir", "choose_dtype", "embeddings", "encode", "entry", "fetch", "load"]
__all__ += ["registry", "wrap"]

CPUINFO = Path("/proc/cpuinfo")


@dataclass
class Model:
    """A loaded model.

    Attributes:
        id: The registry's id.
        lm: `nnsight.TransformersModel` around `hf`.
        hf: The transformers model: eval mode, no gradients, greedy generation settings.
        tokenizer: Pads on the left; has a chat template and a pad token.
        dtype: "bfloat16" or "float32".
        weights_sha256: Of the safetensors file, or of the list of them.
        template_sha256: Of the chat template's text.
        n_layers: Number of decoder blocks.
        width: Width of the residual stream.
        stop_ids: Token ids that end a completion.
        device: Where inputs go.
    """

    id: str
    lm: "TransformersModel"
    hf: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    dtype: str
    weights_sha256: str
    template_sha256: str
    n_layers: int
    width: int
    stop_ids: tuple[int, ...]
    device: "torch.device"


def choose_dtype() -> str:
    """`bfloat16` with a CUDA device or a processor with AVX512-BF16 or AMX-BF16, else `float32`."""
    import torch

    if torch.cuda.is_available():
        return "bfloat16"
    flags = set(CPUINFO.read_text().split()) if CPUINFO.is_file() else set()
    return "bfloat16" if flags & {"avx512_bf16", "amx_bf16"} else "float32"


def load(model_id: str, dtype: str = "auto") -> Model:
    """Loads a model, fetching it where it is missing; the files' hashes are checked each time.

    Args:
        model_id: An id of data/models.yaml.
        dtype: "bfloat16", "float32", or "auto" for `choose_dtype()`.

    Raises:
        CompendiumError: What `fetch` and `wrap` raise, an unknown dtype, or weights that do not fit the entry.
    """
    if dtype not in ("auto", "bfloat16", "float32"):
        raise CompendiumError(f"there is no dtype {dtype!r}: use auto, bfloat16 or float32.")
    known = entry(model_id)
    folder = fetch(model_id)
    weights_sha256 = identity(folder)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from refusal import packing

    place: dict[str, Any] = {
        "pretrained_model_name_or_path": folder,
        "local_files_only": True,
        "trust_remote_code": False,
    }
    chosen = getattr(torch, choose_dtype() if dtype == "auto" else dtype)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(**place)
            hf = AutoModelForCausalLM.from_pretrained(
                **place, dtype=chosen, use_safetensors=True, device_map={"": 0} if torch.cuda.is_available() else None
            )
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())[:200].rstrip(".")
        raise CompendiumError(f"{model_id} cannot be loaded from {folder}: {said}.") from error
    packing.pack(hf)
    model = wrap(hf, tokenizer, model_id, weights_sha256, known.stop)
    if (model.n_layers, model.width) != (known.blocks, known.width):
        raise CompendiumError(
            f"{model_id} has {model.n_layers} blocks of width {model.width}, but its registry entry says "
            f"{known.blocks} and {known.width}: correct the fields blocks and width."
        )
    return model


def _single_id(tokenizer: "PreTrainedTokenizerBase", token: str, model_id: str) -> int:
    ids = tokenizer(token, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise CompendiumError(f"{model_id}: the stop token {token!r} is {len(ids)} tokens to its tokenizer, not one.")
    return int(ids[0])


def wrap(
    hf: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    model_id: str,
    weights_sha256: str = "",
    stop: Sequence[str] = (),
) -> Model:
    """Makes a `Model` of a transformers model and its tokenizer, which it sets up in place.

    Only our own generation settings hold: greedy, the stop tokens, no repetition penalty (some hub models ship one).

    Args:
        hf: A causal language model whose blocks are `model.layers` (Llama, Mistral, Qwen2, Gemma 2).
        tokenizer: Its tokenizer.
        model_id: What records call the model.
        weights_sha256: The weights' identity.
        stop: Tokens that end a turn, besides the tokenizer's end of sequence.

    Raises:
        CompendiumError: No chat template, no end token, a stop token that is several tokens, or other blocks.
    """
    import torch
    from nnsight import TransformersModel
    from transformers import GenerationConfig

    if not tokenizer.chat_template:
        raise CompendiumError(
            f"{model_id} has no chat template, so its prompts cannot be built: use an instruct model."
        )
    if tokenizer.eos_token is None:
        raise CompendiumError(f"{model_id} has no end-of-sequence token in its tokenizer: use an instruct model.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    stop_ids = tuple(dict.fromkeys(_single_id(tokenizer, token, model_id) for token in (tokenizer.eos_token, *stop)))
    hf.eval().requires_grad_(False)
    parts, modules = ("model.layers.0.mlp", "model.embed_tokens", "model.norm", "lm_head"), dict(hf.named_modules())
    lacking = [part for part in parts if part not in modules]
    # Some divide or multiply their logits after the head, where the engine's own head would not.
    scaled = [name for name in ("logits_scaling", "logit_scale") if getattr(hf.config, name, None) not in (None, 1)]
    if lacking or scaled:
        lack = f"no {lacking[0]}" if lacking else f"a {scaled[0]}"
        raise CompendiumError(f"{model_id} ({type(hf).__name__}) has {lack}: only Llama-like models are steered.")
    with quiet():
        lm = TransformersModel(hf, tokenizer=tokenizer, task="text-generation")
    hf.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=tokenizer.pad_token_id, eos_token_id=list(stop_ids), use_cache=True
    )
    model = Model(
        id=model_id,
        lm=lm,
        hf=hf,
        tokenizer=tokenizer,
        dtype=str(hf.dtype).removeprefix("torch."),
        weights_sha256=weights_sha256,
        template_sha256=sha256_text(tokenizer.get_chat_template()),
        n_layers=len(hf.model.layers),
        width=hf.config.hidden_size,
        stop_ids=stop_ids,
        device=hf.device,
    )
    first = blocks(model)[0]
    with torch.no_grad(), lm.trace(encode(model, ["a"])) as tracer:
        output = first.output.save()
        tracer.stop()
    # Some architectures and older versions return a tuple, of which output[0] would silently be a batch row here.
    if not isinstance(output, torch.Tensor) or output.ndim != 3 or output.shape[-1] != model.width:
        raise CompendiumError(f"{model_id}: a block's output is no tensor of (prompts, tokens, {model.width}).")
    return model


def encode(model: Model, texts: Sequence[str], template: bool = True) -> "dict[str, torch.Tensor]":
    """Turns texts into a left-padded batch.

    Args:
        model: The model.
        texts: User messages (with `template`), else raw text.
        template: Put each text into the chat template with the generation prompt and the model's default system prompt.

    Returns:
        `input_ids` and `attention_mask`, int64 of shape (texts, longest), on the model's device. The last column holds
        each text's last token.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if template:
        written = functools.partial(model.tokenizer.apply_chat_template, add_generation_prompt=True, tokenize=False)
        texts = [str(written([{"role": "user", "content": text}])) for text in texts]
    # A template writes the special tokens itself; a second beginning-of-sequence token would change every activation.
    batch = model.tokenizer(
        texts, add_special_tokens=not template, padding=True, padding_side="left", return_tensors="pt"
    )
    return {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}


def blocks(model: Model) -> "list[Envoy]":
    """The nnsight envoys of the decoder blocks; `.output` of number l is layer l, shape (prompts, tokens, width)."""
    return list(model.lm.model.layers)


def embeddings(model: Model) -> "Envoy":
    """The nnsight envoy of the token embeddings; `.output` has shape (prompts, tokens, width)."""
    return model.lm.model.embed_tokens


def main(argv: Sequence[str]) -> int:
    """`fetch ID [--stamp PATH]` gets a model; `list` prints the registry."""
    parser = argparse.ArgumentParser(prog="python -m refusal.models", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    get = commands.add_parser("fetch", help="get, check and convert a model; does nothing where that is done")
    get.add_argument("id")
    get.add_argument("--stamp", type=Path, help="write a small JSON file with the id and the weights' sha256")
    commands.add_parser("list", help="print the known models")
    chosen = parser.parse_args(argv)
    if chosen.command == "list":
        for known in registry().values():
            where = "package registry" if known.source == "wheels" else "hub, gated" if known.gated else "hub"
            print(f"{known.id:20} {where:16} {known.blocks:3} x {known.width:<5} {known.licence:13} {known.note}")
        return 0
    folder = fetch(chosen.id)
    weights_sha256 = identity(folder)
    if chosen.stamp:
        with atomic(chosen.stamp) as path:
            path.write_text(json.dumps({"id": chosen.id, "weights_sha256": weights_sha256}) + "\n", encoding="utf-8")
    print(f"{chosen.id}: weights {weights_sha256[:12]} in {folder}")
    return 0


if __name__ == "__main__":
    cli(main)
