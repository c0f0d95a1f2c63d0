"""The API index: every public name of the exported modules with its signature, the comments on its parameters and a link to the chapter.

Read from the notebooks themselves with `ast`, so nothing is imported and the text is what the author wrote."""
import ast, re, textwrap
from pathlib import Path
import nbformat
from nbdev_reader import directives

def _target(said): return next((said[n].split()[0] if said[n] else None for n in ('export', 'exports') if n in said), False)

def _slug(title): # as MyST makes it from a heading
    title = re.sub(r'[*`]|\$[^$]*\$|\[([^\]]*)\]\([^)]*\)', lambda m: m[1] or '', title)
    return re.sub(r'[^\w\- ]', '', title.strip().lower()).replace(' ', '-')

def _signature(source, node): # the lines from `def` or `class` up to the body
    first = min([d.lineno for d in node.decorator_list], default=node.lineno)
    body = node.body[0].lineno - 1
    lines = source.split('\n')[first - 1:max(body, node.lineno)]
    return textwrap.dedent('\n'.join(lines)).rstrip()

def _fields(source, node): # a class: its annotated fields, with their comments
    lines = source.split('\n')
    return '\n'.join(line for n in node.body if isinstance(n, ast.AnnAssign) for line in lines[n.lineno - 1:n.end_lineno])

def _entry(source, node, level, where, owner=''):
    shown = _signature(source, node)
    if isinstance(node, ast.ClassDef) and (fields := _fields(source, node)): shown += '\n' + fields
    if shown.split('\n')[-1].lstrip().startswith(('return ', 'try:')): shown = '\n'.join(shown.split('\n')[:-1])
    doc = ast.get_docstring(node) or ''
    text = f'{"#" * level} `{owner}{node.name}`\n\n{doc}\n\n```python\n{shown}\n```\n\n[{where[1]}]({where[0]})\n\n'
    if isinstance(node, ast.ClassDef):
        for n in node.body:
            if isinstance(n, ast.FunctionDef) and not n.name.startswith('_') and ast.get_docstring(n): text += _entry(source, n, level + 1, where, f'{owner}{node.name}.')
    return text

def _patched(node): # the class that fastcore's `@patch` adds this function to
    decorated = any((d.func if isinstance(d, ast.Call) else d).id == 'patch' for d in node.decorator_list if isinstance(getattr(d, 'func', d), ast.Name))
    return f'{ast.unparse(node.args.args[0].annotation)}.' if decorated else ''

def entries(notebook: Path,  # a chapter
            link: str,       # how pages of the API index reach it
           ):                # yields (module, Markdown)
    "What one notebook adds to the package."
    default, heading, chapter = None, None, None
    for cell in nbformat.read(notebook, 4).cells:
        if cell.cell_type == 'markdown':
            for line in re.sub(r'^```.*?^```', '', cell.source, flags=re.M | re.S).split('\n'):
                if m := re.match(r'(#+) (.+)', line):
                    heading = m[2]
                    if len(m[1]) == 1: chapter = m[2]
        if cell.cell_type != 'code': continue
        said, source = directives(cell.source)
        default = said.get('default_exp', default)
        if (target := _target(said)) is False: continue
        where = (f'{link}#{_slug(heading)}', heading if heading == chapter else f'{re.split(": ", chapter)[0]} › {heading}')
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'):
                yield target or default, _entry(source, node, 2, where, _patched(node) if isinstance(node, ast.FunctionDef) else '')

def pages(nbs: Path,
          chapters,        # names of the notebooks, in reading order
         ) -> dict[str, str]: # file name → Markdown
    "One page per module, and the page that lists them."
    modules, made_by, says = {}, {}, {}
    for chapter in chapters:
        notebook = nbs/f'{chapter}.ipynb'
        first = nbformat.read(notebook, 4).cells[0].source
        for module, text in entries(notebook, f'../{chapter}.ipynb'):
            modules.setdefault(module, []).append(text)
            if module not in says: says[module], made_by[module] = (re.search(r'^> (.+)', first, re.M) or [None, ''])[1], f'{chapter}.ipynb'
    listing = '\n'.join(f'| [`kesi.{m}`]({m}.md) | {says[m]} |' for m in modules)
    toc = '\n'.join(modules)
    found = {'index.md': '# API\n\nAll public names, module by module, in the order in which they build on each other. Signatures carry what is worth saying about each parameter: shape, unit, range. '
                         f'Each entry links to the section that explains it.\n\n| module | |\n|---|---|\n{listing}\n\n```{{toctree}}\n:hidden:\n{toc}\n```\n'}
    for m, texts in modules.items():
        found[f'{m}.md'] = f'# `kesi.{m}`\n\n> {says[m]}\n\nFrom [its chapter](../{made_by[m]}).\n\n' + ''.join(texts)
    return found
