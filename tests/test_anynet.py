"Networks that kesi did not build: cut through the graph, trained, stored, loaded, compressed."
import copy, dataclasses, json, math, random, subprocess, sys
from pathlib import Path
import pytest, torch, torch.nn.functional as F, torch.nn.utils.prune, torchvision
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_pil_image
from strangers import FACTORIES, SHAPE, Handmade, names, pruned
import kesi
from kesi import anynet, deploy, paper
from kesi.anynet import (MEASURES, Source, cost, cut, cut_to, free, groups, load, plan, save,
                         spread, widths_left)
from kesi.data import load as load_data
from kesi.macs import count
from kesi.models import Spec, build
from kesi.paper import UserError
from kesi.pruning import prune_filters
from kesi.runtime import DamagedFile, Diverged, Runtime
from kesi.training import Training, fit

pytest.importorskip('torch_pruning')
pytestmark = pytest.mark.usefixtures('no_pictures')
RT = Runtime(channels_last=False, threads=1)

def params_of(net): return sum(p.numel() for p in net.parameters())

def equal(a, b):
    "Are two networks equal, tensor by tensor and by name?"
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())

# Cutting

@pytest.mark.parametrize('name', names())
def test_a_pruning_by_30_percent(name):
    net, small = pruned(name)
    found = groups(net, SHAPE)
    layers, narrow = dict(net.named_modules()), dict(small.named_modules())
    has_classifier = any(g.kept == 'classifier' for g in found)
    assert has_classifier or isinstance(list(narrow.values())[-1], nn.Linear)
    for g in found:
        want = g.width if g.kept else paper.shrink((g.width,), (.3,))[0]
        assert narrow[g.name].weight.shape[0] == want, g
        for p in g.producers:
            assert narrow[p].weight.shape[0] == layers[p].weight.shape[0] - (g.width - want), (g, p)
    last = [n for n, m in net.named_modules() if isinstance(m, nn.Linear)][-1]
    assert narrow[last].out_features == 10 and small(torch.zeros(2, *SHAPE)).shape == (2, 10)
    assert count(small, SHAPE).macs < .8 * count(net, SHAPE).macs and type(small) is type(net)

def random_vectors(net):
    "Norms and biases that differ from channel to channel."
    for t in net.state_dict().values():
        if t.ndim != 1: continue
        g = torch.Generator().manual_seed(len(t))
        t.copy_(.5 + torch.rand(t.shape, generator=g, dtype=t.dtype))

def silence(graph, root, gone):
    "Set filters of a layer to zero, with all that Torch-Pruning says goes with them."
    layer, cutting = graph.layers[root], graph.tp.prune_conv_out_channels
    for item in graph.graph.get_pruning_group(layer, cutting, gone):
        m = item.dep.target.module
        if m in graph.name and graph.graph.is_out_channel_pruning_fn(item.dep.handler):
            for p in m.parameters(): p.data[item.idxs] = 0

@pytest.mark.parametrize('name', names(heavy=('densenet121',)))
def test_the_cut_network_is_the_big_one_with_those_filters_silenced(name):
    "The oracle: filters and norms of what goes are set to zero in the big network instead."
    big = copy.deepcopy(pruned(name)[0]).double()
    random_vectors(big)
    small, silent = cut(big, SHAPE, .3), copy.deepcopy(big)
    graph, found = anynet._Graph(silent, SHAPE), groups(big, SHAPE)
    gone = anynet._gone(graph, silent, found, widths_left(found, .3))
    for root, some in gone.items():
        if root not in graph.hidden: silence(graph, root, some.tolist())
        else:                                               # a hidden unit that says nothing
            for p in graph.layers[root].parameters(): p.data[some] = 0
    x = torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(small(x), silent(x), rtol=1e-8, atol=1e-8)
        assert (small(x) - big(x)).abs().max() > 1e-6

# Blocks of channels

def resnext():
    block = torchvision.models.resnet.Bottleneck
    return torchvision.models.ResNet(block, [1, 1, 1, 1], 10, groups=4, width_per_group=16)

def group_normed():
    block = torchvision.models.resnet.Bottleneck
    def norm(n): return nn.GroupNorm(8, n)
    return torchvision.models.ResNet(block, [1, 1, 1, 1], 10, norm_layer=norm)

def regnet():
    kind = torchvision.models.regnet
    sizes = kind.BlockParams([1, 1], [32, 64], [8, 16], [1., 1.], [2, 2], se_ratio=None)
    return kind.RegNet(sizes, num_classes=10)

def shufflenet():
    return torchvision.models.ShuffleNetV2([1, 2, 1], [24, 48, 96, 192, 256], num_classes=10)

def told_apart(net):
    "Double precision, and each entry of a norm has a number of its own."
    net, g = net.double().eval(), torch.Generator().manual_seed(3)
    for m in net.modules():
        if not isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)): continue
        for t in m.parameters(): t.data = .5 + torch.rand(t.shape, generator=g, dtype=t.dtype)
        if isinstance(m, nn.BatchNorm2d): m.running_mean.uniform_(-.5, .5, generator=g)
    return net

def without_what_is_gone(big, small):
    "The big network, silent in those entries of its norms whose numbers the small one lacks."
    silent = copy.deepcopy(big)
    for name, m in small.named_modules():
        if not isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)): continue
        norm = silent.get_submodule(name)
        gone = ~torch.isin(norm.weight.data, m.weight.data)
        for p in norm.parameters(): p.data[gone] = 0
    return silent

BLOCKS = {'resnext': (resnext, 16), 'group_normed': (group_normed, 16), 'regnet': (regnet, 8),
          'shufflenet': (shufflenet, 1)}

class Mixing(nn.Module):
    "A block of an MLP of tokens, as timm writes it: linear layers that no nn.Sequential holds."
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 16, 16), nn.LayerNorm(16)
        self.fc1, self.fc2, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 10)
    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.fc2(F.gelu(self.fc1(self.norm(x))))
        return self.head(x.mean(1))

def test_linear_layers_where_nothing_else_is_left():
    torch.manual_seed(0)
    net = Mixing().double().eval()
    g, = free(groups(net, SHAPE))
    assert (g.name, g.width, g.readers) == ('fc1', 24, ('fc2',)) and not g.stuck
    small, silent, x = cut(net, SHAPE, .5), copy.deepcopy(net), torch.randn(2, *SHAPE).double()
    gone = net.fc1.weight.detach().abs().sum(1).argsort(stable=True)[:12]
    silent.fc2.weight.data[:, gone] = 0
    with torch.no_grad(): torch.testing.assert_close(small(x), silent(x), rtol=1e-8, atol=1e-8)
    assert small.fc1.out_features == small.fc2.in_features == 12

