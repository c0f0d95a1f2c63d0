"What a run folder remembers, what is cleared away in it, and who helps."
import errno, fcntl, json, os, subprocess, sys, threading
from dataclasses import replace
from types import SimpleNamespace as Stage
import drive, pytest
from kesi import cli, pipeline, report, runtime, scale, store, studies
from kesi.runtime import Runtime

RT = Runtime(threads=1)
TWO = replace(drive.TINY, seeds=2)


@pytest.fixture(autouse=True)
def blobs(monkeypatch, no_pictures):
    "Small images, and no pictures."
    monkeypatch.setattr(pipeline, 'load', lambda name, root=None: drive.blobs())


def unused(out):
    return [e.path.name for e in scale.inventory(out) if e.what == 'stage' and not e.users]

def run(out, r, rt=RT): return pipeline.run(r, out, rt, say=None)
def seeds_of(home): return json.loads((home/'run.json').read_text())['seeds']


# Records

def test_a_study_needs_its_stages(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, 'load', lambda name, root=None: drive.blobs())
    r = replace(drive.TINY, data='digits', epochs=1, retrain_epochs=1, distill_epochs=1, seeds=1)
    studies.run_study('student', r, tmp_path/'runs', rt=RT, say=lambda line: None)
    assert list((tmp_path/'runs').glob('distill-*')) and not unused(tmp_path/'runs')
    assert not scale.clean(tmp_path/'runs')
    assert cli.kesi_report([str(tmp_path/'runs')]) == 2              # a study is no report


def test_fewer_seeds_forget_nothing(tmp_path):
    home = run(tmp_path/'runs', TWO)
    assert run(tmp_path/'runs', replace(TWO, seeds=1)) == home
    assert report.write(home)['table'][-1]['accuracy']['n'] == 2 and not unused(tmp_path/'runs')


def test_other_variants_forget_nothing(tmp_path):
    home = run(tmp_path/'runs', replace(TWO, variants=('kesi',)))
    assert run(tmp_path/'runs', replace(TWO, variants=('pfec',), seeds=1)) == home
    found = report.write(home)
    assert {r['variant']: r['accuracy']['n'] for r in found['table']} == {
        'baseline': 2, 'pfec': 1, 'one-cycle': 2, 'ensemble': 2, 'kesi': 2}
    assert {d['claim']: d['n'] for d in found['differences']}['kesi > pfec'] == 1
    assert found['recipe']['variants'] == ['pfec', 'kesi'] and '(n = 1)' in report.table(found)
    assert not unused(tmp_path/'runs')


def test_the_order_of_runs_does_not_matter(tmp_path):
    r = replace(TWO, seeds=1)
    parts = [replace(r, variants=('kesi',)), replace(r, variants=('pfec',))]
    for part in parts: first = run(tmp_path/'a', part)
    for part in parts[::-1]: other = run(tmp_path/'b', part)
    assert (first/'run.json').read_bytes() == (other/'run.json').read_bytes()


def test_other_numerics_have_a_folder_of_their_own(tmp_path):
    r = replace(TWO, seeds=1, variants=('pfec',))
    plain = run(tmp_path/'runs', r)
    other = run(tmp_path/'runs', r, Runtime(threads=1, precision='bfloat16', pad=4))
    assert plain == tmp_path/'runs'/'reports'/pipeline.slug(r)
    assert other.name == f'{plain.name}-bfloat16-pad4'
    assert not unused(tmp_path/'runs')


def test_other_data_under_the_same_name(tmp_path, monkeypatch):
    "They are not mixed with the first ones, whose stages stay in use."
    r = replace(TWO, seeds=1, variants=('pfec',))
    run(tmp_path/'runs', TWO)
    monkeypatch.setattr(pipeline, 'load', lambda name, root=None: drive.blobs(n=32))
    home = run(tmp_path/'runs', r)
    assert len(seeds_of(home)) == 1 and not unused(tmp_path/'runs')
    assert 'kesi' not in seeds_of(home)[0]


