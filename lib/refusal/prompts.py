"""Prompt sets: the shipped ones by name, and a user's file in one of the public benchmarks' layouts."""

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pandas as pd

from refusal.files import ROOT, CompendiumError, sha256_text

FOLDER = ROOT / "data" / "prompts"
FILE_COLUMNS = ("prompt_id", "category", "cluster", "text")
COLUMNS = ("prompt_id", "prompt_set", "category", "cluster", "text")
_DOUBLED_SHOWN = 10
_BROKEN = re.compile("[\udc80-\udcff\0]")  # what bytes that are not UTF-8 text are decoded to


@dataclass(frozen=True)
class Layout:
    """One file layout: its name, the columns of prompt and category (None: it has none), and all that it must have."""

    name: str
    text: str
    category: str | None
    required: tuple[str, ...]


# The first layout whose columns are all there is taken, so that a file which serves two is read the same way always.
LAYOUTS = (
    Layout("compendium", "text", "category", ("text",)),
    Layout("JailbreakBench", "Goal", "Category", ("Goal", "Category")),
    Layout("HarmBench", "Behavior", "SemanticCategory", ("Behavior", "SemanticCategory")),
    Layout("StrongREJECT", "forbidden_prompt", "category", ("forbidden_prompt", "category")),
    Layout("AdvBench", "goal", None, ("goal", "target")),
    Layout("XSTest", "prompt", "type", ("prompt", "type", "label")),
)
SHIPPED = Layout("compendium", "text", "category", FILE_COLUMNS)
PLAIN = Layout("plain text", "text", None, ())


@dataclass(frozen=True)
class _Record:
    line: int  # the line of the file, counted from 1, on which the record begins
    cells: list[str]


def names() -> list[str]:
    """The known prompt sets, sorted: one for each CSV file in data/prompts."""
    return sorted(path.stem for path in FOLDER.glob("*.csv"))


def normalise(text: str) -> str:
    """The text in one case and with single spaces; two prompts that agree in this are the same prompt."""
    return " ".join(text.split()).casefold()


def load(name_or_path: str | Path) -> pd.DataFrame:
    """Loads a shipped prompt set by name, or a user's file by path.

    A file's layout is read from its header: own (`text`, and where present `prompt_id`, `category`, `cluster`),
    AdvBench, JailbreakBench, HarmBench (a context is put before its behavior as that benchmark does), StrongREJECT,
    XSTest; a file not called .csv that has none of these headers is plain text with a prompt a line.

    Args:
        name_or_path: A name from `names()`, or the path of a CSV or text file in UTF-8.

    Returns:
        A frame of strings with the columns prompt_id, prompt_set, category, cluster, text, in the file's order. For a
        user's file prompt_set is "user", ids are "user-001" and so on, and category is "user" where there is none.

    Raises:
        CompendiumError: Unknown name, unreadable file, missing column, empty or doubled prompt or id, bad encoding.

    Example:
        >>> len(load("harmful_selection"))
        32
    """
    known = names()
    if str(name_or_path) in known:
        return _read(FOLDER / f"{name_or_path}.csv", str(name_or_path))
    path = Path(name_or_path).expanduser()
    if not path.exists() and path.name == str(name_or_path) and not path.suffix:
        raise CompendiumError(
            f"there is no prompt set '{name_or_path}': take one of {', '.join(known)}, or give the path of a file."
        )
    return _read(path, "user")


def digest(frame: pd.DataFrame) -> str:
    """The sha256 over a frame's prompt ids and texts, in their order."""
    return sha256_text(json.dumps([[str(i), str(t)] for i, t in zip(frame["prompt_id"], frame["text"], strict=True)]))


def assert_disjoint(used: Sequence[str | Path], reported: Sequence[str | Path]) -> None:
    """Checks that no prompt serves both to extract or select and to report a rate (design, "Splits").

    Args:
        used: Names or paths of the sets that a direction, layer or alpha comes from.
        reported: Names or paths of the sets that a rate is reported on.

    Raises:
        CompendiumError: A text, compared without case and spacing, occurs on both sides; the message names the ids.
    """
    seen: dict[str, str] = {}
    for source in used:
        for row in load(source).itertuples():
            seen.setdefault(normalise(str(row.text)), f"{row.prompt_id} of {source}")
    doubled = [
        f"{seen[key]} is {row.prompt_id} of {source}"
        for source in reported
        for row in load(source).itertuples()
        if (key := normalise(str(row.text))) in seen
    ]
    if doubled:
        more = f" and {len(doubled) - _DOUBLED_SHOWN} more" if len(doubled) > _DOUBLED_SHOWN else ""
        raise CompendiumError(
            "prompts used to extract or select also report a rate: remove them from one side "
            f"({'; '.join(doubled[:_DOUBLED_SHOWN])}{more})."
        )