@pytest.mark.parametrize('name', BLOCKS)
def test_whole_blocks_go_exactly(name, tmp_path):
    make, block = BLOCKS[name]
    torch.manual_seed(0)
    big = told_apart(make())
    found = groups(big, SHAPE, more=True)
    assert block in {g.block for g in free(found)}
    assert not any(g.name == 'fc' for g in free(found)), 'the classifier is left alone'
    small = cut(big, SHAPE, .5, more=True)
    assert count(small, SHAPE).macs < .7 * count(big, SHAPE).macs
    silent, x = without_what_is_gone(big, small), torch.randn(2, *SHAPE, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(small(x), silent(x), rtol=1e-8, atol=1e-8)
        assert (small(x) - big(x)).abs().max() > 1e-6
    for m in small.modules():
        if isinstance(m, nn.Conv2d): assert m.weight.shape[1] == m.in_channels // m.groups
    small.train()(x).sum().backward()
    path = save(small.eval(), tmp_path/'n', lambda: make().double(), SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(load(path, lambda: make().double())(x), small(x))

def test_blocks_go_by_the_sum_of_their_filters():
    "Eight filters in four blocks: the block of the smallest sum goes, with its inputs and outputs."
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=4), nn.AdaptiveAvgPool2d(1),
                        nn.Flatten(), nn.Linear(8, 10)).eval()
    for conv, sizes in ((net[0], (5., 5, 1, 9, 3, 3, 4, 4)), (net[1], (1.,) * 8)):
        conv.weight.data = torch.tensor(sizes)[:, None, None, None].expand_as(conv.weight).clone()
    g, = free(groups(net, SHAPE, more=True))
    assert (g.width, g.block, g.producers) == (4, 2, ('0', '1'))
    small = cut(net, SHAPE, .25, more=True)
    left = [5, 5, 1, 9, 4, 4]                                 # sums of the blocks: 10, 10, 6, 8
    assert small[0].weight[:, 0, 0, 0].tolist() == left and small[1].groups == 3
    torch.testing.assert_close(small[4].weight, net[4].weight[:, [0, 1, 2, 3, 6, 7]])

def test_usual_groups_come_first():
    "Networks that could be cut without blocks are cut as before; a target takes more in need."
    net = resnext().eval()
    usual, every = groups(net, SHAPE), groups(net, SHAPE, more=True)
    assert len(free(usual)) < len(free(every))
    assert any(g.kept == 'grouped channels' for g in usual)
    gentle, half = (plan(net, SHAPE, target={'macs': s}, iterations=1) for s in (.98, .5))
    assert len(gentle.widths[0]) == len(free(usual)) and len(half.widths[0]) == len(free(every))
    assert .98 * .5 <= half.counts[-1].macs / half.counts[0].macs <= .5

@pytest.mark.parametrize('make', (Handmade, resnext, shufflenet))
def test_costs_follow_from_widths(make):
    "Rows and columns counted, against the network that was cut."
    net = make().eval()
    found = groups(net, SHAPE, more=True)
    for rate in (.2, .7):
        widths = widths_left(found, rate)
        small = cut_to(net, SHAPE, widths)
        for kind in ('macs', 'params', 'bytes'):
            assert cost(net, SHAPE, found, kind)(widths) == MEASURES[kind][1](small, SHAPE), kind

class Along(nn.Module):
    "A gate that looks along the channels, as in ECA-Net: fewer of them have other neighbours."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = conv(3, 8), conv(8, 16), nn.Linear(16, 10)
        self.gate = nn.Conv1d(1, 1, 3, padding=1)
    def forward(self, x):
        x = self.b(self.a(x))
        gate = self.gate(x.mean((2, 3))[:, None]).view(len(x), -1, 1, 1)
        return self.fc((x * gate).mean((2, 3)))

class Standardised(nn.Conv2d):
    "A convolution whose filters are standardised, as in NFNet."
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / (w.std((1, 2, 3), keepdim=True) + .1), self.bias, padding=1)

class Computed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = conv(3, 8), Standardised(8, 16, 3), nn.Linear(16, 10)
    def forward(self, x): return self.fc(self.b(self.a(x)).mean((2, 3)))

@pytest.mark.parametrize('make, name', ((Along, 'b'), (Computed, 'a')))
def test_cuts_that_would_not_be_exact_are_not_made(make, name):
    "Where silent and cut differ, the group stays whole; its rate is 0, and asking for it says why."
    torch.manual_seed(0)
    net = make().eval()
    g, = (g for g in groups(net, SHAPE) if g.name == name)
    assert g.stuck or g.kept == anynet._UNCLEAR
    small = cut(net, SHAPE, .5)
    assert getattr(small, name).out_channels == getattr(net, name).out_channels
    with pytest.raises(UserError, match=f'{name!r} cannot be cut: '): cut(net, SHAPE, {name: .5})
    assert cut(net, SHAPE, {'': .5, name: 0}).state_dict().keys() == small.state_dict().keys()

@pytest.mark.parametrize('arch', ('resnet20', 'preresnet11', 'wrn_10_1', 'vgg16', 'resnet18'))
def test_our_networks_are_cut_alike_both_ways(arch):
    net = build(Spec(arch), seed=7).eval()
    for _ in range(2):
        here, there = prune_filters(net, .3), cut(net, (3, 32, 32), .3)
        assert here.spec == there.spec
        for (n, a), (m, b) in zip(here.state_dict().items(), there.state_dict().items()):
            assert n == m and torch.equal(a, b), n
        net = there

def test_plans_that_coupling_forbids():
    net = Handmade()
    found = groups(net, SHAPE)
    with pytest.raises(UserError, match='residual stream, together with down.0, outer.0'):
        spread(found, {'outer': .1})
    with pytest.raises(UserError, match='no layer that can be cut begins with'):
        spread(found, {'layer9': .1})
    with pytest.raises(UserError, match='takes 1 rate'): spread(found, [.1, .2])
    assert cut(net, SHAPE, .3, streams=True).down[0].out_channels == 22

def conv(n_in, n_out): return nn.Conv2d(n_in, n_out, 3, padding=1)

class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = conv(3, 8), conv(8, 16), nn.Linear(256, 10)
    def forward(self, x): return self.fc(F.adaptive_avg_pool2d(self.b(self.a(x)), 4).view(-1, 256))

class Glued(Flat):
    "A concatenation that is flattened at once, which the graph maps wrongly: it is left alone."
    def __init__(self):
        super().__init__()
        self.c, self.fc = conv(8, 16), nn.Linear(512, 10)
    def forward(self, x):
        x = self.a(x)
        both = torch.cat([self.b(x), self.c(x)], 1)
        return self.fc(F.adaptive_avg_pool2d(both, 4).flatten(1))

def test_forward_passes_with_fixed_sizes():
    with pytest.raises(UserError, match=r"'b' cannot be cut: .*flatten\(1\)"):
        cut(Flat(), SHAPE, {'b': .5})
    for rates in (.5, {'a': .5, 'b': 0}):
        small = cut(Flat(), SHAPE, rates)
        assert small.b.in_channels == 4 and small.b.out_channels == 16
    assert {g.kept for g in groups(Glued(), SHAPE)} >= {None, 'unclear concatenation'}
    assert cut(Glued(), SHAPE, .5).a.out_channels == 4

def test_widths_that_break_the_network_are_blamed():
    with pytest.raises(UserError, match=r'cannot run with fewer filters in b: .*flatten\(1\)'):
        cut_to(Flat(), SHAPE, (4, 8))
    with pytest.raises(UserError, match='there are 2 groups that may be cut; got 1 widths'):
        cut_to(Flat(), SHAPE, (4,))

def test_networks_that_cannot_be_pruned():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(12288, 10))
    parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    for net, match in ((linear, 'no 2-d convolution'),
                       ('resnet50', 'must be a torch.nn.Module'),
                       (nn.Conv2d(3, 4, 3), 'must return logits'),
                       (parametrized, 'parametrized')):
        with pytest.raises(UserError, match=match): groups(net, SHAPE)
    masked = Handmade()
    torch.nn.utils.prune.l1_unstructured(masked.stem[0], 'weight', .3)
    with pytest.raises(UserError, match='already pruned.*prune.remove'): groups(masked, SHAPE)
    thin = cut(Handmade(), SHAPE, .9)
    with pytest.raises(UserError, match='would remove all.*pruned already takes smaller rates'):
        cut(thin, SHAPE, .9)
    with pytest.raises(UserError, match='Auxiliary outputs'): groups(Two(), SHAPE)

