"""Files of a run folder that were truncated, altered, swapped, emptied or replaced: named, set
aside, computed again; nothing is deleted, nothing is executed."""
import itertools, json, pickle, shutil
from pathlib import Path
import drive, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from kesi import cli, report, store, training
from kesi.paper import UserError
from kesi.runtime import DamagedFile, KesiError, StoreError, digest

FILES = ('manifest.json', 'model.safetensors', 'history.json', 'predictions.safetensors')
counter = itertools.count()

@pytest.fixture
def copy(tiny, tmp_path):
    "A fresh copy of the finished run for each use."
    def make():
        out = tmp_path/f'copy{next(counter)}'
        shutil.copytree(tiny[0], out)
        return out
    return make

class Attack:
    "A pickle of this makes a file when it is opened without care."
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return exec, (f'open({self.path!r}, "w")',)

def replaced_by_a_folder(path):
    path.unlink()
    path.mkdir()
    (path/'mine').write_text('keep me')

def replaced_by_a_link(path):
    path.unlink()
    path.symlink_to('nowhere')

def foreign(path):
    is_json = path.suffix == '.json'
    path.write_bytes(b'{"schema": 1, "note": "this is mine"}' if is_json else bytes(range(250)) * 2)

def damage(path, kind, at, other, trap):
    "Spoil one file; the bytes that are there now (None: nothing, or a folder)."
    raw = path.read_bytes()
    at = int(at * max(len(raw) - 1, 0))
    contents = {'truncated': lambda: raw[:at],
                'flipped': lambda: raw[:at] + bytes([raw[at] ^ (1 << at % 8)]) + raw[at + 1:],
                'emptied': lambda: b'',
                'longer': lambda: raw + b'\0',
                'swapped': other.read_bytes,
                'pickle': lambda: pickle.dumps(Attack(trap)),
                'deep': lambda: b'[' * 100_000}
    acts = {'foreign': foreign,
            'torch': lambda path: torch.save({'state_dict': Attack(trap)}, path),
            'gone': Path.unlink,
            'folder': replaced_by_a_folder,
            'link': replaced_by_a_link}
    if kind in contents: path.write_bytes(contents[kind]())
    else: acts[kind](path)
    return path.read_bytes() if path.is_file() else None

KINDS = ('truncated', 'flipped', 'emptied', 'longer', 'foreign', 'swapped', 'pickle', 'torch',
         'deep', 'gone', 'folder', 'link')

def is_kept(content, places):
    "Does one of these places hold a file with this content?"
    return any(p.is_file() and p.read_bytes() == content for p in places)

def repaired(out, good, kind, said, name, left):
    "The run is as it was, what happened was said, and the spoilt file still exists."
    drive.same(out, good)
    assert any(name in line and 'set aside' in line for line in said), said
    if left is not None: assert is_kept(left, (out/'damaged').rglob('*'))
    if kind == 'folder': assert list((out/'damaged').rglob('mine'))
    assert not drive.debris(out)

def try_damage(make, good, trap, stage, file, kind, at):
    out, said = make(), []
    stages = sorted(p.parent for p in out.glob('*/manifest.json'))
    folder = stages[stage % len(stages)]
    left = damage(folder/file, kind, at, stages[(stage + 1) % len(stages)]/file, trap)
    is_damage = left is None or left != good.get(f'{folder.name}/{file}')     # not the same bytes
    if is_damage:
        drive.go(out, drive.TINY, drive.blobs(), said.append)
        repaired(out, good, kind, said, folder.name, left)
        assert not trap.exists()
    shutil.rmtree(out)
    return is_damage

CASES = [(3 * i, FILES[i % 4], kind) for i, kind in enumerate(KINDS)]

@pytest.mark.parametrize('stage, file, kind', CASES)
def test_one_damaged_file(copy, tiny, tmp_path, stage, file, kind):
    assert try_damage(copy, tiny[1], tmp_path/'trap', stage, file, kind, .6)

@pytest.mark.soak
def test_many_damaged_files(copy, tiny, tmp_path):
    every, trap = list(HealthCheck), tmp_path/'trap'
    @settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=every)
    @given(st.integers(0, 20), st.sampled_from(FILES), st.sampled_from(KINDS), st.floats(0, 1))
    def check(stage, file, kind, at): try_damage(copy, tiny[1], trap, stage, file, kind, at)
    check()

# Files that are no part of a stage

