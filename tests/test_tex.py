import pandas as pd
import pytest

from refusal import tex
from refusal.files import CompendiumError


def test_escape_leaves_no_active_character():
    assert tex.escape("50 % of a_b & #1 {x} ~ ^ $ \\") == (
        r"50 \% of a\_b \& \#1 \{x\} \textasciitilde{} \textasciicircum{} \$ \textbackslash{}"
    )
    assert tex.escape("< 0.0001") == r"\textless{} 0.0001"


def test_a_hyphen_is_a_minus_only_before_a_number_of_its_own():
    assert tex.escape("-3.1") == "$-$3.1"
    assert tex.escape("[-3.1, -2]") == "[$-$3.1, $-$2]"
    assert tex.escape("Coder-0.5B, mid-p, 2026-02") == "Coder-0.5B, mid-p, 2026-02"
    assert tex.escape("./run_all.sh --only 03") == r"./run\_all.sh -{}-only 03"  # a dash would not run


def test_escape_refuses_what_the_fonts_lack():
    with pytest.raises(CompendiumError, match="no TeX form"):
        tex.escape("verdict ✅")
    assert tex.escape("Röttger") == "Röttger"


def test_plain_undoes_escape():
    for text in ["--model a ---", "< 0.0001", "50 % & a_b", "α ≥ 1 ± 2", r"\{}", "−3.1", "a{b}~^|#$"]:
        assert tex.plain(tex.escape(text)) == text


def test_tabular_aligns_numbers_right_and_refuses_raw_numbers():
    frame = pd.DataFrame({"n %": ["a_1", "b"], "rate": ["62.0 [52.2, 70.9]", "< 1"], "note": ["1", "none"]})
    table = tex.tabular(frame)
    assert r"\begin{tabular}{lrl}" in table
    assert r"a\_1 & 62.0 [52.2, 70.9] & 1 \\" in table
    assert table.index(r"\toprule") < table.index(r"n \%") < table.index(r"\midrule") < table.index(r"\bottomrule")
    with pytest.raises(CompendiumError, match="format it"):
        tex.tabular(pd.DataFrame({"rate": [62.0]}))


def test_longtable_wraps_its_cells_and_refuses_what_is_no_text():
    frame = pd.DataFrame({"claim": ["a_1 rises"], "verdict": ["< 5 %"]})
    table = tex.longtable(frame, (0.7, 0.3))
    assert table.startswith(r"\begin{longtable}{@{}>{\raggedright\arraybackslash}p{\dimexpr0.700\textwidth-2\tabcolsep")
    assert r"a\_1 rises & \textless{} 5 \% \\" in table and table.endswith("\\end{longtable}\n")
    rows = tex.longtable(pd.concat([frame] * 3), (0.7, 0.3)).split(r"\endfoot")[1].splitlines()[1:-1]
    assert [row.partition(r"\\")[2] for row in rows] == [r"\addlinespace", r"*\addlinespace", ""]  # no lone last row
    assert table.index(r"\endhead") < table.index(r"\endfoot") < table.index(r"a\_1")
    for widths, cells in (((1.0,), frame), ((0.5, 0.5), frame.assign(verdict=5.0))):
        with pytest.raises(CompendiumError, match="a width a column, and texts"):
            tex.longtable(cells, widths)


@pytest.mark.parametrize(
    "typed, found",
    [
        ("The rate was 62.", "62"),
        (r"It was 62.5\,\% here.", "62.5"),
        (r"A total of 1,024 prompts\label{a} passed.", "1,024"),
        ("Of a hundred prompts most were refused.", "hundred"),
        ("Twelve\nprompts", "Twelve"),
        ("It was $62$ there.", "62"),
        ("It was $1$ there.", "1"),
        ("Here $p = 0.05$ holds.", "0.05"),
        (r"\begin{equation} p = 17 \end{equation}", "17"),
        (r"\textbf{94} and more", "94"),
        (r"\caption{All 100 prompts.}", "100"),
        (r"costs \$5 and \$6", "5"),
        ("rose by 5 in total", "5"),
    ],
)
def test_typed_numbers_are_found(typed, found):
    source = "\\documentclass[11pt]{article}\n\\begin{document}\n" + typed + "\n\\end{document}"
    hits = list(tex.typed_numbers(source))
    assert hits and hits[0] == (3, found)


@pytest.mark.parametrize(
    "harmless",
    [
        "% 62 in a comment",
        r"see \ref{fig:1}, \citep[p.~3]{wilson1927probable}, \label{sec:2}",
        r"\includegraphics[width=0.9\linewidth]{figures/fig_1}",
        r"\verb|./run_all.sh --only 03| and \path{01_extraction}",
        r"\setlength{\tabcolsep}{4pt}\vspace{2em} a \\[3pt] b",
        r"$\alpha = +1$, $h_{l+1}$ and $\lVert d \rVert_2$",
        "\\begin{equation}\n  d = \\frac{1}{|H|} \\sum_x h(x) \\label{eq:9}\n\\end{equation}",
        "in float32 with sums in float64",
        r"\RefusalPlus{}\,\% of a single set, in one of two ways",
    ],
)
def test_what_is_no_typed_number(harmless):
    source = "\\documentclass[11pt]{article}\n\\begin{document}\n" + harmless + "\n\\end{document}"
    assert list(tex.typed_numbers(source)) == []


def test_model_names_stay_distinct_in_letters():
    ids = ["qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b", "qwen2.5-0.5b", "qwen2.5-7b", "qwen2-7b", "smollm2-135m"]
    names = {tex.letters(model) for model in ids}
    assert len(names) == len(ids)
    assert all(name.isalpha() for name in names)