class Two(Flat):
    def forward(self, x):
        z = super().forward(x)
        return (z, z) if self.training else z

def test_without_torch_pruning(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch_pruning', None)
    with pytest.raises(UserError, match=r'pip install -e .\.\[anynet\]'): groups(Handmade(), SHAPE)

# Training and files

@pytest.mark.parametrize('name', names())
def test_one_training_step(name):
    net = copy.deepcopy(pruned(name)[1]).train()
    before = copy.deepcopy(net.state_dict())
    opt = torch.optim.SGD(net.parameters(), lr=.01)
    torch.manual_seed(0)
    loss = F.cross_entropy(net(torch.randn(4, *SHAPE)), torch.arange(4))
    loss.backward()
    opt.step()
    assert loss.isfinite() and all(p.grad is not None for p in net.parameters())
    moved = [n for n, t in net.state_dict().items() if not torch.equal(t, before[n])]
    assert len(moved) > .9 * len(before)

LOADING = '''
import sys, torch
sys.path.insert(0, sys.argv[1])
sys.modules["torch_pruning"] = None                                     # loading does not need it
from strangers import FACTORIES, SHAPE
import kesi
for name in sys.argv[3:]:
    net = kesi.load(f"{sys.argv[2]}/{name}.safetensors", FACTORIES[name])
    assert not net.training
    with torch.no_grad(): torch.save(net(torch.ones(2, *SHAPE)), f"{sys.argv[2]}/{name}.pt")
'''

@pytest.mark.parametrize('some', (
    ['handmade', 'mobilenet_v2'],
    pytest.param(list(FACTORIES), marks=pytest.mark.soak)), ids=('two', 'all'))
def test_files_load_in_a_fresh_process(tmp_path, some):
    for name in some:
        kesi.save(pruned(name)[1], tmp_path/f'{name}.safetensors', FACTORIES[name], SHAPE)
    here = str(Path(__file__).parent)
    line = [sys.executable, '-W', 'ignore', '-c', LOADING, here, str(tmp_path), *some]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in some:
        with torch.no_grad(): expected = pruned(name)[1](torch.ones(2, *SHAPE))
        found = torch.load(tmp_path/f'{name}.pt')
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

def test_files_that_do_not_fit(tmp_path):
    small, path = pruned('handmade')[1], tmp_path/'n.safetensors'
    save(small, path, Handmade, SHAPE)
    class Other(Handmade):
        def forward(self, x): return 1.01 * super().forward(x)
    for factory, match in ((None, r'factory\(\) builds the unpruned Handmade'),
                           (Flat, 'does not fit'),
                           (Other, 'gives other answers')):
        with pytest.raises(UserError, match=match): load(path, factory)
    frozen = load(path, lambda: Handmade().requires_grad_(False))
    assert not any(p.requires_grad for p in frozen.parameters())
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
    assert count(small, SHAPE).macs < .75 * count(net, SHAPE).macs
    assert small(torch.zeros(2, *SHAPE)).shape == (2, 10)
    again = load(save(small, tmp_path/'n.safetensors', factory, SHAPE), factory)
    assert torch.equal(again(torch.ones(2, *SHAPE)), small(torch.ones(2, *SHAPE)))

def test_a_network_that_asserts_its_size():
    class Picky(Handmade):
        def forward(self, x):
            assert x.shape[-1] == 224, 'needs 224 pixels'
            return super().forward(x)
    match = r'Picky cannot take images of shape \(3, 64, 64\).*needs 224 pixels'
    with pytest.raises(UserError, match=match): groups(Picky(), SHAPE)

# compress

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.na = conv(1, 12), nn.BatchNorm2d(12)
        self.b, self.nb = conv(12, 16), nn.BatchNorm2d(16)
        self.fc, self.drop = nn.Linear(16, 10), nn.Dropout(.1)
    def forward(self, x):
        x = F.max_pool2d(F.relu(self.na(self.a(x))), 4)
        x = F.relu(self.nb(self.b(x)))
        return self.fc(self.drop(x.mean((2, 3))))

@pytest.fixture(scope='module')
def digits():
    d = load_data('digits')
    return [(s.images[:300].float() / 127.5 - 1, s.labels[:300]) for s in (d.train, d.test)]

QUICK = dict(epochs=1, iterations=2, rates=.3, lr=.05, rt=RT, say=None, retrain_batch=64)

def quick(**changes): return {**QUICK, 'iterations': 1, **changes}

def for_loader(**changes):
    "Quick settings without a batch size, which a DataLoader has of its own."
    return {n: v for n, v in quick(**changes).items() if n != 'retrain_batch'}

class Rows:
    def __init__(self, x, y): self.x, self.y = x, y
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], int(self.y[i])

def test_compress_is_the_same_twice_and_goes_on_after_a_stop(digits, tmp_path, monkeypatch):
    train, test = digits
    torch.manual_seed(0)
    net = Tiny()
    class Stop(Exception): pass
    def stop(line):
        if 'one-cycle 1' in line: raise Stop
    with pytest.raises(Stop):
        kesi.compress(net, train, test, name='d', out=tmp_path/'a', **{**QUICK, 'say': stop})
    a = kesi.compress(net, train, test, name='d', out=tmp_path/'a', **QUICK)
    b = kesi.compress(net, train, test, name='d', out=tmp_path/'b', **QUICK)
    assert equal(a.network, b.network) and a.report['table'] == b.report['table']
    assert json.loads((a.home/'report.json').read_text()) == a.report
    reported = a.report['table'][-1]['params']
    assert a.steps[-1].params == params_of(a.network) == reported
    assert not net.fc.weight.grad and net.a.out_channels == 12
    kept = {p.name for p in (tmp_path/'a').iterdir()}
    kesi.compress(net, train, test, name='d', out=tmp_path/'a', **QUICK)
    assert {p.name for p in (tmp_path/'a').iterdir()} == kept

def test_compress_takes_datasets_loaders_and_our_own(digits):
    train, test = digits
    rows = Rows(*train), Rows(*test)
    ours = load_data('digits')
    loaders = (DataLoader(rows[0], 64, shuffle=True, drop_last=True),
               DataLoader(rows[1], 64, shuffle=True))
    for a, b in ((train, test), rows, loaders, (ours, None)):
        how = for_loader if isinstance(a, DataLoader) else quick
        s = kesi.compress(Tiny(), a, b, **how(variants=('one-cycle',)))
        assert s.home is None
        assert [r['variant'] for r in s.report['table']] == ['baseline', 'one-cycle', 'ensemble']
        assert s(torch.zeros(3, 1, 16, 16)).shape == (3, 10)

def test_compress_takes_networks_of_ours(digits):
    s = kesi.compress(build(Spec('resnet8', in_channels=1)), *digits, **{**QUICK, 'iterations': 1})
    assert s.network.spec.widths == (11, 22, 44)

