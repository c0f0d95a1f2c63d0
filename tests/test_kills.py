"A run that is killed, stopped or starved goes on where it was, and ends with the same bits."
import errno, itertools, json, os, shutil, signal, subprocess, time
from dataclasses import replace
import drive, pytest, torch
from kesi import cli, pipeline, store, training
from kesi.runtime import Diverged, Runtime, StoreError, locked

def finished_at_last(out, good, tiny=True, log=None):
    assert drive.finish(out, tiny=tiny, log=log) == 0, out.with_suffix('.log').read_text()
    drive.same(out, good)
    assert not drive.debris(out) and not (out/'damaged').exists()

def watched(out, tiny=True):
    "The operations of a run that nothing disturbs, by the name of what each puts in its place."
    seen = out.with_suffix('.operations')
    assert drive.finish(out, tiny=tiny, watch=str(seen)) == 0, out.with_suffix('.log').read_text()
    return seen.read_text().split('\n')

@pytest.fixture(scope='module')
def all_of_them(tmp_path_factory): return watched(tmp_path_factory.mktemp('watched')/'runs')

# SIGKILL

FILES = ('store.json', 'run.json', 'checkpoint', 'manifest.json', 'report.json', 'report.md')
FOLDERS = ('prune-', 'distill-')                          # are renamed, not written
SELECTED = [(which, moment) for which in FILES for moment in drive.MOMENTS]
SELECTED += [(which, moment) for which in FOLDERS for moment in ('before', 'after')]

def test_the_selection_has_the_first_and_the_last(all_of_them):
    assert (all_of_them[0], all_of_them[-1]) == (FILES[0], FILES[-1])
    assert all(any(name.startswith(which) for name in all_of_them) for which, _ in SELECTED)

def killed_at(out, good, which, moment):
    code = drive.finish(out, tiny=True, kill=(which, moment))
    assert code == -signal.SIGKILL, out.with_suffix('.log').read_text()
    finished_at_last(out, good)

@pytest.mark.parametrize('which, moment', SELECTED, ids=lambda v: v)
def test_killed_at(tmp_path, tiny, which, moment):
    killed_at(tmp_path/'runs', tiny[1], which, moment)

@pytest.mark.soak
@pytest.mark.parametrize('moment', drive.MOMENTS)
def test_killed_at_every_operation(tmp_path, tiny, all_of_them, moment):
    "Each operation of a small run; a folder is renamed, not written, so it has no middle."
    assert len(all_of_them) > 30
    numbers = [n for n, name in enumerate(all_of_them, 1) if moment != 'write' or '.' in name]
    for n in numbers: killed_at(tmp_path/f'runs{n}', tiny[1], n, moment)
    print(f'{len(numbers)} kills, moment: {moment}')

@pytest.mark.soak
def test_the_digits_killed_again_and_again(tmp_path):
    "One folder, and a kill at every ninth operation of each beginning."
    watched(tmp_path/'whole', tiny=False)
    out, kills, moments = tmp_path/'runs', 0, itertools.cycle(drive.MOMENTS)
    while (code := drive.finish(out, kill=(9, next(moments)))) == -signal.SIGKILL: kills += 1
    assert code == 0 and kills >= 5
    finished_at_last(out, drive.content(tmp_path/'whole'), tiny=False)

# Other ends

@pytest.mark.parametrize('number, code', ((signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)))
@pytest.mark.parametrize('which, moment', (
    ('store.json', 'after'), ('checkpoint', 'write'), ('report.md', 'before')))
def test_stopped_politely(tmp_path, tiny, which, moment, number, code):
    assert drive.finish(tmp_path/'runs', tiny=True, kill=(which, moment, number)) == code
    finished_at_last(tmp_path/'runs', tiny[1])

def epochs_in(checkpoint): return len(training.read_checkpoint(checkpoint)[1]['history'])

def _raise_in_epoch(monkeypatch, when, error):
    "Let the `when`-th epoch of all end in an exception."
    real, count = training._epoch, [0]
    def epoch(*a):
        count[0] += 1
        if count[0] == when: raise error
        return real(*a)
    monkeypatch.setattr(training, '_epoch', epoch)

