"ONNX files that answer like torch, int8, latencies, model cards, and the command kesi_export."
import subprocess, sys
from dataclasses import replace
import pytest, torch
from strangers import SHAPE, Handmade, names, pruned
import kesi
from kesi import cli, deploy, paper, report
from kesi.anynet import save
from kesi.data import Loader, load
from kesi.models import Spec, build
from kesi.paper import UserError
from kesi.pipeline import run
from kesi.runtime import KesiError, Runtime

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

HEAVY = 'dense', 'mobilenet_v2', 'densenet121', 'efficientnet_b0'

@pytest.mark.parametrize('name', names(HEAVY))
def test_onnx_answers_like_torch(name, tmp_path):
    net = pruned(name)[1]
    path = deploy.export(net, tmp_path/'n.onnx', SHAPE)
    x = torch.randn(3, *SHAPE)
    with torch.no_grad(): expected = net(x)
    torch.testing.assert_close(deploy.session(path, 1)(x), expected, rtol=1e-3, atol=1e-4)
    assert [p.name for p in tmp_path.iterdir()] == ['n.onnx']                       # one file
    m = onnx.load(path)
    batch, *sizes = m.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param == 'batch' and [d.dim_value for d in sizes] == list(SHAPE)
    raw = path.read_bytes()
    assert sys.prefix.encode() not in raw and b'stack_trace' not in raw and b'.py"' not in raw

def test_a_file_of_another_network_is_noticed(tmp_path):
    net = build(Spec('resnet8'), 1)
    path = deploy.export(net, tmp_path/'n.onnx', 16)
    other = build(Spec('resnet8'), 2)
    with pytest.raises(KesiError, match='does not answer like torch'):
        deploy.agree(other, path, 16)
    class Doubting(torch.nn.Module):
        def forward(self, x): return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))
    doubting = _with_weights(Doubting())
    with pytest.raises(KesiError, match='cannot export Doubting'):
        deploy.export(doubting, tmp_path/'x.onnx', SHAPE)
    assert not (tmp_path/'x.onnx').exists()

def _with_weights(net):
    net.p = torch.nn.Parameter(torch.zeros(1))
    return net

def test_what_is_missing_or_wrong(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r'channels, height, width'):
        deploy.export(Handmade(), tmp_path/'x.onnx')
    (tmp_path/'bad.onnx').write_bytes(b'nothing')
    with pytest.raises(UserError, match='not an ONNX file'): deploy.session(tmp_path/'bad.onnx')
    with pytest.raises(UserError, match='cannot be filled up'):
        deploy.fastest_widths(Handmade(), SHAPE)
    needed_by = {'onnxscript': lambda: deploy.to_onnx(build(Spec('resnet8')), 16),
                 'onnxruntime': lambda: deploy.session(b'')}
    for module, call in needed_by.items():
        with monkeypatch.context() as m:
            m.setitem(sys.modules, module, None)
            with pytest.raises(UserError, match=r'pip install -e .\.\[deploy\]'): call()

def test_the_median_is_not_moved_by_a_hiccup(monkeypatch):
    ends = [i + (.5 if i == 3 else .002) for i in range(400)]
    times = iter([0.] + [t for i, end in enumerate(ends) for t in (float(i), end)])
    monkeypatch.setattr(deploy.time, 'perf_counter', lambda: next(times))
    assert 1.9 < deploy.milliseconds(lambda x: x, None, 0.) < 500

def test_several_quantiles_give_the_spread(monkeypatch):
    "Calls of 1, 2, 3, 4 and 5 milliseconds, after one look at the clock for the end."
    ends = [i + (i + 1) / 1000 for i in range(5)]
    times = iter([0.] + [t for i, end in enumerate(ends) for t in (float(i), end)])
    monkeypatch.setattr(deploy.time, 'perf_counter', lambda: next(times, 1e9))
    found = deploy.in_turns({'it': lambda x: x}, torch.zeros(1), 0., quantile=(.2, .5, .8))
    assert found['it'] == pytest.approx((1, 3, 4), abs=1e-6)

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp('deploy')/'runs'
    r = replace(paper.recipe('digits/resnet8'), seeds=1, iterations=1, variants=('kesi',),
                epochs=3, retrain_epochs=1, distill_epochs=1)
    return out, report.write(run(r, out, Runtime(threads=1), say=None))

