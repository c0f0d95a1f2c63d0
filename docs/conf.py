"Sphinx's settings. `docs/build.py` lays out the pages."
from configparser import ConfigParser
from pathlib import Path

_config = ConfigParser(delimiters=['='])
_config.read(Path(__file__).resolve().parents[1]/'settings.ini', encoding='utf-8')
_said = _config['DEFAULT']
project, release, copyright = _said['lib_name'], _said['version'], _said['copyright']

extensions = ['myst_nb', 'sphinx_copybutton', 'sphinx.ext.mathjax']
nb_execution_mode = 'off'                      # pages show the committed outputs
nb_merge_streams = True
nb_ipywidgets_js = {}                          # nothing from other hosts: widgets are text
nb_render_markdown_format = 'myst'             # tables and formulas in computed Markdown
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'deflist']
myst_heading_anchors = 3

html_theme = 'furo'
html_title = 'kesi'
html_static_path = ['_static']
html_css_files = ['kesi.css']
html_show_sourcelink = False
html_copy_source = False

def _brand(primary, content):
    colors = {'primary': primary, 'content': content, 'visited': content}
    return {f'color-brand-{name}': color for name, color in colors.items()}

html_theme_options = {'top_of_page_buttons': [],
                      'light_css_variables': _brand('#23528f', '#2a62a8'),
                      'dark_css_variables': _brand('#8fb8ea', '#8fb8ea')}
pygments_style, pygments_dark_style = 'friendly', 'github-dark'
html_search_language = 'en'

mathjax_path = 'mathjax/tex-svg-full.js'       # one file, in docs/_static; no other host is asked
mathjax3_config = {'svg': {'fontCache': 'global'}, 'options': {'enableMenu': False}}
copybutton_exclude = '.linenos, .gp, .go'

def _scripts(app, page, template, context, doctree):
    if page == 'use/playground': app.add_js_file('playground.js', loading_method='defer')

def setup(app): app.connect('html-page-context', _scripts)
