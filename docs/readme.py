"""Write README.md from `nbs/index.ipynb`, the landing page of the site.

    python docs/readme.py           writes it
    python docs/readme.py --check   exits with 1 when the two are out of step
"""
import difflib, re, sys
from pathlib import Path
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import TagRemovePreprocessor
from traitlets.config import Config
from nbdev_reader import read

ROOT = Path(__file__).resolve().parent.parent
_NO_PICTURES = ('{}: README.md cannot hold the picture of an output; '
                'save it in nbs/images and link it')
_ELSEWHERE = re.compile(r'[a-z][a-z0-9+.-]*:|[#/]', re.I)

def from_root(link: str, # target of a link in `nbs/`
             ) -> str:   # the same target, seen from the repository's root
    "Move a relative link up by one folder."
    if _ELSEWHERE.match(link): return link
    return link[3:] if link.startswith('../') else f'nbs/{link}'

def relink(markdown: str) -> str:
    "All relative links and images outside of code, seen from the repository's root."
    parts = re.split(r'(^```.*?^```|`[^`\n]+`)', markdown, flags=re.M | re.S)
    for i in range(0, len(parts), 2):
        for link in (r'(\]\()([^)\s]+)', r'\b((?:src|href|srcset)=")([^"]+)'):
            parts[i] = re.sub(link, lambda m: m[1] + from_root(m[2]), parts[i])
    return ''.join(parts)

def readme(source: Path = ROOT/'nbs'/'index.ipynb') -> str:
    "The text of README.md."
    nb = read(source.read_text(encoding='utf-8'))
    remove = {'enabled': True, 'remove_input_tags': {'remove-input'}}
    config = Config({'TagRemovePreprocessor': remove})
    exporter = MarkdownExporter(config=config)
    exporter.register_preprocessor(TagRemovePreprocessor(config=config), enabled=True)
    markdown, resources = exporter.from_notebook_node(nb)
    if resources.get('outputs'): sys.exit(_NO_PICTURES.format(source.name))
    markdown = re.sub(r'^```ipython3?$', '```python', markdown, flags=re.M)
    return re.sub(r'\n{3,}', '\n\n', relink(markdown)).strip() + '\n'

def main(args) -> int:
    target, text = ROOT/'README.md', readme()
    if '--check' not in args:
        target.write_text(text, encoding='utf-8')
        return 0
    old = target.read_text(encoding='utf-8') if target.exists() else ''
    if old == text: return 0
    both = old.splitlines(True), text.splitlines(True)
    sys.stdout.writelines(difflib.unified_diff(*both, 'README.md', 'nbs/index.ipynb'))
    print('README.md is out of step with nbs/index.ipynb; `python docs/readme.py` writes it')
    return 1

if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
