"The authors' networks, files and counts: every number of the paper's compression half."
import copy, functools
import numpy as np, pytest, torch, torch.nn.functional as F, torchvision
from torch.testing import assert_close
import authors
from kesi import paper
from kesi.macs import count
from kesi.models import Spec, empty, from_authors, load, save
from kesi.pruning import keep_filters, prune_filters, zero_filters

def pruned(net, times):
    for _ in range(times): net = prune_filters(net, paper.plan(net.spec.arch))
    return net

@pytest.fixture(scope='module')
def networks(tmp_path_factory):
    "arch → the network in the authors' file, a fresh copy each time."
    folder = tmp_path_factory.mktemp('authors')
    @functools.cache
    def read(arch): return from_authors(authors.write(folder / f'{arch}.pth.tar', arch), arch)
    return lambda arch: copy.deepcopy(read(arch))

def close_in_float64(found, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert_close(found, expected, rtol=0, atol=1e-9 * expected.abs().max().item())

# What the authors' own code answered

@pytest.mark.parametrize('times', (0, 1, 5))
@pytest.mark.parametrize('arch', authors.WITH_VALUES)
def test_logits_and_widths(networks, arch, times):
    facts, net = authors.facts(arch), pruned(networks(arch), times)
    assert net.spec.widths == tuple(w for w in facts['cfg'][str(times)] if w != 'M')
    with torch.no_grad(): logits = net.double()(authors.images(arch).double())
    close_in_float64(logits[:2, :10], facts['logits_float64'][str(times)])

@pytest.mark.parametrize('arch', authors.WITH_VALUES)
def test_kept_filters(networks, arch):
    keep = keep_filters(networks(arch), paper.plan(arch))
    if arch == 'resnet56': keep = [k for k, r in zip(keep, paper.plan(arch)) if r > 0]
    assert [k.tolist() for k in keep] == authors.facts(arch)['kept_first_pruning']

@pytest.mark.parametrize('arch', authors.WITH_VALUES)
def test_params_and_macs_of_each_pruning(networks, arch):
    net, facts = networks(arch), authors.facts(arch)
    for params, macs in zip(facts['params'], facts['conv_linear_macs'], strict=True):
        c = count(net, 32)
        assert (c.params, c.macs) == (params, macs)
        net = pruned(net, 1)

# The table of counts, for all seven networks

# network: classes, image size, params after 0..5 prunings,
# MACs in M before and after five, share of MACs saved in %, as printed
COUNTS = {
    'resnet56': (
        10, 32, (853018, 654450, 513598, 417760, 340398, 283816),
        ('125.49', '51.09'), '59.28'),
    'resnet110': (
        10, 32, (1727962, 1256960, 923318, 697592, 516032, 383534),
        ('252.89', '86.19'), '65.92'),
    'preresnet164': (
        10, 32, (1703258, 1091779, 741590, 541579, 402771, 313620),
        ('247.65', '67.62'), '72.69'),
    'wrn_16_8': (
        10, 32, (10961370, 8010654, 5894362, 4378574, 3277770, 2479022),
        ('1548.15', '547.51'), '64.63'),
    'vgg16': (
        10, 32, (14987722, 9455098, 6273310, 4431289, 3355802, 2714694),
        ('313.46', '170.6'), '45.58'),
    'resnet18': (
        200, 224, (11279112, 8306624, 6171300, 4636912, 3520248, 2708380),
        ('1813.66', '826.61'), '54.4'),
    'resnet34': (
        200, 224, (21387272, 15968298, 12019122, 9127208, 6990660, 5404362),
        ('3663.35', '1558.63'), '57.5')}

@pytest.mark.parametrize('arch', COUNTS)
def test_counts(arch):
    classes, size, params, macs, saved = COUNTS[arch]
    specs = [Spec(arch, paper.Recipe(arch=arch).widths(t), num_classes=classes) for t in range(6)]
    assert tuple(sum(p.numel() for p in empty(s).parameters()) for s in specs) == params
    first, last = count(specs[0], size), count(specs[5], size)
    assert (first.params, last.params) == (params[0], params[5])
    as_in = lambda printed, value: f'{value:.{len(printed.split(".")[1])}f}'
    assert tuple(as_in(p, c.macs / 1e6) for p, c in zip(macs, (first, last))) == macs
    assert as_in(saved, 100 * (1 - last.macs / first.macs)) == saved

def test_the_table_is_complete(): assert set(COUNTS) == set(authors.ARCHS)

# Files of all seven networks

@pytest.mark.parametrize('prefix', ('', 'module.'))
@pytest.mark.parametrize('with_cfg', (True, False))
@pytest.mark.parametrize('arch', authors.ARCHS)
def test_files(tmp_path, arch, with_cfg, prefix):
    path, facts = tmp_path / 'net.pth.tar', authors.facts(arch)
    net = from_authors(authors.write(path, arch, with_cfg, prefix), arch)
    assert not net.training and all(p.requires_grad for p in net.parameters())
    assert net.spec == Spec(arch, num_classes=200 if arch in ('resnet18', 'resnet34') else 10)
    found, expected = net.state_dict(), authors.state_dict(arch)
    assert [[n, list(t.shape)] for n, t in found.items()] == facts['state_dict']
    for n in expected: assert torch.equal(found[n], expected[n]), n

@pytest.mark.parametrize('arch', authors.ARCHS)
def test_files_of_pruned_networks(tmp_path, networks, arch):
    net = pruned(networks(arch), 5)
    widths = list(net.spec.widths) if arch != 'vgg16' else authors.facts(arch)['cfg']['5']
    for cfg in ({'cfg': widths}, {}):
        torch.save({'state_dict': net.state_dict(), **cfg}, tmp_path / 'pruned.pth.tar')
        again = from_authors(tmp_path / 'pruned.pth.tar', arch)
        assert again.spec == net.spec
        pairs = zip(again.state_dict().values(), net.state_dict().values(), strict=True)
        for a, b in pairs: assert torch.equal(a, b)

# The networks themselves, against code that shares nothing with ours

def norm(s, n, x):
    parts = (s[f'{n}.{p}'] for p in ('running_mean', 'running_var', 'weight', 'bias'))
    return F.batch_norm(x, *parts, eps=1e-5)

def act(s, n, x): return F.relu(norm(s, n, x))
def blocks(s, pattern, stages):
    named = [pattern.format(i, b) for i in range(1, stages + 1) for b in range(99)]
    return [p for p in named if f'{p}.conv1.weight' in s]

def stride(p, b): return 2 if b == '0' and p[5] != '1' else 1

def by_hand(arch, s, x):
    if arch in ('resnet18', 'resnet34'):
        twin = torchvision.models.get_model(arch, num_classes=200).double().eval()
        twin.load_state_dict(s)
        return twin(x)
    x = F.conv2d(x, s['conv1.weight'], padding=1)
    if arch == 'preresnet164':
        for p in blocks(s, 'layer{}.{}', 3):
            step = stride(p, p.split('.')[1])
            y = F.conv2d(act(s, f'{p}.bn1', x), s[f'{p}.conv1.weight'])
            y = F.conv2d(act(s, f'{p}.bn2', y), s[f'{p}.conv2.weight'], stride=step, padding=1)
            y = F.conv2d(act(s, f'{p}.bn3', y), s[f'{p}.conv3.weight'])
            short = f'{p}.downsample.0.weight'
            x = y + (F.conv2d(x, s[short], stride=step) if short in s else x)
        x = act(s, 'bn', x)
    elif arch == 'wrn_16_8':
        for p in blocks(s, 'block{}.layer.{}', 3):
            step, short = stride(p, p.split('.')[2]), f'{p}.convShortcut.weight'
            y = act(s, f'{p}.bn1', x)
            if short in s: x = F.conv2d(y, s[short], stride=step)
            y = F.conv2d(y, s[f'{p}.conv1.weight'], stride=step, padding=1)
            x = x + F.conv2d(act(s, f'{p}.bn2', y), s[f'{p}.conv2.weight'], padding=1)
        x = act(s, 'bn1', x)
    else:
        x = act(s, 'bn1', x)
        for p in blocks(s, 'layer{}.{}', 3):
            step = stride(p, p.split('.')[1])
            y = act(s, f'{p}.bn1', F.conv2d(x, s[f'{p}.conv1.weight'], stride=step, padding=1))
            y = norm(s, f'{p}.bn2', F.conv2d(y, s[f'{p}.conv2.weight'], padding=1))
            if step == 2:
                x = F.avg_pool2d(x, 2)
                x = torch.cat([x, torch.zeros_like(x)], 1)
            x = F.relu(x + y)
    return F.linear(F.avg_pool2d(x, 8).flatten(1), s['fc.weight'], s['fc.bias'])

@pytest.mark.parametrize('arch', authors.BY_NAME)
def test_logits_by_hand(networks, arch):
    x = authors.images(arch)[:2, :, :96, :96].double()
    is_torchvisions = arch in ('resnet18', 'resnet34')                        # cannot be narrow
    for times in (0,) if is_torchvisions else (0, 1, 5):
        net = pruned(networks(arch), times).double()
        with torch.no_grad(): close_in_float64(net(x), by_hand(arch, net.state_dict(), x))

@pytest.mark.parametrize('arch', authors.ARCHS)
def test_pruned_equals_zeroed(tmp_path, networks, arch):
    x, rates, net = authors.images(arch)[:2, :, :96, :96].double(), paper.plan(arch), networks(arch)
    keep, small = keep_filters(net, rates), prune_filters(net, rates)
    again = load(save(small, tmp_path / 'small.safetensors'))
    with torch.no_grad():
        close_in_float64(small.double()(x), zero_filters(net, keep).double()(x))
        assert torch.equal(small.double()(x), again.double()(x))

def test_bottlenecks_are_ranked_on_their_full_input(networks):
    net, rates = networks('preresnet164'), paper.plan('preresnet164')
    full = cut = 0
    state, previous = authors.state_dict('preresnet164'), None
    for u, k in zip(net.units(), keep_filters(net, rates), strict=True):
        w = np.abs(state[f'{u.conv}.weight'].numpy())
        best = lambda v: set(np.argsort(v.sum((1, 2, 3)))[len(v) - len(k):].tolist())
        assert set(k.tolist()) == best(w), u.conv
        if u.conv.endswith('conv2') and rates[u.width] > 0:
            full += len(k)
            cut += len(set(k.tolist()) - best(w[:, previous]))
        previous = k.numpy()
    assert 0 < cut < full / 5                # ranking after the cut would keep other filters