@pytest.mark.parametrize('kind', [k for k in KINDS if k != 'swapped'])
def test_the_mark_of_the_folder(copy, tiny, tmp_path, kind):
    out, said = copy(), []
    left = damage(out/'store.json', kind, .5, out/'store.json', tmp_path/'trap')
    try: drive.go(out, drive.TINY, drive.blobs(), said.append)
    except UserError as e: assert kind == 'flipped' and 'another version' in str(e)
    else:
        drive.same(out, tiny[1])
        is_readable = kind == 'foreign'                                # and of this version
        if left is not None and not is_readable:
            assert 'store.json' in said[0] and is_kept(left, (out/'damaged').iterdir())
    assert not (tmp_path/'trap').exists()
    assert not any('test accuracy' in line for line in said)           # nothing was computed again

OTHERWISE = '{"schema": %s, "recipe": {%s}, "runtime": {}, "size": 8, "seeds": []}'
RECORDS = ('', '[]', '3', '{}', '{"schema": 1}', '[' * 100_000, OTHERWISE % (0, ''),
           OTHERWISE % (1, '"lr": NaN'), OTHERWISE % (1, '"old": 1'))

@pytest.mark.parametrize('content', RECORDS, ids=range(len(RECORDS)))
def test_a_record_of_something_else(copy, tiny, capsys, content):
    out = copy()
    (home,) = report.homes(out)
    (home/'run.json').write_text(content)
    assert cli.kesi_report([str(out)]) == 2
    assert capsys.readouterr().err.count('\n') == 1
    drive.go(out, drive.TINY, drive.blobs())                           # a run writes it again
    drive.same(out, tiny[1])

def test_foreign_files_stay(copy, tiny):
    out = copy()
    stage = next(out.glob('baseline-*'))
    mine = [out/'notes.txt', out/'sub'/'x', stage/'notes.txt', out/'reports'/'mine', out/'.hidden']
    for p in mine:
        p.parent.mkdir(exist_ok=True)
        p.write_text('mine')
    drive.go(out, drive.TINY, drive.blobs())
    assert all(p.read_text() == 'mine' for p in mine)

def test_renamed_stages(copy, tiny):
    "Folders swapped by hand are recognised, by runs and by reports."
    out, said = copy(), []
    a, b = sorted(out.glob('retrain-*'))[:2]
    for old, new in ((a, out/'x'), (b, a), (out/'x', b)): old.rename(new)
    (home,) = report.homes(out)
    with pytest.raises(DamagedFile, match='holds another stage.*renamed'): report.write(home)
    drive.go(out, drive.TINY, drive.blobs(), said.append)
    drive.same(out, tiny[1])
    assert sum('holds another stage' in line for line in said) == 2
    assert len(list((out/'damaged').iterdir())) == 2

def test_a_lost_pruning_is_made_again(copy, tiny):
    "Nobody computes from it any more, but reports read it."
    out = copy()
    shutil.rmtree(next(out.glob('prune-*')))
    drive.go(out, drive.TINY, drive.blobs())
    drive.same(out, tiny[1])

def test_a_manifest_from_the_future(copy, capsys):
    out = copy()
    path = next(out.glob('retrain-*/manifest.json'))
    m = {**json.loads(path.read_text()), 'schema': 99}
    del m['sha256']
    path.write_text(json.dumps({**m, 'sha256': digest(m, 64)}))
    before = path.read_bytes()
    with pytest.raises(StoreError, match='newer kesi .schema 99.*update'):
        drive.go(out, drive.TINY, drive.blobs())
    assert path.read_bytes() == before and not (out/'damaged').exists()
    assert cli.kesi_report([str(out)]) == 1 and capsys.readouterr().err.count('\n') == 1

@pytest.mark.parametrize('change', (
    {'files': {}},
    {'files': 3},
    {'files': {n: 'x' for n in FILES[1:]}},
    {'metrics': float('nan')}))
def test_a_manifest_with_a_checksum_but_without_sense(copy, tiny, change):
    out, said = copy(), []
    path = next(out.glob('retrain-*/manifest.json'))
    m = {**json.loads(path.read_text()), **change}
    del m['sha256']
    with_sum = m if 'metrics' in change else {**m, 'sha256': digest(m, 64)}
    path.write_text(json.dumps(with_sum))
    drive.go(out, drive.TINY, drive.blobs(), said.append)
    drive.same(out, tiny[1])
    assert 'set aside' in said[0]

