"""The reading order: the one list that the side bar and the API index follow."""
from pathlib import Path

STORY, ENGINE, USE, REPRODUCTION = 'The story', 'Engine room', 'Use it', 'Reproduction'

_ENGINE = ('runtime', 'data', 'downloads', 'other_networks', 'authors_files', 'sensitivity',
           'training', 'folding', 'store', 'report', 'scale', 'bench', 'cli', 'studies',
           'studies_controls', 'studies_families')
_USE = ('your_own_network', 'should_i_use_it', 'compress', 'any_network', 'criteria', 'deploy',
        'zoo', 'playground', 'slurm')
_REPRODUCTION = ('cifar10', 'digits', 'fashion_mnist', 'counts', 'diversity', 'landscape',
                 'restart_height', 'teachers', 'views', 'how_far', 'speed', 'cifar',
                 'tiny_imagenet', 'beyond', 'families')

def _found(nbs, folder, names):
    "The pages of a folder in the order of their names; a page that is not in the list is an error."
    there = {p.stem for p in (nbs/folder).glob('*.ipynb')}
    if left_out := there - set(names):
        raise SystemExit(f'docs/contents.py does not say where {folder}/{min(left_out)} belongs')
    return [f'{folder}/{n}' for n in names if n in there]

def sections(nbs: Path) -> dict[str, list[str]]: # caption → pages
    "All pages, in the order in which they are read."
    story = sorted(p.stem for p in nbs.glob('[0-9]*.ipynb'))
    return {STORY: story, USE: _found(nbs, 'use', _USE),
            REPRODUCTION: _found(nbs, 'reproduce', _REPRODUCTION),
            ENGINE: _found(nbs, 'engine', _ENGINE),
            'Reference': ['glossary', 'references', 'api/index']}
