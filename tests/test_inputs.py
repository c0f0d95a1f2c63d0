"Strange recipes, settings, plans and command lines: one line and exit code 2 before any work."
import json, os, shutil, subprocess, sys
from dataclasses import fields, replace
import drive, pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from kesi import cli, paper, pipeline, studies, training
from kesi.data import Dataset, Split
from kesi.models import Spec, build
from kesi.paper import Recipe, UserError
from kesi.runtime import KesiError, Runtime, StoreError, write_json

def examples(n):
    "Settings of hypothesis: the same n cases in every run."
    every = list(HealthCheck)
    return dict(deadline=None, derandomize=True, max_examples=n, suppress_health_check=every)

FEW, MANY = examples(40), examples(400)
NAMES = [f.name for f in fields(Recipe)]
text = st.text(st.characters(exclude_characters='\0', codec='utf-8'), max_size=12)
number = st.one_of(st.integers(), st.floats(), st.integers(-3, 20), st.floats(-1, 2))
likely_words = st.sampled_from(['resnet20', 'digits', 'kesi', 'filters', 'step'])
plain = st.one_of(st.none(), st.booleans(), number, text, likely_words)
def nested(v): return st.lists(v, max_size=4) | st.dictionaries(text, v, max_size=2)
value = st.recursive(plain, nested, max_leaves=6)

class Started(Exception): "Training would begin now."

def begun(*a, **kw): raise Started

def exit_code(call):
    "The exit code of a command; None: training would have begun."
    try: return call()
    except Started: return None
    except SystemExit as e: return e.code

def command(argv, tmp, capsys, monkeypatch):
    "Run a command line up to the first training: exit code (None: it would have begun) and error."
    monkeypatch.setattr(pipeline.Store, 'ensure', begun)
    capsys.readouterr()
    code = exit_code(lambda: cli.kesi_run([*argv, '--out', str(tmp/'runs')]))
    shutil.rmtree(tmp/'runs', ignore_errors=True)
    return code, capsys.readouterr().err

def fine(code, said):
    assert code in (None, 0, 2), (code, said)
    if code == 2: assert said.count('\n') == 1 and said.startswith('error: '), said
    elif code is None: assert 'error' not in said

# A setting as the command line has it

ODD_SETTINGS = ['=', 'lr=', '=1', 'lr==1', 'rates=' + '[' * 9999, 'epochs=1e999', 'lr=1e-999',
                'seeds=1e3', 'rates=,,', 'lr=٣', 'epochs=0x10', 'epochs=' + '9' * 5000]
ODD_WORDS = ['meta', 'cuda:99', 'kesi,', 'float16', '/', '.', '/dev/null']
ODD_NAMES = ['digits/resnet8', 'digits', 'digits/', '/resnet20', 'digits/resnet9', 'digits/vgg16',
             'cifar10/resnet8', '--', '-', '--out']
values = st.one_of(text, number.map(str), value.map(json.dumps))
setting = st.one_of(st.builds('{}={}'.format, st.sampled_from(NAMES), values),
                    st.builds('{}={}'.format, text, text), text, st.sampled_from(ODD_SETTINGS))
counts = st.sampled_from(['--seeds', '--budget', '--threads', '--evaluate'])
words = st.sampled_from(['--method', '--variants', '--precision', '--device', '--recipe',
                         '--data-root'])
asks = text.filter(lambda t: t not in ('-h', '--help'))
option = st.one_of(st.tuples(st.just('--set'), setting),
                   st.tuples(counts, st.one_of(number.map(str), text)),
                   st.tuples(words, st.one_of(text, st.sampled_from(ODD_WORDS))),
                   st.tuples(st.one_of(asks, st.sampled_from(ODD_NAMES))))

def _check_lines(n, tmp_path, capsys, monkeypatch):
    seen = {None: 0, 0: 0, 2: 0}
    @settings(**n)
    @given(st.lists(option, min_size=1, max_size=3))
    def check(options):
        argv = [a for o in options for a in o]
        code, said = command(argv, tmp_path, capsys, monkeypatch)
        fine(code, said)
        seen[code] += 1
    check()
    assert seen[2] > sum(seen.values()) / 2

def test_command_lines(tmp_path, capsys, monkeypatch):
    _check_lines(FEW, tmp_path, capsys, monkeypatch)

@pytest.mark.soak
def test_many_command_lines(tmp_path, capsys, monkeypatch):
    _check_lines(MANY, tmp_path, capsys, monkeypatch)

