"""Configuration of the site.  tools/site.py collects docs/, the chapters and the pages on kdlib, and builds them."""

from importlib.util import find_spec
from pathlib import Path

project = "Learning to teach: knowledge distillation for BERT"
author = "the kdlib authors"
copyright = author
html_title = project
language = "en"

extensions = ["myst_nb", "sphinx_external_toc", "sphinx_copybutton"]
external_toc_path = "book.yml"
exclude_patterns = ["costs.md", "downloads"]  # included in index.md; offered by the chapters' pages

# The chapters were executed before; warnings and progress bars that they printed are not for the page.
nb_execution_mode = "off"
nb_output_stderr = "remove"
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Every figure and every labelled equation has a number, and `{eq}` and `{numref}` show it on any page.
numfig = True
numfig_format = {"figure": "Figure %s"}

# Types in signatures belong to other libraries, whose pages this site does not fetch; kdlib's own names must resolve.
nitpick_ignore_regex = [("py:(class|obj)", r"(?!kdlib\.).*")]
python_maximum_signature_line_length = 80
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "sphinx_book_theme"
html_theme_options = {
    "logo": {"text": project},
    "use_download_button": False,  # each chapter offers its own files
    "use_fullscreen_button": False,
    "show_navbar_depth": 1,
    "navbar_persistent": [],  # the search field stands in the sidebar
    "pygments_light_style": "github-light-colorblind",
    "pygments_dark_style": "github-dark-colorblind",
}
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is
# The formulas' scripts and fonts come from the package sphinx-mathjax-offline, not from a network.
html_static_path = ["_static", str(Path(find_spec("sphinx-mathjax-offline").origin).parent / "static")]
mathjax_path = "mathjax/tex-chtml.js"
html_css_files = ["book.css"]
html_js_files = ["search.js"]
html_favicon = "_static/favicon.svg"
html_use_index = html_domain_indices = False  # the search finds more
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
copybutton_exclude = ".linenos, .gp, .go"


def number_by_chapter(app, env):
    """Number figures and equations as 1.1, 1.2, … in chapter 1; Sphinx has counted them through the whole book.

    Sphinx would take chapter numbers from the table of contents, where the preface comes first and numbers are missing.
    """
    for page, kinds in env.toc_fignumbers.items():
        chapter = page.removeprefix("chapters/")[:2]
        for labels in kinds.values():
            ordered = sorted(labels, key=labels.get)
            labels.update({label: (n,) for n, label in enumerate(ordered, start=1)})
            if chapter.isdigit():
                labels.update({label: (int(chapter), *number) for label, number in labels.items()})
    return []


def setup(app):
    app.connect("env-get-updated", number_by_chapter, priority=900)  # after Sphinx has counted