def test_what_compress_refuses(digits):
    train, test = digits
    net, rows = Tiny(), [{'image': x, 'label': int(y)} for x, y in zip(*train)]
    losses = 'unknown loss .hinge.; allowed are cross-entropy, label-smoothing'
    for wrong, match in ((dict(loss='hinge'), losses),
                         (dict(temprature=3), 'no field .temprature.'),
                         (dict(method='weights'), 'prunes filters'),
                         (dict(rates=1.), 'below 1'),
                         (dict(rates=.9), 'at least one'),
                         (dict(rates={'fc': .1}), 'no layer that can be cut'),
                         (dict(iterations=0), 'iterations must be')):
        with pytest.raises(UserError, match=match):
            kesi.compress(net, train, test, **{**QUICK, **wrong})
    x, y = train
    for data, match in ((DataLoader(rows, 8), "dictionaries .with 'image', 'label'.; kesi needs"),
                        ((x.byte(), y), 'floating-point'),
                        ((x, y[:5]), '300 images and 5 labels'),
                        ((x, y + 1), 'labels must be from 0 to 9'),
                        ((x[:, :, :8], y), 'have the shape'),
                        ('cifar10', 'got str'),
                        ((x[:0], y[:0]), 'no images'),
                        ((x.repeat(1, 3, 1, 1), y), 'have the shape')):
        with pytest.raises(UserError, match=match): kesi.compress(net, data, test, **QUICK)
    with pytest.raises(UserError, match='give test data too'): kesi.compress(net, train, **QUICK)
    with pytest.raises(UserError, match='no 2-d convolution'):
        kesi.compress(nn.Sequential(nn.Flatten(), nn.Linear(256, 10)), train, test, **QUICK)

def test_test_data_are_put_into_order(digits):
    x, y = digits[1]
    s = Source(digits[0], DataLoader(Rows(x, y), 50, shuffle=True))
    assert torch.equal(torch.cat([b for _, b in s.loaders(64, RT)[1]]), y)

def test_the_recipe_of_a_stranger():
    r = paper.Recipe(arch='own:Tiny', rates=(.1, .2))
    assert paper.from_dict(json.loads(paper.to_json(r))) == r and r.pruning == (.1, .2)
    assert dataclasses.replace(r, iterations=9).iterations == 9
    with pytest.raises(UserError): paper.recipe('digits/own:Tiny')

# What was silently wrong

def test_label_smoothing_happens(digits, tmp_path):
    "Another loss is another training; and no stage has teachers that are no stages."
    torch.manual_seed(0)
    net, found = Tiny(), []
    how = quick(name='d', out=tmp_path, variants=('one-cycle',))
    for loss in ('cross-entropy', 'label-smoothing'):
        s = kesi.compress(net, *digits, loss=loss, **how)
        found.append(s.network.fc.weight)
    assert not torch.equal(*found)
    stages = [json.loads(p.read_text())['stage'] for p in tmp_path.glob('retrain-*/manifest.json')]
    assert sorted(s['loss'] for s in stages) == ['cross-entropy', 'label-smoothing']
    assert not any('teachers' in s for s in stages)

def test_losses_of_the_callers_own(digits, tmp_path):
    "A module with class weights takes effect; the same one is found again, another one is not."
    torch.manual_seed(0)
    net, found = Tiny(), []
    how = quick(name='d', out=tmp_path, variants=('one-cycle',))
    for factor in (1., 1., 9.):
        weight = torch.ones(10)
        weight[3] = factor
        loss = nn.CrossEntropyLoss(weight=weight)
        s = kesi.compress(net, *digits, loss=loss, **how)
        found.append(s.network.fc.weight)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert len(list(tmp_path.glob('retrain-*'))) == 2

def share_right(net, x, y):
    with torch.no_grad(): return (net(x).argmax(1) == y).double().mean().item()

@pytest.mark.parametrize('variants, stage', (
    (('one-cycle',), 'one-cycle 1'), (('pfec',), 'pfec 1'), (('kesi', 'pfec'), 'kesi')))
def test_the_accuracy_is_that_of_the_network_that_is_returned(digits, variants, stage):
    s = kesi.compress(Tiny(), *digits, **quick(variants=variants))
    right = share_right(s, *digits[1])
    assert s.stage == stage and s.accuracy == pytest.approx(right, abs=1e-6)
    assert f'→ {right:.2%}' in repr(s) and s.size.params == params_of(s.network)
    assert f'Test accuracy {100 * right:.2f} %' in deploy.card(s)

class Augmented(Rows):
    "Noise on the images, from torch's global generator."
    def __getitem__(self, i): return self.x[i] + .1 * torch.randn(()), int(self.y[i])

@pytest.mark.parametrize('kind', (Rows, Augmented))
@pytest.mark.parametrize('loader', (False, True))
def test_other_data_are_not_taken_for_the_same(digits, tmp_path, kind, loader):
    "Of the same length, under the same name; one label is another, or one pixel."
    (x, y), test = digits
    def digest(x, y, **kw):
        rows = kind(x, y)
        data = DataLoader(rows, 32, shuffle=True) if loader else rows
        return Source(data, test, 'same', **kw).digest
    label, pixel = y.clone(), x.clone()
    label[150] = (label[150] + 1) % 10
    pixel[150, 0, 3, 3] += .5
    assert digest(x, y) == digest(x.clone(), y.clone())
    assert len({digest(x, y), digest(x, label), digest(pixel, y), digest(x, y, version='2')}) == 4

def test_batches_of_a_loader_belong_to_its_data(digits):
    rows = Rows(*digits[0])
    loaders = [DataLoader(rows, n, shuffle=s) for n in (16, 32) for s in (True, False)]
    assert len({Source(loader, digits[1], 'same').digest for loader in loaders}) == 4

class Restless(Rows):
    "A random generator of its own, which goes on from sample to sample."
    rng = torch.Generator()
    def __getitem__(self, i):
        noise = torch.randn((), generator=self.rng)
        return self.x[i] + .1 * noise, int(self.y[i])

def test_data_that_cannot_be_told_need_a_version(digits, tmp_path):
    rows = Restless(*digits[0])
    match = 'train: the samples come out differently each time.*give version='
    with pytest.raises(UserError, match=match): Source(rows, digits[1], 'named')
    one, two = (Source(rows, digits[1], 'named', version=v).digest for v in '12')
    assert one != two
    Source(rows, digits[1])                              # nothing is kept, so nothing needs a name

def test_telling_data_leaves_the_random_numbers_alone(digits):
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate()
    Source(Augmented(*digits[0]), digits[1], 'named')
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()

class PythonNoise(Rows):
    def __getitem__(self, i): return self.x[i] + random.random() / 10, int(self.y[i])

@pytest.mark.parametrize('kind', ('generator', 'python', 'workers'))
def test_a_stopped_training_goes_on_exactly(digits, tmp_path, kind):
    "DataLoaders that remember epochs: a generator, Python's random numbers, persistent workers."
    (x, y), test = digits
    how = {'generator': dict(generator=torch.Generator().manual_seed(3)),
           'workers': dict(num_workers=1, persistent_workers=True), 'python': {}}[kind]
    rows = {'python': PythonNoise, 'workers': Augmented}.get(kind, Rows)(x[:128], y[:128])
    torch.manual_seed(0)
    net, t = Tiny(), Training(3, 64, .05)
    class Stop(Exception): pass
    def stop(record):
        if record['epoch'] == 1: raise Stop
    def train(**kw):
        source = Source(DataLoader(rows, 64, shuffle=True, **how), test)
        return fit(net, source, t, rt=RT, **kw)[0].state_dict()
    whole = train()
    with pytest.raises(Stop): train(checkpoint=tmp_path/'c', on_epoch=stop)
    again = train(checkpoint=tmp_path/'c')
    for n, w in whole.items(): assert torch.equal(w, again[n]), n

