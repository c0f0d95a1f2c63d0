"`kesi.compress` in a practitioner's hands: what is given wrongly, the proposed rate, the bar."
import json
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler, TensorDataset
import kesi
from kesi import anynet, models
from kesi.anynet import Source
from kesi.data import load as load_data
from kesi.paper import UserError
from kesi.runtime import Diverged, Runtime

pytest.importorskip('torch_pruning')
pytestmark = pytest.mark.usefixtures('no_pictures')
RT = Runtime(channels_last=False, threads=1)

def conv(n_in, n_out): return nn.Conv2d(n_in, n_out, 3, padding=1)

class Tiny(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d, classes=10):
        super().__init__()
        self.a, self.na = conv(1, 12), norm(12)
        self.b, self.nb = conv(12, 16), norm(16)
        self.fc = nn.Linear(16, classes)
    def forward(self, x):
        x = F.max_pool2d(F.relu(self.na(self.a(x))), 4)
        return self.fc(F.relu(self.nb(self.b(x))).mean((2, 3)))

class Soft(Tiny):
    def forward(self, x): return super().forward(x).softmax(1)

class Lazy(Tiny):
    def __init__(self):
        super().__init__()
        self.a = nn.LazyConv2d(12, 3, padding=1)

class Rows:
    def __init__(self, x, y): self.x, self.y = x, y
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], int(self.y[i])

@pytest.fixture(scope='module')
def digits():
    d = load_data('digits')
    return [(s.images[:200].float() / 127.5 - 1, s.labels[:200]) for s in (d.train, d.test)]

QUICK = dict(epochs=1, iterations=1, rates=.3, lr=.05, rt=RT, say=None, variants=('one-cycle',))

def called(digits, *, net=None, **given):
    "One quick call, changed as a test says; a DataLoader decides the size of its batches itself."
    train, test = (given.pop(n, d) for n, d in zip(('train', 'test'), digits))
    how = {**QUICK, **given}
    if not isinstance(train, DataLoader): how.setdefault('retrain_batch', 64)
    return kesi.compress(Tiny() if net is None else net, train, test, **how)

# What is refused, in one line that names what was given and what is allowed

def half(net, layer):
    net.get_submodule(layer).double()
    return net

