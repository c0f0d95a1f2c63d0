"Several processes train one network: the same protocol, the same gradients, one writer."
import os, subprocess, sys
from pathlib import Path
import drive, pytest, several, torch
from kesi import anynet, scale
from torch.testing import assert_close


def together(n, *args, log):
    "Run `several.py` in n processes; torchrun's exit code."
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    script = str(Path(several.__file__))
    command = [*launcher, '--nproc_per_node', str(n), script, *map(str, args)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    with open(log, 'a') as f:
        return subprocess.run(command, stdout=f, stderr=f, timeout=300, env=env).returncode


def begin(folder, n):
    "The gradients, and a run that nothing disturbs, of n processes."
    out, log = folder/'runs', folder/'runs.log'
    assert together(n, 'both', out, folder/'found', log=log) == 0, log.read_text()
    return out, torch.load(folder/'found')


@pytest.fixture(scope='module')
def pair(tmp_path_factory): return begin(tmp_path_factory.mktemp('pair'), 2)


def they_are_those_of_one_process(got):
    want = several.gradients(several.runtime(precision='float64'))
    assert len(got['gradients']) == len(want['gradients']) == 2 * 5
    for key in ('gradients', 'weights', 'history'):
        assert_close(got[key], want[key], rtol=1e-9, atol=1e-12)
    for split, size in (('train', 66), ('test', 53)):        # counted over exactly the whole set
        counts = [round(r[f'{split}_accuracy'] * size, 9) for r in got['history']]
        assert all(c == round(c) for c in counts), counts
    assert_close(got['measured'], want['measured'], rtol=1e-9, atol=0)


def test_gradients_are_those_of_one_process(pair): they_are_those_of_one_process(pair[1])


@pytest.mark.soak
def test_gradients_of_three_processes_are_those_of_one(tmp_path):
    they_are_those_of_one_process(begin(tmp_path, 3)[1])


ALONE = {'compress': (lambda d: anynet.compress(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3)), d),
                      'compress works in one process'),
         'sweep': (lambda d: scale.sweep([], d), 'without torchrun')}

@pytest.mark.parametrize('call, said', ALONE.values(), ids=ALONE)
def test_what_works_alone_says_so(tmp_path, monkeypatch, call, said):
    pytest.importorskip('ray')
    launched = {'WORLD_SIZE': '2', 'RANK': '0', 'LOCAL_RANK': '0'}
    for name, value in launched.items(): monkeypatch.setenv(name, value)
    with pytest.raises(scale.UserError, match=said): call(tmp_path)


def test_one_process_writes(pair):
    said = pair[0].with_suffix('.log').read_text()
    assert said.count('baseline: test accuracy') == 1 and 'Warning' not in said, said
    assert not drive.debris(pair[0])


def test_stages_of_several_processes_are_their_own(pair, tiny):
    "The number of processes changes the last digits, so it is part of a stage's name."
    theirs, ours = ({p.parent.name for p in out.glob('*/manifest.json')}
                    for out in (pair[0], tiny[0]))
    assert not theirs & ours and len(theirs) == len(ours)


@pytest.mark.soak
@pytest.mark.parametrize('rank', (0, 1))
def test_a_killed_process_resumes(pair, tmp_path, rank):
    out, log = tmp_path/'runs', tmp_path/'log'
    of_the_first_retraining = 4                              # its second epoch
    assert together(2, 'run', out, rank, of_the_first_retraining, log=log) != 0
    assert list(out.glob('.*.partial/checkpoint.safetensors'))
    assert together(2, 'run', out, log=log) == 0, log.read_text()
    drive.same(out, drive.content(pair[0]))
    assert not drive.debris(out)
