"The benchmark as a command: what it writes, how it refuses. Speed itself is never a test."
import json, math
import pytest
from kesi import bench, cli, macs
from kesi.models import Spec


def numbers(value):
    if isinstance(value, dict): value = list(value.values())
    if isinstance(value, (list, tuple)): return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, float) else []


@pytest.mark.parametrize('what', (
    'data,training',
    pytest.param('data,training,inference', marks=pytest.mark.soak)))  # an ONNX file takes seconds
def test_quick_bench_writes_what_it_measured(tmp_path, capsys, what):
    out = tmp_path/'b.json'
    how = ['--quick', '--batch', '4', '--threads', '1', '--precision', 'float32']
    assert cli.kesi_bench([*how, '--what', what, '--out', str(out)]) == 0
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == ['b.json', 'b.png', 'b.svg']
    assert 'retraining after 5 prunings' in said
    assert ('the fastest of each' in said) == ('inference' in what)
    assert found['settings']['batch'] == 4 and found['where']['threads'] == 1
    assert found['clock'] == 'cpu'
    measured = numbers([found[part] for part in ('cases', 'inference', 'machine')])
    assert all(math.isfinite(n) and n > 0 for n in measured)
    assert bench.tables(found) in said                # the tables can be drawn again from the file
    assert bool(found['inference']) == ('inference' in what)
    if not found['inference']: return
    widths = bench.snapshots('resnet8')[5].spec.widths
    counted = [macs.count(spec, 32).macs for spec in (Spec('resnet8'), Spec('resnet8', widths))]
    assert found['inference']['resnet8']['macs'] == counted


@pytest.mark.parametrize('wrong', (
    ['--what', 'speed'],
    ['--network', 'alexnet'],
    ['--rounds', '0'],
    ['--batch', '-1'],
    ['--device', 'tpu'],
    ['--out', 'bench.txt'],
    ['--threads', '0']))
def test_bench_refuses(wrong, capsys):
    assert cli.kesi_bench(wrong) == 2
    assert capsys.readouterr().err.count('\n') == 1