def test_settings_that_would_be_ignored_are_refused(digits):
    train, test = digits
    loader = DataLoader(Rows(*train), 32, shuffle=True)
    for wrong, match in ((dict(batch=32), 'no setting .batch.'),
                         (dict(weight_decay=1e-3), 'no setting .weight_decay.'),
                         (dict(schedule='step'), 'no setting'),
                         (dict(small_lr=.01), 'without the variant pfec'),
                         (dict(temperature=2, variants=('one-cycle',)), 'without the variant kesi'),
                         (dict(retrain_lr=.1), 'is called lr here'),
                         (dict(retrain_epochs=1), 'is called epochs here'),
                         (dict(warmup=.2, variants=('pfec',)), 'without the variant'),
                         (dict(lr=-500), 'lr must be a number above 0; got -500'),
                         (dict(epochs=0), '^epochs must be')):
        with pytest.raises(UserError, match=match):
            kesi.compress(Tiny(), train, test, **{**QUICK, **wrong})
    for n in ('retrain_batch', 'distill_batch'):
        with pytest.raises(UserError, match=f'{n} has no effect: the DataLoader'):
            kesi.compress(Tiny(), loader, test, **for_loader(iterations=2), **{n: 64})

def test_batch_sizes_take_effect(digits):
    source, seen = Source(*digits), []
    for batch in (32, 100): seen.append([len(y) for _, y in source.loaders(batch, RT)[0].epoch(0)])
    assert seen == [[32] * 9 + [12], [100] * 3]

def test_a_loader_says_its_batch_size_in_the_recipe(digits):
    loader = DataLoader(Rows(*digits[0]), 50, shuffle=True)
    said = kesi.compress(Tiny(), loader, digits[1], **for_loader()).report['recipe']
    assert (said['retrain_batch'], said['distill_batch']) == (50, 50)

def test_a_learning_rate_that_diverges_is_named_as_given(digits):
    with pytest.raises(Diverged, match=r'lr=1e\+12 was given'):
        kesi.compress(Tiny(), *digits, **quick(lr=1e12))

