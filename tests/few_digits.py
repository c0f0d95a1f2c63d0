"Run networks once with one method on a few digits, through the command itself. Usage: few_digits.py METHOD NETWORK…"
import dataclasses, json, sys
from pathlib import Path
from kesi import cli, data, report

full = data.load('digits')
few = dataclasses.replace(full, train=data.Split(full.train.images[:10], full.train.labels[:10]), test=data.Split(full.test.images[:4], full.test.labels[:4]))
data._LOADERS['digits'] = lambda name, root: few
data._load.cache_clear()

method, *networks = sys.argv[1:]
for arch in networks:
    args = [f'digits/{arch}', '--method', method, '--seeds', '1', '--budget', '0.001', '--set', 'iterations=1', '--set', 'variants=kesi', '--threads', '1', '--out', f'runs-{method}']
    assert cli.kesi_run(args) == 0, arch
    table = json.loads(next(Path(f'runs-{method}/reports').rglob(f'{arch}*/report.json')).read_text())['table']
    kesi = table[-1]
    assert kesi['variant'] == 'kesi' and kesi['nonzero_params'] < table[0]['params'], arch
    report._save = lambda figure, path: None             # the first network has shown that figures are drawn
