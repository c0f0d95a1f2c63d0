"Networks that kesi did not build: cut through the graph, trained, stored, loaded elsewhere, and compressed."
import copy, dataclasses, json, subprocess, sys
from pathlib import Path
import pytest, torch, torch.nn.functional as F, torch.nn.utils.prune
from torch import nn
from torch.utils.data import DataLoader
from strangers import FACTORIES, SHAPE, Handmade, names, pruned
import kesi
from kesi import paper
from kesi.anynet import Source, _Graph, _groups, _kept, cut, groups, load, save, spread
from kesi.data import load as load_data
from kesi.macs import count
from kesi.models import Spec, build
from kesi.paper import UserError
from kesi.pruning import prune_filters
from kesi.runtime import DamagedFile, Runtime

pytest.importorskip('torch_pruning')
RT = Runtime(channels_last=False, threads=1)

# Cutting

@pytest.mark.parametrize('name', names())
def test_a_pruning_by_30_percent(name):
    net, small = pruned(name)
    found = groups(net, SHAPE)
    layers, narrow = dict(net.named_modules()), dict(small.named_modules())
    assert any(g.kept == 'classifier' for g in found) or isinstance(list(narrow.values())[-1], nn.Linear)
    for g in found:
        want = g.width if g.kept else paper.shrink((g.width,), (.3,))[0]
        assert narrow[g.name].weight.shape[0] == want, g
        for p in g.producers: assert narrow[p].weight.shape[0] == layers[p].weight.shape[0] - (g.width - want), (g, p)
    last = [n for n, m in net.named_modules() if isinstance(m, nn.Linear)][-1]
    assert narrow[last].out_features == 10 and small(torch.zeros(2, *SHAPE)).shape == (2, 10)
    assert count(small, SHAPE).macs < .8 * count(net, SHAPE).macs and type(small) is type(net)

@pytest.mark.parametrize('name', FACTORIES)
def test_the_cut_network_is_the_big_one_with_those_filters_silenced(name):
    "The oracle: filters and norms of everything that goes are set to zero in the big network instead."
    big = copy.deepcopy(pruned(name)[0]).double()
    for t in big.state_dict().values():
        if t.ndim == 1: t.copy_(.5 + torch.rand(t.shape, generator=torch.Generator().manual_seed(len(t)), dtype=t.dtype))
    small, silent = cut(big, SHAPE, .3), copy.deepcopy(big)
    graph = _Graph(silent, SHAPE); found = _groups(graph, False)
    for root, keep in _kept(graph, found, .3, 1).items():
        gone = sorted(set(range(len(graph.layers[root].weight))) - set(keep.tolist()))
        for item in graph.graph.get_pruning_group(graph.layers[root], graph.tp.prune_conv_out_channels, gone):
            m = item.dep.target.module
            if m in graph.name and graph.graph.is_out_channel_pruning_fn(item.dep.handler):
                for p in m.parameters(): p.data[item.idxs] = 0
    x = torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(small(x), silent(x), rtol=1e-8, atol=1e-8)
        assert (small(x) - big(x)).abs().max() > 1e-6

@pytest.mark.parametrize('arch', ('resnet20', 'preresnet11', 'wrn_10_1', 'vgg16', 'resnet18'))
def test_our_networks_are_cut_alike_both_ways(arch):
    net = build(Spec(arch), seed=7).eval()
    for _ in range(2):
        here, there = prune_filters(net, .3), cut(net, (3, 32, 32), .3)
        assert here.spec == there.spec
        for (n, a), (m, b) in zip(here.state_dict().items(), there.state_dict().items()): assert n == m and torch.equal(a, b), n
        net = there

def test_plans_that_coupling_forbids():
    net = Handmade()
    found = groups(net, SHAPE)
    with pytest.raises(UserError, match='residual stream, together with down.0, outer.0'): spread(found, {'outer': .1})
    with pytest.raises(UserError, match='no layer that can be cut begins with'): spread(found, {'layer9': .1})
    with pytest.raises(UserError, match='takes 1 rate'): spread(found, [.1, .2])
    assert cut(net, SHAPE, .3, streams=True).down[0].out_channels == 22

