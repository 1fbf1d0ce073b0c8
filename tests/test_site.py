"""The site: its pages hold what the notebooks hold, each figure leads to its evidence, and a real browser shows it."""

import re
from urllib.parse import unquote, urlsplit

import browser
import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from refusal import site, site_claims, site_pages, summaries
from refusal.files import ROOT, CompendiumError
from refusal.options import notebooks

MODEL = site_pages.DEFAULT
WIDE, PHONE = {"width": 1400, "height": 1000}, {"width": 390, "height": 844}
WCAG = {"runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}}
CELL = 'figure = figures.sweep(1)\n_ = figures.save(figure, data, "fig_a", folder)'


def committed(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def figures_of(name):
    """The figures of a notebook that are in git."""
    drawn = [figure for cell in committed(name).cells for figure in site_pages.drawn(cell)]
    return [figure for figure in drawn if (ROOT / "figures" / MODEL / f"{figure}.csv").exists()]


# --- pages as text


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ("see `02_b`.", "see [`02_b`](02_b.ipynb)."),
        ("this is `01_a`", "this is `01_a`"),
        ("`99_z` and `alpha`", "`99_z` and `alpha`"),
        ("[`02_b`](elsewhere)", "[`02_b`](elsewhere)"),
        ("(`data/analysis_plan.yaml`)", "([`data/analysis_plan.yaml`](../plan.md))"),
        ("`data/claims.yaml`", "[`data/claims.yaml`](../claims.md)"),
        ("(arXiv:2406.11717)", "([arXiv:2406.11717](https://arxiv.org/abs/2406.11717))"),
        ("https://arxiv.org/abs/2406.11717", "https://arxiv.org/abs/2406.11717"),
        ("$h_l$ and `h_l`", "$h_l$ and `h_l`"),
    ],
)
def test_names_become_links(text, becomes):
    assert site_pages.linked(text, "01_a", ["01_a", "02_b"]) == becomes


def test_titles_and_questions():
    cell = new_markdown_cell("# 03 · Sign: does it?\n\n**Question.** Does it\nreally?\n\nMore.")
    node = new_notebook(cells=[cell])
    assert site_pages.title(node) == "03 · Sign: does it?"
    assert site_pages.short("03 · Sign: does it?") == "03 · Sign"
    assert site_pages.short("04 · A threshold? Does it") == "04 · A threshold"
    assert site_pages.question(node) == "Does it really?"
    with pytest.raises(CompendiumError, match="no title"):
        site_pages.title(new_notebook(cells=[new_code_cell("1")]))


