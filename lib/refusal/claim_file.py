"""The file of claims, data/claims.yaml: read, and refused with one sentence where something in it is wrong."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from refusal.claim_tests import TESTS
from refusal.files import ROOT, CompendiumError

FILE = ROOT / "data" / "claims.yaml"
BEHIND = ("raw counts", "mock data", "a computation", "an argument", "nothing")  # what a published figure may rest on
PARTS = ("documents", "rules", "claims")


@dataclass(frozen=True)
class Claim:
    """A published claim. The head of data/claims.yaml explains the fields; `document` is the first word of `source`."""

    id: str
    source: str
    quote: str
    claim: str
    replicated: str
    behind: str
    notebook: str
    figure: str = ""
    test: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs: str = ""

    @property
    def document(self) -> str:
        """The key of the document that it comes from."""
        return self.source.partition(",")[0]

    @property
    def place(self) -> str:
        """Where in the document."""
        return self.source.partition(",")[2].strip()


REQUIRED = ("id", "source", "quote", "claim", "replicated", "behind", "notebook")
KNOWN = tuple(one.name for one in fields(Claim))


@dataclass(frozen=True)
class Ledger:
    """What the file holds: names of the documents by key, the rule of each test in words, and the claims in order."""

    documents: Mapping[str, str]
    rules: Mapping[str, str]
    claims: tuple[Claim, ...]

    def claim(self, name: str) -> Claim:
        """A claim by its id.

        Raises:
            CompendiumError: There is none.
        """
        found = next((one for one in self.claims if one.id == name), None)
        if found is None:
            raise CompendiumError(f"there is no claim {name!r}: {FILE.name} lists them.")
        return found


def read(path: Path = FILE) -> Ledger:
    """Reads and checks the file.

    Args:
        path: A file of its layout.

    Raises:
        CompendiumError: Whatever is wrong with it, with the line and the claim's id where it has one.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tree, given = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise CompendiumError(f"{path} cannot be read ({type(error).__name__}): restore it with git.") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise CompendiumError(f"{path.name}{line}: this is no YAML ({error.problem}): correct it.") from error
    except yaml.YAMLError as error:
        raise CompendiumError(f"{path.name}: this is no YAML ({' '.join(str(error).split())}): correct it.") from error
    if not isinstance(tree, yaml.MappingNode) or sorted(map(str, given)) != sorted(PARTS):
        raise CompendiumError(f"{path.name}: it must hold {', '.join(PARTS)} and nothing else: correct it.")
    _refuse_doubled(tree, path.name)
    documents, rules, claims = (given[part] for part in PARTS)
    for part, values in (("documents", documents), ("rules", rules)):
        if not isinstance(values, dict) or not all(isinstance(one, str) and one.strip() for one in values.values()):
            raise CompendiumError(f"{path.name}: {part} must map names to texts: correct it.")
    if wrong := sorted(set(rules) ^ set(TESTS)):
        what = "no rule for" if wrong[0] in TESTS else "a rule for what is no test,"
        raise CompendiumError(f"{path.name}: there is {what} {wrong[0]!r}: rules and tests belong together.")
    if not isinstance(claims, list) or not claims:
        raise CompendiumError(f"{path.name}: claims must be a list of claims: correct it.")
    lines = [node.start_mark.line + 1 for key, value in tree.value if key.value == "claims" for node in value.value]
    made: dict[str, Claim] = {}
    for line, one in zip(lines, claims, strict=True):
        fault = _fault(one, documents, made)
        if fault:
            named = f" ({one['id']})" if isinstance(one, dict) and isinstance(one.get("id"), str) else ""
            raise CompendiumError(f"{path.name}, line {line}{named}: {fault}.")
        texts: dict[str, Any] = {
            name: " ".join(value.split()) if isinstance(value, str) else value for name, value in one.items()
        }
        made[one["id"]] = Claim(**texts)
    return Ledger(documents, {name: " ".join(rule.split()) for name, rule in rules.items()}, tuple(made.values()))


def _refuse_doubled(node: yaml.Node, where: str) -> None:
    """YAML takes the last of two equal keys in silence."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise CompendiumError(f"{where}, line {line}: {key.value!r} stands there twice: leave one.")
            seen.add(key.value)
            _refuse_doubled(value, where)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_doubled(value, where)


def _fault(one: object, documents: Mapping[str, str], known: Mapping[str, Claim]) -> str:
    """What is wrong with a claim, "" for nothing."""
    if not isinstance(one, dict):
        return "a claim must map fields to values"
    for name in REQUIRED:
        if name not in one:
            return f"the field {name!r} is missing"
    for name, value in one.items():
        if name not in KNOWN:
            return f"there is no field {name!r}, only {', '.join(KNOWN)}"
        if name != "arguments" and (not isinstance(value, str) or not value.strip()):
            return f"the field {name!r} must be a text"
    if not re.fullmatch(r"[a-z]+(-[a-z]+)*", one["id"]):
        return "an id is made of lower-case words joined by hyphens"
    if one["id"] in known:
        return "another claim has the same id"
    if one["source"].partition(",")[0] not in documents or not one["source"].partition(",")[2].strip():
        return f"the source must begin with one of {', '.join(documents)}, a comma, and the place"
    if not one["behind"].startswith(tuple(f"{kind}:" for kind in BEHIND)):
        return f"what stands behind a figure must begin with one of {', '.join(BEHIND)}, and a colon"
    if not re.fullmatch(r"\d\d_[a-z_]+", one["notebook"]):
        return f"{one['notebook']!r} is no name of a notebook"
    if ("test" in one) == ("needs" in one):
        return "a claim has a test, or says what it needs, and not both"
    if "needs" in one:
        return "without a test there are no arguments" if "arguments" in one else ""
    return _test_fault(one["test"], one.get("arguments", {}))


def _test_fault(test: str, arguments: object) -> str:
    if test not in TESTS:
        return f"there is no test {test!r}, only {', '.join(sorted(TESTS))}"
    if not isinstance(arguments, dict):
        return "arguments must map names to values"
    try:
        inspect.signature(TESTS[test]).bind(None, **arguments)
    except TypeError as error:
        return f"the test {test!r} does not take these arguments ({error})"
    return ""
