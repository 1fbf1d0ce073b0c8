"""Converting a GGUF file, once, to what loads in seconds: bfloat16 safetensors and a tokenizer."""

import contextlib
import errno
import importlib.metadata
import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from refusal.files import CompendiumError, sha256_file
from refusal.registry import Entry

CONVERSION = 1  # raised when convert() changes what it writes, so that older conversions are made anew


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without a terminal, silences the bars, advice and retries that transformers and the hub's client print."""
    if sys.stderr.isatty():
        yield
        return
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    level, bars, hub_level = logging.get_verbosity(), logging.is_progress_bar_enabled(), hub_logging.get_verbosity()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()


def convert(model: Entry, gguf: Path, folder: Path) -> None:
    """Writes bfloat16 safetensors, the tokenizer with its chat template, and provenance.json into a new folder.

    Raises:
        CompendiumError: transformers cannot read the file, or would split text otherwise than the model was trained on.
    """
    import torch
    from safetensors import SafetensorError
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.integrations.gguf import read_gguf_metadata
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        split = read_gguf_metadata(str(gguf))[0].get("tokenizer.ggml.pre", "default")
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(**place)
            hf = AutoModelForCausalLM.from_pretrained(
                **place, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
            )
    except (ValueError, KeyError, NotImplementedError) as error:
        said = " ".join(str(error).split())[:200].rstrip(".")
        raise CompendiumError(f"transformers cannot read {gguf.name} of {model.id} ({said}).") from error
    if split == "smollm":  # transformers 5.23 does not know this rule and takes GPT-2's, which splits "\n\n1" otherwise
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif split not in {"default", "gpt-2", *GGUF_PRE_TOKENIZER_SPLITS}:
        raise CompendiumError(f"{gguf.name} splits text by the rule {split!r}, which transformers does not know.")
    tokenizer.save_pretrained(folder)
    try:
        with quiet():
            hf.save_pretrained(folder, max_shard_size="1TB")  # one file, whose sha256 is the weights' identity
    except SafetensorError as error:
        if "os error 28" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device") from error
        raise
    files = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
    provenance = {
        "id": model.id,
        "conversion": CONVERSION,
        "wheels": [f"{project}=={version} sha256:{digest}" for project, version, _, digest in model.wheels],
        "gguf_name": model.gguf_name,
        "gguf_sha256": model.gguf_sha256,
        "versions": {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "gguf", "safetensors")
        },
        "dtype": "bfloat16",
        "files": files,
        "weights_sha256": files["model.safetensors"],
    }
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner only, and a cache may be shared
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