def test_a_path_is_not_a_beginning_of_letters():
    layers = [nn.Sequential(conv(n_in, 16), nn.ReLU()) for n_in in (3, *(16,) * 11)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    found = groups(net, SHAPE)
    rates = dict(zip((g.name for g in free(found)), spread(found, {'': .5, '1': 0})))
    assert rates['1.0'] == 0 and rates['10.0'] == rates['11.0'] == .5

class Halves(Flat):
    "A split into fixed sizes, as in Res2Net."
    def forward(self, x):
        a, b = torch.split(self.b(self.a(x)), [8, 8], 1)
        return self.fc(F.adaptive_avg_pool2d(torch.cat([a, b], 1), 4).flatten(1))

class Shuffled(Flat):
    def __init__(self):
        super().__init__()
        self.up, self.fc = nn.PixelShuffle(2), nn.Linear(64, 10)
    def forward(self, x):
        x = self.up(self.b(self.a(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 4).flatten(1))

class Heads(Flat):
    "Channels in four heads of four, as in attention."
    def forward(self, x):
        x = self.b(self.a(x))
        x = x.view(len(x), 4, 4, *x.shape[2:]).flatten(1, 2)
        return self.fc(F.adaptive_avg_pool2d(x, 4).flatten(1))

@pytest.mark.parametrize('net, said', (
    (Shuffled, r'its layer up \(PixelShuffle\) expects'),
    (Heads, 'unclear channels'), (Halves, 'unclear concatenation')))
def test_what_a_cut_would_break_is_said(net, said):
    with pytest.raises(UserError, match=f"'b' cannot be cut: {said}") as e:
        cut(net(), SHAPE, {'b': .4})
    assert 'flatten' not in str(e.value)
    assert cut(net(), SHAPE, .4).b.in_channels == 4

def test_tied_weights_are_refused_before_training(digits):
    class Tied(Tiny):
        def __init__(self):
            super().__init__()
            self.again = nn.Linear(16, 10)
            self.again.weight = self.fc.weight
    with pytest.raises(UserError, match='fc.weight and again.weight are one tied weight'):
        kesi.compress(Tied(), *digits, **QUICK)

def test_labels_and_pictures_that_do_not_fit(digits):
    (x, y), test = digits
    y = y.clone()
    y[-1] = 10                                             # in the last batch
    match = 'labels must be from 0 to 9, as the network gives 10 logits; found 10'
    for data in ((x, y), Rows(x, y), DataLoader(Rows(x, y), 100)):
        with pytest.raises(UserError, match=match):
            kesi.compress(Tiny(), data, test, **for_loader())
    pictures = Rows([to_pil_image(i) for i in x], test[1])
    with pytest.raises(UserError, match='the samples cannot be put into a batch .*ToTensor'):
        kesi.compress(Tiny(), pictures, test, **QUICK)
    ragged = Rows([i[:, :8] if n % 2 else i for n, i in enumerate(x)], y)
    with pytest.raises(UserError, match='cannot be put into a batch'):
        kesi.compress(Tiny(), ragged, test, **QUICK)

# Targets

TARGETS = ('macs', .5), ('params', .4), ('bytes', .6), ('macs', 1.2e7)

@pytest.mark.parametrize('kind, value', TARGETS)
def test_a_target_is_met_within_two_percent(kind, value):
    net = Handmade().eval()
    measure = MEASURES[kind][1]
    p = plan(net, SHAPE, target={kind: value}, iterations=3)
    small = net
    for w in p.widths: small = cut_to(small, SHAPE, w)
    goal = value if value > 1 else value * measure(net, SHAPE)
    assert .98 * goal <= measure(small, SHAPE) <= goal
    assert all(a >= b for x, y in zip(p.widths, p.widths[1:]) for a, b in zip(x, y))
    assert count(small, SHAPE) == p.counts[-1]

def test_wide_layers_keep_multiples_of_eight():
    p = plan(Handmade(), SHAPE, rates=.3, iterations=2)
    for g, w in zip(free(p.groups), p.widths[-1]):
        assert w % 8 == 0 if g.width >= 32 else w < g.width
    once = plan(Handmade(), SHAPE, rates=.3, iterations=1, multiple=1)
    assert once.widths == [widths_left(p.groups, .3)]

def test_targets_that_cannot_be_met():
    for wrong, match in (({'macs': 1e-4}, 'cannot be reached: .* remain'),
                         ({'params': 1e9}, 'meets the target'),
                         ({'flops': .5}, 'must be a dictionary with one of macs'),
                         ({'macs': -1}, 'got -1'),
                         ({'macs': True}, 'got True'),
                         ({}, 'got {}'),
                         ('half', "got 'half'")):
        with pytest.raises(UserError, match=match): plan(Handmade(), SHAPE, target=wrong)

def test_the_accuracy_may_fall_so_far(digits):
    """The snapshot before the first that falls further is distilled; a limit that nothing breaks
    prunes to the end."""
    torch.manual_seed(0)
    how = quick(valid=.2, iterations=3, target={'accuracy_drop': .9})
    s = kesi.compress(Tiny(), *digits, **how)
    assert len(s.plan.widths) == 3 and s.report['recipe']['iterations'] == 3
    assert s.report['recipe']['valid'] == pytest.approx(.2)
    how |= dict(iterations=2, lr=1e-9, target={'accuracy_drop': .0}, rates={'a': .01, 'b': .01})
    limited = kesi.compress(s.snapshots[-1].network, *digits, **how)
    first, *others = limited.snapshots
    kept = [t.accuracy for t in others if t.name.startswith('one-cycle')]
    assert min(kept) >= first.accuracy

def test_validation_data_choose_and_test_data_are_last(digits):
    "The test data change nothing but the accuracy at the end."
    (x, y), (tx, ty) = digits
    torch.manual_seed(0)
    net = Tiny()
    other = (ty + 1) % 10
    a, b = (kesi.compress(net, (x, y), (tx, labels), valid=.2, **quick()) for labels in (ty, other))
    assert equal(a.network, b.network)
    assert b.accuracy == pytest.approx(share_right(b, tx, other), abs=1e-6)
    for wrong, match in ((2, 'share between 0 and 1'),
                         (0., 'share between 0 and 1'),
                         (True, 'valid|got bool'),
                         ('x', 'got str')):
        with pytest.raises(UserError, match=match):
            kesi.compress(net, (x, y), (tx, ty), valid=wrong, **quick())

def test_any_snapshot_can_be_picked_and_compressed_further(digits, tmp_path):
    torch.manual_seed(0)
    s = kesi.compress(Tiny(), *digits, **quick(iterations=2))
    assert [n.name for n in s.snapshots] == ['baseline', 'one-cycle 1', 'one-cycle 2', 'kesi']
    one = s.pick(max_macs=s.snapshots[1].macs, max_params=s.snapshots[1].params)
    assert one.stage in ('one-cycle 1', 'one-cycle 2', 'kesi')
    assert s.pick(min_accuracy=0).size.macs == s.snapshots[-1].macs
    with pytest.raises(UserError, match='no snapshot is within these limits; there are baseline'):
        s.pick(max_macs=1)
    further = kesi.compress(one, *digits, **quick())
    assert further.size.params < one.size.params
    again = load(further.save(tmp_path/'n'), Tiny)       # from the class as it was before pruning
    assert torch.equal(again(digits[1][0]), further(digits[1][0]))

def test_ctrl_c_says_that_the_same_call_goes_on(digits, tmp_path):
    for name, match in (('d', 'the same call goes on from here'),
                        (None, 'with a name= the same call')):
        said = []
        def say(line):
            said.append(line)
            if line.startswith('as given'): raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            kesi.compress(Tiny(), *digits, name=name, out=tmp_path, **quick(say=say))
        assert match in said[-1]

def test_soft_labels(digits):
    "MixUp in the DataLoader: the loss sees the shares, the accuracy the larger one."
    x, y = digits[0]
    def mixed(rows):
        images, labels = zip(*rows)
        a, b = torch.stack(images), F.one_hot(torch.tensor(labels), 10).float()
        return .7 * a + .3 * a.flip(0), .7 * b + .3 * b.flip(0)
    loader = DataLoader(Rows(x, y), 50, shuffle=True, collate_fn=mixed)
    s = kesi.compress(Tiny(), loader, digits[1], **for_loader())
    losses = [h['train_loss'] for h in s.history['one-cycle 1']]
    entropy = -sum(share * math.log(share) for share in (.7, .3))              # of the labels
    assert losses[0] > entropy - 1e-6

# The learning rate

def test_adamw_retrains_with_its_own_rate(digits, tmp_path):
    "AdamW is another training; SGD's stages keep their keys."
    torch.manual_seed(0)
    net, how = Tiny(), quick(variants=('one-cycle',), lr=.002)
    def once(**kw): return kesi.compress(net, *digits, name='d', out=tmp_path, **{**how, **kw})
    sgd, adamw = once(), once(optimizer='adamw')
    stages = [json.loads(p.read_text())['stage'] for p in tmp_path.glob('retrain-*/manifest.json')]
    assert sorted(s['training']['optimizer'] for s in stages) == ['adamw', 'sgd']
    def first_loss(s): return s.history['one-cycle 1'][0]['train_loss']
    assert first_loss(adamw) != first_loss(sgd)

@pytest.mark.parametrize('kind', ('tensors', 'loader', 'ours'))
def test_a_learning_rate_is_proposed(digits, kind):
    "By training images alone, the same twice, and said."
    torch.manual_seed(0)
    net, said, (x, y) = Tiny(), [], digits[0]
    train = {'tensors': (x, y), 'loader': DataLoader(Rows(x, y), 64, shuffle=True),
             'ours': load_data('digits')}[kind]
    test = [None] * 2 if kind == 'ours' else [digits[1], (digits[1][0], digits[1][1].flip(0))]
    how = {k: v for k, v in quick().items() if kind != 'loader' or k != 'retrain_batch'}
    how |= dict(lr='auto', optimizer='adamw', variants=('one-cycle',), say=said.append)
    rates = [kesi.compress(net, train, t, **how).report['recipe']['retrain_lr'] for t in test]
    told = [line for line in said if 'is proposed' in line]
    assert rates[0] == rates[1] in anynet._RATES['adamw'] and told[0] == told[1]
    assert told[0].startswith(f'lr={rates[0]:g} is proposed (adamw; loss of held-out training')

def test_the_largest_rate_within_one_standard_error():
    trials = {.3: (2., .1), .1: (1.05, .1), .03: (1., .06), .01: (1.2, .06)}
    assert anynet._proposed(trials) == .1
    assert anynet._proposed({**trials, .1: (1.07, .1)}) == .03

def test_rates_that_do_not_suit(digits):
    for wrong, match in ((dict(optimizer='rmsprop'), "sgd, adam, adamw; got 'rmsprop'"),
                         (dict(optimizer='adamw', lr=.1), 'lr=0.1 is a rate of SGD'),
                         (dict(lr='fast'), "or 'auto'; got 'fast'"),
                         (dict(lr='auto', retrain_batch=300), 'at least two batches .* got 1 of')):
        with pytest.raises(UserError, match=match):
            kesi.compress(Tiny(), *digits, **{**quick(), **wrong})

# The quick way

def test_a_budget_of_epochs_is_kept(digits):
    "As many epochs as were asked for, of a network cut at once as deep as five prunings cut it."
    torch.manual_seed(0)
    net, how = Tiny(), dict(rates=.1, lr=.05, rt=RT, say=None)
    s = kesi.compress(net, *digits, total_epochs=4, **how)
    assert {n: len(h) for n, h in s.history.items() if h} == {'one-cycle 1': 1, 'kesi': 3}
    assert s.plan.widths == plan(net, (1, 16, 16), rates=.1).widths[-1:]
    for wrong, match in ((dict(total_epochs=1), 'whole number from 2; got 1'),
                         (dict(total_epochs='4'), "whole number from 2; got '4'"),
                         (dict(total_epochs=4, epochs=3), 'not both; got 3 and 4'),
                         (dict(total_epochs=4, iterations=2), 'iterations is fixed by it')):
        with pytest.raises(UserError, match=match): kesi.compress(net, *digits, **{**how, **wrong})

# Targets of recipes

@pytest.mark.parametrize('arch, kind, value', (('resnet20', 'macs', .5), ('vgg16', 'params', .4),
    ('resnet20', 'bytes', .6), ('resnet56', 'macs', .8), ('resnet20', 'macs', 2e6)))
def test_rates_of_a_recipe_meet_a_target(arch, kind, value):
    r = paper.recipe(f'digits/{arch}')
    t = anynet.with_target(r, {kind: value}, (1, 16, 16))
    nets = [build(Spec(arch, t.widths(i), in_channels=1)) for i in (0, t.iterations)]
    whole, left = (MEASURES[kind][1](n, (1, 16, 16)) for n in nets)
    goal = value if value > 1 else value * whole
    assert .96 * goal <= left <= goal

def test_targets_of_recipes_that_cannot_be_met():
    r = paper.recipe('digits/resnet20')
    for wrong, match in (({'macs': 1e-5}, 'cannot be reached in 5 prunings'),
                         ({'macs': 0}, 'got 0'),
                         ({'accuracy_drop': .01}, 'kesi.compress with valid='),
                         ({'macs': 1e9}, 'meets the target')):
        with pytest.raises(UserError, match=match): anynet.with_target(r, wrong, (1, 16, 16))
    with pytest.raises(UserError, match='method=weights removes none'):
        anynet.with_target(dataclasses.replace(r, method='weights'), {'macs': .5}, (1, 16, 16))

def test_a_target_says_what_was_given():
    assert anynet.target_of({'macs': .001}).text == '0.1% of the MACs'
    assert anynet.target_of({'macs': .5}).text == '50% of the MACs'
    assert anynet.target_of({'params': 12345}).text == '12,345 parameters'

@pytest.mark.parametrize('name', ('handmade', 'resnet18', 'mobilenet_v2', 'squeezenet1_0'))
def test_milliseconds_are_planned_by_a_clock(name, monkeypatch):
    "The clock here is one that says the square root of the MACs: the plan meets it within 10 %."
    net = Handmade() if name == 'handmade' else torchvision.models.get_model(name, num_classes=10)
    def clock(net, small, shape, seconds=.7):
        a, b = (count(n, shape).macs**.5 for n in (net, small))
        return b / a, a
    monkeypatch.setattr(anynet, '_time_share', clock)
    p = plan(net.eval(), SHAPE, target={'milliseconds': .7}, iterations=1)
    assert .63 <= (p.counts[-1].macs / p.counts[0].macs)**.5 <= .7

def test_a_target_from_the_command_line(tmp_path, capsys, monkeypatch):
    from kesi import cli, pipeline
    ran = []
    def run(r, *a, **kw):
        ran.append(r)
        raise UserError('enough')
    monkeypatch.setattr(pipeline, 'run', run)
    assert cli.kesi_run(['digits/resnet8', '--target', 'macs=.5']) == 2
    assert ran[0].rates and 'target: 50% of the MACs. Planned: ' in capsys.readouterr().out
    for wrong, match in (('macs=half', 'must be written WHAT=NUMBER, such as macs=.5; '
                                       "got 'macs=half'"),
                         ('macs', "got 'macs'"), ('flops=.5', 'with one of macs, params'),
                         ('macs=-1', 'got -1.0'), ('macs=nan', 'got nan')):
        try: code = cli.kesi_run(['digits/resnet8', '--target', wrong])
        except SystemExit as e: code = e.code
        said = capsys.readouterr().err
        assert code == 2 and match in said and said.count('\n') == 1, said

# Refused before training

class Normed(Tiny):
    "Batch normalisation of single numbers, as in the heads of many networks."
    def forward(self, x):
        x = F.relu(self.na(self.a(x))).mean((2, 3), keepdim=True)
        return self.fc(F.relu(self.nb(self.b(x))).flatten(1))

def test_what_cannot_end_well_is_refused_early(digits, monkeypatch):
    (x, y), test = digits
    rows, said = Rows(x[:129], y[:129]), []
    how = {k: v for k, v in quick(say=said.append).items() if k != 'retrain_batch'}
    single, loader = DataLoader(rows, 64, shuffle=True), DataLoader(rows, 43)
    for train, more, match in (
            (single, {}, 'of 129 training images one is left over .* drop_last=True'),
            ((x[:129], y[:129]), dict(retrain_batch=64), 'one is left over .* retrain_batch'),
            (rows, dict(distill_batch=64), 'one is left over .* distill_batch'),
            (loader, dict(views=2), 'views=2 .* DataLoader gives cannot be known'),
            ((x, y), dict(views=2), 'views=2 are cut from a kesi.data.Dataset; .* tuple'),
            ((x, y), dict(views=2, variants=('one-cycle',)), 'views has no effect without')):
        with pytest.raises(UserError, match=match):
            kesi.compress(Normed(), train, test, **how, **more)
    monkeypatch.setattr(anynet, '_free_memory', lambda rt: 1000)
    with pytest.raises(UserError, match='gradients and 2 teachers take at least 0.0 GiB'):
        kesi.compress(Tiny(), *digits, **how)
    assert not any(line.startswith('as given') for line in said)

def test_a_last_batch_of_one_that_the_network_can_take(digits):
    "Without batch normalisation of single numbers nothing is in the way."
    (x, y), test = digits
    s = kesi.compress(Tiny(), (x[:65], y[:65]), test, **quick(variants=('one-cycle',)))
    assert len(s.history['one-cycle 1']) == 1

def test_the_least_memory():
    assert anynet._least_memory([10, 6, 4], 4, True) == 4 * (4 * 4 + 20)
    assert anynet._least_memory([10, 9, 1], 4, False) == 4 * 27

def test_views_of_our_own_data_take_effect():
    said = [kesi.compress(build(Spec('resnet8', in_channels=1)), load_data('digits'),
                          **quick(views=v)).history['kesi'][0]['train_loss'] for v in (None, 1)]
    assert said[0] != said[1]

# Hidden units of linear layers

class Headed(nn.Module):
    "AlexNet in small: few filters, and a head with two hidden layers."
    def __init__(self):
        super().__init__()
        self.features, self.pool = nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(32, 24), nn.ReLU(),
                                        nn.Dropout(), nn.Linear(24, 16), nn.ReLU(),
                                        nn.Linear(16, 10))

    def forward(self, x):
        x = self.pool(F.relu(self.features(x)))
        return self.classifier(torch.flatten(x, 1))

def hidden_factories():
    vision = torchvision.models
    block = vision.convnext.CNBlockConfig(24, None, 2)
    return {'vit': (lambda: vision.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10), 32, 2),
            'swin': (lambda: vision.SwinTransformer([4, 4], 24, [1, 1], [2, 4], [4, 4],
                                                    num_classes=10), 32, 2),
            'convnext': (lambda: vision.convnext.ConvNeXt([block], num_classes=10), 32, 2),
            'alexnet': (Headed, 16, 2)}