class Flat(nn.Module):
    def __init__(self):
        super().__init__(); self.a, self.b, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1), nn.Linear(256, 10)
    def forward(self, x): return self.fc(F.adaptive_avg_pool2d(self.b(self.a(x)), 4).view(-1, 256))

class Glued(Flat):
    "A concatenation that is flattened at once, which the graph maps wrongly: it is left alone."
    def __init__(self): super().__init__(); self.c = nn.Conv2d(8, 16, 3, padding=1); self.fc = nn.Linear(512, 10)
    def forward(self, x): x = self.a(x); return self.fc(F.adaptive_avg_pool2d(torch.cat([self.b(x), self.c(x)], 1), 4).flatten(1))

def test_forward_passes_with_fixed_sizes():
    with pytest.raises(UserError, match=r'cannot run with fewer filters in b: .*flatten\(1\)'): cut(Flat(), SHAPE, .5)
    assert cut(Flat(), SHAPE, {'a': .5, 'b': 0}).b.in_channels == 4
    assert {g.kept for g in groups(Glued(), SHAPE)} >= {None, 'unclear concatenation'} and cut(Glued(), SHAPE, .5).a.out_channels == 4

def test_networks_that_cannot_be_pruned():
    for net, match in ((nn.Sequential(nn.Flatten(), nn.Linear(12288, 10)), 'no 2-d convolution'), ('resnet50', 'must be a torch.nn.Module'), (nn.Conv2d(3, 4, 3), 'must return logits'),
                       (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), 'parametrized')):
        with pytest.raises(UserError, match=match): groups(net, SHAPE)
    masked = Handmade(); torch.nn.utils.prune.l1_unstructured(masked.stem[0], 'weight', .3)
    with pytest.raises(UserError, match='already pruned.*prune.remove'): groups(masked, SHAPE)
    thin = cut(Handmade(), SHAPE, .9)
    with pytest.raises(UserError, match='would remove all.*pruned already takes smaller rates'): cut(thin, SHAPE, .9)
    with pytest.raises(UserError, match='Auxiliary outputs'): groups(Two(), SHAPE)

class Two(Flat):
    def forward(self, x): z = super().forward(x); return (z, z) if self.training else z

