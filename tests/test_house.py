"""Rules that hold for the repository as a whole."""
import ast
import json
import os
import pathlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

import cpool_vision

if sys.version_info >= (3, 11):
    import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'cpool_vision'
OURS = ('cpool_vision', 'benchmarks', 'tests')

# what each subpackage may import of the package; the root itself registers the models and may be imported to that end
ARROWS = {
    'ops': set(),
    'layers': {'ops'},
    'models': {'layers', 'ops'},
    'inspect': {'layers', 'ops'},
    'retrofit': {'inspect', 'layers', 'models'},
    'data': set(),
    'engine': {'data', 'inspect'},
    'cli': {'data', 'engine', 'inspect', 'retrofit'},
    'profile': {'ops', 'engine', 'inspect', 'cli'},
}
# the same inside the engine
ROOMS = {
    'settings': set(),
    'distributed': {'settings'},
    'device': {'distributed', 'settings'},
    'data': {'device', 'settings'},
    'checkpoints': {'distributed', 'settings'},
    'model': {'checkpoints', 'device', 'settings'},
    'tracking': {'checkpoints', 'device', 'distributed', 'settings'},
    'validate': {'data', 'device', 'model', 'settings', 'tracking'},
    'train': {'checkpoints', 'data', 'device', 'distributed', 'model', 'settings', 'tracking', 'validate'},
}

WITHOUT_TIMM = ('ops', 'layers', 'inspect')
LAZY_TIMM = 'layers/rivals.py'  # timm's SelectiveKernel, imported when one is built
PRIVATE_TIMM = 'models/_compat.py'


def sources(*folders: str) -> list[pathlib.Path]:
    """Python files of the folders and of the root."""
    return [*ROOT.glob('*.py'), *(path for folder in folders for path in sorted((ROOT / folder).rglob('*.py')))]


def parsed(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(encoding='utf-8'), str(path))


def run_python(code: str, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, '-c', code]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)  # noqa: S603


def test_versions_agree() -> None:
    version = cpool_vision.__version__
    changelog = re.findall(r'^## (\S+)', (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8'), re.MULTILINE)
    assert changelog[0] == version
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text(encoding='utf-8'))
    assert citation['version'] == version and citation['cff-version'] == '1.2.0'
    assert {'message', 'title', 'authors', 'license'} <= set(citation)


@pytest.mark.skipif(sys.version_info < (3, 11), reason='tomllib is part of Python 3.11')
def test_metadata() -> None:
    config = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))
    project = config['project']
    assert 'version' in project['dynamic']
    assert config['tool']['setuptools']['dynamic']['version']['attr'] == 'cpool_vision.version.__version__'
    assert project['license'] == 'Apache-2.0' == yaml.safe_load((ROOT / 'CITATION.cff').read_text())['license']
    assert 'Apache License' in (ROOT / 'LICENSE').read_text(encoding='utf-8')
    for target in project['scripts'].values():
        module, function = target.split(':')
        path = ROOT / (module.replace('.', '/') + '.py')
        assert any(isinstance(node, ast.FunctionDef) and node.name == function for node in parsed(path).body), target


def test_ci_runs_the_readme_command() -> None:
    assert 'make test' in (ROOT / 'README.md').read_text(encoding='utf-8')
    script = ROOT / '.ci' / 'run'
    assert re.search(r'\bmake test\b', script.read_text(encoding='utf-8')) and script.stat().st_mode & 0o100


