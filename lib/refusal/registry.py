"""The registry: what data/models.yaml says about each model, checked field by field."""

import re
from dataclasses import dataclass, fields

import yaml

from refusal.files import ROOT, CompendiumError

REGISTRY = ROOT / "data" / "models.yaml"
_PATTERNS = {
    "id": r"[a-z0-9][a-z0-9.-]*",
    "source": r"wheels|hub",
    "hub_id": r"[\w-]+/[\w.-]+",
    "revision": r"[0-9a-f]{40}",
    "gguf_name": r"[\w-][\w.-]*\.gguf",
    "gguf_sha256": r"[0-9a-f]{64}",
}
_WHEEL = {"project": r"[A-Za-z]\w*", "version": r"[\w.]+", "member": r"[\w./-]+", "sha256": r"[0-9a-f]{64}"}
_SHAPE = ("vocabulary", "feed_forward", "heads", "kv_heads", "head_width")
_OWN = {"hub": ("hub_id", "revision"), "wheels": ("wheels", "gguf_name", "gguf_bytes", "gguf_sha256")}


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that its entry gives for estimates; nothing that is measured depends on them."""

    vocabulary: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_width: int
    tied: bool


@dataclass(frozen=True)
class Entry:
    """One model of data/models.yaml, whose head says what each field means."""

    id: str
    source: str
    licence: str
    blocks: int
    width: int
    stop: tuple[str, ...]
    gated: bool
    note: str
    hub_id: str = ""
    revision: str = ""
    wheels: tuple[tuple[str, str, str, str], ...] = ()
    gguf_name: str = ""
    gguf_bytes: int = 0
    gguf_sha256: str = ""
    shape: Shape | None = None


def _read_entry(model_id: str, raw: object) -> Entry:
    def wrong(field: str, what: str) -> CompendiumError:
        return CompendiumError(f"{REGISTRY}: entry {model_id!r}, field {field!r}: {what}.")

    if not isinstance(raw, dict):
        raise CompendiumError(f"{REGISTRY}: entry {model_id!r} must be a mapping of fields.")
    values = {"id": model_id, **raw}
    known = {field.name: field.type for field in fields(Entry)}
    needed = [name for name in known if name not in {"shape"}.union(*_OWN.values())]
    needed += _OWN.get(str(values.get("source")), ())
    others = {name for source, names in _OWN.items() if source != values.get("source") for name in names}
    for name in values:
        if name not in known or (values.get("source") in _OWN and name in others):
            raise wrong(str(name), "there is no such field for this source")
    for name in needed:
        if name not in values:
            raise wrong(name, "it is missing")
        value, kind = values[name], known[name]
        if kind in (int, bool, str) and type(value) is not kind:
            raise wrong(name, f"{value!r} is not of type {getattr(kind, '__name__', kind)}")
        if kind is int and value < 1:
            raise wrong(name, f"{value!r} is not positive")
        if name in _PATTERNS and not re.fullmatch(_PATTERNS[name], value):
            raise wrong(name, f"{value!r} does not match {_PATTERNS[name]}")
    stop = values["stop"]
    if not isinstance(stop, list) or not stop or not all(isinstance(token, str) and token for token in stop):
        raise wrong("stop", "it must be a list of one or more token strings")
    wheels = values.get("wheels", [])
    if not isinstance(wheels, list) or ("wheels" in needed and not wheels):
        raise wrong("wheels", "it must be a list of one or more wheels, in the order of their parts")
    for number, wheel in enumerate(wheels, 1):
        if not isinstance(wheel, dict) or set(wheel) != set(_WHEEL):
            raise wrong("wheels", f"number {number} must have exactly the fields {', '.join(_WHEEL)}")
        for name, pattern in _WHEEL.items():
            if not isinstance(wheel[name], str) or not re.fullmatch(pattern, wheel[name]):
                raise wrong("wheels", f"number {number} has {name} {wheel[name]!r}, which does not match {pattern}")
    shape = values.get("shape")
    if shape is not None:
        given = shape if isinstance(shape, dict) and set(shape) == {*_SHAPE, "tied"} else {}
        sizes = [given.get(name) for name in _SHAPE]
        if not all(type(size) is int and size > 0 for size in sizes) or type(given["tied"]) is not bool:
            raise wrong("shape", f"it must have the whole numbers {', '.join(_SHAPE)}, and tied: true or false")
        shape = Shape(**shape)
    parts = tuple((w["project"], w["version"], w["member"], w["sha256"]) for w in wheels)
    return Entry(**{**values, "stop": tuple(stop), "wheels": parts, "shape": shape})


def registry() -> dict[str, Entry]:
    """All models of data/models.yaml by id, in the file's order.

    Raises:
        CompendiumError: The file or an entry is malformed (names the entry and the field).
    """
    try:
        text = REGISTRY.read_text(encoding="utf-8")
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CompendiumError(f"{REGISTRY} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(raw, dict):
        raise CompendiumError(f"{REGISTRY} must be a mapping from model ids to entries.")
    ids = re.findall(r"^([^\s#:-][^:]*):", text, flags=re.MULTILINE)
    for model_id in ids:
        if ids.count(model_id) > 1:  # YAML would keep the last one and say nothing
            raise CompendiumError(f"{REGISTRY}: entry {model_id!r} is there twice: rename or remove one.")
    return {str(model_id): _read_entry(str(model_id), entry) for model_id, entry in raw.items()}


def entry(model_id: str) -> Entry:
    """One model's entry.

    Raises:
        CompendiumError: No such id; the sentence lists the known ones.
    """
    models = registry()
    if model_id not in models:
        raise CompendiumError(f"there is no model {model_id!r}: the known ids are {', '.join(models)}.")
    return models[model_id]
