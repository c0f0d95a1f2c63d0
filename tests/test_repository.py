"The repository as a whole: what is exported is in step, and the notebooks are fit to be read."
import json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
MACHINE_PATH = re.compile(rf'({re.escape(str(ROOT))}|/(root|tmp)/|/(home|Users)/\w+/)')


def source(cell): return ''.join(cell['source'])
def is_code(cell): return cell['cell_type'] == 'code' and source(cell).strip()
def code_cells(nb): return [c for c in nb['cells'] if is_code(c)]


def shown(cell):
    unshown = r'^#\|\s*(hide|default_exp|export|eval:\s*false)'
    return not re.search(unshown, source(cell), re.M)


def printed(output):
    data = output.get('data', {})
    kinds = ('text/plain', 'text/html', 'text/markdown')
    return json.dumps([output.get('text'), *map(data.get, kinds)])


NO_PICTURE = 'a figure without its picture; put %matplotlib inline into the first cell'

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_fit_to_be_read(path):
    nb = json.loads(path.read_text())
    outputs = [o for c in code_cells(nb) for o in c['outputs']]
    if any(map(shown, code_cells(nb))):
        assert outputs, 'committed without outputs; run `make notebooks`'
    for o in outputs:
        assert o['output_type'] != 'error'
        assert o.get('name') != 'stderr', printed(o)
        assert 'Warning' not in printed(o)
        assert not MACHINE_PATH.search(printed(o)), printed(o)
        if '<Figure size' in printed(o): assert 'image/png' in o['data'], NO_PICTURE
    assert path.stat().st_size < 1_500_000
    ids = [c['id'] for c in nb['cells']]
    assert len(set(ids)) == len(ids), 'two cells have one id'
    for c in code_cells(nb):
        is_folded = 'code-fold: true' in source(c)
        assert source(c).count('\n') < 45 or is_folded, source(c)[:200]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_lines_fit_the_page(path):
    cells = code_cells(json.loads(path.read_text()))
    lines = [line for c in cells for line in source(c).split('\n')]
    long = [line for line in lines if len(line) > 100]
    assert not long, f'{len(long)} lines are longer than 100, first {long[:1]}'


@pytest.mark.parametrize('path', sorted((ROOT/'kesi').glob('[!_]*.py')), ids=lambda p: p.stem)
def test_lines_of_the_package_are_short(path):
    "What nbdev writes (the docstring, __all__) stands above the first cell."
    _, *cells = re.split(r'^# %% \.\./nbs/.*$', path.read_text(), flags=re.M)
    assert cells
    long = [line for cell in cells for line in cell.split('\n') if len(line) > 100]
    assert not long, f'{len(long)} lines are longer, first {long[:1]}'


# of prose, and of code that is neither hidden nor folded: a quarter of an hour
WORDS, LINES = 1500, 150
STORY = [p for p in NOTEBOOKS if p.parent.name == 'nbs' and p.stem[0].isdigit()]


def prose(cell): # without the targets of links
    return re.sub(r'\]\([^)]*\)', ']', source(cell)) if cell['cell_type'] == 'markdown' else ''


def visible_lines(cell):
    unseen = r'^#\|\s*(hide|default_exp|include:\s*false|echo:\s*false|code-fold:\s*true)'
    if not is_code(cell) or re.search(unseen, source(cell), re.M): return []
    return [line for line in source(cell).split('\n') if line.strip() and line[:2] != '#|']


@pytest.mark.parametrize('path', STORY, ids=lambda p: p.stem)
def test_a_story_chapter_takes_a_quarter_of_an_hour(path):
    cells = json.loads(path.read_text())['cells']
    words = sum(len(prose(c).split()) for c in cells)
    lines = sum(len(visible_lines(c)) for c in cells)
    assert words <= WORDS and lines <= LINES, f'{words} words, {lines} lines of code to be seen'


