"Read a notebook for readers: what only nbdev needs is taken out, folded solutions are marked for Sphinx."
import re
import nbformat

_DIRECTIVE = re.compile(r'#\|\s*([\w-]+)\s*:?\s*(.*)')

def directives(source: str,  # source of a code cell
              ) -> tuple[dict, str]: # directive → its value, and the source without them
    "Take the lines `#| name: value` off a cell."
    lines, found = source.split('\n'), {}
    for line in lines:
        if m := _DIRECTIVE.fullmatch(line.strip()): found[m[1]] = m[2].strip().strip('"\'')
    return found, '\n'.join(line for line in lines if not _DIRECTIVE.fullmatch(line.strip())).strip('\n')

def _still(output): # a page has no kernel that could move a slider
    if 'application/vnd.jupyter.widget-view+json' not in output.get('data', {}): return output
    return nbformat.v4.new_output('display_data', {'text/markdown': '*The sliders appear here when this notebook runs in JupyterLab: `make lab`.*'})

def _whole(output): # "93.34 ± 0.05" is not broken over two lines
    if 'text/markdown' in (data := output.get('data', {})): data['text/markdown'] = data['text/markdown'].replace(' ± ', '\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}')
    return output

def read(text: str): # content of an .ipynb file → notebook
    "A notebook without hidden cells and without directives."
    nb, cells = nbformat.reads(text, 4), []
    for cell in nb.cells:
        if cell.cell_type == 'code':
            said, cell.source = directives(cell.source)
            if {'hide', 'default_exp'} & said.keys() or said.get('include') == 'false' or not cell.source: continue
            if said.get('echo') == 'false' or 'hide_input' in said: cell.metadata['tags'] = ['remove-input']
            if said.get('code-fold') == 'true':
                cell.metadata['tags'] = ['hide-cell' if said.get('code-summary', '').startswith('Solution') else 'hide-input']
                name = said.get('code-summary', 'Code')
                cell.metadata['mystnb'] = {'code_prompt_show': name, 'code_prompt_hide': name}
            cell.outputs = [_whole(_still(o)) for o in cell.get('outputs', [])]
        cells.append(cell)
    nb.cells = cells
    nb.metadata['language_info'] = {'name': 'python', 'pygments_lexer': 'ipython3'}
    return nb
