"The commands as a user runs them: in processes of their own."
import json, subprocess, sys
from pathlib import Path
import pytest

SMALL = ('digits/resnet8', '--seeds', '1', '--set', 'iterations=2', '--budget', '0.15', '--threads', '1', '--precision', 'float32')


def command(name, *args, cwd):
    code = f'import sys; from kesi.cli import {name}; sys.exit({name}())'
    return subprocess.run([sys.executable, '-c', code, *args], cwd=cwd, capture_output=True, text=True, timeout=300)


def content(out):
    "The reports of a run folder, without where and when they were computed."
    reports = [json.loads(p.read_text()) for p in sorted(Path(out).rglob('report.json'))]
    return [{k: v for k, v in r.items() if k != 'provenance'} for r in reports]


def test_two_runs_give_identical_numbers(tmp_path):
    for out in ('a', 'b'):
        done = command('kesi_run', *SMALL, '--out', out, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert content(tmp_path/'a') == content(tmp_path/'b') != []
    for p in (tmp_path/'a').glob('*/model.safetensors'):
        assert p.read_bytes() == (tmp_path/'b'/p.parent.name/p.name).read_bytes()


def test_second_run_computes_nothing(tmp_path):
    command('kesi_run', *SMALL, '--out', 'runs', cwd=tmp_path)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/'runs').glob('*/*')}
    done = command('kesi_run', *SMALL, '--out', 'runs', cwd=tmp_path)
    assert done.returncode == 0 and 'test accuracy' not in done.stdout and 'report.md' in done.stdout
    stages = {p: t for p, t in before.items() if p.parent.name not in ('reports', '.locks')}
    assert {p: p.stat().st_mtime_ns for p in stages} == stages


@pytest.mark.parametrize('method', ('filters', 'weights'))
def test_every_network_runs_end_to_end(tmp_path, method):
    "A handful of batches per stage: one pruning, one epoch of everything, on a few digits for the large networks."
    driver = Path(__file__).with_name('few_digits.py')
    done = subprocess.run([sys.executable, str(driver), method], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
