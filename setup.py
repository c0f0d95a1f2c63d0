"Installs kesi; everything it says about the package comes from settings.ini."
import shlex
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='], interpolation=None)
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
listed = lambda name: shlex.split(cfg.get(name, ''))
named = [name for name in cfg if name.endswith('_requirements')]
extras = {name.removesuffix('_requirements'): listed(name) for name in named}
readme = Path('README.md')
package_data = ['networks/*/*', 'order-*.safetensors']  # networks, the official order of datasets

setup(
    name=cfg['lib_name'], version=cfg['version'],
    description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], license='Apache-2.0',
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown',
    packages=find_packages(include=['kesi', 'kesi.*']), zip_safe=False,
    package_data={'kesi': package_data},
    python_requires='>=' + cfg['min_python'],
    install_requires=listed('requirements'), extras_require=extras,
    entry_points={'console_scripts': cfg.get('console_scripts', '').split('\n')},
    classifiers=['Development Status :: 3 - Alpha',
                 'Intended Audience :: Developers',
                 'Intended Audience :: Science/Research',
                 'License :: OSI Approved :: Apache Software License',
                 'Programming Language :: Python :: 3'],
)
