"Read a notebook for readers: what only nbdev needs is taken out, solutions are marked for Sphinx."
import re
import nbformat

_DIRECTIVE = re.compile(r'#\|\s*([\w-]+)\s*:?\s*(.*)')
_WIDGET = 'application/vnd.jupyter.widget-view+json'
_NO_KERNEL = '*The sliders appear here when this notebook runs in JupyterLab: `make lab`.*'
_MINUS = '\N{MINUS SIGN}'
_SPACE = '\N{NO-BREAK SPACE}'

def directives(source: str,  # source of a code cell
              ) -> tuple[dict, str]: # directive → its value, and the source without them
    "Take the lines `#| name: value` off a cell."
    found, left = {}, []
    for line in source.split('\n'):
        m = _DIRECTIVE.fullmatch(line.strip())
        if m: found[m[1]] = m[2].strip().strip('"\'')
        else: left.append(line)
    return found, '\n'.join(left).strip('\n')

def _still(output): # a page has no kernel that could move a slider
    if _WIDGET not in output.get('data', {}): return output
    return nbformat.v4.new_output('display_data', {'text/markdown': _NO_KERNEL})

_CODE = re.compile(r'(^```.*?^```|`[^`\n]+`|\$[^$\n]+\$)', re.M | re.S)
# -0.32, (-3), | -3 |, but not "ResNet-18 and -34"
_NEGATIVE = re.compile(r'(?<![\w.)\]/#-])-(?=\d*\.\d)|(?<=\()-(?=\d)|(?<=\| )-(?=\d)')

# "93.3 ± 0.5", "−0.3 to +1.9", "n = 5", "40.55 M" stay on one line; "95%" is set as in the text
_TOGETHER = re.compile(r'(?<=\d) (?:±|to) (?=[+−]?[\d.])|(?<=\bn) = (?=\d)|(?<=\d) (?=[MG]\b)')
_PERCENT = re.compile(r'(?<=\d)%(?![\dA-F])')

def typeset(markdown: str) -> str:
    "Computed text as a printer sets it: minus signs, percents, what belongs on one line."
    parts = _CODE.split(markdown)
    for i in range(0, len(parts), 2):
        signed = _NEGATIVE.sub(_MINUS, parts[i])
        together = _TOGETHER.sub(lambda m: m[0].replace(' ', _SPACE), signed)
        parts[i] = _PERCENT.sub(f'{_SPACE}%', together)
    return ''.join(parts)

def _set(output):
    data = output.get('data', {})
    if 'text/markdown' in data: data['text/markdown'] = typeset(data['text/markdown'])
    return output

def _named(cell): # what a fold without a name of its own hides
    shown = [o.get('data', {}) for o in cell.outputs]
    texts = ''.join(d.get('text/markdown', '') for d in shown)
    if any('image/png' in d for d in shown): return 'How the figure is drawn'
    if '|---' in texts.replace(' ', ''): return 'How the table is made'
    if texts: return 'How this is computed'
    defined = re.findall(r'^(?:def|class) (\w+)', cell.source, re.M)
    public = [name for name in defined if not name.startswith('_')]
    if not defined: return 'Imports' if cell.source.startswith(('import ', 'from ')) else 'Code'
    return ', '.join(public) or 'Helpers'

def _is_machinery(cell, said): # code of the package that no reader needs who only uses it
    lines = [line for line in cell.source.split('\n') if line.strip()]
    public = re.search(r'^(def|class) [^_]', cell.source, re.M)
    return 'export' in said and 'code-fold' not in said and (not public or len(lines) > 15)

def _fold(cell, name): # what MyST-NB knows
    cell.metadata['tags'] = ['hide-cell' if name.startswith('Solution') else 'hide-input']
    cell.metadata['mystnb'] = {'code_prompt_show': name, 'code_prompt_hide': name}

def _direct(cell, said): # directives → what MyST-NB knows
    if said.get('echo') == 'false' or 'hide_input' in said: cell.metadata['tags'] = ['remove-input']
    if said.get('code-fold') == 'true': _fold(cell, said.get('code-summary') or _named(cell))

def _is_hidden(said): return {'hide', 'default_exp'} & said.keys() or said.get('include') == 'false'

def read(text: str,          # content of an .ipynb file
         used: bool = False, # a page for those who use the package: its machinery is folded
        ):                   # the notebook
    "A notebook without hidden cells and without directives."
    nb, cells, last = nbformat.reads(text, 4), [], None
    for cell in nb.cells:
        machinery = None
        if cell.cell_type == 'code':
            said, cell.source = directives(cell.source)
            if _is_hidden(said) or not cell.source: continue
            cell.outputs = [_set(_still(o)) for o in cell.get('outputs', [])]
            _direct(cell, said)
            if used and _is_machinery(cell, said): machinery = cell
        if machinery and last:                       # one fold for those that follow one another
            cells.remove(last)
            cell.source = f'{last.source}\n\n{cell.source}'
        if machinery: _fold(cell, _named(cell))
        last = machinery
        cells.append(cell)
    nb.cells = cells
    nb.metadata['language_info'] = {'name': 'python', 'pygments_lexer': 'ipython3'}
    return nb