WENT_WRONG = (['--budget', '1e308'], ['--budget', '1e-308'], ['--threads', '100000'],
              ['--threads', '99999999999999999999'], ['--device', 'meta'],
              ['--device', 'cpu', '--threads', '-1'], ['--set', 'epochs=1e400'],
              ['--seeds', '9' * 5000], ['--jobs', '9' * 5000], ['digits/resnet\n20'],
              ['digits/resnet8', 'x'], ['--out', 'a' * 300], ['--set', 'rates=[[.1]]'],
              ['--recipe', '/'], ['--recipe', '/dev/null'])

@pytest.mark.parametrize('argv', WENT_WRONG, ids=lambda a: ' '.join(a)[:40])
def test_lines_that_once_went_wrong(tmp_path, capsys, monkeypatch, argv):
    monkeypatch.setattr(pipeline.Store, 'ensure', begun)
    monkeypatch.chdir(tmp_path)
    code = exit_code(lambda: cli.kesi_run(argv))
    fine(code, capsys.readouterr().err)
    assert code == (None if argv == ['--budget', '1e-308'] else 2)

# Recipes

some_fields = st.dictionaries(st.sampled_from(NAMES), value, min_size=1, max_size=3)

def _check_recipes(n, tmp_path, capsys, monkeypatch):
    seen = {None: 0, 2: 0}
    path = tmp_path/'recipe.json'
    @settings(**n)
    @given(st.one_of(value, some_fields, text))
    def check(v):
        path.write_text(v if isinstance(v, str) else json.dumps(v), encoding='utf-8')
        code, said = command(['--recipe', str(path)], tmp_path, capsys, monkeypatch)
        fine(code, said)
        seen[code] += 1
    check()
    assert seen[2] > sum(seen.values()) / 2

def test_recipe_files(tmp_path, capsys, monkeypatch):
    _check_recipes(FEW, tmp_path, capsys, monkeypatch)

@pytest.mark.soak
def test_many_recipe_files(tmp_path, capsys, monkeypatch):
    _check_recipes(MANY, tmp_path, capsys, monkeypatch)

# Plans

PLANNED = ['resnet8', 'resnet20', 'preresnet11', 'wrn_10_1', 'vgg16', 'resnet18']
likely = st.one_of(st.none(), st.lists(st.floats(0, .4), min_size=1, max_size=1))
plans = st.fixed_dictionaries({
    'arch': st.sampled_from(PLANNED),
    'rates': st.one_of(likely, value, st.lists(number, max_size=20)),
    'iterations': st.one_of(st.integers(1, 6), st.integers(1, 50)), 'multiple': st.integers(-1, 70),
    'method': st.sampled_from(['filters', 'weights'])})

def _check_plans(n):
    seen = {'accepted': 0, 'refused': 0}
    @settings(**n)
    @given(plans)
    def check(given):
        try: r = Recipe(**given, shares=given['rates'])
        except UserError as e:
            seen['refused'] += 1
            assert len(str(e)) < 4000
            return
        seen['accepted'] += 1
        assert all(min(r.widths(i)) >= 1 for i in range(r.iterations + 1))   # it can be built
        assert paper.from_dict(json.loads(paper.to_json(r))) == r
    check()
    assert min(seen.values()) > 0, seen

def test_plans(): _check_plans(FEW)
@pytest.mark.soak
def test_many_plans(): _check_plans(MANY)

# Nothing that is finished is lost by a bad command

def test_bad_commands_leave_a_run_alone(tiny, capsys):
    out, good = tiny
    for argv in (['--set', 'epochs=no'], ['--budget', '-1'], ['none/resnet20'], ['digits/none'],
                 ['--device', 'meta'], ['--nonsense'], ['--threads', '0']):
        assert exit_code(lambda: cli.kesi_run([*argv, '--out', str(out)])) == 2
        assert capsys.readouterr().err.count('\n') == 1
    drive.same(out, good)

# Settings of a training, a machine and a store

@pytest.mark.parametrize('bad', (float('nan'), float('inf')))
def test_numbers_that_are_none(tmp_path, bad):
    for n in ('lr', 'momentum', 'weight_decay', 'gamma', 'warmup'):
        wrong = {'epochs': 1, 'batch': 1, 'lr': .1, n: bad}
        with pytest.raises(UserError, match=f'{n} must be a finite number'):
            training.Training(**wrong)
    with pytest.raises(UserError, match='NaN or infinite'): pipeline.digest({'lr': [bad]})
    with pytest.raises(StoreError, match='NaN or infinite'):
        write_json(tmp_path/'x.json', {'loss': bad})
    assert not list(tmp_path.iterdir())

