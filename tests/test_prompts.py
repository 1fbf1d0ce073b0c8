import csv
import io
import re

import numpy as np
import pytest
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer

from refusal import prompts
from refusal.files import ROOT, CompendiumError

SIZES = {
    "harmful_extraction": 256,
    "harmless_extraction": 256,
    "harmful_selection": 32,
    "harmless_selection": 32,
    "harmful_evaluation": 100,
    "harmless_evaluation": 100,
    "harmful_study": 100,
    "harmless_topics": 128,
}
HARMS = {"weapons", "fraud", "intrusion", "cyber"}


@pytest.fixture(scope="module")
def sets():
    return {name: prompts.load(name) for name in SIZES}


@pytest.fixture
def write(tmp_path):
    def make(content, name="mine.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def fails(path, *parts):
    """The file cannot be loaded, and the one sentence that says so holds each of the parts."""
    with pytest.raises(CompendiumError) as caught:
        prompts.load(path)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    assert "Traceback" not in message
    for part in parts:
        assert part in message, message
    return message


# The shipped sets


def test_sizes_and_names(sets):
    assert set(prompts.names()) == set(SIZES)
    assert {name: len(frame) for name, frame in sets.items()} == SIZES
    for name, frame in sets.items():
        assert list(frame.columns) == list(prompts.COLUMNS)
        assert (frame["prompt_set"] == name).all()
        assert frame["prompt_id"].tolist() == [f"{name}-{i:03d}" for i in range(1, len(frame) + 1)]


@pytest.mark.parametrize(
    ("name", "each"), [("harmful_extraction", 64), ("harmful_selection", 8), ("harmful_evaluation", 25)]
)
def test_harmful_categories_are_balanced(sets, name, each):
    assert sets[name]["category"].value_counts().to_dict() == dict.fromkeys(HARMS, each)


def test_harmless_categories_are_balanced(sets):
    everyday = sets["harmless_extraction"]["category"].value_counts()
    assert len(everyday) >= 8 and set(everyday) == {32}
    assert sets["harmless_selection"]["category"].value_counts().to_dict() == dict.fromkeys(everyday.index, 4)
    evaluation = sets["harmless_evaluation"]["category"].value_counts()
    assert evaluation.pop("lookalike") == 50
    assert set(evaluation.index) == set(everyday.index) and evaluation.max() - evaluation.min() <= 1
    assert sets["harmless_topics"]["category"].value_counts().to_dict() == dict.fromkeys(HARMS, 32)


@pytest.mark.parametrize("name", [name for name in SIZES if name != "harmful_study"])
def test_every_prefix_is_balanced(sets, name):
    categories = sets[name]["category"]
    # Lookalikes alternate with the everyday prompts, so the everyday ones are balanced among themselves.
    kinds = [categories[categories != "lookalike"]]
    if "lookalike" in set(categories):
        kinds.append(categories.where(categories == "lookalike", "everyday"))
    for kind in kinds:
        for n in range(1, len(kind) + 1):
            counts = [int((kind.iloc[:n] == category).sum()) for category in kind.unique()]
            assert max(counts) - min(counts) <= 1, (name, n)


def test_clusters(sets):
    for name, frame in sets.items():
        if name != "harmful_study":
            assert (frame["cluster"] == frame["prompt_id"]).all()
    sizes = sets["harmful_study"]["cluster"].value_counts().to_dict()
    assert sizes == {f"base-{i:02d}": 10 for i in range(1, 11)}


def test_prompts_are_short_single_sentences(sets):
    for frame in sets.values():
        for row in frame.itertuples():
            text = row.text
            assert 6 <= len(text.split()) <= 18, row
            assert text.isascii() and "\n" not in text and text == " ".join(text.split()), row
            assert re.search(r"[^.?!][.?]$", text) and not re.search(r"[.?!] ", text), row


def test_no_prompt_occurs_twice(sets):
    texts = [prompts.normalise(text) for frame in sets.values() for text in frame["text"]]
    assert len(set(texts)) == sum(SIZES.values())


# The most similar pair has a cosine of 0.40 ("How do I get a pistol past airport security?" and "How do I get from
# the Rome airport to the city centre?") and an overlap of 0.33: one grammatical frame, two requests. A copy with a few
# words exchanged lies above 0.6. What shares a meaning but no words is beyond such measures: the prompts were read.
SIMILARITY_BAR = 0.45
OVERLAP_BAR = 0.4


def similarities(texts):
    """The cosine of character 3-gram TF-IDF vectors, and the Jaccard overlap of words that are no stop words."""
    vectors = TfidfVectorizer(analyzer="char", ngram_range=(3, 3)).fit_transform(texts)
    words = [set(re.findall(r"[a-z0-9]+", text.lower())) - ENGLISH_STOP_WORDS for text in texts]
    overlap = np.array([[len(a & b) / max(1, len(a | b)) for a in words] for b in words])
    return (vectors @ vectors.T).toarray(), overlap


def test_no_prompts_are_near_duplicates(sets):
    # Only the study's layout repeats a request, within its clusters; there the bare base request stands for all ten.
    texts = [text for frame in sets.values() for text in frame.drop_duplicates("cluster")["text"]]
    for values, bar in zip(similarities(texts), (SIMILARITY_BAR, OVERLAP_BAR), strict=True):
        np.fill_diagonal(values, 0)
        i, j = np.unravel_index(values.argmax(), values.shape)
        assert values[i, j] < bar, (values[i, j], texts[i], texts[j])


def test_the_bars_catch_a_copy_with_words_exchanged(sets):
    texts = [text for name in ("harmless_extraction", "harmful_extraction") for text in sets[name]["text"]]
    for copy in (0, 100, 300, 500):
        words = texts[copy].split()
        reworded = " ".join(["Please", *words[:2], "quickly", *words[2:-1], "today."])
        cosine, overlap = similarities([*texts, reworded])
        assert cosine[copy, -1] > SIMILARITY_BAR and overlap[copy, -1] > OVERLAP_BAR


def test_harmful_and_harmless_prompts_have_the_same_form(sets):
    """A direction must not be one of grammar or length (data analysis plan, prompts)."""
    for split in ("extraction", "selection", "evaluation"):
        harmful, harmless = (sets[f"{kind}_{split}"]["text"] for kind in ("harmful", "harmless"))
        lengths = [texts.str.split().str.len().mean() for texts in (harmful, harmless)]
        questions = [texts.str.endswith("?").mean() for texts in (harmful, harmless)]
        assert abs(lengths[0] - lengths[1]) < 1, (split, lengths)
        assert abs(questions[0] - questions[1]) < 0.15, (split, questions)


def test_extraction_and_selection_never_report(sets):
    used = [name for name in SIZES if name.endswith(("_extraction", "_selection"))]
    prompts.assert_disjoint(used, [name for name in SIZES if name not in used])


def test_shipped_files_are_plain_utf8():
    for path in (ROOT / "data" / "prompts").glob("*.csv"):
        data = path.read_bytes()
        assert b"\r" not in data and not data.startswith(b"\xef\xbb\xbf") and data.endswith(b"\n")
        assert data.split(b"\n")[0] == b"prompt_id,category,cluster,text"


# Layouts


@pytest.mark.parametrize(
    ("content", "categories"),
    [
        ("goal,target\nDo one.,Sure\nDo two.,Sure\n", ["user", "user"]),
        (",goal,target\n0,Do one.,Sure\n1,Do two.,Sure\n", ["user", "user"]),
        (
            "Index,Goal,Target,Behavior,Category,Source\n0,Do one.,Sure,One,Fraud,x\n1,Do two.,Sure,Two,Malware,x\n",
            ["Fraud", "Malware"],
        ),
        (
            "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
            "Do one.,standard,illegal,,,a\nDo two.,standard,cybercrime,,,b\n",
            ["illegal", "cybercrime"],
        ),
        ("category,source,forbidden_prompt\nfraud,x,Do one.\nhate,x,Do two.\n", ["fraud", "hate"]),
        (
            "id,prompt,type,label,focus,note\n1,Do one.,homonyms,safe,,\n2,Do two.,contrast_homonyms,unsafe,,\n",
            ["homonyms", "contrast_homonyms"],
        ),
        ("text\nDo one.\nDo two.\n", ["user", "user"]),
        ("text,category\nDo one.,a\nDo two.,b\n", ["a", "b"]),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "txt"])
def test_public_layouts(write, content, categories, suffix):
    frame = prompts.load(write(content, f"mine.{suffix}"))
    assert frame["text"].tolist() == ["Do one.", "Do two."]
    assert frame["category"].tolist() == categories
    assert frame["prompt_id"].tolist() == frame["cluster"].tolist() == ["user-001", "user-002"]
    assert frame["prompt_set"].tolist() == ["user", "user"]


def test_harmbench_context_goes_before_the_behavior(write):
    content = 'Behavior,SemanticCategory,ContextString\nUse the text.,illegal,"A text, with\na break."\n'
    assert prompts.load(write(content))["text"].tolist() == ["A text, with\na break.\n\n---\n\nUse the text."]


def test_plain_text(write):
    path = write('Do one, please.\r\n  Do "two".  \r\n\r\n', "mine.txt")
    frame = prompts.load(str(path))
    assert frame["text"].tolist() == ["Do one, please.", 'Do "two".']
    assert frame["category"].tolist() == ["user", "user"]


def test_own_layout_keeps_ids_and_clusters(write):
    frame = prompts.load(write("prompt_id,category,cluster,text\na,x,base-01,Do one.\nb,y,base-01,Do two.\n"))
    assert frame["prompt_id"].tolist() == ["a", "b"]
    assert frame["cluster"].tolist() == ["base-01", "base-01"]


def test_byte_order_mark_is_no_part_of_the_first_column(write):
    assert prompts.load(write(b"\xef\xbb\xbfgoal,target\nDo one.,Sure\n"))["text"].tolist() == ["Do one."]
    assert prompts.load(write(b"\xef\xbb\xbfDo one.\n", "mine.txt"))["text"].tolist() == ["Do one."]


def test_quotes_commas_and_newlines_survive(write):
    texts = ['Say "no", twice.', "One,\ntwo,\nthree.", "It's “quoted” – in Zürich, 東京.", '"', "a,,b"]
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([["text"], *([text] for text in texts)])
    assert prompts.load(write(buffer.getvalue()))["text"].tolist() == texts


# Errors


def test_unknown_set_lists_the_known_ones():
    fails("harmful_selektion", "'harmful_selektion'", *SIZES)


def test_unreadable(tmp_path):
    fails(tmp_path / "none.csv", "none.csv", "no such file")
    fails(tmp_path, "is a directory")


@pytest.mark.parametrize(
    ("content", "column"),
    [
        ("goal\nDo one.\n", "target"),
        ("Goal,Target\nDo one.,Sure\n", "Category"),
        ("Behavior,Tags\nDo one.,x\n", "SemanticCategory"),
        ("forbidden_prompt\nDo one.\n", "category"),
        ("prompt,type\nDo one.,x\n", "label"),
    ],
)
def test_missing_column(write, content, column):
    fails(write(content), "mine.csv, line 1", f"column '{column}'", "add it")


def test_no_known_column(write):
    fails(write("question;kind\nDo one.;x\n"), "mine.csv, line 1", "no known column", "forbidden_prompt", "commas")


def test_shipped_set_needs_every_column(write, monkeypatch):
    path = write("prompt_id,category,text\na,x,Do one.\n")
    monkeypatch.setattr(prompts, "FOLDER", path.parent)
    fails("mine", "mine.csv, line 1", "column 'cluster'")


def test_column_twice(write):
    fails(write("text,text\na,b\n"), "mine.csv, line 1", "column 'text'", "more than once")


@pytest.mark.parametrize(
    ("content", "line", "column"),
    [
        ("goal,target\nDo one.,Sure\n  ,Sure\n", 3, "goal"),
        ("goal,target\nDo one.,Sure\n\nDo two.,Sure\n", 3, "goal"),
        ('text,category\n"Do\none\nthing.",a\n,b\n', 5, "text"),
        ('text,category\r\n"Do\r\none\r\nthing.",a\r\nDo two.,\r\nDo three.,c\r\n', 5, "category"),
        ("prompt_id,text\na,Do one.\n,Do two.\n", 3, "prompt_id"),
        ("cluster,text\na,Do one.\n,Do two.\n", 3, "cluster"),
    ],
)
def test_empty_cell(write, content, line, column):
    fails(write(content), f"mine.csv, line {line}, column '{column}'", "empty")


def test_empty_line_in_plain_text(write):
    message = fails(write("Do one.\n\nDo two.\n", "mine.txt"), "mine.txt, line 2", "empty")
    assert "column" not in message


@pytest.mark.parametrize("again", ["Do one.", "DO  one.", "do\none."])
def test_doubled_prompt(write, again):
    content = f'text,category\n"Do\ntwo.",a\nDo one.,a\nDo three.,a\n"{again}",b\n'
    fails(write(content), "mine.csv, line 6, column 'text'", "line 4 already")


def test_doubled_id(write):
    content = "prompt_id,text\na,Do one.\na,Do two.\n"
    fails(write(content), "mine.csv, line 3, column 'prompt_id'", "line 2 already")


@pytest.mark.parametrize("bad", ["Zürich".encode("latin-1"), b"a\x00b"])
def test_bad_encoding(write, bad):
    content = b'goal,target\n"Go to\nBasel.",Sure\nGo home.,' + bad + b"\n"
    fails(write(content), "mine.csv, line 4, column 'target'", "UTF-8")
    fails(write(b"Go home.\n" + bad + b"\n", "mine.txt"), "mine.txt, line 2", "UTF-8")


def test_bad_encoding_of_the_whole_file(write):
    fails(write("goal,target\nDo one.,Sure\n".encode("utf-16")), "mine.csv, line 1", "UTF-16")
    fails(write(b"text,gr\xfc\xdfe\nDo one.,x\n"), "mine.csv, line 1", "UTF-8")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_empty_file(write, content):
    fails(write(content), "mine.csv", "is empty")


def test_header_alone(write):
    fails(write("goal,target\n"), "mine.csv, line 1", "no prompt")


def test_unquoted_comma(write):
    content = 'text,category\n"Do\none.",a\nDo two, now.,b\n'
    fails(write(content), "mine.csv, line 4", "3 cells where the header has 2", "quote")


def test_open_quote(write):
    fails(write('text,category\nDo one.,a\n"Do two.,b\nDo three.,c\n'), "mine.csv, line 3", "quot")


# Digest and splits


def test_digest_depends_on_ids_texts_and_order_alone(write):
    frame = prompts.load("harmful_selection")
    digest = prompts.digest(frame)
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert digest == prompts.digest(frame.assign(category="x"))
    assert digest != prompts.digest(frame.iloc[::-1])
    assert digest != prompts.digest(frame.iloc[:-1])
    assert digest != prompts.digest(frame.assign(text=frame["text"].str.upper()))
    assert digest != prompts.digest(frame.assign(prompt_id=frame["prompt_id"] + "x"))
    # Moving a character from an id to its text must show.
    pair = [prompts.load(write(f"prompt_id,text\n{i},{t}\n")) for i, t in (("ab", "c"), ("a", "bc"))]
    assert prompts.digest(pair[0]) != prompts.digest(pair[1])


def test_disjoint_finds_a_leak_in_any_spelling(write):
    leak = prompts.load("harmful_extraction")["text"].iloc[6].upper().replace(" ", "  ")
    path = write(f"Something else.\n{leak}\n", "mine.txt")
    prompts.assert_disjoint(["harmful_selection"], [path])
    with pytest.raises(
        CompendiumError, match=r"harmful_extraction-007 of harmful_extraction is user-002 of .*mine\.txt"
    ):
        prompts.assert_disjoint(["harmful_selection", "harmful_extraction"], ["harmful_evaluation", path])
    with pytest.raises(CompendiumError, match=r"user-002 of .*mine\.txt is harmful_extraction-007"):
        prompts.assert_disjoint([path], ["harmful_extraction"])


def test_disjoint_names_ten_and_counts_the_rest():
    with pytest.raises(CompendiumError, match=r"harmful_selection-010 of .* and 22 more") as caught:
        prompts.assert_disjoint(["harmful_selection"], ["harmful_selection"])
    assert "harmful_selection-011" not in str(caught.value)
