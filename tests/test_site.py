"The built site and JupyterLab in a real browser: headless Chromium, at desktop and phone width, light and dark."
import json, os, re, shlex, shutil, socket, subprocess, sys, time
from html.parser import HTMLParser
from pathlib import Path
import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT/'_docs'/'html'
CHROMIUM, CHROMEDRIVER = (shutil.which(n) for n in ('chromium', 'chromedriver'))
FLAGS = ('--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update '
         '--disable-sync --disable-dev-shm-usage --hide-scrollbars').split()
browser_test = pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason='needs a browser: apt-get install chromium chromium-driver')

def python(*args, **kw): return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, **kw)

def test_readme_is_in_step():
    done = python('docs/readme.py', '--check')
    assert done.returncode == 0, done.stdout

def test_picture_is_in_step():
    done = python('docs/picture.py', '--check', env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr

def test_readme_links_lead_somewhere():
    text = re.sub(r'^```.*?^```', '', (ROOT/'README.md').read_text(encoding='utf-8'), flags=re.M | re.S)
    local = [t.split('#')[0] for t in re.findall(r'\]\(([^)\s]+)', text) if not re.match(r'[a-z]+:|#', t)]
    assert local and [t for t in local if not (ROOT/t).exists()] == []

@pytest.fixture(scope='session')
def site():
    "The built site; warnings, such as a link that leads nowhere, are errors. Several workers of one test run build it once."
    run, mark = os.environ.get('PYTEST_XDIST_TESTRUNUID'), ROOT/'_docs'/'.run'
    mark.parent.mkdir(exist_ok=True)
    with FileLock(mark.with_suffix('.lock')):
        if run is None or not mark.exists() or mark.read_text() != run:
            done = python('docs/build.py')
            assert done.returncode == 0, done.stderr[-4000:]
            mark.write_text(run or '')
    return HTML

def pages(site): return sorted(p.relative_to(site).as_posix() for p in site.rglob('*.html') if not {'_static', '_sources'} & set(p.parts))

class _Neighbours(HTMLParser):
    def __init__(self, text): super().__init__(); self.found = {}; self.feed(text)
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        for side in ('prev', 'next'):
            if tag == 'a' and f'{side}-page' in attrs.get('class', '').split(): self.found[side] = attrs['href'].split('#')[0]

def test_the_chain_of_pages_is_complete(site):
    around = {p: {s: os.path.normpath(os.path.join(os.path.dirname(p), h)) for s, h in _Neighbours((site/p).read_text(encoding='utf-8')).found.items()} for p in pages(site)}
    chain = ['index.html']
    while 'next' in around[chain[-1]] and len(chain) <= len(around): chain.append(around[chain[-1]]['next'])
    assert set(chain) == set(around) - {'search.html', 'genindex.html'} and len(chain) == len(set(chain))
    for a, b in zip(chain, chain[1:]): assert around[b]['prev'] == a
    chapters = [p for p in chain if re.match(r'\d\d_', p)]
    assert chapters == sorted(chapters) and chapters[0] == '00_kesi_in_one_page.html'

def test_every_exported_name_is_in_the_api_index(site):
    for module in (ROOT/'kesi').glob('[a-z]*.py'):
        listed = re.search(r'__all__ = (\[.*?\])', module.read_text(encoding='utf-8'), re.S)
        page = (site/'api'/f'{module.stem}.html').read_text(encoding='utf-8')
        functions = set(re.findall(r'^(?:def|class) (\w+)', module.read_text(encoding='utf-8'), re.M)) & set(json.loads(listed[1].replace("'", '"')))
        assert [n for n in functions if f'<span class="pre">{n}</span>' not in page] == []

# In the browser

MODES = ((1300, False), (390, True)), ((1100, True), (390, False))     # width of the window, dark?

def see_as(driver, width=1300, dark=False):
    "Give the window a width and a colour scheme; pages that are open follow."
    driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 600))
    driver.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': [{'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}]})

@pytest.fixture(scope='session')
def shared_browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions(); options.binary_location, options.unhandled_prompt_behavior = CHROMIUM, 'accept'
    for f in FLAGS: options.add_argument(f)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    driver.set_page_load_timeout(180); driver.set_script_timeout(180)
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

