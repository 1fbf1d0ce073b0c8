"""TeX, without knowing what is measured: escaping, tables, and what a source text must not hold."""

import re
from collections.abc import Iterator, Sequence

import pandas as pd

from refusal.files import CompendiumError

ESCAPES = {character: "\\" + character for character in "%&_#${}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "−": "$-$",
    "α": r"$\alpha$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "→": r"$\to$",
    "–": "--",
    "—": "---",
    "…": r"\ldots{}",
    "’": "'",
    "“": "``",
    "”": "''",
}
DIGITS = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
# TeX's own control words that start with a capital, as the project's macros do.
STANDARD = {"LaTeX", "TeX", "Large", "LARGE", "Huge", "Pr", "Gamma", "Delta", "Theta", "Lambda", "Sigma", "Phi"}
# Names of number formats are the only words with digits that prose may hold: they say how, never how much.
ALLOWED = re.compile(r"\bfloat(?:32|64)\b")
NUMBER_WORD = (
    r"\b(?:four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen|twenty|thirty|forty"
    r"|fifty|sixty|seventy|eighty|ninety|dozen|hundred|thousand|million|billion)s?\b"
)
MATH = re.compile(
    r"\\begin\{(equation|align|gather|multline)(\*?)\}.*?\\end\{\1\2\}|\\\[.*?\\\]|\\\(.*?\\\)|(?<!\\)\$[^$]*(?<!\\)\$",
    re.DOTALL,
)
# What is no prose: names of files and commands, references, file arguments, lengths.
APART = re.compile(
    r"\\verb(\W).*?\1|\\begin\{verbatim\}.*?\\end\{verbatim\}|\\\\\[[^]]*\]"
    r"|\\(?:path|url|label|(?:eq|page|auto)?ref|cite\w*|input|includegraphics|bibliography(?:style)?|[vh]space)"
    r"\*?(?:\[[^]]*\])*\{[^{}]*\}|\\(?:begin(?!\{(?:equation|align|gather|multline))|setlength|addtolength)(?:\{[^{}]*\}|\[[^]]*\])+",
    re.DOTALL,
)
FIGURE = re.compile(r"\\includegraphics\s*(?:\[[^]]*\])?\{(?:[^}]*/)?([^}/]+?)(?:\.pdf)?\}")
INPUT = re.compile(r"\\input\{generated/([^}]+?)(?:\.tex)?\}")
DEFINITION = re.compile(r"^\\newcommand\{\\([A-Za-z]+)\}\{(.*)\}$", re.MULTILINE)


def letters(text: str) -> str:
    """A name in letters only, as TeX needs it: "qwen2.5-coder-1.5b" gives "QwenTwoFiveCoderOneFiveB"."""
    words = re.findall(r"[A-Za-z]+|\d", text)
    return "".join(DIGITS[int(word)] if word.isdigit() else word.capitalize() for word in words)


def escape(text: str) -> str:
    """Plain text as TeX; a hyphen before a number becomes a minus sign, and the two of an option stay two hyphens.

    Raises:
        CompendiumError: A character that the paper's fonts may lack.
    """
    text = re.sub(r"(?<![\w.)\]-])-(?=\d)", "−", " ".join(text.split()))
    for character in text:
        if ord(character) > 0x17F and character not in ESCAPES:
            raise CompendiumError(f"{character!r} in {text!r} has no TeX form: add one to ESCAPES in tex.py.")
    pairs = zip(f" {text}", text, strict=False)
    return "".join("{}-" if two == ("-", "-") else ESCAPES.get(two[1], two[1]) for two in pairs)


def plain(text: str) -> str:
    """The plain text of which `escape` made this."""
    original = {tex: character for character, tex in ESCAPES.items()}
    forms = "|".join(re.escape(tex) for tex in sorted(original, key=len, reverse=True))
    return re.sub(r"(?<=-)\{\}(?=-)", "", re.sub(forms, lambda match: original[match.group()], text))


def tabular(frame: pd.DataFrame) -> str:
    """A booktabs tabular of a frame of ready strings: columns of numbers are right aligned, the first and others left.

    Raises:
        CompendiumError: A cell that is no text; rounding is not decided here.
    """
    if not all(isinstance(cell, str) for cell in frame.to_numpy().ravel()):
        raise CompendiumError(f"the table of {list(frame.columns)} has a cell that is no text: format it.")
    numbers = re.compile(r"[-+−<>=\[\](),.–—/%×\s\d]*")
    align = "".join("r" if i and all(map(numbers.fullmatch, frame.iloc[:, i])) else "l" for i in range(frame.shape[1]))
    head, *rows = [" & ".join(escape(str(cell)) for cell in row) + r" \\" for row in [frame.columns, *frame.to_numpy()]]
    body = "\n".join([r"\toprule", head, r"\midrule", *rows, r"\bottomrule"])
    return f"\\begin{{tabular}}{{{align}}}\n{body}\n\\end{{tabular}}\n"


