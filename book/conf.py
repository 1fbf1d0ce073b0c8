"""The site, for Sphinx. `python -m refusal.site` (./run_all.sh site) lays the pages beside this file and builds them.

Nothing is loaded from elsewhere: fonts, scripts and MathJax come from packages and lie in the site itself.
"""

from typing import Any

project = "Crystallized Safety"
author = "the compendium's contributors"
project_copyright = "the compendium's contributors, under the MIT licence"

extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx-mathjax-offline", "sphinxcontrib.bibtex"]
exclude_patterns = ["files"]  # what is linked as it is
templates_path = ["_templates"]
smartquotes = False

nb_execution_mode = "off"  # the notebooks are committed executed
nb_render_markdown_format = "gfm"
nb_ipywidgets_js: dict[str, dict[str, str]] = {}
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 2
bibtex_bibfiles = ["files/references.bib"]
bibtex_default_style = "plain"

html_theme = "pydata_sphinx_theme"
html_title = project
html_favicon = "_static/favicon.svg"
html_context = {"default_mode": "auto"}  # light or dark as the reader's system has it
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_sidebars = {"**": ["contents.html"]}
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": project},
    "navbar_center": [],
    "navbar_end": ["theme-switcher"],
    "navbar_persistent": ["search-button"],
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "search_bar_text": "Search the book",
    "show_nav_level": 2,
}


def setup(app: Any) -> None:  # noqa: ANN401
    """Takes away a role of citations which docutils still writes and ARIA has withdrawn."""

    def mend(app: Any, page: str, template: str, context: dict[str, Any], tree: Any) -> None:  # noqa: ANN401
        body = context.get("body", "").replace(' role="doc-biblioentry"', "")
        context["body"] = body.replace('<div role="list" class="citation-list">', '<div class="citation-list">')

    app.connect("html-page-context", mend)