@pytest.mark.parametrize('name', hidden_factories())
def test_hidden_units_silenced_are_hidden_units_cut(name, tmp_path):
    "The big network with zeros in the reader's columns answers like the narrow one."
    make, side, n = hidden_factories()[name]
    torch.manual_seed(0)
    net, shape = make().double().eval(), (3, side, side)
    for p in net.parameters(): p.data += .1 * torch.randn_like(p)
    found = groups(net, shape)
    mlps = [g for g in free(found) if isinstance(net.get_submodule(g.name), nn.Linear)]
    assert len(mlps) == n and all(len(g.readers) == 1 for g in mlps)
    small = cut(net, shape, {g.name: .5 for g in mlps})
    silent = copy.deepcopy(net)
    for g in mlps:
        score = net.get_submodule(g.name).weight.detach().abs().sum(1)
        gone = score.argsort(stable=True)[:g.width - g.width // 2]
        silent.get_submodule(g.readers[0]).weight.data[:, gone] = 0
        assert small.get_submodule(g.name).out_features == g.width // 2
    x = torch.randn(2, *shape, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(small(x), silent(x), rtol=1e-8, atol=1e-8)
        assert (small(x) - net(x)).abs().max() > 1e-6
    small(x).sum().backward()
    again = load(anynet.save(small, tmp_path/'n', lambda: make().double(), shape),
                 lambda: make().double())
    with torch.no_grad(): torch.testing.assert_close(again(x), small.eval()(x))

# Twenty more mistakes

def mistakes(digits):
    "What was given, and what the one line must say."
    (x, y), test = digits
    loss = dict(two=lambda z, y: F.cross_entropy(z, y, reduction='none'), number=lambda z, y: 1.)
    arrays, pairs = (x.numpy(), y.numpy()), list(zip(x, y))
    yield from ((dict(train=arrays), 'train must be .* as tensors.* got tuple'),
                (dict(train=pairs), 'train must be .* as tensors.* got list'),
                (dict(test=pairs), 'test must be .* as tensors.* got list'),
                (dict(train=(x[:, 0], y)), 'must be N×C×H×W'), (dict(test=(x, y + 5)), 'found 14'),
                (dict(multiple=0), 'multiple must be a whole number from 1, or None; got 0'),
                (dict(multiple=2.5), 'got 2.5'), (dict(multiple='8'), "got '8'"),
                (dict(streams='yes'), "streams must be True or False; got 'yes'"),
                (dict(rates={}), 'rates={} names no layer'), (dict(rates=None), 'got None'),
                (dict(rates=float('nan')), 'got nan'), (dict(rates='.1'), "got '.1'"),
                (dict(name=''), "name must be a word .* got ''"), (dict(name=3), 'got 3'),
                (dict(name='d', out=None), 'out must be a folder for the runs; got None'),
                (dict(rt='cuda'), "rt must be a kesi.runtime.Runtime.* got 'cuda'"),
                (dict(say='yes'), "say must be a function of one line.* got 'yes'"),
                (dict(loss=nn.CrossEntropyLoss), r'instances, CrossEntropyLoss\(\)'),
                (dict(loss=loss['two']), r'it gave Tensor of shape \(2,\)'),
                (dict(loss=loss['number']), 'it gave float'),
                (dict(net=Tiny().requires_grad_(False)), 'all weights of Tiny are frozen'),
                (dict(net=Tiny), 'got type|must be a torch.nn.Module'),
                (dict(seeds=0), 'seeds must be'), (dict(epochs='3'), "^epochs must be .* got '3'"))

def test_twenty_more_mistakes(digits):
    for wrong, match in mistakes(digits):
        given = {**dict(net=Tiny(), train=digits[0], test=digits[1]), **quick(), **wrong}
        with pytest.raises(UserError, match=match): kesi.compress(**given)

# Criteria

def ranked(net, by, rate=.5, **kw):
    "Filters that stay, by the numbers that tell them apart."
    return cut(net, SHAPE, rate, by=by, **kw)

def gates(net, names, x, y):
    "The oracle of taylor: a factor in front of each output of some layers, asked of autograd."
    factors = {n: torch.ones(len(net.get_submodule(n).weight), dtype=x.dtype, requires_grad=True)
               for n in names}
    def turned(n): return lambda m, _, out: out * shaped(factors[n], out)
    def shaped(f, out): return f[:, None, None] if out.ndim == 4 else f
    hooks = [net.get_submodule(n).register_forward_hook(turned(n)) for n in names]
    loss = F.cross_entropy(net(x), y)
    grads = torch.autograd.grad(loss, list(factors.values()))
    for h in hooks: h.remove()
    return dict(zip(names, grads))

def test_taylor_is_the_slope_of_a_gate():
    "For convolutions behind which a norm stands, for plain ones, and for hidden linear units."
    torch.manual_seed(0)
    for net in (told_apart(Handmade()), Headed().double().eval()):
        x = torch.randn(6, *((3, 16, 16) if isinstance(net, Headed) else SHAPE)).double()
        y, shape = torch.arange(6), tuple(x.shape[1:])
        told, graph = anynet._asked(net, 'taylor', (x, y)), anynet._graph_of(net, shape)
        for g in free(groups(net, shape)):
            if len(g.producers) > 1: continue
            asked = (g.norms or g.producers)[:1]
            want = gates(net, asked, x, y)[asked[0]].abs()
            got = anynet._scores(graph, told, g, 'taylor')
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)

def test_a_network_that_changed_is_read_anew():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    assert [g.width for g in groups(net, SHAPE)] == [4]
    net[0], net[3] = nn.Conv2d(3, 6, 1), nn.Linear(6, 10)
    assert [g.width for g in groups(net, SHAPE)] == [6]

def test_criteria_by_hand():
    "Four filters of one weight and two of them alike: which goes first?"
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1),
                        nn.Flatten(), nn.Linear(4, 10)).eval()
    filters = torch.tensor([[3., 0, 0], [1, 1, 1], [2, 2, 2], [-9, 0, 0]])
    net[0].weight.data = filters[..., None, None]
    net[1].weight.data = torch.tensor([1., 2, -.1, 3])
    gone = {'l1': 0, 'l2': 1, 'norm': 2, 'median': 1}
    # l1: 3, 3, 6, 9 (the first of equals goes); l2: 3, 1.73, 3.46, 9
    # distances: 0: 2.45+3+12 = 17.4; 1: 2.45+1.73+10.1 = 14.3; 2: 3+1.73+11.4 = 16.1
    for by, first in gone.items():
        left = ranked(net, by, .25)[0].weight[:, 0, 0, 0]
        want = net[0].weight[[i for i in range(4) if i != first], 0, 0, 0]
        assert torch.equal(left, want), by