def test_a_figure_gets_a_description_and_only_the_evidence_there_is(tmp_path):
    for name in (f"figures/{MODEL}/fig_a.csv", f"records/{MODEL}/06_x.parquet"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    cells = [new_markdown_cell("# 06 · X"), new_code_cell(CELL, execution_count=1, metadata={"tags": ["parameters"]})]
    page = site_pages.notebook_page("06_x", new_notebook(cells=cells), {"fig_a": "What\nit shows."}, tmp_path, ["06_x"])
    assert page.cells[1].id == "about-this-page" and "06_x.parquet" in page.cells[1].source
    made = page.cells[2].metadata
    assert made["mystnb"]["image"]["alt"] == "What\nit shows." and made["mystnb"]["figure"]["name"] == "fig_a"
    caption = made["mystnb"]["figure"]["caption"]
    assert f"../files/figures/{MODEL}/fig_a.csv" in caption and f"../files/records/{MODEL}/06_x.parquet" in caption
    assert "fig_a.pdf" not in caption and "metrics" not in caption and "`./run_all.sh --only 06`" in caption
    assert made["tags"] == ["hide-input"]


def test_text_beside_a_figure_follows_it(tmp_path):
    outputs = [
        new_output("display_data", {"text/markdown": "said"}),
        new_output("display_data", {"image/png": "aGk=", "text/plain": "<Figure>"}),
    ]
    cells = [new_markdown_cell("# 06 · X"), new_code_cell(CELL, outputs=outputs, execution_count=1)]
    page = site_pages.notebook_page("06_x", new_notebook(cells=cells), {"fig_a": "What"}, tmp_path, ["06_x"])
    assert [list(output.data) for output in page.cells[2].outputs] == [["image/png", "text/plain"]]
    assert page.cells[3].outputs == outputs[:1] and page.cells[3].metadata["tags"] == ["remove-input"]
    assert "figure" not in page.cells[3].metadata.get("mystnb", {})


def test_a_figure_without_description_is_refused(tmp_path):
    node = new_notebook(cells=[new_markdown_cell("# 06 · X"), new_code_cell(CELL)])
    with pytest.raises(CompendiumError, match=r"fig_a of 06_x has no alternative text"):
        site_pages.notebook_page("06_x", node, {}, tmp_path, ["06_x"])


def test_a_notebook_that_was_not_run_says_so(tmp_path):
    node = new_notebook(cells=[new_markdown_cell("# 06 · X"), new_code_cell("1")])
    assert "not been run yet" in site_pages.notebook_page("06_x", node, {}, tmp_path, []).cells[1].source


def test_every_figure_is_drawn_by_one_cell_and_described():
    drawn = [
        (figure, name) for name in notebooks() for cell in committed(name).cells for figure in site_pages.drawn(cell)
    ]
    assert dict(drawn) == summaries.FIGURES and len(drawn) == len(summaries.FIGURES)
    described = site.alternatives()
    assert {*summaries.FIGURES, "explore_doses", "explore_layers"} <= set(described)
    assert all(40 < len(text) < 400 for text in described.values())


def test_descriptions_hold_no_results():
    assert [name for name, text in site.alternatives().items() if re.search(r"\d", text)] == []


def test_markdown_of_the_notebooks_has_no_line_that_the_site_would_drop():
    """MyST takes lines that begin with % for comments, and `(name)=` or +++ for marks."""
    for name in notebooks():
        for cell in committed(name).cells:
            if cell.cell_type == "markdown":
                assert not re.search(r"^\s*(?:%|\+\+\+|\([\w-]+\)=)", cell.source, re.MULTILINE), (name, cell.id)


def ledger():
    row = {"claim": "sign-plus", "document": "study", "place": "table 1", "quote": "15 | 6", "sentence": "It rises."}
    row |= {"verdict": "replicated", "numbers": "+23 | p = 0.01.", "power": "", "command": "./run_all.sh --only 03"}
    row |= {"record": "r", "figure": f"figures/{MODEL}/fig_sign.png", "notebook": "03_sign_inversion"}
    other = row | {"claim": "never", "verdict": "not testable here", "record": "", "command": "", "figure": ""}
    return pd.DataFrame([row, other])


def test_each_claim_leads_to_its_evidence(tmp_path):
    record = tmp_path / "records" / MODEL / "03_sign_inversion.parquet"
    record.parent.mkdir(parents=True)
    record.write_text("")
    tables = {MODEL: ledger(), "smollm2-135m": ledger().assign(verdict="contradicted")}
    about = {name: {"behind": "nothing: none", "replicated": "a rise"} for name in ("sign-plus", "never")}
    page = site_claims.claims_page(tables, {"study": "The study"}, about, tmp_path, {"fig_sign"})
    assert "(claim-sign-plus)=" in page and "| replicated | 1 | 0 |" in page and "| contradicted | 0 | 2 |" in page
    rows = [line for line in page.splitlines() if "**replicated**" in line]
    assert len(rows) == 1 and "+23 \\| p = 0.01." in rows[0] and "{ref}`figure <fig_sign>`" in rows[0]
    assert f"files/records/{MODEL}/03_sign_inversion.parquet" in rows[0] and "`./run_all.sh --only 03`" in rows[0]
    none = next(line for line in page.splitlines() if "**not testable here**" in line)
    assert "download" not in none and "ref" not in none and "run_all" not in none
    assert "{ref}" not in site_claims.claims_page(tables, {"study": "The study"}, about, tmp_path, set())


def test_without_its_packages_the_site_ends_in_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(site.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(CompendiumError, match=r"requirements-site\.lock"):
        site.build(tmp_path)


# --- the built site


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """The site, built with a stand-in for the paper."""
    pytest.importorskip("myst_nb", reason="the site's packages are missing: ./run_all.sh test installs them")
    out = tmp_path_factory.mktemp("site")
    (out / "stand-in.pdf").write_bytes(b"%PDF-1.5")
    return site.build(out, out / "stand-in.pdf").parent


@pytest.fixture(scope="module")
def soups(html):
    return {
        path.relative_to(html).as_posix(): BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        for path in sorted(html.rglob("*.html"))
        if "_static" not in path.parts
    }


def pages(soups):
    return [name for name in soups if name not in ("search.html", "genindex.html")]


@pytest.mark.slow
def test_every_link_resolves_and_nothing_is_loaded_from_elsewhere(html, soups):
    ids = {name: {tag["id"] for tag in soup.find_all(id=True)} for name, soup in soups.items()}
    wrong = []
    for name, soup in soups.items():
        for tag in soup.find_all(["a", "img", "link", "script", "source", "iframe"]):
            target = tag.get("href") or tag.get("src")
            if not target or target.startswith("data:"):
                continue
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                wrong += (
                    [f"{name}: loads {target}"]
                    if tag.name not in ("a", "link") or "stylesheet" in tag.get("rel", [])
                    else []
                )
                continue
            path = (html / name).parent / unquote(parts.path) if parts.path else html / name
            if not path.resolve().is_relative_to(html.resolve()) or not path.exists():
                wrong.append(f"{name}: {target} does not exist")
            elif parts.fragment and path.suffix == ".html":
                here = path.resolve().relative_to(html.resolve()).as_posix()
                if parts.fragment not in ids[here]:
                    wrong.append(f"{name}: {target} has no such place")
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("name", notebooks())
def test_a_page_holds_what_its_notebook_holds(soups, name):
    soup, node = soups[f"notebooks/{name}.html"], committed(name)
    body = soup.find("article")
    said = {re.sub(r"\W+", " ", tag.get_text()).strip() for tag in body.find_all(re.compile("^h[1-4]$"))}
    for cell in node.cells:
        for heading in re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else []:
            assert re.sub(r"\W+", " ", heading).strip() in said
    code = [cell for cell in node.cells if cell.cell_type == "code" and cell.source.strip()]
    assert len(body.select("div.cell_input")) == len(code)
    printed = body.get_text()
    for cell in code:
        for output in cell.outputs:
            if output.output_type == "stream":
                assert output.text.strip() in printed
    images = sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert len(body.select("div.cell_output img")) == images


@pytest.mark.slow
def test_each_figure_leads_to_its_cell_its_data_and_its_record(html, soups):
    overview = soups["figures.html"]
    checked = 0
    for name in notebooks():
        for figure in figures_of(name):
            place = figure.replace("_", "-")
            found = soups[f"notebooks/{name}.html"].find("figure", id=place)
            assert found is not None and found.find_parent("div", class_="cell") is not None, figure
            linked = {(html / "notebooks" / tag["href"]).resolve() for tag in found.find_all("a", class_="download")}
            contents = {path.read_bytes() for path in linked}
            for evidence in (f"figures/{MODEL}/{figure}.csv", f"data/records/{MODEL}/{name}.parquet"):
                assert (ROOT / evidence).read_bytes() in contents, (figure, evidence)
            assert overview.find("a", href=f"notebooks/{name}.html#{place}"), figure
            checked += 1
    assert checked == len(list((ROOT / "figures" / MODEL).glob("*.csv")))


@pytest.mark.slow
def test_the_first_page_shows_the_results_of_the_readme(soups):
    shown = " ".join(soups["index.html"].find("article").get_text().split())
    rows = re.findall(r"^\| (.+) \|$", site._results(), re.MULTILINE)
    assert len(rows) > 5
    for row in rows[:1] + rows[2:]:  # without the line below the head
        for cell in row.split(" | "):
            assert re.sub(r"[*`]", "", cell) in shown


@pytest.mark.slow
def test_the_paper_is_there_and_the_glossary_holds_the_vocabulary(html, soups):
    paper = [tag["href"] for tag in soups["paper.html"].select("a.download")]
    assert any((html / href).read_bytes() == b"%PDF-1.5" for href in paper)
    terms = {tag["id"] for tag in soups["glossary.html"].select("dt[id]")}
    words = (
        "layer direction alpha condition completion label refusal compliance degenerate cluster baseline record verdict"
    )
    assert {f"term-{word}" for word in words.split()} <= terms
    assert len(soups["references.html"].select("div.citation")) == len(
        re.findall(r"^@", (ROOT / "paper" / "references.bib").read_text(), re.MULTILINE)
    )


@pytest.mark.slow
def test_a_site_that_cannot_be_built_says_why_and_leaves_the_old_one(monkeypatch, tmp_path):
    pytest.importorskip("myst_nb", reason="the site's packages are missing: ./run_all.sh test installs them")
    book = tmp_path / "book"
    book.mkdir()
    for name in ("conf.py", "_templates/contents.html", "_static/site.css", "_static/favicon.svg", "figures.yaml"):
        (book / name).parent.mkdir(exist_ok=True)
        (book / name).write_bytes((site.BOOK / name).read_bytes())
    (book / "index.md").write_text("# Title\n\nSee [nothing](nowhere.md).\n")
    (tmp_path / "out" / "html").mkdir(parents=True)
    (tmp_path / "out" / "html" / "index.html").write_text("old")
    monkeypatch.setattr(site, "BOOK", book)
    monkeypatch.setattr(site, "notebooks", list)
    with pytest.raises(CompendiumError, match=r"could not be built \(.*\): its log is"):
        site.build(tmp_path / "out")
    assert (tmp_path / "out" / "html" / "index.html").read_text() == "old"
    assert "nowhere.md" in (tmp_path / "out" / "sphinx.log").read_text()


# --- in a browser


@pytest.fixture(scope="module")
def chromium():
    with browser.launched() as started:
        yield started


@pytest.fixture(scope="module")
def origin(html):
    with browser.served(html) as address:
        yield address


def settled(page, address):
    page.goto(address, wait_until="networkidle")
    if page.locator("article .math").count():
        page.wait_for_selector("mjx-container", state="attached")


# Pictures in the text with what makes one visible: [source, alternative, pixels, width, height].
PICTURES = """all => all.map(i => [i.getAttribute("src"), i.alt, i.complete ? i.naturalWidth : 0,
    i.checkVisibility() ? i.getBoundingClientRect().width : 0, i.getBoundingClientRect().height])"""


@pytest.fixture(scope="module")
def looked_at(chromium, origin, soups):
    """What is wrong with each page: in light and dark, on a wide window and on a phone's, by kind of fault."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is missing").Axe()
    page, faults = browser.opened(chromium, origin, viewport=WIDE, color_scheme="light")
    found = {"errors": {}, "pictures": {}, "formulas": {}, "light": {}, "dark": {}, "phone": {}}

    def check(scheme, options):
        page.wait_for_selector(f"html[data-theme={scheme}]")
        wrong = axe.run(page, options=options).response["violations"]
        found[scheme][name] = [(fault["id"], [node["target"] for node in fault["nodes"]][:3]) for fault in wrong]

    for name in [*pages(soups), "search.html"]:
        settled(page, f"{origin}/{name}")
        pictures = page.locator("article img").evaluate_all(PICTURES)
        found["pictures"][name] = [
            source
            for source, alternative, pixels, width, height in pictures
            if len(alternative) < 10 or not pixels or width < 100 or height < 50
        ]
        written, shown = page.locator("article .math").count(), page.locator("mjx-container").count()
        broken = page.locator("mjx-merror, [data-mjx-error]").count()
        found["formulas"][name] = [f"{shown} of {written}, {broken} broken"] if broken or shown < written else []
        found["errors"][name] = faults.copy()  # before the checker loads things of its own
        check("light", WCAG)
        page.emulate_media(color_scheme="dark")
        check("dark", {"runOnly": ["color-contrast"]})
        page.emulate_media(color_scheme="light")
        page.set_viewport_size(PHONE)
        wide = page.evaluate("document.scrollingElement.scrollWidth")
        found["phone"][name] = [f"{wide} pixels wide"] if wide > PHONE["width"] else []
        page.set_viewport_size(WIDE)
        faults.clear()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["errors", "pictures", "formulas", "light", "dark", "phone"])
def test_pages_pass_in_a_browser(looked_at, kind):
    """No console errors, visible pictures with texts, formulas set, WCAG A and AA, nothing wider than a phone."""
    assert len(looked_at[kind]) > len(notebooks()) + 5
    assert {name: wrong for name, wrong in looked_at[kind].items() if wrong} == {}


@pytest.mark.slow
def test_formulas_are_set_and_the_contents_open_on_a_phone(chromium, origin):
    page, faults = browser.opened(chromium, origin, viewport=PHONE, has_touch=True, is_mobile=True)
    settled(page, f"{origin}/notebooks/01_extraction.html")
    assert page.locator("mjx-container").count() > 5
    page.locator("button.primary-toggle").first.click()
    entry = page.locator("nav[aria-label='Contents']:visible").get_by_text("Sign inversion").first
    entry.wait_for(state="visible")
    entry.click()
    page.wait_for_url("**/notebooks/03_sign_inversion.html")
    assert faults == []


@pytest.mark.slow
def test_search_finds_sign_inversion(chromium, origin):
    page, faults = browser.opened(chromium, origin, viewport=WIDE)
    page.goto(f"{origin}/index.html", wait_until="networkidle")
    page.locator("button.search-button__button:visible, button.search-button:visible").first.click()
    page.keyboard.type("sign inversion")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=*")
    page.wait_for_selector("#search-results li a[href*='notebooks/03_sign_inversion.html']")
    assert faults == []


@pytest.mark.slow
def test_the_checker_finds_what_is_wrong(chromium):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is missing").Axe()
    page = chromium.new_page()
    page.set_content(
        "<html lang=en><title>x</title><img src=data:,><p style='color:#bbb;background:#fff'>Pale</p></html>"
    )
    assert {"image-alt", "color-contrast"} <= {
        fault["id"] for fault in axe.run(page, options=WCAG).response["violations"]
    }


@pytest.mark.slow
def test_a_reader_can_switch_to_the_dark(chromium, origin):
    page, faults = browser.opened(chromium, origin, viewport=WIDE, color_scheme="light")
    page.goto(f"{origin}/index.html", wait_until="networkidle")
    colour = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(colour)
    page.locator("button.theme-switch-button:visible").first.click()
    page.locator("button.theme-change-button[data-mode=dark]:visible").first.click()
    assert page.locator("html").get_attribute("data-theme") == "dark" and page.evaluate(colour) != before
    assert faults == []
