"""The API index: every public name of the exported modules with its signature, the comments on
its parameters and a link to the chapter.

Read from the notebooks themselves with `ast`, so nothing is imported and the text is what the
author wrote."""
import ast, re, textwrap
from pathlib import Path
import nbformat
from nbdev_reader import directives

HEAD = '''# API

All public names, module by module, in the order in which they build on each other. \
Signatures carry what is worth saying about each parameter: shape, unit, range. \
Each entry links to the section that explains it.

| module | |
|---|---|
{listing}

```{{toctree}}
:hidden:
{toc}
```
'''

def _target(said): # the module that a cell is exported to; None: the notebook's; False: none
    for name in ('export', 'exports'):
        if name in said: return said[name].split()[0] if said[name] else None
    return False

def _slug(title): # as MyST makes it from a heading
    title = re.sub(r'[*`]|\$[^$]*\$|\[([^\]]*)\]\([^)]*\)', lambda m: m[1] or '', title)
    return re.sub(r'[^\w\- ]', '', title.strip().lower()).replace(' ', '-')

def _signature(source, node): # the lines from `def` or `class` up to the body
    first = min([d.lineno for d in node.decorator_list], default=node.lineno)
    body = node.body[0].lineno - 1
    lines = source.split('\n')[first - 1:max(body, node.lineno)]
    return textwrap.dedent('\n'.join(lines)).rstrip()

def _fields(source, node): # a class: its annotated fields, with their comments
    lines, found = source.split('\n'), []
    for n in node.body:
        if isinstance(n, ast.AnnAssign): found += lines[n.lineno - 1:n.end_lineno]
    return '\n'.join(found)

def _shown(source, node): # what a reader sees of the code
    shown = _signature(source, node)
    if isinstance(node, ast.ClassDef):
        fields = _fields(source, node)
        if fields: shown += '\n' + fields
    *before, last = shown.split('\n')
    is_body = last.lstrip().startswith(('return ', 'try:'))
    return '\n'.join(before) if is_body else shown

def _methods(node): # the public ones that say what they do
    functions = [n for n in node.body if isinstance(n, ast.FunctionDef)]
    return [n for n in functions if not n.name.startswith('_') and ast.get_docstring(n)]

def _entry(source, node, level, where, owner=''):
    doc, (link, section) = ast.get_docstring(node) or '', where
    title = f'{"#" * level} `{owner}{node.name}`'
    code = f'```python\n{_shown(source, node)}\n```'
    text = f'{title}\n\n{doc}\n\n{code}\n\n[{section}]({link})\n\n'
    if isinstance(node, ast.ClassDef):
        for n in _methods(node): text += _entry(source, n, level + 1, where, f'{owner}{node.name}.')
    return text

def _patched(node): # the class that fastcore's `@patch` adds this function to
    called = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    if not any(isinstance(d, ast.Name) and d.id == 'patch' for d in called): return ''
    return f'{ast.unparse(node.args.args[0].annotation)}.'

def _headings(markdown): # (level, title), in order
    outside = re.sub(r'^```.*?^```', '', markdown, flags=re.M | re.S)
    return [(len(m[1]), m[2]) for m in re.finditer(r'^(#+) (.+)', outside, re.M)]

def _public(source): # the functions and classes that a cell defines
    kinds = (ast.FunctionDef, ast.ClassDef)
    defined = [n for n in ast.parse(source).body if isinstance(n, kinds)]
    return [n for n in defined if not n.name.startswith('_')]

def entries(notebook: Path,  # a chapter
            link: str,       # how pages of the API index reach it
           ):                # yields (module, Markdown)
    "What one notebook adds to the package."
    default, heading, chapter = None, None, None
    for cell in nbformat.read(notebook, 4).cells:
        if cell.cell_type == 'markdown':
            for level, heading in _headings(cell.source):
                if level == 1: chapter = heading
        if cell.cell_type != 'code': continue
        said, source = directives(cell.source)
        default = said.get('default_exp', default)
        target = _target(said)
        if target is False: continue
        short = re.split(': ', chapter)[0]
        section = heading if heading == chapter else f'{short} › {heading}'
        where = f'{link}#{_slug(heading)}', section
        for node in _public(source):
            owner = _patched(node) if isinstance(node, ast.FunctionDef) else ''
            if owner.startswith('_'): continue
            yield target or default, _entry(source, node, 2, where, owner)

def _summary(notebook): # the sentence below a chapter's title
    m = re.search(r'^> (.+)', nbformat.read(notebook, 4).cells[0].source, re.M)
    return m[1] if m else ''

def pages(nbs: Path,
          chapters,        # names of the notebooks, in reading order
         ) -> dict[str, str]: # file name → Markdown
    "One page per module, and the page that lists them."
    modules, made_by, says = {}, {}, {}
    for chapter in chapters:
        notebook = nbs/f'{chapter}.ipynb'
        for module, text in entries(notebook, f'../{chapter}.ipynb'):
            if module not in modules:
                modules[module], made_by[module] = [], f'{chapter}.ipynb'
                says[module] = _summary(notebook)
            modules[module].append(text)
    listing = '\n'.join(f'| [`kesi.{m}`]({m}.md) | {says[m]} |' for m in modules)
    found = {'index.md': HEAD.format(listing=listing, toc='\n'.join(modules))}
    for m, texts in modules.items():
        head = f'# `kesi.{m}`\n\n> {says[m]}\n\nFrom [its chapter](../{made_by[m]}).\n\n'
        found[f'{m}.md'] = head + ''.join(texts)
    return found