def test_numbers_changed_by_hand(copy, tiny):
    out, said = copy(), []
    path = next(out.glob('retrain-*/manifest.json'))
    m = json.loads(path.read_text())
    m['metrics']['accuracy'] = 1.
    path.write_text(json.dumps(m))
    with pytest.raises(DamagedFile, match='its own checksum'): store.read_manifest(path.parent)
    drive.go(out, drive.TINY, drive.blobs(), said.append)
    drive.same(out, tiny[1])
    assert 'set aside' in said[0]

# Working folders

@pytest.fixture(scope='module')
def begun(tmp_path_factory):
    out = tmp_path_factory.mktemp('begun')/'runs'
    for n in range(9, 20):                                   # until a checkpoint is there
        if out.exists(): shutil.rmtree(out)
        assert drive.finish(out, tiny=True, kill=(n, 'before')) == -9
        if list(out.glob('.*.partial/checkpoint.safetensors')): return out
    raise AssertionError('no checkpoint was seen')

@pytest.mark.parametrize('kind', KINDS)
def test_a_damaged_checkpoint(begun, tiny, tmp_path, kind):
    out, said = tmp_path/'runs', []
    shutil.copytree(begun, out)
    checkpoint = next(out.glob('.*.partial/checkpoint.safetensors'))
    left = damage(checkpoint, kind, .9, next(out.glob('*/model.safetensors')), tmp_path/'trap')
    drive.go(out, drive.TINY, drive.blobs(), said.append)
    drive.same(out, tiny[1])
    assert not (tmp_path/'trap').exists()
    if left is not None: assert 'set aside' in said[0] and is_kept(left, out.rglob('*.damaged-*'))
    if kind == 'folder': assert list(out.rglob('mine'))

def test_a_checkpoint_of_another_training(begun, tiny, tmp_path):
    "Well-formed, with a checksum, but of other settings: not used."
    out, said = tmp_path/'runs', []
    shutil.copytree(begun, out)
    checkpoint = next(out.glob('.*.partial/checkpoint.safetensors'))
    tensors, record = training.read_checkpoint(checkpoint)
    unnamed = {n: v for n, v in record.items() if n != 'of'}
    for wrong in ({**record, 'of': 'other'}, unnamed, [1], None):
        training.write_checkpoint(checkpoint, tensors, wrong)
        drive.go(out, drive.TINY, drive.blobs(), said.append)
        drive.same(out, tiny[1])
        assert 'belongs to another training' in said[0]
        said.clear()
        shutil.rmtree(out)
        shutil.copytree(begun, out)

@pytest.mark.parametrize('spoil', ('file', 'link', 'tmp'))
def test_a_strange_working_folder(begun, tiny, tmp_path, spoil):
    out, said = tmp_path/'runs', []
    shutil.copytree(begun, out)
    work = next(out.glob('.*.partial'))
    if spoil == 'tmp':
        (work/'.checkpoint.safetensors.999999999-aa.tmp').write_text('x')
        (out/f'{work.name[:-8]}.999999999-aa.new').mkdir()
    else:
        shutil.rmtree(work)
        if spoil == 'file': work.write_text('mine')
        else: work.symlink_to('nowhere')
    drive.go(out, drive.TINY, drive.blobs(), said.append)
    drive.same(out, tiny[1])
    if spoil == 'file': assert is_kept(b'mine', (out/'damaged').iterdir())
    assert not drive.debris(out)

@pytest.mark.parametrize('where', ('.locks', 'damaged', 'reports'))
def test_a_file_where_a_folder_should_be(copy, where):
    out = copy()
    if (out/where).exists(): shutil.rmtree(out/where)
    (out/where).write_text('mine')
    path = next(out.glob('baseline-*/model.safetensors'))
    path.write_bytes(b'x')
    with pytest.raises(KesiError, match=where): drive.go(out, drive.TINY, drive.blobs())
    assert (out/where).read_text() == 'mine' and path.read_bytes() == b'x'

def test_a_disk_that_forgets(tmp_path, monkeypatch):
    "A stage that is damaged as soon as it is written is an error, not an endless loop."
    real = store._fill
    def fill(keep, folder, *a):
        real(keep, folder, *a)
        (folder/'history.json').write_text('[]')
    monkeypatch.setattr(store, '_fill', fill)
    with pytest.raises(DamagedFile, match='as soon as it was written'):
        drive.go(tmp_path/'runs', drive.TINY, drive.blobs())