NO_MACHINES = ({'device': 'meta'}, {'device': ''}, {'device': 'cuda:99'}, {'device': 'gpu'},
               {'precision': 'half'}, {'threads': 0}, {'threads': 10**6}, {'threads': 1.5},
               {'pad': 0})

@pytest.mark.parametrize('bad', NO_MACHINES, ids=str)
def test_machines_that_are_none(bad):
    with pytest.raises(UserError): Runtime(**bad)

# Data, before training begins

def strange_data():
    "What is said → a function that makes the data of which it is said."
    d = drive.blobs()
    one, images = torch.zeros_like(d.train.labels), d.train.images
    def train(labels, pixels=images): return replace(d, train=Split(pixels, labels))
    def test(pixels, labels): return replace(d, test=Split(pixels, labels))
    return {
        'one class': lambda: train(one),
        'no test images': lambda: test(d.test.images[:0], d.test.labels[:0]),
        'one size': lambda: test(d.test.images[..., :4], d.test.labels),
        'labels must be from 0 to 3; found 9': lambda: train(one + 9),
        'found -1': lambda: test(d.test.images, one - 1),
        'uint8': lambda: train(one, images.float()),
        'int64': lambda: train(one.float()),
        'at least 2': lambda: replace(d, classes=('a',)),
        'positive std': lambda: Dataset('x', d.train, d.test, d.classes, (.5,), (0.,))}

@pytest.mark.parametrize('said, make', strange_data().items(), ids=list(strange_data()))
def test_data_that_cannot_be_learnt(tmp_path, monkeypatch, said, make):
    monkeypatch.setattr(training, '_epoch', begun)
    monkeypatch.setattr(pipeline, 'load', lambda name, root=None: make())
    with pytest.raises(UserError, match=said):
        pipeline.run(drive.TINY, tmp_path/'runs', drive.RT, say=None)
    assert not (tmp_path/'runs').exists()

LISTS = ('--list', b'cifar10/resnet56')

@pytest.mark.parametrize('option, shown', (('--help', b'digits/resnet20'),
                                           pytest.param(*LISTS, marks=pytest.mark.soak)))
def test_terminals_without_letters(option, shown):
    "A console that only knows ASCII gets replacements, not a crash after an hour of computing."
    code = f'import sys; from kesi.cli import kesi_run; sys.exit(kesi_run(["{option}"]))'
    env = {**os.environ, 'PYTHONIOENCODING': 'ascii'}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, env=env)
    assert done.returncode == 0 and shown in done.stdout and b'\\u' in done.stdout

# What once went through

EMPTY = [('kesi_run', ['']), ('kesi_run', ['--recipe', '']), ('kesi_run', ['--device', '']),
         ('kesi_run', ['--out', '']), ('kesi_run', ['--out=']), ('kesi_run', ['--set', '']),
         ('kesi_run', ['--data-root', '']), ('kesi_run', ['--variants', '']),
         ('kesi_report', ['']), ('kesi_export', ['', 'x.onnx']), ('kesi_export', ['x', '']),
         ('kesi_export', ['x', 'x.onnx', '--factory', '']), ('kesi_bench', ['--out', '']),
         ('kesi_sweep', ['']), ('kesi_sweep', ['--out', '', '--dry-run']),
         ('kesi_store', ['list', '']), ('kesi_store', ['clean', '', '--yes']),
         ('kesi_study', ['']), ('kesi_study', ['teachers', '--out', ''])]

@pytest.mark.parametrize('name, argv', EMPTY, ids=str)
def test_an_empty_word_is_a_mistake(tmp_path, capsys, monkeypatch, name, argv):
    "It once meant the default, or the current folder."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline.Store, 'ensure', begun)
    command = getattr(studies if name == 'kesi_study' else cli, name)
    code, said = exit_code(lambda: command(argv)), capsys.readouterr().err
    assert (code, said.count('\n')) == (2, 1) and 'empty' in said
    assert not list(tmp_path.iterdir())

def test_an_empty_variable_is_none(monkeypatch):
    "KESI_DATA= in a script means the default, as if it were not set."
    monkeypatch.setenv('KESI_DATA', '')
    assert cli._run_parser().parse_args([]).data_root is None