NETWORKS = {
    'half precision': (lambda: Tiny().half(), 'of Tiny are float16; kesi trains float32'),
    'bfloat16': (lambda: Tiny().bfloat16(), r'are bfloat16; .* give net.float\(\)'),
    'double precision': (lambda: Tiny().double(), 'are float64; kesi trains float32'),
    'mixed': (lambda: half(Tiny(), 'b'), 'are float32 and float64'),
    'class': (lambda: Tiny, r'got the class Tiny: give an instance, Tiny\('),
    'weights': (lambda: Tiny().state_dict(), 'got weights without layers .OrderedDict'),
    'path': (lambda: 'net.pt', 'must be a torch.nn.Module; got str'),
    'script': (lambda: torch.jit.script(Tiny()), 'is TorchScript, whose layers are fixed'),
    'lazy': (Lazy, 'has lazy layers without weights; call it once'),
    'meta': (lambda: Tiny().to('meta'), 'it is on the device meta'),
    'probabilities': (Soft, 'gives probabilities; kesi needs logits'),
    'one logit': (lambda: Tiny(classes=1), 'one number for each image; kesi needs a logit'),
    'frozen': (lambda: Tiny().requires_grad_(False), 'all weights of Tiny are frozen'),
    'no image size': (lambda: nn.Sequential(conv(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
                      r'cannot take images of shape \(1, 16, 16\)')}

@pytest.mark.filterwarnings('ignore:.*torch.jit.script.*', 'ignore:Lazy modules')
@pytest.mark.parametrize('name', NETWORKS)
def test_networks_that_are_refused(digits, name):
    make, match = NETWORKS[name]
    with pytest.raises(UserError, match=match): called(digits, net=make())

def with_nan(x):
    x = x.clone()
    x[150, 0, 3, 3] = float('nan')
    return x

DATA = {
    'arrays': (lambda x, y: (x.numpy(), y.numpy()), 'got tuple of ndarray and ndarray'),
    'labels in a list': (lambda x, y: (x, y.tolist()), 'got tuple of Tensor and list'),
    'rows': (lambda x, y: list(zip(x, y)), 'got list of 200 tuples'),
    'generator': (lambda x, y: (p for p in [(x, y)]), 'got generator'),
    'iterator': (lambda x, y: iter(DataLoader(Rows(x, y), 64)), 'got _SingleProcessDataLoaderIter'),
    'name': (lambda x, y: 'digits', 'train must be .* got str'),
    'nothing': (lambda x, y: None, 'got NoneType'),
    'images only': (lambda x, y: TensorDataset(x), 'pairs; got list of 1'),
    'triples': (lambda x, y: TensorDataset(x, y, y), 'pairs; got list of 3'),
    'no batches': (lambda x, y: DataLoader(Rows(x, y), None), 'yields single images; give it'),
    'none whole': (lambda x, y: DataLoader(Rows(x, y), 512, drop_last=True), 'not one whole batch'),
    'from 1': (lambda x, y: (x, y + 1), 'from 0 to 9, .* found 10. Subtract 1 where they begin'),
    'float labels': (lambda x, y: (x, y.float()), 'whole numbers, .* got torch.float32'),
    'one-hot int': (lambda x, y: (x, F.one_hot(y, 10)), r'got torch.int64 of shape \(64, 10\)'),
    'columns': (lambda x, y: (x, y[:, None]), r'of shape \(64, 1\) for 64 images'),
    'soft, of 9': (lambda x, y: (x, F.one_hot(y % 9, 9).float()), r'N×10, .* got \(64, 9\)'),
    'nan': (lambda x, y: (with_nan(x), y), 'images must be finite numbers'),
    'complex': (lambda x, y: (x + 0j, y), 'got torch.complex64'),
    'channels last': (lambda x, y: (x.permute(0, 2, 3, 1), y), r'the shape \(16, 16, 1\), test')}

@pytest.mark.parametrize('name', DATA)
def test_data_that_are_refused(digits, name):
    make, match = DATA[name]
    with pytest.raises(UserError, match=match): called(digits, train=make(*digits[0]))

def test_images_that_decide_are_no_others(digits):
    (x, y), test = digits
    rows = Rows(x, y)
    first, last = (DataLoader(rows, 50, sampler=SubsetRandomSampler(i))
                   for i in (range(120), range(100, 200)))
    for given, n in ((dict(valid=(x, y)), '200 of 200 images are training'),
                     (dict(valid=test), '200 of 200 images are test'),
                     (dict(valid=(x[150:], y[150:])), '50 of 50 images are training'),
                     (dict(train=Subset(rows, range(100)), valid=Subset(rows, range(50, 150))),
                      '50 of 100 images are training'),
                     (dict(train=first, valid=last), '20 of 100 images are training')):
        with pytest.raises(UserError, match=n): called(digits, **given)
    assert anynet._overlap((x[:100], y[:100]), (x[99:], y[99:])) == (0, 100)      # twins happen
    said = []
    called(digits, test=(x, y), say=said.append)
    assert any(line.startswith('test: 200 of 200 images are training images too') for line in said)

def settings(tmp):
    "What was given, and what the one line must say."
    named = dict(name='d', out=tmp)
    yield from (({**named, 'name': n}, 'name must be a word .* got ') for n in
                ('a/b', '..', '.x', 'a\nb', 'a\\b', ' ', 'x' * 101, b'd'))
    yield from (
        ({**named, 'version': [1]}, r'version must be a word .* got \[1\]'),
        (dict(version='1'), 'without a name= nothing is kept'),
        ({**named, 'version': '1'}, 'version has no effect: tensors'),
        (dict(epochs=-1), '^epochs must be .* got -1'), (dict(epochs=True), 'got True'),
        (dict(iterations=-2), 'iterations must be .* got -2'), (dict(seeds=1.5), 'got 1.5'),
        (dict(temperature=0, variants=('kesi',)), 'temperature must be a number above 0'),
        (dict(rates=0), 'nothing would be cut at rates=0'), (dict(rates=50), 'below 1; got 50'),
        (dict(rates=[.3] * 3), r'takes 1 rate for all or 2 .* got 3'),
        (dict(target={'MACs': .5}), 'one of macs, params'), (dict(target=('macs', .5)), 'got .'),
        (dict(target={'macs': 50}), r'a share below 1 \(.5 is half\).* got 50'),
        (dict(target={'macs': '50%'}), "got '50%'"), (dict(target={'params': 1.}), 'got 1.0'),
        (dict(target={'macs': .001}), 'cannot be reached: .* 4% of the MACs remain'),
        (dict(target={'accuracy_drop': 1}, valid=.2), r'below 1 \(.01 is one point\); got 1'),
        (dict(valid=.001), 'valid=0.001 of 200 training images are 0'),
        (dict(valid=.999), 'are 200 of them'), (dict(valid='x'), 'valid must be .* got str'),
        (dict(optimizer=['sgd']), r"sgd, adam, adamw; got \['sgd'\]"), (dict(lr=[.1]), 'got .0.1'),
        (dict(lr=float('nan')), 'got nan'), (dict(lr='0.1'), "or 'auto'; got '0.1'"),
        (dict(loss=nn.MSELoss()), r'labels \(N whole numbers\); it raised RuntimeError'),
        (dict(loss=nn.CrossEntropyLoss(weight=torch.ones(9))), 'defined either for all 10'),
        (dict(seed=1), "no setting 'seed': seeds=1"), (dict(device='cuda'), 'rt=kesi.runtime'),
        (dict(batch_size=64), 'retrain_batch and distill_batch'),
        (dict(train=load_data('digits')), 'digits is a kesi.data.Dataset, which holds its test'),
        (dict(train=load_data('digits'), test=None, valid=2), 'Dataset; got 2'))

def test_settings_that_are_refused(digits, tmp_path):
    for wrong, match in settings(tmp_path):
        with pytest.raises(UserError, match=match) as e: called(digits, **wrong)
        assert '\n' not in str(e.value)
    assert not any(tmp_path.glob('*-*'))                             # nothing was computed

# What may look odd, and works

def odd_norm(**how): return lambda n: nn.BatchNorm2d(n, **how)

FINE = {
    'float64 images': lambda x, y: dict(train=(x.double(), y)),
    'soft test labels': lambda x, y: dict(test=(-x, F.one_hot(y, 10).float())),
    'int32 labels': lambda x, y: dict(train=(x, y.int())),
    'no running statistics': lambda x, y: dict(net=Tiny(odd_norm(track_running_stats=False))),
    'no scale': lambda x, y: dict(net=Tiny(odd_norm(affine=False))),
    'data parallel': lambda x, y: dict(net=nn.DataParallel(Tiny())),
    'compiled': lambda x, y: dict(net=torch.compile(Tiny(), backend='eager')),
    "numpy's numbers": lambda x, y: dict(epochs=np.int64(1), rates=np.float32(.3),
                                         lr=np.float64(.05), valid=np.float32(.2))}

@pytest.mark.parametrize('name', FINE)
def test_what_looks_odd_works(digits, name):
    s = called(digits, **FINE[name](*digits[0]))
    assert type(s.network) is Tiny and not s.network.training
    a, b, fc = s.network.a, s.network.b, s.network.fc
    assert (a.out_channels, b.in_channels, fc.in_features) == (8, 8, 11)
    with torch.no_grad(): assert s(digits[1][0]).dtype == torch.float32

def test_frozen_layers_stay_as_they_are(digits):
    torch.manual_seed(0)
    net = Tiny()
    net.nb.requires_grad_(False)
    net.nb.weight.data.uniform_(.5, 2)
    s = called(digits, net=net, variants=('kesi',))
    assert not s.network.nb.weight.requires_grad
    assert set(s.network.nb.weight.tolist()) < set(net.nb.weight.tolist())
    assert not set(s.network.fc.bias.tolist()) & set(net.fc.bias.tolist())

def test_numbers_of_a_version_are_words(digits):
    "As ever, a version that is a number is the same as its text."
    three = [Source(Rows(*digits[0]), digits[1], 'd', version=v).digest for v in (3, '3', '4')]
    assert three[0] == three[1] != three[2]

def test_a_network_that_guesses_is_told(digits):
    said = []
    called(digits, say=said.append)
    assert any('hardly does better than guessing' in line for line in said)

# The learning rate

def proposing(digits, **given):
    "A call that leaves the rate to the test, with what it said of it."
    said = []
    torch.manual_seed(0)
    s = called(digits, lr='auto', say=said.append, **given)
    return s, [line for line in said if 'is proposed' in line]

def folders(out): return sorted(p.name for p in out.iterdir())

def test_a_rate_is_proposed_by_default(digits):
    "Nobody has to name one, whatever the optimizer; and what the test costs is said."
    import inspect
    assert inspect.signature(kesi.compress).parameters['lr'].default == 'auto'
    for optimizer, rates in anynet._RATES.items():
        s, (line,) = proposing(digits, optimizer=optimizer)
        assert s.report['recipe']['retrain_lr'] in rates and line.startswith('lr=')
        steps = len(rates) * 3                             # four batches, one of them held out
        assert f'; {steps} steps, {steps / 4:.0%} of those to come' in line

def test_a_proposed_rate_is_the_rate(digits, tmp_path):
    "The stages are those of the call that names it."
    how = dict(name='d', out=tmp_path)
    lr = proposing(digits, **how)[0].report['recipe']['retrain_lr']
    before = folders(tmp_path)
    torch.manual_seed(0)
    called(digits, lr=lr, **how)
    assert folders(tmp_path) == before

def test_a_call_that_goes_on_keeps_its_rate(digits, tmp_path, monkeypatch):
    "Wherever it goes on, and whatever the test would say there."
    how = dict(name='d', out=tmp_path)
    first, (line,) = proposing(digits, **how)
    lr, before = first.report['recipe']['retrain_lr'], folders(tmp_path)
    monkeypatch.setattr(anynet, '_lr_trials', lambda *a: pytest.fail('tested again'))
    again, (line,) = proposing(digits, **how)
    assert line == f'lr={lr:g} is proposed (sgd; as proposed before)'
    assert again.report['recipe'] == first.report['recipe'] and folders(tmp_path) == before
    kept = next((tmp_path/'measured').glob('lr-*.json'))
    assert json.loads(kept.read_text())['lr'] == lr
    kept.write_text('{"lr": ')                             # damaged: the test is made again
    monkeypatch.undo()
    assert proposing(digits, **how)[0].report['recipe']['retrain_lr'] == lr
    assert folders(tmp_path) == before

def test_no_rate_is_tried_where_none_is_used(digits, monkeypatch):
    monkeypatch.setattr(anynet, '_lr_trials', lambda *a: pytest.fail('tested'))
    assert not proposing(digits, variants=('pfec',))[1]

def test_a_network_that_no_rate_can_train(digits, monkeypatch):
    def diverges(*a, **kw): raise Diverged('the train loss became nan')
    monkeypatch.setattr(anynet, 'fit', diverges)
    with pytest.raises(UserError, match='no rate from 0.001 up can train this network; are its'):
        proposing(digits)

# Targets

def test_a_drop_that_never_comes_ends_where_layers_end(digits):
    "Pruning goes on while every layer keeps a filter: 12 are 6, 3 and 1 after three halvings."
    (x, y), test = digits
    how = dict(target={'accuracy_drop': .99}, valid=.2, iterations=20, rates=.5)
    s = called(digits, **how)
    assert s.plan.widths == [(6, 8), (3, 4), (1, 2)] and s.report['recipe']['iterations'] == 3
    with pytest.raises(UserError, match='would remove all 1 filters of a'):
        called(digits, iterations=20, rates=.5)

def test_milliseconds_from_the_command_line(tmp_path, capsys, monkeypatch):
    "The clock here says the square root of the MACs; half of the time is a quarter of these."
    from kesi import cli, pipeline
    from kesi.macs import count
    ran = []
    def clock(net, small, shape, seconds=.7):
        a, b = (count(n, shape).macs**.5 for n in (net, small))
        return b / a, a / 100
    def run(r, *a, **kw):
        ran.append(r)
        raise UserError('enough')
    monkeypatch.setattr(anynet, '_time_share', clock)
    monkeypatch.setattr(pipeline, 'run', run)
    for wanted, low, high in (('.5', .45, .5), ('10', .85, 1)):
        assert cli.kesi_run(['digits/resnet8', '--target', f'milliseconds={wanted}']) == 2
        told, r = capsys.readouterr().out, ran.pop()
        assert told.startswith('target: ') and 'milliseconds. Planned: ' in told
        share = float(told.rpartition('(')[2].partition('%')[0]) / 100
        net = models.build(models.Spec('resnet8', in_channels=1))
        whole = anynet._time_share(net, net, (1, 16, 16))[1]
        goal = float(wanted) if float(wanted) < 1 else float(wanted) / whole
        assert .9 * goal <= share**.5 <= 1.001 * goal and r.rates
    assert cli.kesi_run(['digits/resnet8', '--target', 'milliseconds=.01']) == 2
    assert 'cannot be reached in 5 prunings' in capsys.readouterr().err

def test_the_clock_compares_in_turns():
    "Two forms of one network take times of which one is a share of the other."
    share, whole = anynet._time_share(Tiny().eval(), Tiny().eval(), (1, 16, 16), seconds=.01)
    assert share > 0 and whole > 0

# The bar in a notebook

WATCHED = '''
from kesi.store import _bar
bar = _bar(True)
bar.n = 50
bar.set_description_str('half')
bar.clear()
print('a line')
bar.close()
'''

def test_the_bar_shows_where_a_person_looks_on():
    "In a notebook that a person runs it comes and goes; a notebook that is executed has none."
    manager = pytest.importorskip('jupyter_client.manager')
    kernels, client = manager.start_new_kernel(kernel_name='python3')
    shown = {}
    try:
        for person in (True, False):
            seen = shown[person] = []
            client.execute_interactive(WATCHED, allow_stdin=person, output_hook=seen.append,
                                       timeout=300)
    finally:
        client.stop_channels()
        kernels.shutdown_kernel(now=True)
    def texts(person):
        made = [m['content'] for m in shown[person] if m['msg_type'].endswith('display_data')]
        return [c['data']['text/plain'] for c in made]
    assert any(t.startswith('50% |█████') and t.endswith('half') for t in texts(True))
    assert texts(True)[-1] == '' and not texts(False)
    for person in shown:
        streams = [m['content'] for m in shown[person] if m['msg_type'] == 'stream']
        assert [(c['name'], c['text']) for c in streams] == [('stdout', 'a line\n')]
