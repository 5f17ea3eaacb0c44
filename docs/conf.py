"""Configuration of the site.  `make book` copies docs/ and the executed chapters to _build/site and builds there."""

project = "Learning to teach: knowledge distillation for BERT"
author = "the kdlib authors"
copyright = author
html_title = project

extensions = ["myst_nb", "sphinx_external_toc", "sphinx-mathjax-offline"]
external_toc_path = "book.yml"
exclude_patterns = ["costs.md"]  # included in index.md

# The chapters were executed by tools/book.py; warnings and progress bars that they printed are not for the page.
nb_execution_mode = "off"
nb_output_stderr = "remove"
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

html_theme = "sphinx_book_theme"
html_theme_options = {"use_download_button": False, "use_fullscreen_button": False}
html_copy_source = False
html_show_sourcelink = False
