"""The pages of the site as text: what git holds (notebooks, figures, benchmark, plan), with links to the evidence.

Pages are MyST Markdown, and notebooks stay notebooks. Nothing is measured, and no number is made here.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell

from refusal.files import CompendiumError
from refusal.options import DEFAULT_MODEL as DEFAULT  # the committed notebooks were executed on it

TITLE = re.compile(r"^# (.+)$", re.MULTILINE)
QUESTION = re.compile(r"\*\*Question\.\*\*\s+(.+?)(?:\n\s*\n|\Z)", re.DOTALL)
SHARED_PAGES = {"data/analysis_plan.yaml": "plan.md", "data/claims.yaml": "claims.md"}


def drawn(cell: NotebookNode) -> list[str]:
    """The names of the figures that a cell saves."""
    if cell.cell_type != "code" or "figures.save(" not in cell.source:
        return []
    return list(dict.fromkeys(re.findall(r'"(fig_[a-z0-9_]+)"', cell.source)))


def explored(cell: NotebookNode) -> list[str]:
    """The names of the figures with sliders that a cell shows (`refusal.explore`), as book/figures.yaml has them."""
    found = re.findall(r"\bexplore\.(\w+)\(", cell.source) if cell.cell_type == "code" else []
    return [f"explore_{name}" for name in found]


def title(node: NotebookNode) -> str:
    """The first heading of a notebook."""
    found = TITLE.search("\n\n".join(cell.source for cell in node.cells if cell.cell_type == "markdown"))
    if not found:
        raise CompendiumError("a notebook has no title: begin it with a cell '# NN · Its question'.")
    return found[1]


def question(node: NotebookNode) -> str:
    """What a notebook asks, in its own words; empty where it does not say."""
    found = QUESTION.search(node.cells[0].source)
    return " ".join(found[1].split()) if found else ""


def short(text: str) -> str:
    """A title for the sidebar: up to its colon or question mark."""
    return re.split(r"[:?]", text)[0].strip()


def placed(pages: Mapping[str, NotebookNode]) -> set[str]:
    """The figures that can be seen, and so linked, on the notebooks' pages."""
    return {
        cell.metadata["mystnb"]["figure"]["name"]
        for node in pages.values()
        for cell in node.cells
        if drawn(cell) and any("image/png" in output.get("data", {}) for output in cell.outputs)
    }


def executed(node: NotebookNode) -> bool:
    """Whether every cell with code has run."""
    return all(cell.get("execution_count") for cell in node.cells if cell.cell_type == "code" and cell.source.strip())


