"Several processes train one network: the same protocol, the same gradients, one writer."
import os, subprocess, sys
from pathlib import Path
import drive, pytest, several, torch
from kesi import anynet, scale
from torch.testing import assert_close

def together(n, *args, log):
    "Run `several.py` in n processes; torchrun's exit code."
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n), str(Path(several.__file__)), *map(str, args)]
    with open(log, 'a') as f: return subprocess.run(command, stdout=f, stderr=f, timeout=300, env={**os.environ, 'OMP_NUM_THREADS': '1'}).returncode

@pytest.mark.parametrize('n', (2, pytest.param(3, marks=pytest.mark.soak)))
def test_gradients_are_those_of_one_process(tmp_path, n):
    assert together(n, 'gradients', tmp_path/'found', log=tmp_path/'log') == 0, (tmp_path/'log').read_text()
    got, want = torch.load(tmp_path/'found'), several.gradients(several.runtime(precision='float64'))
    assert len(got['gradients']) == len(want['gradients']) == 2 * 5
    for a, b in zip(got['gradients'], want['gradients']): assert_close(a, b, rtol=1e-9, atol=1e-12)
    for key in ('weights', 'history'): assert_close(got[key], want[key], rtol=1e-9, atol=1e-12)
    for split in ('train', 'test'):              # counted over exactly the whole set
        counts = [round(r[f'{split}_accuracy'] * (66 if split == 'train' else 53), 9) for r in got['history']]
        assert all(c == round(c) for c in counts), counts
    assert_close(got['measured'], want['measured'], rtol=1e-9, atol=0)

@pytest.mark.parametrize('call, said', ((lambda d: anynet.compress(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3)), d), 'compress works in one process'),
                                        (lambda d: scale.sweep([], d), 'without torchrun')), ids=('compress', 'sweep'))
def test_what_works_alone_says_so(tmp_path, monkeypatch, call, said):
    pytest.importorskip('ray')
    for name, value in (('WORLD_SIZE', '2'), ('RANK', '0'), ('LOCAL_RANK', '0')): monkeypatch.setenv(name, value)
    with pytest.raises(scale.UserError, match=said): call(tmp_path)

@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    "A run of two processes that nothing disturbed."
    out = tmp_path_factory.mktemp('pair')/'runs'
    assert together(2, 'run', out, log=out.with_suffix('.log')) == 0, out.with_suffix('.log').read_text()
    return out

def test_one_process_writes(pair):
    said = pair.with_suffix('.log').read_text()
    assert said.count('baseline: test accuracy') == 1 and 'Warning' not in said, said
    assert not drive.debris(pair)

def test_stages_of_several_processes_are_their_own(pair, tiny):
    "The number of processes changes the last digits, so it is part of a stage's name."
    names = lambda out: {p.parent.name for p in out.glob('*/manifest.json')}
    assert not names(pair) & names(tiny[0]) and len(names(pair)) == len(names(tiny[0]))

@pytest.mark.soak
@pytest.mark.parametrize('rank', (0, 1))
def test_a_killed_process_resumes(pair, tmp_path, rank):
    out, log = tmp_path/'runs', tmp_path/'log'
    assert together(2, 'run', out, rank, 4, log=log) != 0               # the second epoch of the first retraining
    assert list(out.glob('.*.partial/checkpoint.safetensors'))
    assert together(2, 'run', out, log=log) == 0, log.read_text()
    drive.same(out, drive.content(pair))
    assert not drive.debris(out)