def requested(driver):
    "Addresses asked for since the last call."
    messages = (json.loads(e['message'])['message'] for e in driver.get_log('performance'))
    return [m['params']['request']['url'] for m in messages if m['method'] == 'Network.requestWillBeSent']

LOOK = '''const done = arguments[0], all = q => [...document.querySelectorAll(q)];
const look = () => {
  const shown = e => e.checkVisibility();
  const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number); return (.3 * r + .6 * g + .1 * b) / 255; };
  const style = getComputedStyle(document.body);
  done({
    formulas: all('article .math').length, unrendered: all('article .math').filter(e => !e.querySelector('mjx-container svg')).length,
    wrong: all('mjx-merror, [data-mjx-error]').length,
    blank: all('article img').filter(e => shown(e) && !(e.complete && e.naturalWidth > 0 && e.offsetWidth > 20)).map(e => e.src),
    pictures: all('article img').length, title: (document.querySelector('article h1') || {}).innerText,
    wide: document.documentElement.scrollWidth - innerWidth, ground: light(style.backgroundColor), ink: light(style.color),
    raw: all('article p').filter(e => /\\$\\$|^#\\| /.test(e.innerText)).length,
  }); };
all('article img').forEach(e => e.loading = 'eager');
const ready = window.MathJax && MathJax.startup ? MathJax.startup.promise : Promise.resolve();
ready.then(() => Promise.all(all('article img').map(e => e.decode().catch(() => 0)))).then(look);'''

@browser_test
@pytest.mark.parametrize('modes', (MODES[0], pytest.param(MODES[1], marks=pytest.mark.soak)), ids=('light and dark', 'dark and light'))
def test_pages_look_right(site, browser, modes):
    "No errors, no other hosts; in every window all formulas and pictures there, nothing wider than the window, text and ground apart."
    formulas = pictures = 0
    browser.get_log('browser'); requested(browser)                    # what other tests left
    for page in pages(site):
        see_as(browser)
        browser.get((site/page).as_uri())
        for width, dark in modes:
            see_as(browser, width, dark)
            until(lambda: browser.execute_script('return innerWidth') == width, what=f'a window of {width} pixels')
            seen, where = browser.execute_async_script(LOOK), (page, width, dark)
            assert (seen['unrendered'], seen['wrong'], seen['blank'], seen['raw']) == (0, 0, [], 0), (where, seen)
            assert seen['wide'] <= 0 and (seen['title'] or page in ('search.html', 'genindex.html')), (where, seen)
            assert (seen['ground'] < .2 and seen['ink'] > .7) if dark else (seen['ground'] > .9 and seen['ink'] < .2), (where, seen)
        assert [e['message'] for e in browser.get_log('browser') if e['level'] == 'SEVERE'] == [], page
        assert [u for u in requested(browser) if not u.startswith(('file:', 'data:', 'blob:'))] == [], page
        formulas += seen['formulas']; pictures += seen['pictures']
    assert formulas > 5 and pictures >= 1

@browser_test
def test_search_and_folded_solutions(site, browser):
    find = lambda q: browser.find_elements('css selector', q)
    browser.get((site/'search.html').as_uri() + '?q=temperature')
    links = until(lambda: {e.get_attribute('href') for e in find('#search-results li a')}, what='search results')
    until(lambda: any('07_kd_loss.html' in e.get_attribute('href') for e in find('#search-results li a')), what='the chapter on distillation')
    assert all(u.startswith('file:') for u in links)
    browser.get((site/'01_paper.html').as_uri())
    fold = find('details.hide')[-1]
    code = fold.find_element('css selector', '.highlight')
    assert fold.find_element('css selector', 'summary').text.strip() and not code.is_displayed()
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", fold)
    fold.find_element('css selector', 'summary').click()
    until(code.is_displayed, what='the unfolded solution')

# The playground of the page itself