def test_without_torch_pruning(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch_pruning', None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[anynet\]'"): groups(Handmade(), SHAPE)

# Training and files

@pytest.mark.parametrize('name', names())
def test_one_training_step(name):
    net = copy.deepcopy(pruned(name)[1]).train()
    before = copy.deepcopy(net.state_dict())
    opt = torch.optim.SGD(net.parameters(), lr=.01)
    loss = F.cross_entropy(net(torch.randn(4, *SHAPE)), torch.arange(4)); loss.backward(); opt.step()
    assert loss.isfinite() and all(p.grad is not None for p in net.parameters())
    assert sum(not torch.equal(t, before[n]) for n, t in net.state_dict().items()) > .9 * len(before)

LOADING = '''
import sys, torch; sys.path.insert(0, sys.argv[1]); sys.modules["torch_pruning"] = None        # loading does not need it
from strangers import FACTORIES, SHAPE
import kesi
for name in sys.argv[3:]:
    net = kesi.load(f"{sys.argv[2]}/{name}.safetensors", FACTORIES[name])
    assert not net.training
    with torch.no_grad(): torch.save(net(torch.ones(2, *SHAPE)), f"{sys.argv[2]}/{name}.pt")
'''

@pytest.mark.parametrize('some', (['handmade', 'mobilenet_v2'], pytest.param(list(FACTORIES), marks=pytest.mark.soak)), ids=('two', 'all'))
def test_files_load_in_a_fresh_process(tmp_path, some):
    for name in some: kesi.save(pruned(name)[1], tmp_path/f'{name}.safetensors', FACTORIES[name], SHAPE)
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', LOADING, str(Path(__file__).parent), str(tmp_path), *some], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in some:
        with torch.no_grad(): torch.testing.assert_close(torch.load(tmp_path/f'{name}.pt'), pruned(name)[1](torch.ones(2, *SHAPE)), rtol=1e-5, atol=1e-5)

def test_files_that_do_not_fit(tmp_path):
    small, path = pruned('handmade')[1], tmp_path/'n.safetensors'
    save(small, path, Handmade, SHAPE)
    class Other(Handmade):
        def forward(self, x): return 1.01 * super().forward(x)
    for factory, match in ((None, r'factory\(\) builds the unpruned Handmade'), (Flat, 'does not fit'), (Other, 'gives other answers'), (lambda: Handmade().requires_grad_(False), None)):
        if match is None: assert not any(p.requires_grad for p in load(path, factory).parameters()); continue
        with pytest.raises(UserError, match=match): load(path, factory)
    raw = path.read_bytes()
    for content in (b'', raw[:100], raw[:-50], raw.replace(b'\\"format\\": 1', b'\\"format\\": 2')):
        path.write_bytes(content)
        with pytest.raises(DamagedFile): load(path, Handmade)
    with pytest.raises(UserError, match='there is no file'): load(tmp_path/'none')
    with pytest.raises(UserError, match='other names'): save(small, path, Flat, SHAPE)
    with pytest.raises(UserError, match='factory='): save(small, path)

def test_a_file_cannot_touch_what_is_not_a_size(tmp_path):
    small, path = pruned('handmade')[1], tmp_path/'n.safetensors'
    save(small, path, Handmade, SHAPE)
    path.write_bytes(path.read_bytes().replace(b'out_channels', b'weight______'))
    with pytest.raises(UserError, match='no layer .* with a size'): load(path, Handmade)

@pytest.mark.parametrize('name', ('test_resnet', 'mobilenetv2_035'))
def test_networks_of_timm(name, tmp_path):
    timm = pytest.importorskip('timm', reason='needs timm')
    torch.manual_seed(0)
    def factory(): return timm.create_model(name, pretrained=False, num_classes=10)
    net = factory().eval()
    small = cut(net, SHAPE, .3)
    assert count(small, SHAPE).macs < .75 * count(net, SHAPE).macs and small(torch.zeros(2, *SHAPE)).shape == (2, 10)
    again = load(save(small, tmp_path/'n.safetensors', factory, SHAPE), factory)
    assert torch.equal(again(torch.ones(2, *SHAPE)), small(torch.ones(2, *SHAPE)))

def test_a_network_that_asserts_its_size():
    class Picky(Handmade):
        def forward(self, x): assert x.shape[-1] == 224, 'needs 224 pixels'; return super().forward(x)
    with pytest.raises(UserError, match=r'Picky cannot take images of shape \(3, 64, 64\).*needs 224 pixels'): groups(Picky(), SHAPE)

# compress

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.na, self.b, self.nb, self.fc = nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Linear(16, 10)
        self.drop = nn.Dropout(.1)
    def forward(self, x): return self.fc(self.drop(F.relu(self.nb(self.b(F.max_pool2d(F.relu(self.na(self.a(x))), 4)))).mean((2, 3))))

@pytest.fixture(scope='module')
def digits():
    d = load_data('digits')
    return [(s.images[:300].float() / 127.5 - 1, s.labels[:300]) for s in (d.train, d.test)]

QUICK = dict(epochs=1, iterations=2, rates=.3, lr=.05, rt=RT, say=None, retrain_batch=64)

class Rows:
    def __init__(self, x, y): self.x, self.y = x, y
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], int(self.y[i])