def test_the_command(runs, tmp_path, capsys):
    out, told = runs
    assert cli.kesi_export([str(out), str(tmp_path/'n.onnx'), '--int8', '--latency']) == 0
    said = capsys.readouterr().out
    parts = 'differs from torch by', 'test accuracy', 'ONNX Runtime, int8'
    for part in parts: assert part in said
    def accuracy(name):
        return deploy.onnx_accuracy(tmp_path/name, Loader(load('digits'), load('digits').test, 100))
    found, small = accuracy('n.onnx'), accuracy('n.int8.onnx')
    assert abs(100 * found - told['table'][-1]['accuracy']['mean']) < .3
    size, small_size = (tmp_path.joinpath(n).stat().st_size for n in ('n.onnx', 'n.int8.onnx'))
    assert abs(found - small) < .1 and small_size < .5 * size

def test_the_command_on_a_stranger_and_on_mistakes(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    path = save(pruned('handmade')[1], tmp_path/'h.safetensors', Handmade, SHAPE)
    right = [str(path), str(tmp_path/'h.onnx'), '--factory', 'strangers:Handmade', '--size', '64']
    assert cli.kesi_export(right) == 0
    capsys.readouterr()
    for wrong in ([str(tmp_path/'none'), 'x.onnx'],
                  [str(tmp_path), 'x.onnx'],
                  [str(path), 'x.onnx'],
                  [str(path), 'x.onnx', '--factory', 'strangers'],
                  [str(path), 'x.onnx', '--factory', 'strangers:None_'],
                  [str(path), 'x.onnx', '--factory', 'strangers:Handmade'],
                  [str(runs[0]), 'x.onnx', '--size', '0'],
                  [str(runs[0]), str(tmp_path/'y.onnx'), '--int8', '--data', 'nothing']):
        assert cli.kesi_export(wrong) == 2, wrong
        err = capsys.readouterr().err
        assert err.startswith('error: ') and err.count('\n') == 1, err

def test_the_card(runs):
    text = deploy.card(runs[1], licence='CC0')
    parts = ('# resnet8, pruned', '## Results', 'one seed', '## Data', '`digits`',
             '## Licence\n\nCC0', '## Limits', 'Test accuracy')
    for part in parts: assert part in text, part
    assert f'{runs[1]["table"][-1]["params"]:,}' in text and str(runs[0]) not in text

LAZILY = '''
import sys, kesi.paper
assert "torch" not in sys.modules
import kesi
assert callable(kesi.compress) and callable(kesi.export) and "share" in dir(kesi)
try: kesi.nothing
except AttributeError as e: print(e)
'''

def test_what_kesi_offers_lazily():
    line = [sys.executable, '-W', 'ignore', '-c', LAZILY]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0 and "no attribute 'nothing'" in done.stdout, done.stderr
    assert kesi.load is not None

def test_an_int8_file_of_a_share_says_its_accuracy(tmp_path, monkeypatch):
    "Both accuracies stand on the card, and a fall of more than a point is said."
    pytest.importorskip('onnxruntime')
    d = load('digits')
    train, test = ((s.images[:200].float() / 127.5 - 1, s.labels[:200]) for s in (d.train, d.test))
    torch.manual_seed(0)
    s = kesi.compress(build(Spec('resnet8', in_channels=1), 0), train, test, iterations=1, epochs=1,
                      variants=('one-cycle',), say=None, rt=Runtime(channels_last=False, threads=1))
    said = []
    home = deploy.share(s, tmp_path/'whole', train[0], seconds=.01, say=said.append)
    files = [home/'model.onnx', home/'model.int8.onnx']
    whole, small = (deploy.onnx_accuracy(f, s.test) for f in files)
    assert whole == pytest.approx(s.accuracy, abs=.01)
    note = f'The int8 file scores {small:.2%} on the test data, the float32 file {whole:.2%}.'
    assert note in (home/'README.md').read_text() and len(said) == (small < whole - .01)
    measured = deploy.onnx_accuracy
    worse = lambda f, batches: measured(f, batches) - .2 * ('int8' in f.name)
    monkeypatch.setattr(deploy, 'onnx_accuracy', worse)
    said.clear()
    deploy.share(s, tmp_path/'worse', train[0], seconds=.01, say=said.append)
    assert len(said) == 1 and 'hand on the float32 file' in said[0]