ON_A_GPU = torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20 GiB')
ON_A_CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
ERRORS = KeyboardInterrupt(), MemoryError(), ON_A_GPU, ON_A_CPU

@pytest.mark.parametrize('error', ERRORS, ids=lambda e: type(e).__name__)
def test_an_exception_keeps_the_last_epoch(tmp_path, tiny, monkeypatch, capsys, error):
    "As in a notebook: the cell ends with the exception, and running it again goes on."
    out, seen = tmp_path/'runs', []
    _raise_in_epoch(monkeypatch, 4, error)
    with pytest.raises(type(error)): drive.go(out, drive.TINY, drive.blobs())
    (checkpoint,) = out.glob('.*.partial/checkpoint.safetensors')
    assert epochs_in(checkpoint) == 1 and len(drive.debris(out)) == 1
    def failing(args): raise error
    assert cli.guarded(failing, None) == (130 if isinstance(error, KeyboardInterrupt) else 1)
    said = capsys.readouterr().err
    advice = 'run the same command again', 'smaller batch'
    assert said.count('\n') == 1 and any(part in said for part in advice)
    real = training._epoch
    monkeypatch.setattr(training, '_epoch', lambda *a: seen.append(a[6]) or real(*a))
    drive.go(out, drive.TINY, drive.blobs())
    assert len(seen) == 2 + 2 * 2 + 2 - 3           # three epochs were done, none is repeated
    drive.same(out, tiny[1])

CHECKPOINT = 'checkpoint.safetensors'
FIRST_CELL = '''
import drive, torch
torch.set_num_threads(1)
data, recipe = drive.blobs(), drive.replace(drive.TINY, epochs=60)
'''

@pytest.mark.soak
def test_interrupted_notebook(tmp_path):
    "A kernel interrupted in the middle of a cell; the same cell, run again, goes on."
    from jupyter_client.manager import start_new_kernel
    paths = os.path.dirname(drive.__file__), os.environ.get('PYTHONPATH', '')
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(paths)}
    manager, client = start_new_kernel(kernel_name='python3', env=env)
    def epochs():
        "Epochs of the unpruned network that are kept so far."
        kept = (tmp_path/'runs').glob(f'.baseline*.partial/{CHECKPOINT}')
        return max(map(epochs_in, kept), default=0)
    def is_answer(reply, asked): return reply['parent_header'].get('msg_id') == asked
    def cell(code, stop=None):
        asked = client.execute(code)
        while stop and epochs() < stop: time.sleep(.02)
        if stop: manager.interrupt_kernel()
        while not is_answer(reply := client.get_shell_msg(timeout=120), asked): pass
        return reply['content']
    try:
        assert cell(FIRST_CELL)['status'] == 'ok'
        code = 'home = drive.go({!r}, recipe, data)'
        for stop in (3, 8, 15):
            end = cell(code.format(str(tmp_path/'runs')), stop)
            told = '\n'.join(end.get('traceback', ['finished too early']))
            assert end.get('ename') == 'KeyboardInterrupt', told
        for folder in ('runs', 'whole'):
            assert cell(code.format(str(tmp_path/folder)))['status'] == 'ok'
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    drive.same(tmp_path/'runs', drive.content(tmp_path/'whole'))

# Losses that are no numbers

@pytest.mark.parametrize('first, split', ((1, 'train'), (2, 'train'), (1, 'test'), (2, 'test')))
def test_no_number(tmp_path, monkeypatch, first, split):
    monkeypatch.setattr(drive, 'RT', replace(drive.RT, evaluate=1))
    count, real_epoch, real_test = [0], training._epoch, training.evaluate
    def is_lost(what): return what == split and count[0] >= first
    def epoch(*a):
        count[0] += 1
        return real_epoch(*a) * (float('nan') if is_lost('train') else 1)
    def test(*a): return (float('inf'), 0.) if is_lost('test') else real_test(*a)
    monkeypatch.setattr(training, '_epoch', epoch)
    monkeypatch.setattr(training, 'evaluate', test)
    with pytest.raises(Diverged) as e: drive.go(tmp_path/'runs', drive.TINY, drive.blobs())
    said, loss = str(e.value), f'the {split} loss became'
    for word in ('baseline-', loss, f'epoch {first}', 'learning rate', 'try a lower'):
        assert word in said, said
    assert ('last good epoch is kept' in said) == (first == 2)
    kept = (tmp_path/'runs').glob(f'.*.partial/{CHECKPOINT}')
    assert list(map(epochs_in, kept)) == [1] * (first == 2)