def test_compress_is_the_same_twice_and_goes_on_after_a_stop(digits, tmp_path, monkeypatch):
    train, test = digits
    torch.manual_seed(0); net = Tiny()
    class Stop(Exception): pass
    def stop(line):
        if 'one-cycle 1' in line: raise Stop
    with pytest.raises(Stop): kesi.compress(net, train, test, name='d', out=tmp_path/'a', **{**QUICK, 'say': stop})
    a = kesi.compress(net, train, test, name='d', out=tmp_path/'a', **QUICK)
    b = kesi.compress(net, train, test, name='d', out=tmp_path/'b', **QUICK)
    for n, t in a.network.state_dict().items(): assert torch.equal(t, b.network.state_dict()[n]), n
    assert a.report['table'] == b.report['table'] and json.loads((a.home/'report.json').read_text()) == a.report
    assert [s.params for s in a.steps][-1] == sum(p.numel() for p in a.network.parameters()) == a.report['table'][-1]['params']
    assert not net.fc.weight.grad and net.a.out_channels == 12
    kept = {p.name for p in (tmp_path/'a').iterdir()}
    kesi.compress(net, train, test, name='d', out=tmp_path/'a', **QUICK)
    assert {p.name for p in (tmp_path/'a').iterdir()} == kept

def test_compress_takes_datasets_loaders_and_our_own(digits):
    train, test = digits
    rows = Rows(*train), Rows(*test)
    ours = load_data('digits')
    for a, b in ((train, test), rows, (DataLoader(rows[0], 64, shuffle=True, drop_last=True), DataLoader(rows[1], 64, shuffle=True)), (ours, None)):
        s = kesi.compress(Tiny(), a, b, **{**QUICK, 'iterations': 1, 'variants': ('one-cycle',)})
        assert s.home is None and [r['variant'] for r in s.report['table']] == ['baseline', 'one-cycle', 'ensemble']
        assert s(torch.zeros(3, 1, 16, 16)).shape == (3, 10)

def test_compress_takes_networks_of_ours(digits):
    s = kesi.compress(build(Spec('resnet8', in_channels=1)), *digits, **{**QUICK, 'iterations': 1})
    assert s.network.spec.widths == (11, 22, 44)

def test_what_compress_refuses(digits):
    train, test = digits
    net, rows = Tiny(), [{'image': x, 'label': int(y)} for x, y in zip(*train)]
    for wrong, match in ((dict(loss='hinge'), 'unknown loss .hinge.; allowed are cross-entropy, label-smoothing'), (dict(temprature=3), 'no field .temprature.'), (dict(method='weights'), 'prunes filters'),
                         (dict(rates=1.), 'below 1'), (dict(rates=.9), 'at least one'), (dict(rates={'fc': .1}), 'no layer that can be cut'), (dict(iterations=0), 'iterations must be')):
        with pytest.raises(UserError, match=match): kesi.compress(net, train, test, **{**QUICK, **wrong})
    for data, match in ((DataLoader(rows, 8), "dictionaries .with 'image', 'label'.; kesi needs"), ((train[0].byte(), train[1]), 'floating-point'), ((train[0], train[1][:5]), '300 images and 5 labels'),
                        ((train[0], train[1] + 1), 'labels must be from 0 to 9'), ((train[0][:, :, :8], train[1]), 'have the shape'), ('cifar10', 'got str'), ((train[0][:0], train[1][:0]), 'no images'),
                        ((train[0].repeat(1, 3, 1, 1), train[1]), 'have the shape')):
        with pytest.raises(UserError, match=match): kesi.compress(net, data, test, **QUICK)
    with pytest.raises(UserError, match='give test data too'): kesi.compress(net, train, **QUICK)
    with pytest.raises(UserError, match='no 2-d convolution'): kesi.compress(nn.Sequential(nn.Flatten(), nn.Linear(256, 10)), train, test, **QUICK)

def test_test_data_are_put_into_order(digits):
    x, y = digits[1]
    s = Source(digits[0], DataLoader(Rows(x, y), 50, shuffle=True), 64, '')
    assert torch.equal(torch.cat([b for _, b in s.loaders(64, RT)[1]]), y)

def test_the_recipe_of_a_stranger():
    r = paper.Recipe(arch='own:Tiny', rates=(.1, .2))
    assert paper.from_dict(json.loads(paper.to_json(r))) == r and r.pruning == (.1, .2) and dataclasses.replace(r, iterations=9).iterations == 9
    with pytest.raises(UserError): paper.recipe('digits/own:Tiny')