def test_what_is_finished_is_shown(tmp_path):
    "A variant that is not finished hides no other one."
    home = run(tmp_path/'runs', TWO)
    (tmp_path/'runs'/seeds_of(home)[1]['pfec 1']).rename(tmp_path/'elsewhere')
    found = report.write(home)
    assert [r['accuracy']['n'] for r in found['table']] == [2, 1, 2, 2, 2]
    assert found['unfinished_seeds'] == 1


NOTE = '''
import sys
from types import SimpleNamespace as Stage
from kesi.store import Store
store, who = Store(sys.argv[1], sweep=False), sys.argv[2]
for i in range(25):
    name = f'pfec {who}{i}'
    about = {'recipe': {'variants': ['pfec']}, 'runtime': {}, 'size': 8}
    store.note('reports/x', [{name: Stage(folder=name)}], about)
'''

def note(out, name):
    about = {'recipe': {'variants': ['pfec']}, 'runtime': {}, 'size': 8}
    return store.Store(out, sweep=False).note('reports/x', [{name: Stage(folder=name)}], about)


def test_a_note_between_reading_and_writing_is_not_lost(tmp_path, monkeypatch):
    "While one writer is about to write what it has read, another one comes: it has to wait."
    out, real, arrived = tmp_path/'runs', store.write_json, threading.Event()
    store.Store(out)
    acquire = runtime.filelock.FileLock.acquire
    def acquired(*a, **kw):
        if threading.current_thread() is second: arrived.set()
        return acquire(*a, **kw)
    def noted():
        note(out, 'pfec 2')
        arrived.set()
    second = threading.Thread(target=noted)
    def write(path, value):
        if threading.current_thread() is not second:
            second.start()
            assert arrived.wait(120)                   # at the lock, or through without one
        return real(path, value)
    monkeypatch.setattr(runtime.filelock.FileLock, 'acquire', acquired)
    monkeypatch.setattr(store, 'write_json', write)
    home = note(out, 'pfec 1')
    second.join(120)
    assert seeds_of(home) == [{'pfec 1': 'pfec 1', 'pfec 2': 'pfec 2'}]


@pytest.mark.soak
def test_noting_at_the_same_time_loses_nothing(tmp_path):
    store.Store(tmp_path/'runs')
    command = [sys.executable, '-c', NOTE, str(tmp_path/'runs')]
    both = [subprocess.Popen([*command, who]) for who in 'ab']
    assert [p.wait(120) for p in both] == [0, 0]
    (seed,) = seeds_of(tmp_path/'runs'/'reports'/'x')
    assert set(seed) == {f'pfec {who}{i}' for who in 'ab' for i in range(25)}


# What killed processes leave

DEAD = '999999999-ab12cd34'

def debris(out):
    "Everything that a kill can leave behind, in every place where we write."
    home, stage = next(out.rglob('run.json')).parent, next(out.glob('distill-*')).name
    files = [out/f'.store.json.{DEAD}.tmp', home/f'.run.json.{DEAD}.tmp',
             home/f'.report.md.{DEAD}.tmp', out/'measured'/f'.lift-0123.json.{DEAD}.tmp',
             out/'studies'/f'.student-digits.json.{DEAD}.tmp',
             out/f'.{stage}.{DEAD}.new'/'model.safetensors',
             out/f'.{stage}.partial'/'checkpoint.safetensors',
             out/f'.{stage}.999999999.removed'/'history.json']
    for p in files:
        p.parent.mkdir(exist_ok=True)
        p.write_text('half')
    return files


def test_debris_is_seen_and_cleaned(tmp_path, tiny):
    run(out := tmp_path/'runs', drive.TINY)
    files = debris(out)
    seen = {e.path for e in scale.inventory(out) if e.what == 'left behind'}
    assert all(p in seen or p.parent in seen for p in files)
    assert {e.path for e in scale.clean(out)} == seen and not drive.debris(out)