SET = '''const e = document.querySelector(`#kesi-playground [name="${arguments[0]}"]`);
if (e.type === 'checkbox') e.checked = arguments[1]; else e.value = arguments[1];
e.dispatchEvent(new Event('input', { bubbles: true }));'''
SHOWN = '''const all = q => [...document.querySelectorAll(`#kesi-playground ${q}`)];
return { widths: JSON.parse(document.getElementById('kesi-playground').dataset.widths || 'null'),
  rows: all('tbody tr').map(r => [...r.querySelectorAll('[data-value]')].map(c => Number(c.dataset.value))),
  text: all('tbody tr').map(r => [...r.querySelectorAll('[data-value]')].map(c => c.innerText)),
  command: all('code').map(e => e.innerText).join(''), measured: all('.measured p').map(e => e.innerText).join(),
  chosen: all('circle.chosen').length, refused: all('.refused').map(e => e.innerText).join() };'''

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
    "What the sliders of the page show, and the command that it hands on, against `kesi.paper` and `kesi.macs`."
    from kesi import paper
    from kesi.macs import count
    from kesi.models import Spec
    browser.get((site/'use'/'playground.html').as_uri())
    for name, value in plan.items(): browser.execute_script(SET, name, value)
    seen = browser.execute_script(SHOWN)
    r = recipe_of(seen['command'])
    assert (r.arch, r.data, r.multiple) == (plan['network'], plan['dataset'], plan.get('multiple', 1))
    assert r.iterations == plan.get('iterations', 5)
    stages, rates = iter(paper.stages(r.arch)), iter(r.pruning)
    for s, published in enumerate([[next(rates) for _ in range(n)] for n in stages], 1):
        assert plan.get(f'rate{s}') in (None, max(published)), (s, published)
    theirs = paper.full_widths(r.arch)
    for _ in range(r.iterations): theirs = paper.shrink(theirs, paper.plan(r.arch))
    assert tuple(seen['widths']) == r.widths(r.iterations)
    classes, channels, side = SIZES[r.data]
    for row, text, widths in zip(seen['rows'], seen['text'], (None, theirs, r.widths(r.iterations))):
        exact = count(Spec(r.arch, widths, classes, channels), side)
        assert row[:3] == [exact.params, exact.macs, 4 * exact.params]
        assert [t.split()[0] for t in text[:2]] == [f'{exact.params:,}', f'{exact.macs:,}']

@browser_test
def test_sliders_of_the_page_move(site, browser):
    "Keys move a slider, a click copies the command, too much is refused, and measured plans show their accuracy."
    from selenium.webdriver.common.keys import Keys
    from kesi import paper
    page, find = site/'use'/'playground.html', browser.find_element
    browser.get(page.as_uri())
    before = browser.execute_script(SHOWN)
    study = json.loads((ROOT/'nbs'/'reproduce'/'results'/'how_far.json').read_text(encoding='utf-8'))
    kesi = [100 * s['networks']['kesi 5']['accuracy'] for s in study['seeds']]
    assert f'KESI {sum(kesi) / len(kesi):.2f} %' in before['measured'] and before['chosen'] == 3
    slider = find('css selector', '#kesi-playground [name="rate3"]')
    for _ in range(3): slider.send_keys(Keys.ARROW_RIGHT)
    now = browser.execute_script(SHOWN)
    assert now['rows'][2][0] < before['rows'][2][0] and now['chosen'] == 0
    assert recipe_of(now['command']).rates == (.1, .2, .45)
    find('css selector', '#kesi-playground [name="copy"]').click()
    until(lambda: find('css selector', '#kesi-playground [name="copy"]').text == 'Copied', what='a copy')
    browser.execute_script(SET, 'rate3', .9)
    with pytest.raises(paper.UserError) as said: paper.shrink((6,), (.9,))
    assert 'at least one' in str(said.value)
    seen = browser.execute_script(SHOWN)
    assert seen['widths'] is None and 'at least one' in seen['refused']
    find('css selector', '#kesi-playground [name="reset"]').click()
    assert browser.execute_script(SHOWN)['rows'] == before['rows']

# JupyterLab

