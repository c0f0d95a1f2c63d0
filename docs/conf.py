"Sphinx's settings. `docs/build.py` lays out the pages."
from configparser import ConfigParser
from pathlib import Path

_config = ConfigParser(delimiters=['='])
_config.read(Path(__file__).resolve().parent.parent/'settings.ini', encoding='utf-8')
project, release, copyright = _config['DEFAULT']['lib_name'], _config['DEFAULT']['version'], _config['DEFAULT']['copyright']

extensions = ['myst_nb', 'sphinx_copybutton', 'sphinx.ext.mathjax']
nb_execution_mode = 'off'                      # pages show the committed outputs
nb_merge_streams = True
nb_ipywidgets_js = {}                          # nothing from other hosts; pages show widgets as text
nb_render_markdown_format = 'myst'             # tables and formulas in computed Markdown
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'deflist']
myst_heading_anchors = 3

html_theme = 'furo'
html_title = 'kesi'
html_static_path = ['_static']
html_css_files = ['kesi.css']
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {'top_of_page_buttons': [], 'light_css_variables': {'color-brand-primary': '#23528f', 'color-brand-content': '#2a62a8', 'color-brand-visited': '#2a62a8'},
                      'dark_css_variables': {'color-brand-primary': '#8fb8ea', 'color-brand-content': '#8fb8ea', 'color-brand-visited': '#8fb8ea'}}
pygments_style, pygments_dark_style = 'friendly', 'github-dark'
html_search_language = 'en'

mathjax_path = 'mathjax/tex-svg-full.js'       # one file, in docs/_static; no other host is asked
mathjax3_config = {'svg': {'fontCache': 'global'}, 'options': {'enableMenu': False}}
copybutton_exclude = '.linenos, .gp, .go'