def unsafe_loads(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every call that could run code from a file."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        true = {key for key, value in options.items() if isinstance(value, ast.Constant) and value.value is True}
        if name == 'torch.load' and 'weights_only' not in true:
            yield node.lineno, 'torch.load without weights_only=True'
        if name in ('eval', 'exec', '__import__') or name.rpartition('.')[0] in ('pickle', 'cPickle', 'dill', 'joblib'):
            yield node.lineno, name
        if re.fullmatch(r'yaml\.(unsafe_load|full_load|load)(_all)?', name) or 'allow_pickle' in true:
            yield node.lineno, name


def test_no_unsafe_loads() -> None:
    found = [f'{path}:{line}: {what}' for path in sources('cpool_vision', 'benchmarks', 'docs', 'models')
             for line, what in unsafe_loads(parsed(path))]
    assert found == []


@pytest.mark.parametrize('code, count', [
    ('torch.load(f)', 1),
    ('torch.load(f, weights_only=False)', 1),
    ('torch.load(f, weights_only=flag)', 1),
    ('torch.load(f, "cpu", weights_only=True)', 0),
    ('yaml.load(f, yaml.SafeLoader)', 1),
    ('yaml.unsafe_load(f)', 1),
    ('yaml.safe_load(f)', 0),
    ('pickle.loads(b)', 1),
    ('pickle.Unpickler(f).load()', 1),
    ('np.load(f, allow_pickle=True)', 1),
    ('np.load(f)', 0),
    ('eval(s)', 1),
    ('model.eval()', 0),
    ('try: pass\nexcept pickle.UnpicklingError: pass', 0),
])
def test_unsafe_loads_are_recognized(code: str, count: int) -> None:
    assert len(list(unsafe_loads(ast.parse(code)))) == count


def imports(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Absolute (module, name) of every import in a file, also inside functions; name is '' for `import module`."""
    package = path.relative_to(ROOT).with_suffix('').parts[:-1]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, '') for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package) - node.level + 1] if node.level else ()
            module = '.'.join([*above, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def subpackage_of(module: str, name: str) -> str | None:
    """Subpackage of ours that an import reaches, None for another package, '' for the root."""
    parts = [*module.split('.'), *([name] if name else [])]
    if parts[0] != 'cpool_vision':
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ARROWS else ''


def room_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE / 'engine').parts[0].removesuffix('.py')


def wrong_arrows(path: pathlib.Path) -> list[str]:
    """Imports from one room of the engine into another that no arrow allows."""
    here, wrong = room_of(path), []
    for module, name in imports(path):
        parts = [*module.split('.'), name]
        reached = parts[2] if parts[:2] == ['cpool_vision', 'engine'] and len(parts) > 2 else here
        if reached != here and reached not in ROOMS[here]:
            wrong.append(f'{path}: {here} imports {module} {name}')
    return wrong


def wrong_imports(path: pathlib.Path) -> list[str]:
    here = path.relative_to(PACKAGE).parts[0]
    wrong = []
    for module, name in imports(path):
        reached = subpackage_of(module, name)
        if reached and reached != here and reached not in ARROWS[here]:
            wrong.append(f'{path}: {here} imports {module} {name}')
        if module.split('.')[0] == 'timm' and here in WITHOUT_TIMM and not path.match(LAZY_TIMM):
            wrong.append(f'{path}: {here} imports timm')
        private = [part for part in (*module.split('.'), name) if part.startswith('_') and not part.startswith('__')]
        if module.split('.')[0] == 'timm' and private and not path.match(PRIVATE_TIMM):
            wrong.append(f'{path}: private {module} {name} belongs into {PRIVATE_TIMM}')
    return wrong


def test_every_subpackage_has_its_arrows() -> None:
    assert {path.parent.name for path in PACKAGE.glob('*/__init__.py')} == set(ARROWS)


@pytest.mark.parametrize('here', sorted(ARROWS))
def test_imports_run_one_way(here: str) -> None:
    paths = sorted((PACKAGE / here).rglob('*.py'))
    assert paths and [line for path in paths for line in wrong_imports(path)] == []


def test_the_rooms_of_the_engine_form_no_cycle() -> None:
    paths = sorted((PACKAGE / 'engine').rglob('*.py'))
    assert {room_of(path) for path in paths} - {'__init__'} == set(ROOMS)
    assert [line for path in paths if room_of(path) in ROOMS for line in wrong_arrows(path)] == []
    left = dict(ROOMS)
    while left:
        free = [room for room, reached in left.items() if not reached & set(left)]
        assert free, f'a cycle among {", ".join(left)}'
        for room in free:
            del left[room]


@pytest.mark.parametrize('code, wrong', [
    ('from ..train.loop import Run', 1), ('from .. import model', 1), ('from ..device import Precision', 0),
    ('from cpool_vision.engine.validate import metrics', 1), ('from .keyed import KeyedDataset', 0),
    ('from cpool_vision.errors import UserError', 0)])
def test_wrong_arrows_are_recognized(code: str, wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], 'parsed', lambda path: ast.parse(code))
    assert len(wrong_arrows(PACKAGE / 'engine' / 'data' / 'example.py')) == wrong


@pytest.mark.parametrize('here, code, wrong', [
    ('ops', 'from ..layers import ContextPool2d', 1),
    ('ops', 'def f():\n    import timm', 1),
    ('ops', 'from . import reference', 0),
    ('layers', 'from ..ops import context_pool2d', 0),
    ('layers', 'from .. import models', 1),
    ('layers', 'from cpool_vision.engine.model import x', 1),
    ('layers', 'from cpool_vision.errors import UserError', 0),
    ('engine', 'import cpool_vision.models', 1),
    ('engine', 'import cpool_vision', 0),
    ('engine', 'from timm.data._info import x', 1),
    ('engine', 'from timm.data import create_loader', 0),
    ('data', 'from ..engine import model', 1),
])
def test_wrong_imports_are_recognized(here: str, code: str, wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], 'parsed', lambda path: ast.parse(code))
    assert len(wrong_imports(PACKAGE / here / 'example.py')) == wrong


def test_public_names_have_docstrings() -> None:
    bare = []
    for path in sorted(PACKAGE.rglob('*.py')):
        for node in parsed(path).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'):
                if not ast.get_docstring(node):
                    bare.append(f'{path.relative_to(ROOT)}:{node.lineno} {node.name}')
    assert bare == []


def long_functions(tree: ast.AST, most: int = 60) -> list[str]:
    """Functions with more lines, docstring included."""
    return [f'{node.name} {node.end_lineno - node.lineno + 1}' for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno >= most]


def test_functions_and_files_of_the_engine_stay_short() -> None:
    paths = [path for room in ('engine', 'cli') for path in sorted((PACKAGE / room).rglob('*.py'))]
    assert {str(path): long for path in paths if (long := long_functions(parsed(path)))} == {}
    assert [str(path) for path in paths if len(path.read_text(encoding='utf-8').splitlines()) > 350] == []


def test_long_functions_are_found() -> None:
    text = 'def f():\n' + '    x = 1\n' * 60
    assert long_functions(ast.parse(text)) == ['f 61'] and not long_functions(ast.parse(text[:-10]))


# PyTorch has one error for every end of a worker, and only words say which
_DECIDING = ('replace', 'startswith', 'endswith', 'search', 'match', 'find')
BY_WORDS = {'engine/data/worker.py'}


def decisions_by_words(tree: ast.AST) -> Iterator[int]:
    """Lines that decide by the words of an error, or change them: `'x' in str(error)`, `str(error).replace(...)`."""
    for handler in ast.walk(tree):
        if not isinstance(handler, ast.ExceptHandler) or handler.name is None:
            continue
        texts = {f'str({handler.name})', f'repr({handler.name})', f'{handler.name}.args[0]', f'{handler.name}.msg'}
        for node in ast.walk(handler):
            if isinstance(node, ast.Assign) and any(text in ast.unparse(node.value) for text in texts):
                texts |= {each.id for each in node.targets if isinstance(each, ast.Name)}
        for node in ast.walk(handler):
            if isinstance(node, ast.Compare) and texts & {ast.unparse(each) for each in ast.walk(node)}:
                yield node.lineno
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                inside = {ast.unparse(each) for each in (node.func.value, *node.args)}
                if node.func.attr in _DECIDING and texts & inside:
                    yield node.lineno


def test_no_decision_hangs_on_the_words_of_an_error() -> None:
    found = [f'{path}:{line}' for path in sources('cpool_vision', 'benchmarks')
             if not any(path.match(name) for name in BY_WORDS) for line in decisions_by_words(parsed(path))]
    assert found == []
    assert all(list(decisions_by_words(parsed(PACKAGE / name))) for name in BY_WORDS)


@pytest.mark.parametrize('code, count', [
    ("if 'x' in str(e): pass", 1), ("raise A(str(e).replace('a', 'b'))", 1), ("t = str(e)\n if R.search(t): pass", 1),
    ("if str(e).startswith('x'): pass", 1), ("if e.args[0] == 'x': pass", 1),
    ("raise A(f'{e}: do so') from e", 0), ("raise A(' '.join(str(e).split()))", 0), ('if e.errno == 2: pass', 0)])
def test_decisions_by_words_are_found(code: str, count: int) -> None:
    assert len(list(decisions_by_words(ast.parse(f'try: pass\nexcept E as e:\n {code}')))) == count


def test_files_stay_short() -> None:
    lengths = {path: len(path.read_text(encoding='utf-8').splitlines()) for path in sources(*OURS)}
    assert {str(path): length for path, length in lengths.items() if length > 450} == {}


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in (ROOT / 'tests').rglob('test_*.py')]
    assert sorted(names) == sorted(set(names))


BLOCK = '''
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {absent}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Absent())
'''


def test_operator_works_without_timm_and_triton() -> None:
    code = BLOCK.format(absent=('timm', 'triton')) + '''
import torch
from cpool_vision.ops import context_pool2d
y = context_pool2d(torch.ones(1, 2, 5, 5), torch.randn(1, 1, 5, 5), torch.full((1, 1, 5, 5), 2.0))
torch.testing.assert_close(y, torch.ones_like(y))
assert 'timm' not in sys.modules
names = {}
exec('from cpool_vision import *', names)
assert 'ContextPool2d' in names and 'add_context_pool' not in names
try:
    import timm
except ModuleNotFoundError:
    print('absent')
'''
    result = run_python(code, cwd=ROOT)
    assert result.stdout.strip() == 'absent', result.stderr


@pytest.fixture(scope='module')
def fresh() -> dict[str, Any]:
    """What a process that starts anew tells while it imports one thing after the other, without network."""
    code = '''
import json, socket, sys, warnings
def refuse(*args, **kwargs):
    raise AssertionError('network')
socket.getaddrinfo = socket.socket.connect = refuse
import urllib.request
urllib.request.build_opener = refuse
warnings.simplefilter('error')
import cpool_vision, timm
told = {'models': len(timm.list_models('*cpool*'))}
import contextlib, importlib, io
told['help'] = {}
for name in ('cli.plot', 'cli.inspect', 'cli.retrofit', 'profile.__main__', 'cli.train', 'cli.validate'):
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        importlib.import_module(f'cpool_vision.{name}').main(['--help'])
    loaded = {'matplotlib', 'scipy', 'torchmetrics', 'transformers', 'albumentations', 'cv2'} & set(sys.modules)
    told['help'][name] = [*sorted(loaded), *([] if 'usage:' in shown.getvalue() else ['no help'])]
import cpool_vision.inspect.draw, cpool_vision.cli.inspect
told['matplotlib'] = 'matplotlib' in sys.modules
import cpool_vision.data, cpool_vision.engine.train.fit, cpool_vision.data.augment
told['early'] = sorted({'albumentations', 'cv2'} & set(sys.modules))
told['metrics'] = 'torchmetrics' in sys.modules
from cpool_vision.data.augment import Pipeline
Pipeline('light')
told['late'] = 'albumentations' in sys.modules
print(json.dumps(told))
'''
    env = {key: value for key, value in os.environ.items() if key != 'NO_ALBUMENTATIONS_UPDATE'}
    result = run_python(code, cwd=ROOT, env=env)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_importing_the_package_registers_the_models(fresh: dict[str, Any]) -> None:
    assert fresh['models'] >= 15


def test_drawing_is_imported_only_when_drawing(fresh: dict[str, Any]) -> None:
    assert fresh['matplotlib'] is False


def test_help_waits_for_nothing_that_only_work_needs(fresh: dict[str, Any]) -> None:
    assert len(fresh['help']) == 6 and not any(fresh['help'].values()), fresh['help']
    assert fresh['metrics']  # training does need it


def test_albumentations_is_imported_late_and_asks_nobody(fresh: dict[str, Any]) -> None:
    assert fresh['early'] == [] and fresh['late'] is True


@pytest.mark.slow
def test_wheel_installs_into_an_empty_environment(tmp_path: pathlib.Path) -> None:
    def run(*command: str, **kwargs) -> str:
        result = subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)  # noqa: S603
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    # a copy, so that nothing is left in the tree and nothing left there gets in
    tree = tmp_path / 'tree'
    listed = run('git', 'ls-files', '--cached', '--others', '--exclude-standard', cwd=ROOT).splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', str(tmp_path / 'dist'), cwd=tree)
    wheel, = (tmp_path / 'dist').glob('*.whl')
    sdist, = (tmp_path / 'dist').glob('*.tar.gz')
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split('/')[0] for name in names} == {'cpool_vision', wheel.name.rsplit('-', 3)[0] + '.dist-info'}
    assert {f'cpool_vision/{each}' for each in ('py.typed', 'models/resnet.py', 'configs/quickstart.yaml')} \
        <= set(names)
    members = run('tar', 'tzf', str(sdist)).splitlines()
    inside = {name.split('/', 1)[-1] for name in members}
    assert {'CHANGELOG.md', 'tests/test_house.py', 'docs/index.md', 'examples/plain_cnn.py', 'train.py'} <= inside
    assert not [name for name in inside if name.endswith(('.safetensors', '.pyc')) or name.startswith('output/')]

    # dependencies come from the running environment by a path file: its own .pth files are not followed
    run(sys.executable, '-m', 'venv', '--without-pip', str(tmp_path / 'venv'))
    python = str(tmp_path / 'venv' / 'bin' / 'python')
    run(sys.executable, '-m', 'pip', '--python', python, 'install', '--no-deps', '--no-index', str(wheel))
    site = pathlib.Path(run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').strip())
    ours = run(sys.executable, '-c', 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])').strip()
    (site / 'dependencies.pth').write_text(ours + '\n')
    code = '''
import cpool_vision, timm, torch
model = timm.create_model('vit_micro_cpool_patch4_32').eval()
print(cpool_vision.__file__, tuple(model(torch.zeros(1, 3, 32, 32)).shape))
'''
    where, shape = run(python, '-c', code, cwd=tmp_path).strip().split(' ', 1)
    assert pathlib.Path(where).is_relative_to(site) and shape == '(1, 10)'
    for script in ('cpool-train', 'cpool-validate', 'cpool-inspect', 'cpool-plot', 'cpool-retrofit', 'cpool-profile'):
        command = str(tmp_path / 'venv' / 'bin' / script)
        assert run(command, '--version', cwd=tmp_path).strip() == f'cpool_vision {cpool_vision.__version__}'
    train = str(tmp_path / 'venv' / 'bin' / 'cpool-train')
    assert 'quickstart' in run(train, '--config', 'list', cwd=tmp_path)
    pool = ['cpool-inspect', 'vit_micro_cpool_patch4_32', '--num-images', '1', '--json', 'numbers.json']
    run(str(tmp_path / 'venv' / 'bin' / pool[0]), *pool[1:], cwd=tmp_path)
    assert json.loads((tmp_path / 'numbers.json').read_text())['layers']