def settings_of(argv): return cli.chosen(cli._run_parser().parse_args(argv))

def test_another_network_brings_its_settings():
    "Of wide networks too, whichever way they are named; what is set explicitly wins."
    wide = paper.recipe('cifar10/wrn_16_8')
    assert wide.weight_decay == 5e-4 != paper.recipe('cifar10/resnet56').weight_decay
    assert settings_of(['cifar10/resnet56', '--set', 'arch=wrn_16_8']) == wide
    narrow = paper.recipe('cifar10/resnet56')
    assert settings_of(['cifar10/wrn_16_8', '--set', 'arch=resnet56']) == narrow
    assert settings_of(['--set', 'data=cifar10', '--set', 'arch=wrn_16_8']) == wide
    for order in (['arch=wrn_16_8', 'gamma=0.1'], ['gamma=0.1', 'arch=wrn_16_8']):
        argv = [word for setting in order for word in ('--set', setting)]
        assert settings_of(['cifar10/resnet56', *argv]) == replace(wide, gamma=.1)

def test_a_file_speaks_for_itself(tmp_path):
    "What a file says is explicit, though it may be what is published for its network."
    path = tmp_path/'recipe.json'
    path.write_text('{"data": "cifar10", "arch": "resnet56", "weight_decay": 1e-4}')
    found = settings_of(['--recipe', str(path), '--set', 'arch=wrn_16_8'])
    assert found == replace(paper.recipe('cifar10/wrn_16_8'), weight_decay=1e-4)

def test_names_of_the_processor():
    "`cpu:0` is the processor like `cpu`, whatever compares it; there is no second one."
    assert Runtime('cpu:0') == Runtime('cpu') == Runtime(torch.device('cpu'))
    for bad in ('cpu:1', 'cpu:x', 'CPU', ' cpu'):
        with pytest.raises(UserError, match='no device'): Runtime(bad)

FULL = 'CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has a total capacity of 8 GiB'

ALSO_FULL = 'CUDA error: out of memory\nCUDA kernel errors …'

@pytest.mark.parametrize('error', (torch.OutOfMemoryError(FULL), RuntimeError(ALSO_FULL)))
def test_a_full_device_is_a_device(monkeypatch, capsys, error):
    def full(*a, **kw): raise error
    monkeypatch.setattr(torch, 'empty', full)
    with pytest.raises(KesiError, match='the device cuda:0 is there, but has no memory left'):
        Runtime('cuda:0')
    assert cli.kesi_run(['--device', 'cuda:0']) == 1
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'no memory left' in said and 'no device' not in said

def test_building_leaves_the_callers_generators(monkeypatch):
    "The CPU's is put back; those of GPUs are not touched, for nobody puts them back."
    seeded = []
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', seeded.append)
    monkeypatch.setattr(torch.cuda, 'manual_seed', seeded.append)
    before = torch.get_rng_state()
    build(Spec('resnet8'), 7)
    assert torch.equal(torch.get_rng_state(), before) and not seeded

BROKEN = ('', '{', '[]', 'null', '{"seeds": 3}', '{"seeds": [[]]}', '{"seeds": []}', '\x00',
          '{"seeds": [{"kesi": 5}]}')

@pytest.mark.parametrize('content', BROKEN)
@pytest.mark.parametrize('of', ('run', 'stage'))
def test_export_of_a_broken_record(tiny, tmp_path, capsys, content, of):
    runs = shutil.copytree(tiny[0], tmp_path/'runs')
    next(runs.rglob('run.json')).write_text(content)
    where = runs if of == 'run' else next(runs.glob('distill-*'))
    code, said = cli.kesi_export([str(where), str(tmp_path/'x.onnx')]), capsys.readouterr().err
    assert code in (1, 2) and said.count('\n') == 1 and 'run.json' in said
    assert not (tmp_path/'x.onnx').exists()

@pytest.mark.parametrize('parser', (cli._run_parser, cli._sweep_parser))
def test_how_often_the_test_split_is_measured(parser):
    parse = parser().parse_args
    assert cli._runtime(parse(['--evaluate', '3'])).evaluate == 3
    assert cli._runtime(parse([])).evaluate is None
    for bad in ('0', '-1', '1.5', 'x', ''):
        assert exit_code(lambda: parse(['--evaluate', bad])) == 2