def _read(path: Path, prompt_set: str) -> pd.DataFrame:
    """Reads one file into the frame that `load` describes."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CompendiumError(
            f"{path} cannot be read ({(error.strerror or str(error)).lower()}): check the path and its permissions."
        ) from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        _fail(path, 1, "", "the file is in UTF-16", "save it as UTF-8")
    # Bytes that are not UTF-8 become lone surrogates, so that the cell in which they stand can be named.
    text = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff").rstrip()
    if not text:
        raise CompendiumError(f"{path} is empty: put at least one prompt in.")
    first = text.splitlines()[0]
    header = [cell.strip() for cell in next(csv.reader([first]), [])]
    layout = SHIPPED if prompt_set != "user" else _layout(header, path)
    if layout is PLAIN:
        lines = io.StringIO(text, newline=None)
        records = [_Record(number, [line.strip()]) for number, line in enumerate(lines, 1)]
        header = ["text"]
    else:
        _check_header(path, header, layout)
        records = _records(path, text, len(header))
    if not records:
        _fail(path, 1, layout.text, "there is a header but no prompt", "add a line for each prompt")
    return _frame(path, prompt_set, layout, [(r.line, dict(zip(header, r.cells, strict=True))) for r in records])


def _layout(header: list[str], path: Path) -> Layout:
    """The layout that a header belongs to."""
    for layout in LAYOUTS:
        if set(layout.required) <= set(header):
            return layout
    if path.suffix.lower() != ".csv":
        return PLAIN
    for layout in LAYOUTS:
        if layout.text in header:
            return layout
    _fail(
        path,
        1,
        "",
        "the header has no known column of prompts",
        f"name it one of {', '.join(layout.text for layout in LAYOUTS)} and separate columns by commas, "
        "or save a prompt a line as .txt",
    )


def _check_header(path: Path, header: list[str], layout: Layout) -> None:
    for column in layout.required:
        if column not in header:
            hint = "add it" if layout.text == "text" else f"add it, or rename '{layout.text}' to 'text'"
            _fail(path, 1, column, f"this column of the {layout.name} layout is missing", hint)
    for column in header:
        if _BROKEN.search(column):
            _fail(path, 1, "", "the header is not UTF-8 text", "save the file as UTF-8")
        if column and header.count(column) > 1:
            _fail(path, 1, column, "this column occurs more than once", "keep one of them")


def _records(path: Path, text: str, width: int) -> list[_Record]:
    """The records below the header, each with the line on which it begins (quoted cells may hold line breaks)."""
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    records, begin = [], 1
    try:
        for cells in rows:
            if len(cells) != width and cells:
                _fail(
                    path, begin, "", f"{len(cells)} cells where the header has {width}", "quote cells that hold commas"
                )
            records.append(_Record(begin, [cell.strip() for cell in cells or [""] * width]))
            begin = rows.line_num + 1
    except csv.Error as error:
        _fail(path, begin, "", f"broken quoting ({error})", 'close every quote, and double a quote inside a cell ("")')
    return records[1:]


def _frame(path: Path, prompt_set: str, layout: Layout, records: list[tuple[int, dict[str, str]]]) -> pd.DataFrame:
    """Checks each record and brings it into the columns of `load`."""
    rows: list[dict[str, str]] = []
    seen: dict[tuple[str, str], int] = {}
    own = layout.text == "text"

    def shown(column: str) -> str:
        return "" if layout is PLAIN else column

    for number, (line, cells) in enumerate(records, 1):
        for column, cell in cells.items():
            if _BROKEN.search(cell):
                _fail(path, line, shown(column), "this is not UTF-8 text", "save the file as UTF-8")
        for column in (layout.text, layout.category or "", *(("prompt_id", "cluster") if own else ())):
            if column and not cells.get(column, "-"):
                what = "the prompt is empty" if column == layout.text else "this cell is empty"
                _fail(path, line, shown(column), what, "fill it in or remove the line")
        prompt_id = cells["prompt_id"] if own and "prompt_id" in cells else f"{prompt_set}-{number:03d}"
        text = cells[layout.text]
        if layout.name == "HarmBench" and cells.get("ContextString"):
            text = f"{cells['ContextString']}\n\n---\n\n{text}"
        for column, what, key in ((layout.text, "prompt", normalise(text)), ("prompt_id", "id", prompt_id)):
            earlier = seen.setdefault((what, key), line)
            if earlier != line:
                _fail(
                    path, line, shown(column), f"this {what} occurs on line {earlier} already", "remove one of the two"
                )
        rows.append(
            {
                "prompt_id": prompt_id,
                "prompt_set": prompt_set,
                "category": cells.get(layout.category, "user") if layout.category else "user",
                "cluster": cells.get("cluster", prompt_id) if own else prompt_id,
                "text": text,
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _fail(path: Path, line: int, column: str, what: str, remedy: str) -> NoReturn:
    where = f"{path}, line {line}" + (f", column '{column}'" if column else "")
    raise CompendiumError(f"{where}: {what}; {remedy}.")