def longtable(frame: pd.DataFrame, widths: Sequence[float]) -> str:
    """A table that breaks over pages, of a frame of ready strings, whose cells wrap.

    Args:
        frame: Texts only.
        widths: Of the columns, as shares of the text's width.

    Raises:
        CompendiumError: As many widths as columns are needed, and texts in the cells.
    """
    if len(widths) != frame.shape[1] or not all(isinstance(cell, str) for cell in frame.to_numpy().ravel()):
        raise CompendiumError(f"the table of {list(frame.columns)} needs a width a column, and texts in its cells.")
    column = r">{\raggedright\arraybackslash}p{\dimexpr%.3f\textwidth-2\tabcolsep\relax}"
    head, *rows = [" & ".join(escape(str(cell)) for cell in row) + r" \\" for row in [frame.columns, *frame.to_numpy()]]
    # The last row holds on to the one before it, and has no space behind it: else a page may get a head and no row.
    rows[-2:-1] = [row + "*" for row in rows[-2:-1]]
    spaced = "\\addlinespace\n".join(rows)
    body = "\n".join([r"\toprule", head, r"\midrule", r"\endhead", r"\bottomrule", r"\endfoot", spaced])
    columns = "".join(column % width for width in widths)
    return f"\\begin{{longtable}}{{@{{}}{columns}@{{}}}}\n{body}\n\\end{{longtable}}\n"


def _blank(match: re.Match[str]) -> str:
    return " " + "\n" * match.group().count("\n")


def strip_comments(source: str) -> str:
    """The source without comments; lines keep their numbers."""
    return re.sub(r"(?<!\\)%.*", "", source)


def typed_numbers(source: str) -> Iterator[tuple[int, str]]:
    """Numbers typed into the body of a source: digits, and number words from four upwards.

    In formulas the integers 0, 1 and 2 may stand beside symbols; a formula of digits alone is a number in disguise.

    Args:
        source: A LaTeX source.

    Yields:
        The line and the number found there.
    """
    text = strip_comments(source)
    start = text.find(r"\begin{document}")
    text = "\n" * text.count("\n", 0, max(start, 0)) + text[max(start, 0) :]
    text = APART.sub(_blank, text)
    for formula in MATH.finditer(text):
        inner = re.sub(r"\\(?:begin|end|label)\{[^}]*\}", "", formula.group())
        numbers = re.findall(r"\d+(?:\.\d+)?", inner)
        symbols = re.search(r"[A-Za-z]", inner)
        for number in numbers:
            if number not in {"0", "1", "2"} or not symbols:
                yield text.count("\n", 0, formula.start()) + 1, number
    text = ALLOWED.sub("", MATH.sub(_blank, text))
    for match in re.finditer(rf"\d+(?:[.,]\d+)*|{NUMBER_WORD}", text, re.IGNORECASE):
        yield text.count("\n", 0, match.start()) + 1, match.group()


def used_macros(source: str) -> set[str]:
    """Control words of the project's kind (a capital first) that a source uses."""
    return set(re.findall(r"\\([A-Z][A-Za-z]*)", strip_comments(source))) - STANDARD


def swallowed_spaces(source: str) -> list[str]:
    """Macros of the project's kind with a blank right behind them, which TeX swallows."""
    return [name for name in re.findall(r"\\([A-Z][A-Za-z]*)(?=[ \n])", strip_comments(source)) if name not in STANDARD]


def citation_problems(source: str, bibliography: str) -> list[str]:
    """Cited keys that a BibTeX file lacks, and its entries without author, title, year or an identifier."""
    entries = {
        key.strip(): {field.lower() for field in re.findall(r"^\s*(\w+)\s*=\s*[{\"\d]", body, re.MULTILINE)}
        for key, body in re.findall(r"^@\w+\{([^,]+),(.*?)^\}", bibliography, re.MULTILINE | re.DOTALL)
    }
    groups = re.findall(r"\\cite\w*\*?(?:\[[^]]*\])*\{([^}]*)\}", strip_comments(source))
    cited = {key.strip() for group in groups for key in group.split(",")}
    problems = [f"references.bib has no entry {key!r}, which the text cites" for key in sorted(cited - entries.keys())]
    for key, fields in entries.items():
        lacking = sorted({"author", "title", "year"} - fields) + ([] if fields & {"eprint", "doi", "url"} else ["doi"])
        problems += [f"the entry {key!r} of references.bib has no {field}" for field in lacking]
    return problems
