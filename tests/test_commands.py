"The commands as a user runs them: in processes of their own."
import json, os, signal, subprocess, sys, time
from pathlib import Path
import psutil, pytest
from kesi.paper import NETWORKS

SMALL = ('digits@200/resnet8', '--seeds', '1', '--set', 'iterations=1', '--budget', '0.15',
         '--threads', '1', '--precision', 'float32')
SOAK = pytest.mark.soak


def command(name, *args, cwd):
    code = f'import sys; from kesi.cli import {name}; sys.exit({name}())'
    line = [sys.executable, '-c', code, *args]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=300)


def content(out):
    "The reports of a run folder, without where and when they were computed."
    reports = [json.loads(p.read_text()) for p in sorted(Path(out).rglob('report.json'))]
    return [{k: v for k, v in r.items() if k != 'provenance'} for r in reports]


def same(a, b):
    assert content(a) == content(b) != []
    networks = {p.parent.name: p.read_bytes() for p in a.glob('*/model.safetensors')}
    assert networks == {p.parent.name: p.read_bytes() for p in b.glob('*/model.safetensors')}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "The folder of a small run."
    where = tmp_path_factory.mktemp('small')
    done = command('kesi_run', *SMALL, cwd=where)
    assert done.returncode == 0, done.stderr
    return where/'runs'


def test_two_runs_give_identical_numbers(tmp_path, runs):
    "The second one by two processes side by side."
    done = command('kesi_run', *SMALL, '--jobs', '2', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('test accuracy') == 4
    same(tmp_path/'runs', runs)


def test_second_run_computes_nothing(runs):
    files = [p for p in runs.glob('*/*') if p.parent.name not in ('reports', '.locks')]
    before = {p: p.stat().st_mtime_ns for p in files}
    done = command('kesi_run', *SMALL, cwd=runs.parent)
    assert done.returncode == 0
    assert 'test accuracy' not in done.stdout and 'report.md' in done.stdout
    assert {p: p.stat().st_mtime_ns for p in before} == before


def gone(process):
    try: return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess: return True


LONG = (*SMALL, '--set', 'retrain_epochs=9999')     # nobody waits for the end of these retrainings

@pytest.fixture
def long_run(tmp_path):
    "A run with a helper that would go on for hours; it ends with the test, whatever that finds."
    code = 'import sys; from kesi.cli import kesi_run; sys.exit(kesi_run())'
    line = [sys.executable, '-u', '-c', code, *LONG, '--jobs', '2']
    def heed(): signal.signal(signal.SIGINT, signal.SIG_DFL)   # a shell's background jobs ignore it
    p = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True, start_new_session=True, preexec_fn=heed)
    yield p
    p.kill()
    p.communicate()


@pytest.mark.parametrize('number', (signal.SIGINT, pytest.param(signal.SIGKILL, marks=SOAK)))
def test_helpers_end_with_their_run(tmp_path, long_run, number):
    assert 'baseline: test accuracy' in long_run.stdout.readline()
    helpers = psutil.Process(long_run.pid).children()
    assert any('kesi.store' in word for h in helpers for word in h.cmdline())
    if number == signal.SIGKILL: long_run.kill()
    else: os.killpg(long_run.pid, number)
    said = long_run.communicate(timeout=60)[1]
    stopped = 'error: stopped; run the same command again to go on\n'
    if number == signal.SIGINT: assert long_run.returncode == 130 and said == stopped
    patience = time.monotonic() + 60
    while not all(map(gone, helpers)):
        assert time.monotonic() < patience
        time.sleep(.1)
    assert list(tmp_path.glob('runs/baseline-*')) and not list(tmp_path.glob('runs/retrain-*'))


ONE_OF_EACH_FAMILY = ('resnet20', 'preresnet11', 'wrn_10_1', 'vgg16', 'resnet18')

@pytest.mark.parametrize('filters, weights', (
    pytest.param(ONE_OF_EACH_FAMILY, ONE_OF_EACH_FAMILY[:2], id='one of each family'),
    pytest.param(NETWORKS, NETWORKS, marks=SOAK, id='all')))
def test_networks_run_end_to_end(tmp_path, filters, weights):
    "A handful of batches per stage: one pruning, one epoch of everything, on a few digits."
    driver = Path(__file__).with_name('few_digits.py')
    runs = [f'filters/{n}' for n in filters] + [f'weights/{n}' for n in weights]
    line = [sys.executable, str(driver), *runs]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
