"""Draw `nbs/images/kesi.svg`, the picture on the landing page, from the digits study's report.

    python docs/picture.py           draws it
    python docs/picture.py --check   exits with 1 when picture and report are out of step
"""
import json, sys
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent/'nbs'
REPORT, PICTURE = NBS/'reproduce'/'results'/'digits.json', NBS/'images'/'kesi.svg'
OUT_OF_STEP = 'kesi.svg is out of step with the digits report; `python docs/picture.py` draws it'

def main(args) -> int:
    if not REPORT.exists():
        print(f'{REPORT.name} is not there yet: the picture stays as it is')
        return 0
    from kesi.report import draw_kesi
    drawn = draw_kesi(json.loads(REPORT.read_text(encoding='utf-8')))
    if '--check' in args:
        same = PICTURE.exists() and PICTURE.read_text(encoding='utf-8') == drawn
        if not same: print(OUT_OF_STEP)
        return int(not same)
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(drawn, encoding='utf-8')
    return 0

if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