def linked(text: str, own: str, known: Sequence[str]) -> str:
    """Markdown in which names of other notebooks, the plan and arXiv papers have become links.

    Args:
        text: The source of a cell in a notebook.
        own: The notebook's name.
        known: The names of all notebooks.
    """

    def link(match: re.Match[str]) -> str:
        name = match[1]
        if name in SHARED_PAGES:
            return f"[`{name}`](../{SHARED_PAGES[name]})"
        return f"[`{name}`]({name}.ipynb)" if name in known and name != own else match[0]

    text = re.sub(r"(?<!\[)`([\w./]+)`", link, text)
    return re.sub(r"(?<![\w/\[])arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def _download(words: str, path: str) -> str:
    return f"{{download}}`{words} <{path}>`"


def record_links(files: Path, model: str, notebook: str, up: str) -> list[str]:
    """Links to the records of a notebook on a model, where there are any.

    Args:
        files: The folder `files` of the site's source.
        model: Registry id.
        notebook: Name of the notebook.
        up: The way from the page to the site's top, e.g. "../".
    """
    found = {"record": f"records/{model}/{notebook}.parquet", "metrics": f"records/{model}/{notebook}.metrics.parquet"}
    return [_download(words, f"{up}files/{path}") for words, path in found.items() if (files / path).exists()]


def evidence(files: Path, model: str, notebook: str, figure: str, up: str) -> str:
    """The line below a figure: its data, its print version, its records and the command that measures it."""
    made = {"data (CSV)": "csv", "print (PDF)": "pdf"}
    paths = {words: f"figures/{model}/{figure}.{ending}" for words, ending in made.items()}
    links = [_download(words, f"{up}files/{path}") for words, path in paths.items() if (files / path).exists()]
    links += record_links(files, model, notebook, up)
    own = "" if model == DEFAULT else f" --model {model}"
    return " · ".join([*links, f"`./run_all.sh --only {notebook.split('_')[0]}{own}`"])


def notebook_page(
    name: str, node: NotebookNode, alternatives: Mapping[str, str], files: Path, known: Sequence[str]
) -> NotebookNode:
    """A notebook as a page: code folded, figures with alternative text and evidence, names linked.

    Args:
        name: The notebook's name.
        node: The notebook, as committed.
        alternatives: What each figure shows, in words.
        files: The folder `files` of the site's source.
        known: The names of all notebooks.

    Raises:
        CompendiumError: A figure without alternative text.
    """
    about = [_download("this notebook", f"../files/notebooks/{name}.ipynb"), *record_links(files, DEFAULT, name, "../")]
    said = f"*To measure it again:* `./run_all.sh --only {name.split('_')[0]}`. *As files:* {', '.join(about)}."
    if not executed(node):
        said = "*This notebook has not been run yet: its numbers and figures are still missing.*"
    cells: list[NotebookNode] = []
    for cell in node.cells:
        cells.append(cell)
        if cell.cell_type == "markdown":
            cell.source = linked(cell.source, name, known)
            continue
        tags = [tag for tag in cell.metadata.get("tags", []) if tag != "parameters"]
        cell.metadata = NotebookNode(tags=[*tags, "hide-input"])
        figures = drawn(cell)
        for figure in (shown := figures + explored(cell)):
            if figure not in alternatives:
                raise CompendiumError(f"{figure} of {name} has no alternative text: describe it in book/figures.yaml.")
        if shown:
            described = " ".join(alternatives[figure].strip() for figure in shown)
            cell.metadata["mystnb"] = {"image": {"alt": described}}
        if figures:
            captions = [f"**{figure}**: {evidence(files, DEFAULT, name, figure, '../')}" for figure in figures]
            cell.metadata["mystnb"]["figure"] = {"name": figures[0], "caption": "\n\n".join(captions)}
            rest = [output for output in cell.outputs if "image/png" not in output.get("data", {})]
            cell.outputs = [output for output in cell.outputs if output not in rest]
            if rest:  # MyST-NB would put text and tables, too, into a figure with that name
                cells.append(new_code_cell(outputs=rest, metadata={"tags": ["remove-input"]}, id=f"{cell.id}-more"))
    node.cells = [cells[0], new_markdown_cell(said, id="about-this-page"), *cells[1:]]
    return node


def notebooks_page(pages: Mapping[str, NotebookNode]) -> str:
    """The list of notebooks with their questions."""
    rows = [f"| [{short(title(node))}]({name}.ipynb) | {question(node)} |" for name, node in pages.items()]
    head = "# The notebooks\n\nOne question each. They can be read without the code, which is folded away.\n"
    return "\n".join([head, "| notebook | question |", "| --- | --- |", *rows, ""])


def figures_page(
    pages: Mapping[str, NotebookNode], models: Sequence[str], alternatives: Mapping[str, str], files: Path
) -> str:
    """All figures of all models, each with its evidence and the cell that drew it."""
    seen = placed(pages)
    text = [
        "# All figures",
        "",
        "Each with the data that it plots, the record that these come from, and the cell that draws it.",
    ]
    for name, node in pages.items():
        names = [figure for cell in node.cells for figure in drawn(cell)]
        shown = [(figure, model) for figure in names for model in models if _png(files, model, figure).exists()]
        if shown:
            text += ["", f"## {title(node)}"]
        for figure, model in shown:
            notebook = f"[the notebook that draws it](notebooks/{name}.ipynb)"
            cell = f"{{ref}}`the cell that draws it <{figure}>`" if figure in seen else notebook
            text += [
                "",
                f"```{{figure}} files/figures/{model}/{figure}.png",
                f":alt: {' '.join(alternatives[figure].split())}",
                "",
                f"**{figure}**, {model}: {cell} · {evidence(files, model, name, figure, '')}",
                "```",
            ]
    return "\n".join([*text, ""])


def hero(files: Path, model: str, notebook: str, figure: str, described: str) -> str:
    """The figure on the first page; nothing where it has not been made yet."""
    if not _png(files, model, figure).exists():
        return ""
    where = f"[how it was measured](notebooks/{notebook}.ipynb)"
    return "\n".join(
        [
            f"```{{figure}} files/figures/{model}/{figure}.png",
            f":alt: {' '.join(described.split())}",
            "",
            f"One mean difference added (+1) or subtracted (−1) at one layer of {model}; 95 % intervals; {where}. "
            + evidence(files, model, notebook, figure, ""),
            "```",
        ]
    )


def _png(files: Path, model: str, figure: str) -> Path:
    return files / "figures" / model / f"{figure}.png"


def plan_page() -> str:
    """The analysis plan, as it is."""
    words = (
        "Written down before the first evaluation: the comparisons of each notebook, the margins, and the rules that\n"
        "turn numbers into verdicts. A later change is a commit that says why.\n"
    )
    return f"# The analysis plan\n\n{words}\n```{{literalinclude}} files/analysis_plan.yaml\n:language: yaml\n```\n"


def paper_page(files: Path) -> str:
    """Where the PDF is, or how to get one, and how to cite."""
    made = _download("paper.pdf", "files/paper.pdf") + ", built from the records that this book is built from."
    missing = "This copy of the book was built without TeX, so there is no PDF: `./run_all.sh --replay` makes it."
    text = ["# The paper", "", made if (files / "paper.pdf").exists() else missing, ""]
    text += [
        "No number in it is typed: tables, figures, and the sentences that depend on numbers are made from records.",
        "",
        f"To cite: {_download('CITATION.cff', 'files/CITATION.cff')}. Works that it builds on: {{doc}}`references`.",
    ]
    return "\n".join([*text, ""])


def contents(pages: Mapping[str, NotebookNode], evidence_pages: Sequence[str]) -> str:
    """The tables of contents, which make the sidebar; they are not shown in the text."""
    parts = {
        "Begin": ["how_to_read", "glossary"],
        "Notebooks": ["Overview <notebooks/index>"]
        + [f"{short(title(node))} <notebooks/{name}>" for name, node in pages.items()],
        "Evidence": list(evidence_pages),
        "Paper": ["paper", "references"],
    }
    blocks = [
        "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *names, "```", ""])
        for caption, names in parts.items()
    ]
    return "\n".join(blocks)