ENDS = re.compile(r'^## (What .*(found|built|shows)|If you want a small network)', re.M)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_a_chapter_ends_with_what_was_found(path):
    "Story chapters and studies: behind the middle of the page stands what came out."
    if path not in STORY and path.parent.name != 'reproduce': return
    cells = json.loads(path.read_text())['cells']
    texts = [source(c) for c in cells[len(cells) // 2:] if c['cell_type'] == 'markdown']
    assert any(map(ENDS.search, texts)), 'no heading says what was found'


def test_package_is_in_step_with_notebooks(tmp_path):
    "Exporting again changes nothing."
    debris = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
    for name in ('nbs', 'kesi'): shutil.copytree(ROOT/name, tmp_path/name, ignore=debris)
    for name in ('settings.ini', 'setup.py', 'pyproject.toml'):
        shutil.copy(ROOT/name, tmp_path/name)
    code = 'from nbdev.doclinks import nbdev_export; nbdev_export()'
    env = {**os.environ, 'PYTHONPATH': str(tmp_path)}
    line = [sys.executable, '-c', code]
    subprocess.run(line, cwd=tmp_path, check=True, capture_output=True, env=env)
    for p in sorted((ROOT/'kesi').glob('*.py')):
        exported = (tmp_path/'kesi'/p.name).read_text()
        stale = f'{p.name} is not what the notebooks export; run nbdev_export'
        assert exported == p.read_text(), stale


STAIRCASE = ('paper', 'runtime', 'data', 'models', 'macs', 'pruning', 'schedules', 'training',
             'ensemble', 'distill', 'store', 'pipeline', 'report', 'deploy', 'anynet', 'scale',
             'bench', 'cli', 'studies', 'pretrained')


def modules():
    "The modules that the notebooks make, from the bottom of the staircase to its top."
    made = [name for p in NOTEBOOKS for c in code_cells(json.loads(p.read_text()))
            for name in re.findall(r'^#\|\s*default_exp\s+(\w+)', source(c), re.M)]
    assert len(made) == len(set(made)) and set(made) <= set(STAIRCASE)
    return sorted(made, key=STAIRCASE.index)


def test_modules_import_only_what_stands_below_them():
    found = modules()
    at_top = r'^from (?:kesi)?\.(\w*) import|^from \.(\w+) import|^from (?:kesi|\.) import (.+)$'
    for i, name in enumerate(found):
        imports = re.findall(at_top, (ROOT/'kesi'/f'{name}.py').read_text(), re.M)
        for module in re.findall(r'\w+', ' '.join(m for groups in imports for m in groups)):
            assert module not in found[i:], f'{name} imports {module}, which stands above it'


ALONE = '''
import importlib, os, sys, traceback
sys.modules["nbdev"] = None
def alone(name):
    "In a process that has not seen any other of our modules: 0 if it can be imported."
    if pid := os.fork(): return os.waitpid(pid, 0)[1]
    try: importlib.import_module(f"kesi.{name}")
    except BaseException: traceback.print_exc(); os._exit(1)
    os._exit(name == "paper" and "torch" in sys.modules)
failed = [n for n in ("paper",) if alone(n)]
import fvcore.nn, matplotlib.pyplot, safetensors.torch, torch, torchvision          # once for all
sys.exit(", ".join(failed + [n for n in sys.argv[1:] if n != "paper" and alone(n)]) or None)
'''

def test_exported_modules_stand_alone():
    "Every module imports without nbdev and without the others; `kesi.paper` without torch."
    line = [sys.executable, '-W', 'error::SyntaxWarning', '-c', ALONE, *modules()]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_page_installs_a_stranger():
    "The index of packages has another project of our name: extras are installed from a clone."
    line = ['git', 'ls-files', '-z']
    listed = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    asked = re.compile(r'pip3? install (?:-[-\w=]+ )*[\'"]?kesi\b')
    texts = {'.py', '.ipynb', '.md', '.ini', '.toml', '.yml', '.sh', '.html', '.js', '.json', ''}
    names = [n for n in listed.stdout.split('\0') if n and Path(n).suffix in texts]
    assert 'README.md' in names and 'nbs/use/any_network.ipynb' in names
    wrong = [n for n in names if asked.search((ROOT/n).read_text(errors='replace'))]
    assert not wrong, f'these install another project named kesi: {wrong}'


def test_users_may_have_any_fastcore():
    "Only nbdev 2, which developers use, needs an old one."
    import configparser, shlex
    settings = configparser.ConfigParser(delimiters=['='], interpolation=None)
    settings.read(ROOT/'settings.ini', encoding='utf-8')
    everything = settings['DEFAULT'].items()
    lists = {n: shlex.split(v) for n, v in everything if n.endswith('requirements')}
    is_bounded = lambda word: word.startswith('fastcore') and word != 'fastcore'
    bounded = {n for n, words in lists.items() if any(map(is_bounded, words))}
    assert 'fastcore' in lists['requirements'] and bounded == {'dev_requirements'}