def test_no_number_in_the_finished_network(tmp_path, monkeypatch):
    real = store.answers
    monkeypatch.setattr(store, 'answers', lambda *a: (real(*a)[0] * float('nan'), real(*a)[1]))
    with pytest.raises(Diverged, match='baseline-.*test loss of the finished network is nan'):
        drive.go(tmp_path/'runs', drive.TINY, drive.blobs())

# Full disks

def starved(out, good, limits, log):
    for limit in limits:
        assert drive.finish(out, tiny=True, log=log, limit=limit) == 1
        said = log.read_text().splitlines()[-1]
        assert said.startswith('error: cannot write') and 'too large' in said, said
        assert not [p for p in out.rglob('*.tmp')] and not list(out.glob('.*.new'))
    finished_at_last(out, good, log=log)

FEW_LIMITS = 20, 400_000
MANY_LIMITS = 0, 100, 1_000, 5_000, 100_000, 200_000, 300_000, 320_000, 500_000

@pytest.mark.parametrize('limits', (
    FEW_LIMITS, pytest.param(MANY_LIMITS, marks=pytest.mark.soak)), ids=('few', 'many'))
def test_limits_on_file_sizes(tmp_path, tiny, limits):
    starved(tmp_path/'runs', tiny[1], limits, tmp_path/'log')

def test_a_full_disk_leaves_no_half_stage(tmp_path, tiny, monkeypatch):
    "A stage is trained, and then cannot be written; when there is room again, it is not repeated."
    out = tmp_path/'runs'
    def full(path, content): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(store, 'write_atomic', full)
        with pytest.raises(StoreError, match='cannot finish .*baseline.*No space left'):
            drive.go(out, drive.TINY, drive.blobs())
        (checkpoint,) = out.glob(f'.*.partial/{CHECKPOINT}')
        assert epochs_in(checkpoint) == drive.TINY.epochs and len(drive.debris(out)) == 1
    drive.go(out, drive.TINY, drive.blobs())
    drive.same(out, tiny[1])

def mount(*options):
    "Mount a file system: was that allowed?"
    return subprocess.run(['mount', *map(str, options)], capture_output=True).returncode == 0

@pytest.mark.soak
def test_a_full_file_system(tmp_path, tiny):
    disk, log = tmp_path/'disk', tmp_path/'log'
    disk.mkdir()
    def resize(size): assert mount('-o', f'remount,size={size}', disk)
    if not mount('-t', 'tmpfs', '-o', 'size=100k', 'tmpfs', disk):
        pytest.skip('needs the right to mount')
    try:
        for size in ('100k', '500k', '1m', '2m', '3m', '4m'):
            resize(size)
            code = drive.finish(disk/'runs', tiny=True, log=log)
            is_told = code == 1 and 'No space left' in log.read_text().splitlines()[-1]
            assert is_told or code == 0
            if size in ('100k', '500k'): assert code == 1
        resize('100m')
        finished_at_last(disk/'runs', tiny[1], log=log)
    finally: subprocess.run(['umount', str(disk)], check=True)

def test_an_unwritable_place(tmp_path, tiny):
    file, log = tmp_path/'file', tmp_path/'log'
    file.write_text('mine')
    assert drive.finish(file/'runs', tiny=True, log=log) == 2
    assert file.read_text() == 'mine'
    assert 'cannot be used as a run folder' in log.read_text()

# Races

def race(out, good, recipes=(None, None), **how):
    both = [drive.start(out, r, tiny=True, **how) for r in recipes]
    for p in both: p.join()
    assert [p.exitcode for p in both] == [0] * len(both), out.with_suffix('.log').read_text()
    if good is not None: drive.same(out, good)
    return out.with_suffix('.log').read_text()

TINY_STAGES = {'baseline': 1, 'prune': 1, 'retrain': 2, 'distill': 1}

