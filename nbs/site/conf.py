"Sphinx reads this; build.py writes what it is about. Nothing here needs the network: no script, font or formula comes from another host."
from pathlib import Path
from docutils.nodes import SkipNode
from latex2mathml.converter import convert

project, author = "whatmatters", "the whatmatters developers"
copyright = "2026 onwards, " + author
html_title, html_theme = project, "sphinx_book_theme"
extensions = ["myst_nb"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
myst_dmath_double_inline = True   # a formula of its own line may stand within a paragraph

suppress_warnings = ["myst.header"]  # a chapter may go from its title to a small heading
nb_execution_mode = "off"        # the notebooks are committed executed
nb_output_stderr = "remove"
nb_render_markdown_format = "myst"   # with tables
nb_ipywidgets_js = {}            # or every page would ask a CDN for require.js

add_module_names = False
python_maximum_signature_line_length = 74
python_display_short_literal_types = True
html_domain_indices = False

html_static_path = [str(Path(__file__).parent/"static")]
html_css_files = ["style.css"]
html_favicon = "static/favicon.svg"
html_copy_source = html_show_sourcelink = False
html_theme_options = {"use_download_button": False, "use_fullscreen_button": False, "home_page_in_toc": True, "show_navbar_depth": 1, "collapse_navbar": True, "show_toc_level": 1,
                      "navbar_persistent": [], "secondary_sidebar_items": {"**": ["page-toc"], "ledger": [], "papers": [], "experiments/index": []}}
html_context = {"default_mode": "auto"}


def visit_math(self, node):
    "A formula as MathML, which browsers show by themselves."
    block = node.tagname == "math_block"
    html = convert(node.astext(), display="block" if block else "inline")
    self.body.append(f'<div class="formula">{html}</div>' if block else html)
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.config.html_math_renderer = "mathml"
    app.connect("html-page-context", lambda app, page, template, context, tree: context.update({"title": "Score it, keep only it, prove it"} if page == "index" else {}))  # in the tab; else the name twice