@pytest.fixture(scope='session')
def lab(tmp_path_factory):
    "A JupyterLab on a copy of the notebooks; yields its address and its folder."
    home = tmp_path_factory.mktemp('lab')
    shutil.copytree(ROOT/'nbs', home/'nbs', ignore=shutil.ignore_patterns('.*', 'runs'))
    for name, said in {'notebook-extension/tracker': {'windowingMode': 'none', 'autosaveInterval': 3600}, 'apputils-extension/notification': {'fetchNews': 'false', 'checkForUpdates': False}}.items():
        path = home/'settings'/'@jupyterlab'/f'{name}.jupyterlab-settings'
        path.parent.mkdir(parents=True, exist_ok=True); path.write_text(json.dumps(said))
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = {**os.environ, 'JUPYTERLAB_SETTINGS_DIR': str(home/'settings'), 'JUPYTERLAB_WORKSPACES_DIR': str(home/'workspaces'), 'JUPYTER_CONFIG_DIR': str(home/'config'),
           'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore'}
    with open(home/'log', 'w') as log:
        server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', f'--port={port}', '--ServerApp.port_retries=0', '--IdentityProvider.token=test',
                                   '--LabApp.expose_app_in_browser=True', f'--ServerApp.root_dir={home/"nbs"}'], cwd=home, env=env, stdout=log, stderr=log)
        def listens():
            assert server.poll() is None, (home/'log').read_text()
            with socket.socket() as s: return s.connect_ex(('127.0.0.1', port)) == 0
        try:
            until(listens, 300, 'JupyterLab')
            yield f'http://127.0.0.1:{port}', home/'nbs'
        finally:
            server.terminate()
            try: server.wait(20)
            except subprocess.TimeoutExpired: server.kill()

def run_all(driver, address, name, seconds):
    "Open a notebook, run it from top to bottom, and return its cells."
    driver.get(f'{address}/lab/tree/{name}?token=test&reset')
    until(lambda: driver.execute_script('''const app = window.jupyterapp, w = app && app.shell && app.shell.currentWidget;
        return !!(w && w.context && w.context.isReady && w.sessionContext.isReady && w.sessionContext.session && w.sessionContext.session.kernel)'''), 300, f'{name} with its kernel')
    driver.execute_script('''window.finished = null; const app = window.jupyterapp;
        app.commands.execute('notebook:clear-all-cell-outputs').then(() => app.commands.execute('notebook:run-all-cells')).then(() => window.finished = 'yes', e => window.finished = String(e))''')
    until(lambda: driver.execute_script('return window.finished'), seconds, f'{name} to run')
    return driver.execute_script('return window.jupyterapp.shell.currentWidget.content.model.sharedModel.cells.map(c => c.toJSON())')

@browser_test
def test_a_chapter_runs_in_jupyterlab(lab, browser):
    cells = [c for c in run_all(browser, lab[0], '01_paper.ipynb', 300) if c['cell_type'] == 'code' and ''.join(c['source']).strip()]
    assert len(cells) > 10 and all(c['execution_count'] for c in cells)
    assert [o for c in cells for o in c['outputs'] if o['output_type'] == 'error'] == []

@browser_test
def test_the_playground_moves(lab, browser):
    pytest.importorskip('ipywidgets', reason='needs ipywidgets')
    from selenium.webdriver.common.keys import Keys
    address, folder = lab
    cells = run_all(browser, address, 'use/playground.ipynb', 300)
    assert [o for c in cells if c['cell_type'] == 'code' for o in c['outputs'] if o['output_type'] == 'error'] == []
    mine = lambda: browser.execute_script("return [...document.querySelectorAll('.jupyter-widgets .kesi-costs')].map(e => e.rows[3].innerText).join('')")
    before = until(mine, 120, 'the table of costs')
    handles = browser.find_elements('css selector', '.jupyter-widgets .noUi-handle')
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", handles[2])
    for _ in range(3): handles[2].send_keys(Keys.ARROW_RIGHT)          # the rate of the third stage
    after = until(lambda: (now := mine()) != before and now, 120, 'new numbers')
    number = lambda row: int(re.search(r'[\d,]{4,}', row)[0].replace(',', ''))
    assert number(after) < number(before)
    button = browser.find_element('css selector', '.jupyter-widgets.jupyter-button')
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", button); button.click()
    plan = folder/'use'/'plan.json'
    until(plan.exists, 120, 'the recipe')
    short = ['epochs=1', 'retrain_epochs=1', 'iterations=1', 'seeds=1', 'variants=pfec']
    done = python('-c', 'import sys; from kesi.cli import kesi_run; sys.exit(kesi_run())', '--recipe', plan, '--out', folder/'runs', *(a for s in short for a in ('--set', s)), env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert json.loads(next((folder/'runs').rglob('report.json')).read_text())['recipe']['rates'] == json.loads(plan.read_text())['rates']