def test_random_is_the_same_twice_and_another_in_each_layer():
    net = Handmade().eval()
    a, b = (ranked(net, 'random') for _ in range(2))
    assert equal(a, b) and not equal(a, ranked(net, 'l1'))
    graph = anynet._graph_of(net, SHAPE)
    left, right = (anynet._scores(graph, net, g, 'random')
                   for g in free(groups(net, SHAPE)) if g.name in ('left.0', 'right.0'))
    assert not torch.equal(left[:24], right)

@pytest.mark.parametrize('by', ('l2', 'norm', 'median', 'taylor', 'random'))
def test_hidden_units_are_ranked_too(by):
    torch.manual_seed(0)
    net, shape = Headed().eval(), (3, 16, 16)
    data = torch.randn(6, *shape), torch.arange(6)
    small = cut(net, shape, {'classifier.1': .5}, by=by, data=data)
    graph, told = anynet._graph_of(net, shape), anynet._asked(net, by, data)
    g, = (g for g in groups(net, shape) if g.name == 'classifier.1')
    keep = anynet._scores(graph, told, g, by).argsort(stable=True)[12:].sort().values
    assert torch.equal(small.classifier[1].weight, net.classifier[1].weight[keep])
    assert torch.equal(small.classifier[4].weight, net.classifier[4].weight[:, keep])

def test_compress_ranks_as_it_is_told(digits, tmp_path):
    "The stage of the cut says so; without, its key is the one that it has always had."
    def once(**kw):
        how = quick(variants=('one-cycle',), out=tmp_path, name='d', **kw)
        return kesi.compress(net, *digits, **how)
    def shown(s): return s.snapshots[-1].network.a.weight
    torch.manual_seed(0)
    net = Tiny().eval()
    plain, told, again = once(), once(by='taylor'), once(by='taylor')
    assert plain.plan.by == 'l1' and told.plan.by == 'taylor'
    assert torch.equal(shown(told), shown(again)) and not torch.equal(shown(told), shown(plain))
    half = once(by='l2', across=True, target={'macs': .5})
    assert .4 < half.steps[-1].macs / half.steps[0].macs <= .5
    with pytest.raises(UserError, match='ranked by l1, l2, norm, median, taylor, random; got'):
        once(by='l3')
    with pytest.raises(UserError, match='across must be True'): once(across='yes')
