"The command `kesi_study`: what is wrong is said in one line, before anything is written."
import json
from dataclasses import replace
import pytest
from kesi import paper, studies
from kesi.runtime import Runtime


@pytest.mark.parametrize('argv, said', (
    (['height'], 'allowed are teachers'),
    (['diversity', 'height'], 'unknown study'),
    (['diversity', '--recipe', 'digits'], 'dataset/network'),
    (['diversity', '--recipe', 'digits@5/resnet8'], 'from 10 to 990'),
    (['diversity', '--recipe', 'mnits/resnet8'], 'unknown dataset'),
    (['diversity', '--seeds', '0'], 'from 1'),
    (['diversity', '--set', 'method=weights'], 'prune filters'),
    (['how_far', '--set', 'rates=.5'], 'at least one'),
    (['teachers', '--threads', '0'], 'threads must be'),
    (['rivals', '--seeds', '6'], 'seeds 0 to 4'),
    ([], 'required')))
def test_bad_lines(tmp_path, capsys, argv, said):
    try: code = studies.kesi_study([*argv, '--out', str(tmp_path/'runs')])
    except SystemExit as e: code = e.code
    out = capsys.readouterr()
    is_one_line = out.err.startswith('error: ') and out.err.count('\n') == 1
    assert code == 2 and said in out.err and is_one_line and not out.out
    assert not (tmp_path/'runs').exists()


def test_two_processes_find_the_same(tmp_path):
    tiny = replace(paper.recipe('digits@100/resnet8'), seeds=2, iterations=1,
                   epochs=1, retrain_epochs=1, distill_epochs=1)
    found = []
    for jobs in (1, 2):
        path = studies.run_study('student', tiny, tmp_path/f'runs{jobs}', rt=Runtime(threads=1),
                                 say=lambda line: None, jobs=jobs)
        found.append(json.loads(path.read_text(encoding='utf-8')))
    one, two = found
    assert one['seeds'] == two['seeds'] and len(one['seeds']) == 2