def until_said(log, words, process):
    "Wait until a living process has said something."
    while not (log.exists() and words in log.read_text()):
        assert process.is_alive(), log.read_text()
        time.sleep(.02)

def test_two_processes(tmp_path, tiny):
    said = race(tmp_path/'runs', tiny[1])
    computed = {kind: said.count(f'computing {kind}') for kind in TINY_STAGES}
    assert computed == TINY_STAGES                                     # each once, by one of them
    assert not drive.debris(tmp_path/'runs')

def test_who_waits_is_told(tmp_path, tiny):
    "A stage in other hands is waited for, and then found."
    out, stage = tmp_path/'runs', next(tiny[0].glob('baseline-*')).name
    with locked(out/'.locks'/f'{stage}.lock'):
        p, log = drive.start(out, tiny=True), out.with_suffix('.log')
        until_said(log, 'waiting: process', p)
        shutil.copytree(tiny[0]/stage, out/stage)
    p.join()
    assert p.exitcode == 0 and 'computing baseline' not in log.read_text()
    drive.same(out, tiny[1])

HOT = replace(drive.TINY, temperature=2.)

def test_two_recipes_share_stages(tmp_path, tiny):
    said = race(tmp_path/'runs', None, (drive.TINY, HOT))
    found = drive.content(tmp_path/'runs')
    kinds = [name.split('-')[0] for name in found if '/' not in name]
    assert (kinds.count('distill'), kinds.count('baseline')) == (2, 1)
    assert said.count('computing baseline') == 1
    for n, value in tiny[1].items(): assert found[n] == value

@pytest.mark.soak
@pytest.mark.parametrize('turn', range(6))
def test_many_races(tmp_path, tiny, turn):
    "Three processes; with and without locks; one of them killed, and all started again."
    out, how = tmp_path/'runs', {'lockless': bool(turn % 2)}
    if turn >= 2:
        deaths = ({'kill': (5 * turn, 'before')}, {}, {})
        several = [drive.start(out, tiny=True, **how, **death) for death in deaths]
        for p in several: p.join()
        assert all(p.exitcode in (0, -9) for p in several), out.with_suffix('.log').read_text()
    race(out, tiny[1], (None,) * 3, **how)

def test_two_processes_without_locks(tmp_path, tiny):
    said = race(tmp_path/'runs', tiny[1], lockless=True)
    assert 'no locks' in said

def test_a_killed_holder_frees_its_lock(tmp_path, tiny):
    out = tmp_path/'runs'
    assert drive.finish(out, tiny=True, kill=(4, 'before')) == -9
    assert list(out.glob('.locks/*.owner'))
    finished_at_last(out, tiny[1])
    assert 'waiting' not in out.with_suffix('.log').read_text()

# Another machine

def test_other_threads_warn_and_go_on(tmp_path):
    said, recipe = [], replace(drive.TINY, variants=('pfec',), iterations=1)
    drive.go(tmp_path/'runs', recipe, drive.blobs())
    stage = pipeline.graph(recipe, 0, drive.blobs(), drive.RT)['baseline']
    def stop(r): raise KeyboardInterrupt
    def train(threads, **kw):
        kw |= dict(seed=(0, 'baseline'), checkpoint=tmp_path/'c', rt=Runtime(threads=threads))
        return training.fit(pipeline.build(stage.spec, 0), drive.blobs(), stage.training, **kw)
    with pytest.raises(KeyboardInterrupt): train(1, on_epoch=stop)
    _, history = train(2, say=said.append)
    assert len(history) == 2 and '1 there, 2 here' in said[0] and 'last digits' in said[0]

def test_a_checkpoint_that_cannot_be_moved(tmp_path, monkeypatch):
    (tmp_path/'c').write_bytes(b'broken')
    def no(*a): raise PermissionError(1, 'not permitted')
    monkeypatch.setattr(type(tmp_path), 'rename', no)
    with pytest.raises(StoreError, match='cannot be renamed'):
        training._set_aside(tmp_path/'c', 'it is broken', print)

def test_store_of_another_version(tmp_path):
    (tmp_path/'store.json').write_text(json.dumps({'schema': 99}))
    with pytest.raises(pipeline.UserError, match='another version of kesi .schema 99'):
        pipeline.Store(tmp_path)
