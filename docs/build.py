"""Build the site: `python docs/build.py` writes `_docs/html`.

The pages are the notebooks of `nbs/`, with their saved outputs; nothing is executed. They are laid
out in `_docs/source` first, together with the table of contents and the API index, so that `nbs/`
holds nothing that only Sphinx needs."""
import re, shutil, sys
from configparser import ConfigParser
from pathlib import Path
import nbformat
from sphinx.cmd.build import main as sphinx
import api
from contents import sections
from nbdev_reader import read

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NBS, SITE = ROOT/'nbs', ROOT/'_docs'
SOURCE, HTML = SITE/'source', SITE/'html'
PICTURES = ('.svg', '.png')

def _entry(page): # chapters are shown with their number
    if not re.match(r'\d', page): return page
    first = nbformat.read(NBS/f'{page}.ipynb', 4).cells[0].source
    title = re.search(r'^# (.+)', first, re.M)[1].replace('`', '')
    return f'{page[:2]} · {title} <{page}>'

def contents() -> str: # Markdown
    "The tables of contents, for the end of the landing page; the side bar shows them."
    trees = []
    for caption, pages in sections(NBS).items():
        lines = ['```{toctree}', ':hidden:', f':caption: {caption}', *map(_entry, pages), '```']
        trees.append('\n'.join(lines))
    return '\n\n'.join(trees)

def _repository():
    config = ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    return f'{config["DEFAULT"]["git_url"]}/blob/{config["DEFAULT"]["branch"]}'

def _outside(markdown, page): # links to files of the repository that are no pages go to it
    def moved(m):
        target = (page.parent/m[2].split('#')[0])
        is_page = target.suffix in ('.ipynb', '.md', *PICTURES)
        inside = target.resolve().is_relative_to(NBS) and is_page
        if inside or not target.exists(): return m[0]
        return f'{m[1]}{_repository()}/{target.resolve().relative_to(ROOT).as_posix()}'
    return re.sub(r'(\]\()(?![a-z]+:|#|/)([^)\s]+)', moved, markdown)

def _write(path, content):
    "Write if changed, so that Sphinx reads again only what it must."
    content = content.encode() if isinstance(content, str) else content
    if path.exists() and path.read_bytes() == content: return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)

def _page(path):
    "What Sphinx is to read of one file of `nbs`; None: nothing."
    if path.suffix in PICTURES: return path.read_bytes()
    if path.suffix == '.md': return _outside(path.read_text(encoding='utf-8'), path)
    if path.suffix != '.ipynb': return None
    nb = read(path.read_text(encoding='utf-8'), used=path.parent.name == 'use')
    for cell in nb.cells:
        if cell.cell_type == 'markdown': cell.source = _outside(cell.source, path)
    if path == NBS/'index.ipynb':
        nb.cells.append(nbformat.v4.new_markdown_cell(contents(), id='contents'))
    return nbformat.writes(nb)

def lay_out():
    "Write `_docs/source`."
    listed = [page for pages in sections(NBS).values() for page in pages]
    notebooks = [page for page in listed if (NBS/f'{page}.ipynb').exists()]
    wanted = {f'api/{name}': text for name, text in api.pages(NBS, notebooks).items()}
    for path in sorted(p for p in NBS.rglob('*') if p.is_file()):
        name = path.relative_to(NBS)
        if any(part.startswith('.') for part in name.parts): continue
        content = _page(path)
        if content is not None: wanted[name.as_posix()] = content
    for name, content in wanted.items(): _write(SOURCE/name, content)
    for path in SOURCE.rglob('*'):
        if path.is_file() and path.relative_to(SOURCE).as_posix() not in wanted: path.unlink()

def main(args) -> int:
    if '--fresh' in args: shutil.rmtree(SITE, ignore_errors=True)
    shutil.rmtree(HTML, ignore_errors=True)                        # no page outlives its notebook
    lay_out()
    strict = ['-E', '-a', '-W', '--keep-going', '-q']
    code = sphinx([*strict, '-c', str(HERE), '-d', str(SITE/'doctrees'), str(SOURCE), str(HTML)])
    if code == 0: print(f'{(HTML/"index.html").relative_to(ROOT)} is ready')
    return code

if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
