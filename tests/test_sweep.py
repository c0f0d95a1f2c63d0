"""A sweep over a local Ray cluster gives the bits of runs one after another, also when it loses a
worker; and a run folder can be cleaned."""
import io, os, shutil, signal, sys, threading, time
from dataclasses import replace
import drive, pytest, torch
from kesi import cli, pipeline, report, scale
from kesi.runtime import Runtime, locked

RT = Runtime(threads=1)
QUICK = ('iterations=1', 'epochs=2', 'retrain_epochs=1', 'distill_epochs=1')

@pytest.fixture(autouse=True)
def one_thread(no_pictures):
    "Equal numbers of threads everywhere."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

def worker_of(out, stage):
    "The other process that computes a stage, by the file beside its lock."
    owner = out/'.locks'/f'{stage}.owner'
    try: pid = int(owner.read_text().split()[1])
    except (OSError, IndexError, ValueError): return None
    return pid if pid != os.getpid() else None

def kill_one(out, killed):
    "Kill the first process that is seen to hold a checkpoint."
    while not killed:
        for p in out.glob('.*.partial/checkpoint.safetensors'):
            stage = p.parent.name[1:].removesuffix('.partial')
            if (pid := worker_of(out, stage)) is None: continue
            os.kill(pid, signal.SIGKILL)
            killed.append(stage)
            return
        time.sleep(.02)

LONGER = ('iterations=2', 'epochs=6', 'retrain_epochs=2', 'distill_epochs=2')
TWO = ['digits/resnet8', 'digits/resnet14']

@pytest.mark.soak
@pytest.mark.parametrize('names, seeds, settings', (
    (['digits/resnet8'], 1, (*QUICK, 'epochs=6')), (TWO, 3, LONGER)), ids=('one', 'grid'))
def test_a_killed_worker_changes_nothing(tmp_path, names, seeds, settings):
    pytest.importorskip('ray')
    recipes, said, killed = scale.grid(names, ['filters', 'weights'], seeds, settings), [], []
    begun = time.perf_counter()
    for r in recipes: report.write(pipeline.run(r, tmp_path/'alone', RT, say=None))
    alone, begun = time.perf_counter() - begun, time.perf_counter()
    threading.Thread(target=kill_one, args=(tmp_path/'runs', killed), daemon=True).start()
    homes = scale.sweep(recipes, tmp_path/'runs', RT, workers=2, say=said.append)
    swept = time.perf_counter() - begun
    print(f'{said[-1]}; one after another {alone:.0f} s, swept {swept:.0f} s')
    assert len(homes) == len(recipes) and killed
    drive.same(tmp_path/'runs', drive.content(tmp_path/'alone'))
    assert not drive.debris(tmp_path/'runs')
    b = scale.bill(scale.Sweep(recipes, RT), RT)
    assert len(list((tmp_path/'runs').glob('*/manifest.json'))) == b['stages'] < b['stages apart']

@pytest.mark.soak
def test_a_failing_stage_fails_alone(tmp_path):
    "A loss that becomes NaN ends its own branch; the others are finished and reported."
    pytest.importorskip('ray')
    recipes, said = scale.grid(['digits/resnet8'], None, 1, (*QUICK, 'variants=pfec')), []
    recipes.append(replace(recipes[0], small_lr=1e30))
    out, match = tmp_path/'runs', '1 of 4 stages could not be computed.*learning rate'
    with pytest.raises(scale.KesiError, match=match):
        scale.sweep(recipes, out, RT, workers=1, say=said.append)
    assert sum(line.startswith('failed: ') for line in said) == 1
    (reported,) = out.rglob('report.json')
    assert reported.parent.name == pipeline.slug(recipes[0]).split('/')[1]

# kesi_store

@pytest.fixture
def store(tiny, tmp_path): return shutil.copytree(tiny[0], tmp_path/'runs')

def stages(out, pattern='*-*'): return {p.name for p in out.glob(pattern)}

def test_nothing_is_removed_unasked(store, tiny, capsys, monkeypatch):
    shutil.rmtree(store/'reports')
    monkeypatch.setattr(sys, 'stdin', io.StringIO('y\n'))     # no terminal: nobody was asked
    assert cli.kesi_store(['clean', str(store)]) == 0
    assert '--yes removes it' in capsys.readouterr().out
    assert stages(store) == stages(tiny[0]) != set()
    assert cli.kesi_store(['clean', str(store), '--yes']) == 0
    assert 'removed, ' in capsys.readouterr().out and not stages(store)

@pytest.mark.parametrize('answer, left', (('n', True), ('', True), ('yes', False)))
def test_it_asks(store, monkeypatch, answer, left):
    class Terminal(io.StringIO):
        def isatty(self): return True
    spoilt = store/'damaged'/'distill-0123456789ab-1'
    spoilt.mkdir(parents=True)
    monkeypatch.setattr(sys, 'stdin', Terminal(f'{answer}\n'))
    assert cli.kesi_store(['clean', str(store)]) == 0
    assert spoilt.exists() == left
    drive.same(store, drive.content(store))

def test_what_is_used_stays(store, tiny):
    """Leftovers and what was set aside go; checkpoints that a report waits for, ancestors and
    strangers' files stay."""
    baseline, kesi = next(store.glob('baseline-*')), next(store.glob('distill-*'))
    waiting, lost = store/f'.{kesi.name}.partial', store/'.retrain-0123456789ab.partial'
    new, mine = store/f'.{baseline.name}.999999999-ab.new', store/'mine-notes'
    shutil.rmtree(kesi)
    for p in (waiting, lost, store/'damaged'/'x', new, mine):
        p.mkdir(parents=True)
        (p/'file').write_text('x')
    (store/'.locks'/'retrain-0123456789ab.lock').touch()
    gone = {e.path.name for e in scale.clean(store)}
    assert gone == {lost.name, 'x', new.name, 'retrain-0123456789ab.lock'}
    assert waiting.exists() and mine.exists() and next(store.glob('prune-*')).exists()
    assert stages(store, '[a-z]*-*') - {mine.name} == stages(tiny[0]) - {kesi.name}

def test_not_while_somebody_works(store, capsys):
    shutil.rmtree(store/'reports')
    stage = next(store.glob('baseline-*')).name
    with locked(store/'.locks'/f'{stage}.lock'):
        assert cli.kesi_store(['clean', str(store), '--yes']) == 1
    assert f'is working on {stage}' in capsys.readouterr().err and (store/stage).exists()

def test_unreadable_files(store, capsys):
    stage = next(store.glob('baseline-*'))
    (stage/'model.safetensors').write_bytes(b'broken')
    assert cli.kesi_store(['list', str(store), '--check']) == 0
    assert 'does not match its checksum' in capsys.readouterr().out
    next(store.rglob('run.json')).write_text('{')
    assert cli.kesi_store(['clean', str(store), '--yes']) == 2
    assert 'nobody knows what it uses' in capsys.readouterr().err
    assert stage.exists()
