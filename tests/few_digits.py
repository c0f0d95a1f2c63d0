"Networks run once by the command, on a few digits. Usage: few_digits.py METHOD/NETWORK…"
import dataclasses, json, sys
from pathlib import Path
from kesi import cli, data, report

full = data.load('digits')
first = lambda split, n: data.Split(split.images[:n], split.labels[:n])
few = dataclasses.replace(full, train=first(full.train, 10), test=first(full.test, 4))
data._LOADERS['digits'] = lambda name, root: few
data._load.cache_clear()

for method, arch in (word.split('/') for word in sys.argv[1:]):
    out = f'runs-{method}'
    args = [f'digits/{arch}', '--method', method, '--seeds', '1', '--budget', '0.001',
            '--set', 'iterations=1', '--set', 'variants=kesi', '--threads', '1', '--out', out]
    assert cli.kesi_run(args) == 0, arch
    path = next(Path(out, 'reports').rglob(f'{arch}*/report.json'))
    table = json.loads(path.read_text())['table']
    kesi = table[-1]
    assert kesi['variant'] == 'kesi' and kesi['nonzero_params'] < table[0]['params'], arch
    report._save = lambda figure, path: None    # the first network has shown figures are drawn