@pytest.mark.parametrize('locks', (True, False), ids=('locks', 'no locks'))
def test_debris_goes_when_a_store_is_opened(tmp_path, monkeypatch, locks):
    run(out := tmp_path/'runs', drive.TINY)
    debris(out)
    mine = [out/'.mine.tmp', out/'reports'/'.notes.1.new.txt', out/'.git'/'.x.999999999-ab.tmp']
    for p in mine:
        p.parent.mkdir(exist_ok=True)
        p.write_text('mine')
    if not locks:
        def none(*a, **kw): raise OSError(errno.ENOLCK, 'no locks here')
        monkeypatch.setattr(fcntl, 'flock', none)
        monkeypatch.setattr(runtime.filelock.FileLock, 'acquire', none)
    store.Store(out)
    assert all(p.read_text() == 'mine' for p in mine)
    for p in mine: p.unlink()
    (out/'.git').rmdir()
    assert not drive.debris(out)


def test_what_a_living_writer_holds_stays(tmp_path, monkeypatch):
    run(out := tmp_path/'runs', drive.TINY)
    held = out/f'.store.json.{DEAD}.tmp'
    with open(held, 'w') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        store.Store(out)
        assert held.exists() and not scale.clean(out)
    new = runtime.temporary(next(out.glob('distill-*')), 'new')      # of this process, which lives
    new.mkdir()
    store.Store(out)
    assert new.exists() and not held.exists()


# The folder's mark and its locks

def test_the_mark_has_a_checksum(tmp_path):
    said = []
    store.Store(tmp_path/'runs')
    mark = tmp_path/'runs'/'store.json'
    mark.write_text(mark.read_text().replace('"schema": 1', '"schema": 9'))
    store.Store(tmp_path/'runs', said.append)
    assert 'does not match its checksum' in said[0] and json.loads(mark.read_text())['schema'] == 1


def test_an_old_mark_is_readable(tmp_path):
    (tmp_path/'store.json').write_text(old := '{"schema": 1, "what": "a run folder of kesi"}')
    store.Store(tmp_path)
    assert (tmp_path/'store.json').read_text() == old


def test_nobody_is_busy_where_there_are_no_locks(tmp_path, monkeypatch):
    run(tmp_path/'runs', replace(drive.TINY, variants=('pfec',)))
    def none(*a): raise OSError(errno.ENOSYS, 'no locks here')
    monkeypatch.setattr(fcntl, 'flock', none)
    for _ in range(2): assert scale.busy(tmp_path/'runs') == []


# Helpers

SCRIPT = '''
import sys, time
from dataclasses import replace
from pathlib import Path
from kesi import paper, pipeline
from kesi.runtime import Runtime
out, end = Path(sys.argv[1]), time.monotonic() + 200
def say(line):
    "After the first stage this process waits until the helper has finished another one."
    print(line)
    while len(list(out.glob('*/manifest.json'))) < 2:
        if time.monotonic() > end: sys.exit('nobody helped')
        time.sleep(.02)
r = replace(paper.recipe('digits@100/resnet8'), seeds=1, iterations=1, epochs=1,
            retrain_epochs=1, distill_epochs=1)
pipeline.run(r, out, Runtime(threads=1), say=say, jobs=2)
'''

def test_a_script_without_a_main_guard(tmp_path):
    (tmp_path/'script.py').write_text(SCRIPT)
    command = [sys.executable, str(tmp_path/'script.py'), str(tmp_path/'runs')]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stderr
    assert len(list((tmp_path/'runs').glob('*/manifest.json'))) == 5
    assert 'helper' not in done.stdout


def test_what_only_a_helper_meets_is_told():
    said = []
    helpers = store.Helpers(1, os.path.join, 1, say=said.append)      # 1 is no path
    helpers.team[0].wait(120)
    helpers.tell()
    helpers.tell()
    helpers.close()
    (line,) = said
    assert line.startswith('a helper process ended early: TypeError: ') and '\n' not in line
