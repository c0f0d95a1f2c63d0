"The built site and JupyterLab in headless Chromium, at desktop and phone width, light and dark."
import json, os, re, shlex, shutil, subprocess, sys, time
from html.parser import HTMLParser
from pathlib import Path
import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT/'_docs'/'html'
CHROMIUM, CHROMEDRIVER = (shutil.which(n) for n in ('chromium', 'chromedriver'))
FLAGS = ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
         '--disable-background-networking', '--disable-component-update', '--disable-sync',
         '--disable-dev-shm-usage', '--hide-scrollbars')
NO_BROWSER = 'needs a browser: apt-get install chromium chromium-driver'
browser_test = pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason=NO_BROWSER)

def python(*args, **kw):
    line = [sys.executable, *map(str, args)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, **kw)

def test_readme_is_in_step():
    done = python('docs/readme.py', '--check')
    assert done.returncode == 0, done.stdout

def test_picture_is_in_step():
    done = python('docs/picture.py', '--check', env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr

def test_readme_links_lead_somewhere():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    targets = re.findall(r'\]\(([^)\s]+)', re.sub(r'^```.*?^```', '', text, flags=re.M | re.S))
    local = [t.split('#')[0] for t in targets if not re.match(r'[a-z]+:|#', t)]
    assert local and [t for t in local if not (ROOT/t).exists()] == []

TYPESET = (('| -0.32 to +1.93 | -3 |', '| −0.32~to~+1.93 | −3 |'), ('(-3, n = 5)', '(−3, n~=~5)'),
           ('1.5 ± .2, 95% of 3', '1.5~±~.2, 95~% of 3'), ('(-1 to -.5, 2%)', '(−1~to~−.5, 2~%)'),
           ('| 40.55 M |', '| 40.55~M |'))
AS_IT_IS = ('ResNet-18 and -34', '`lr=-.5` and $-1.5$', '[a](b-1.5.md#-2.5)', '1e-3, 2-3, --pad',
            '- 3 items', 'from 1 to many', '[a](b%20c1%20)', '```\n-1.5 ± 2 to 3%\n```')

@pytest.mark.parametrize('text, wanted', (*TYPESET, *zip(AS_IT_IS, AS_IT_IS)))
def test_computed_text_is_typeset(text, wanted, monkeypatch):
    monkeypatch.syspath_prepend(ROOT/'docs')
    from nbdev_reader import typeset
    assert typeset(text) == wanted.replace('~', '\N{NO-BREAK SPACE}')

CELLS_OF_A_PAGE = ('#| export\nimport re', '#| hide\n1', '#| export\ndef _a(): pass',
                   '#| export\ndef small(): pass', '#| export\ndef long():\n' + '    1\n' * 16,
                   '#| export\n#| code-fold: false\ndef open_():\n' + '    1\n' * 16)

def test_machinery_is_folded_for_users(monkeypatch):
    monkeypatch.syspath_prepend(ROOT/'docs')
    import nbformat
    from nbdev_reader import read
    cells = [nbformat.v4.new_code_cell(text) for text in CELLS_OF_A_PAGE]
    text = nbformat.writes(nbformat.v4.new_notebook(cells=cells))
    def folds(used):
        found = read(text, used).cells
        return [c.metadata.get('mystnb', {}).get('code_prompt_show') for c in found]
    assert folds(True) == ['Helpers', None, 'long', None]       # two in one, a hidden one between
    assert folds(False) == [None] * 5

@pytest.fixture(scope='session')
def site():
    """The built site; warnings, such as a link that leads nowhere, are errors.

    Several workers of one test run build it once."""
    run, mark = os.environ.get('PYTEST_XDIST_TESTRUNUID'), ROOT/'_docs'/'.run'
    mark.parent.mkdir(exist_ok=True)
    with FileLock(mark.with_suffix('.lock')):
        if run is None or not mark.exists() or mark.read_text() != run:
            done = python('docs/build.py')
            assert done.returncode == 0, done.stderr[-4000:]
            mark.write_text(run or '')
    return HTML

def pages(site):
    found = [p for p in site.rglob('*.html') if not {'_static', '_sources'} & set(p.parts)]
    return sorted(p.relative_to(site).as_posix() for p in found)

class _Neighbours(HTMLParser):
    "The pages before and after a page, by the links at its end."
    def __init__(self, text):
        super().__init__()
        self.found = {}
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        for side in ('prev', 'next'):
            if tag == 'a' and f'{side}-page' in attrs.get('class', '').split():
                self.found[side] = attrs['href'].split('#')[0]

def neighbours(site, page):
    links = _Neighbours((site/page).read_text(encoding='utf-8')).found
    here = os.path.dirname(page)
    return {side: os.path.normpath(os.path.join(here, link)) for side, link in links.items()}

def test_the_chain_of_pages_is_complete(site):
    around = {p: neighbours(site, p) for p in pages(site)}
    chain = ['index.html']
    while 'next' in around[chain[-1]] and len(chain) <= len(around):
        chain.append(around[chain[-1]]['next'])
    assert set(chain) == set(around) - {'search.html', 'genindex.html'}
    assert len(chain) == len(set(chain))
    for a, b in zip(chain, chain[1:]): assert around[b]['prev'] == a
    chapters = [p for p in chain if re.match(r'\d\d_', p)]
    assert chapters == sorted(chapters) and chapters[0] == '00_kesi_in_one_page.html'

def test_every_exported_name_is_in_the_api_index(site):
    for module in (ROOT/'kesi').glob('[a-z]*.py'):
        text = module.read_text(encoding='utf-8')
        listed = re.search(r'__all__ = (\[.*?\])', text, re.S)[1].replace("'", '"')
        page = (site/'api'/f'{module.stem}.html').read_text(encoding='utf-8')
        functions = set(re.findall(r'^(?:def|class) (\w+)', text, re.M)) & set(json.loads(listed))
        assert [n for n in functions if f'<span class="pre">{n}</span>' not in page] == []

# In the browser

MODES = ((1300, False), (390, True)), ((1100, True), (390, False))     # width of the window, dark?

def see_as(driver, width=1300, dark=False):
    "Give the window a width and a colour scheme; pages that are open follow."
    window = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
    driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', window)
    scheme = {'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}
    driver.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': [scheme]})

@pytest.fixture(scope='session')
def shared_browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location, options.unhandled_prompt_behavior = CHROMIUM, 'accept'
    for f in FLAGS: options.add_argument(f)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    driver.set_page_load_timeout(180)
    driver.set_script_timeout(180)
    yield driver
    driver.quit()

@pytest.fixture
def browser(shared_browser):
    "One Chromium for all tests, in a wide light window."
    see_as(shared_browser)
    return shared_browser

def until(condition, seconds=120, what=''):
    "Wait for a condition; its value."
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f'waited {seconds} s in vain for {what}'
        time.sleep(.2)
    return value

def into_view(driver, element):
    centre = "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})"
    driver.execute_script(centre, element)
    return element

def requested(driver):
    "Addresses asked for since the last call."
    messages = [json.loads(e['message'])['message'] for e in driver.get_log('performance')]
    sent = [m['params'] for m in messages if m['method'] == 'Network.requestWillBeSent']
    return [said['request']['url'] for said in sent]

LOOK = '''const done = arguments[0], all = q => [...document.querySelectorAll(q)];
const light = color => {
  const [r, g, b] = color.match(/[\\d.]+/g).map(Number);
  return (.3 * r + .6 * g + .1 * b) / 255; };
const there = e => e.complete && e.naturalWidth > 0 && e.offsetWidth > 20;
const overflows = e => e.scrollWidth > e.clientWidth + 1;
const shrunk = e => e.getBoundingClientRect().width < .6 * e.naturalWidth;
const begins = e => `${e.scrollWidth - e.clientWidth} pixels: ${e.innerText.slice(0, 60)}`;
const look = () => {
  const body = getComputedStyle(document.body), images = all('article img');
  const math = all('article .math');
  done({
    formulas: math.length, pictures: images.length,
    unrendered: math.filter(e => !e.querySelector('mjx-container svg')).length,
    wrong: all('mjx-merror, [data-mjx-error]').length,
    blank: images.filter(e => e.checkVisibility() && !there(e)).map(e => e.src),
    raw: all('article p').filter(e => /\\$\\$|^#\\| /.test(e.innerText)).length,
    title: (document.querySelector('article h1') || {}).innerText,
    ground: light(body.backgroundColor), ink: light(body.color),
    wide: document.documentElement.scrollWidth - innerWidth,
    folded: all('article details').filter(e => !e.open).length,
    tiny: all('.cell_output > img').filter(e => e.checkVisibility() && shrunk(e)).length,
    overflowing: all('article div.highlight pre').filter(overflows).map(begins),
  }); };
all('article details').forEach(e => e.open = true);
all('article img').forEach(e => e.loading = 'eager');
const ready = window.MathJax && MathJax.startup ? MathJax.startup.promise : Promise.resolve();
const loaded = () => Promise.all(all('article img').map(e => e.decode().catch(() => 0)));
ready.then(loaded).then(look);'''

NO_NOTEBOOKS = ('search.html', 'genindex.html')

def looks_right(seen, page, width, dark):
    where = (page, width, dark, seen)
    for fault in ('unrendered', 'wrong', 'raw', 'folded'): assert seen[fault] == 0, where
    assert seen['blank'] == [] and seen['wide'] <= 0 and seen['tiny'] == 0, where
    assert seen['title'] or page in NO_NOTEBOOKS, where
    darker, lighter = sorted((seen['ground'], seen['ink']))
    assert dark == (seen['ground'] < seen['ink']), where
    assert darker < .2 and lighter > (.7 if dark else .9), where

LIGHT_AND_DARK = (MODES[0], pytest.param(MODES[1], marks=pytest.mark.soak))

@browser_test
@pytest.mark.parametrize('modes', LIGHT_AND_DARK, ids=('light and dark', 'dark and light'))
def test_pages_look_right(site, browser, modes):
    """No errors, no other hosts; everything unfolded, and in every window all formulas and pictures
    there, nothing wider than the window, no code or output wider than its page, text and ground
    apart."""
    formulas = pictures = 0
    wide = {}
    browser.get_log('browser')                                        # what other tests left
    requested(browser)
    see_as(browser, *modes[0])
    for page in pages(site):
        browser.get((site/page).as_uri())
        for width, dark in modes:
            see_as(browser, width, dark)
            is_resized = lambda: browser.execute_script('return innerWidth') == width
            until(is_resized, what=f'a window of {width} pixels')
            seen = browser.execute_async_script(LOOK)
            looks_right(seen, page, width, dark)
            if width == 1300 and seen['overflowing']: wide[page[:-5]] = seen['overflowing']
        modes = modes[::-1]                        # the next page is opened as this one was left
        errors = [e['message'] for e in browser.get_log('browser') if e['level'] == 'SEVERE']
        assert errors == [], page
        asked = requested(browser)
        assert [u for u in asked if not u.startswith(('file:', 'data:', 'blob:'))] == [], page
        formulas += seen['formulas']
        pictures += seen['pictures']
    assert formulas > 5 and pictures >= 1
    assert wide == {}, json.dumps(wide, indent=1)

@browser_test
def test_search_and_folded_solutions(site, browser):
    find = lambda q: browser.find_elements('css selector', q)
    browser.get((site/'search.html').as_uri() + '?q=temperature')
    results = "return [...document.querySelectorAll('#search-results li a')].map(e => e.href)"
    is_found = lambda: any('07_kd_loss.html' in u for u in browser.execute_script(results))
    until(is_found, what='the chapter on distillation')
    assert all(u.startswith('file:') for u in browser.execute_script(results))
    browser.get((site/'01_paper.html').as_uri())
    fold = find('details.hide')[-1]
    code = fold.find_element('css selector', '.highlight')
    assert fold.find_element('css selector', 'summary').text.strip() and not code.is_displayed()
    into_view(browser, fold)
    fold.find_element('css selector', 'summary').click()
    until(code.is_displayed, what='the unfolded solution')

# The playground of the page itself

SET = '''const e = document.querySelector(`#kesi-playground [name="${arguments[0]}"]`);
if (e.type === 'checkbox') e.checked = arguments[1]; else e.value = arguments[1];
e.dispatchEvent(new Event('input', { bubbles: true }));'''
SHOWN = '''const page = document.getElementById('kesi-playground');
const all = q => [...page.querySelectorAll(q)], said = q => all(q).map(e => e.innerText).join();
const cells = all('tbody tr').map(r => [...r.querySelectorAll('[data-value]')]);
return { widths: JSON.parse(page.dataset.widths || 'null'),
  rows: cells.map(row => row.map(c => Number(c.dataset.value))),
  text: cells.map(row => row.map(c => c.innerText)),
  command: said('code'), measured: said('.measured p'), refused: said('.refused'),
  chosen: all('circle.chosen').length };'''

PLANS = [dict(network='resnet20', dataset='digits'),
         dict(network='resnet20', dataset='digits', iterations=3, multiple=4, rate1=.05, rate3=.4),
         dict(network='resnet56', dataset='cifar10', multiple=8, rate2=.35),
         dict(network='resnet110', dataset='digits', spare=False, iterations=4),
         dict(network='preresnet164', dataset='fashion_mnist', iterations=7, multiple=2),
         dict(network='wrn_16_8', dataset='cifar100', rate1=.15, rate2=.15, rate3=.15),
         dict(network='vgg16', dataset='cifar10', iterations=2, multiple=16),
         dict(network='vgg16', dataset='digits', spare=False, rate2=.55),
         dict(network='resnet18', dataset='tiny_imagenet', rate4=.6, iterations=1)]
SIZES = {'digits': (10, 1, 16), 'fashion_mnist': (10, 1, 28), 'cifar10': (10, 3, 32),
         'cifar100': (100, 3, 32), 'tiny_imagenet': (200, 3, 224)}

def recipe_of(command):
    "The recipe that a command of the playground runs."
    from kesi import paper
    program, name, *settings = shlex.split(command)
    assert program == 'kesi_run' and set(settings[::2]) <= {'--set'}
    return paper.with_settings(paper.recipe(name), settings[1::2])

@browser_test
@pytest.mark.parametrize('plan', PLANS, ids=lambda p: f'{p["network"]} {p["dataset"]}')
def test_the_page_counts_as_python_does(site, browser, plan):
    "What the sliders show, and the command handed on, against `kesi.paper` and `kesi.macs`."
    from kesi import paper
    from kesi.macs import count
    from kesi.models import Spec
    browser.get((site/'use'/'playground.html').as_uri())
    for name, value in plan.items(): browser.execute_script(SET, name, value)
    seen = browser.execute_script(SHOWN)
    r = recipe_of(seen['command'])
    assert (r.arch, r.data) == (plan['network'], plan['dataset'])
    assert (r.multiple, r.iterations) == (plan.get('multiple', 1), plan.get('iterations', 5))
    stages, rates = iter(paper.stages(r.arch)), iter(r.pruning)
    for s, published in enumerate([[next(rates) for _ in range(n)] for n in stages], 1):
        assert plan.get(f'rate{s}') in (None, max(published)), (s, published)
    theirs = paper.full_widths(r.arch)
    for _ in range(r.iterations): theirs = paper.shrink(theirs, paper.plan(r.arch))
    assert tuple(seen['widths']) == r.widths(r.iterations)
    classes, channels, side = SIZES[r.data]
    networks = (None, theirs, r.widths(r.iterations))
    for row, text, widths in zip(seen['rows'], seen['text'], networks, strict=True):
        exact = count(Spec(r.arch, widths, classes, channels), side)
        assert row[:3] == [exact.params, exact.macs, 4 * exact.params]
        assert [t.split()[0] for t in text[:2]] == [f'{exact.params:,}', f'{exact.macs:,}']

@browser_test
def test_sliders_of_the_page_move(site, browser):
    "Keys move a slider, a click copies, too much is refused, measured plans show their accuracy."
    from selenium.webdriver.common.keys import Keys
    from kesi import paper
    page, find = site/'use'/'playground.html', browser.find_element
    browser.get(page.as_uri())
    before = browser.execute_script(SHOWN)
    results = ROOT/'nbs'/'reproduce'/'results'
    study = json.loads((results/'how_far.json').read_text(encoding='utf-8'))
    kesi = [100 * s['networks']['kesi 5']['accuracy'] for s in study['seeds']]
    assert f'KESI {sum(kesi) / len(kesi):.2f} %' in before['measured'] and before['chosen'] == 3
    slider = find('css selector', '#kesi-playground [name="rate3"]')
    for _ in range(3): slider.send_keys(Keys.ARROW_RIGHT)
    now = browser.execute_script(SHOWN)
    assert now['rows'][2][0] < before['rows'][2][0] and now['chosen'] == 0
    assert recipe_of(now['command']).rates == (.1, .2, .45)
    copy = find('css selector', '#kesi-playground [name="copy"]')
    copy.click()
    until(lambda: copy.text == 'Copied', what='a copy')
    browser.execute_script(SET, 'rate3', .9)
    with pytest.raises(paper.UserError) as said: paper.shrink((6,), (.9,))
    assert 'at least one' in str(said.value)
    seen = browser.execute_script(SHOWN)
    assert seen['widths'] is None and 'at least one' in seen['refused']
    find('css selector', '#kesi-playground [name="reset"]').click()
    assert browser.execute_script(SHOWN)['rows'] == before['rows']

# JupyterLab

LAB_SETTINGS = {
    'notebook-extension/tracker': {'windowingMode': 'none', 'autosaveInterval': 3600},
    'apputils-extension/notification': {'fetchNews': 'false', 'checkForUpdates': False}}

def lab_command(home):
    "The command that starts a JupyterLab in a folder, and its environment."
    for name, said in LAB_SETTINGS.items():
        path = home/'settings'/'@jupyterlab'/f'{name}.jupyterlab-settings'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(said))
    places = {'JUPYTERLAB_SETTINGS_DIR': 'settings', 'JUPYTERLAB_WORKSPACES_DIR': 'workspaces',
              'JUPYTER_CONFIG_DIR': 'config', 'JUPYTER_RUNTIME_DIR': 'runtime'}
    env = {**os.environ, **{name: str(home/folder) for name, folder in places.items()},
           'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
    line = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--port=0',
            '--IdentityProvider.token=test', '--LabApp.expose_app_in_browser=True',
            f'--ServerApp.root_dir={home/"nbs"}']
    return line, env

@pytest.fixture(scope='session')
def lab(tmp_path_factory):
    "A JupyterLab on a copy of the notebooks; yields its address and its folder."
    home = tmp_path_factory.mktemp('lab')
    shutil.copytree(ROOT/'nbs', home/'nbs', ignore=shutil.ignore_patterns('.*', 'runs'))
    line, env = lab_command(home)
    with open(home/'log', 'w') as log:
        server = subprocess.Popen(line, cwd=home, env=env, stdout=log, stderr=log)
        def port():
            "The free port that the server took, once it has said so."
            assert server.poll() is None, (home/'log').read_text()
            for path in (home/'runtime').glob('jpserver-*.json'):
                try: return json.loads(path.read_text())['port']
                except ValueError: pass                               # half written
        try:
            yield f'http://127.0.0.1:{until(port, 300, "JupyterLab")}', home/'nbs'
        finally:
            server.terminate()
            try: server.wait(20)
            except subprocess.TimeoutExpired: server.kill()

HAS_KERNEL = '''const app = window.jupyterapp, w = app && app.shell && app.shell.currentWidget;
return !!(w && w.context && w.context.isReady && w.sessionContext.isReady
          && w.sessionContext.session && w.sessionContext.session.kernel)'''
RUN_ALL = '''window.finished = null;
const commands = window.jupyterapp.commands;
commands.execute('notebook:clear-all-cell-outputs')
  .then(() => commands.execute('notebook:run-all-cells'))
  .then(() => window.finished = 'yes', e => window.finished = String(e))'''
CELLS = '''const notebook = window.jupyterapp.shell.currentWidget.content;
return notebook.model.sharedModel.cells.map(c => c.toJSON())'''

def run_all(driver, address, name):
    "Open a notebook, run it from top to bottom, and return its code cells."
    driver.get(f'{address}/lab/tree/{name}?token=test&reset')
    until(lambda: driver.execute_script(HAS_KERNEL), 300, f'{name} with its kernel')
    driver.execute_script(RUN_ALL)
    until(lambda: driver.execute_script('return window.finished'), 300, f'{name} to run')
    cells = driver.execute_script(CELLS)
    return [c for c in cells if c['cell_type'] == 'code' and ''.join(c['source']).strip()]

def ran_well(cells):
    errors = [o for c in cells for o in c['outputs'] if o['output_type'] == 'error']
    return len(cells) > 10 and all(c['execution_count'] for c in cells) and errors == []

@browser_test
@pytest.mark.soak
def test_a_chapter_runs_in_jupyterlab(lab, browser):     # another than the playground, which does
    assert ran_well(run_all(browser, lab[0], '01_paper.ipynb'))

COSTS = '''const tables = [...document.querySelectorAll('.jupyter-widgets .kesi-costs')];
return tables.map(e => e.rows[3].innerText).join('')'''
SHORT = ('data=digits@100', 'epochs=1', 'retrain_epochs=1', 'iterations=1', 'seeds=1',
         'variants=pfec')

def parameters(row): return int(re.search(r'[\d,]{4,}', row)[0].replace(',', ''))

@browser_test
def test_the_playground_moves(lab, browser, no_pictures):
    pytest.importorskip('ipywidgets', reason='needs ipywidgets')
    from selenium.webdriver.common.keys import Keys
    from kesi import cli
    address, folder = lab
    assert ran_well(run_all(browser, address, 'use/playground.ipynb'))
    mine = lambda: browser.execute_script(COSTS)
    before = until(mine, 120, 'the table of costs')
    handles = browser.find_elements('css selector', '.jupyter-widgets .noUi-handle')
    slider = into_view(browser, handles[2])                            # the rate of the third stage
    for _ in range(3): slider.send_keys(Keys.ARROW_RIGHT)
    after = until(lambda: (now := mine()) != before and now, 120, 'new numbers')
    assert parameters(after) < parameters(before)
    button = browser.find_element('css selector', '.jupyter-widgets.jupyter-button')
    into_view(browser, button).click()
    plan = folder/'use'/'plan.json'
    def rates():
        "Those of the recipe, once it is written."
        try: return json.loads(plan.read_text())['rates']
        except (FileNotFoundError, ValueError): return None
    wanted = until(rates, 120, 'the recipe')
    settings = [word for said in SHORT for word in ('--set', said)]
    line = ['--recipe', str(plan), '--out', str(folder/'runs'), '--threads', '1', *settings]
    assert cli.kesi_run(line) == 0
    found = json.loads(next((folder/'runs').rglob('report.json')).read_text())
    assert found['recipe']['rates'] == wanted
