"""Notebook parameters: which ones a notebook has, and whether the values given for them are sound.

Papermill takes a misspelt name, a value of another type and a notebook without a parameters cell in silence, and then
runs with the defaults. Here each is an error.
"""

import ast
import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import yaml
from nbformat import NotebookNode

from refusal.files import ROOT, CompendiumError
from refusal.options import notebooks

FOLDER = ROOT / "notebooks"


def find(name: str | Path) -> Path:
    """The notebook that is called `name`: a number ("03"), a name ("03_sign_inversion") or a path.

    Raises:
        CompendiumError: There is none; the message lists the known ones.
    """
    if str(name).endswith(".ipynb") and Path(name).is_file():
        return Path(name).resolve()
    matches = [known for known in notebooks() if str(name) in (known, known.split("_")[0])]
    if not matches:
        raise CompendiumError(
            f'there is no notebook "{name}": the known ones are {", ".join(notebooks()) or "none yet"}.'
        )
    return FOLDER / f"{matches[0]}.ipynb"


def read(path: Path) -> NotebookNode:
    """A notebook as a node of format 4.5.

    Raises:
        CompendiumError: The file cannot be read or is no notebook.
    """
    try:
        return nbformat.read(path, as_version=4)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CompendiumError(f"{path} cannot be read as a notebook ({type(error).__name__}): restore it.") from error


def defaults(node: NotebookNode, name: str) -> dict[str, Any]:
    """The parameters of a notebook with their default values, from its one cell that is tagged `parameters`.

    The cell may hold nothing but assignments of literals: a value that is derived from another would keep its default
    when that other one is changed.

    Raises:
        CompendiumError: The tag is missing or doubled, or the cell holds something else.
    """
    tagged = [cell for cell in node.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1 or tagged[0].cell_type != "code":
        raise CompendiumError(
            f'{name} has {len(tagged)} cells tagged "parameters", and must have exactly one, a code cell: tag it.'
        )
    if any("injected-parameters" in cell.metadata.get("tags", []) for cell in node.cells):
        raise CompendiumError(f"{name} is the product of a run (its parameters were injected): execute its source.")
    try:
        statements = ast.parse(tagged[0].source).body
    except SyntaxError as error:
        raise CompendiumError(
            f"the parameters cell of {name} is no Python: line {error.lineno}, {error.msg}."
        ) from error
    values: dict[str, Any] = {}
    for statement in statements:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        target = targets[0]
        try:
            if not isinstance(statement, ast.Assign | ast.AnnAssign) or len(targets) != 1 or statement.value is None:
                raise ValueError
            if not isinstance(target, ast.Name) or target.id in values:
                raise ValueError
            values[target.id] = ast.literal_eval(statement.value)
        except ValueError as error:
            said = ast.unparse(statement).splitlines()[0]
            raise CompendiumError(
                f"the parameters cell of {name} may hold one literal for each name, and `{said}` is something else: "
                "move it to the next cell."
            ) from error
    return values


def _typed(key: str, value: object, default: object, name: str) -> object:
    """`value` where it is of the type of `default`; an int stands for a float, a bool for neither."""
    if isinstance(value, float) and not math.isfinite(value):
        raise CompendiumError(f"parameter {key} of {name} is {value}, which is no finite number: correct it.")
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if default is not None and type(value) is not type(default):
        raise CompendiumError(
            f"parameter {key} of {name} must be of type {type(default).__name__} like its default {default!r}, and "
            f"{value!r} is of type {type(value).__name__}: correct it."
        )
    return value


def check(name: str, known_values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The given parameters, checked against the notebook's own.

    Args:
        name: The notebook, for messages.
        known_values: Its parameters and their defaults.
        given: What is to replace them.

    Raises:
        CompendiumError: An unknown parameter (the known ones are listed), or a value of another type.
    """
    for key in given:
        if key not in known_values:
            near = difflib.get_close_matches(str(key), known_values, n=1)
            hint = f'did you mean "{near[0]}"?' if near else "correct the name."
            raise CompendiumError(f'{name} has no parameter "{key}", it has {", ".join(known_values)}: {hint}')
    return {key: _typed(key, value, known_values[key], name) for key, value in given.items()}


def parse(text: str, where: str) -> dict[str, Any]:
    """Parameters from YAML (or JSON), as Python objects.

    Raises:
        CompendiumError: No YAML, no mapping of names, or a name that stands there twice.
    """
    try:
        tree, values = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CompendiumError(f"{where} is no YAML: {' '.join(str(error).split())}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not isinstance(tree, yaml.MappingNode):
        raise CompendiumError(f"{where} must map names to values, one `name: value` a line.")
    names = [key.value for key, _ in tree.value]
    doubled = sorted({key for key in names if names.count(key) > 1})
    if doubled:
        raise CompendiumError(f"{where} gives {', '.join(doubled)} twice: leave one.")
    return {str(key): value for key, value in values.items()}
