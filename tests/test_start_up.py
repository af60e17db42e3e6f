"""`import retrofit` imports no other module, and a command no torch before its words are right."""

import ast
import importlib
import itertools
import json
import pickle
import pkgutil
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import CONTEXT

import retrofit
from retrofit.cli.arguments import COMMANDS

HEAVY = {"torch", "torchvision", "numpy", "PIL", "safetensors", "jinja2", "tqdm", "timm", "onnx"}
FUNCTIONS = ["calibrate", "convert", "drift", "fold", "plan", "restore", "verify"]
# Of these names, or nearly, and such as import many others.
MODULES = ["calibration.calibrate", "checking.drift", "cli.convert", "cli.restore", "plans"]


def python(code):
    """What a new interpreter prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def command(*words):
    """The exit code of `retrofit WORDS`, its stderr, and the packages that it has imported."""
    code = f"""
import sys
from retrofit.cli import main
try:
    status = main({words!r})
except SystemExit as stop:
    status = stop.code
print(*{{name.partition(".")[0] for name in sys.modules}}, file=sys.stderr)
sys.exit(status)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    *said, packages = done.stderr.splitlines()
    return done.returncode, done.stdout, said, set(packages.split())


def test_import_retrofit_imports_no_other_module_until_a_name_is_used():
    before, after, first = python("""
import json, sys, torch
before = set(sys.modules)
import retrofit
after = set(sys.modules)
retrofit.freeze_statistics
print(json.dumps([len(before), sorted(after - before), sorted(set(sys.modules) - after)]))
""")
    assert before > 100
    assert after == ["retrofit"]
    assert "retrofit.finetuning" in first
    assert {name.partition(".")[0] for name in first} == {"retrofit"}  # torchvision, say, is not


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_does_not_wait_for_torch(name):
    words = [name, "--help"] if name else ["--help"]
    code, out, err, packages = command(*words)
    assert (code, err) == (0, [])
    assert out.startswith(f"usage: retrofit {name or ''}")
    assert packages & HEAVY == set()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--version"], 0, ""),
        (["--json"], 2, "required: COMMAND"),
        (["convrt"], 2, "convrt is no command: did you mean convert?"),
        (
            ["plan", "vgg16", "--layuot", "graph"],
            2,
            "unrecognized arguments: --layuot: did you mean --layout?",
        ),
        (["plan"], 2, "required: model"),
        (["plan", "vgg16", "--layout", "tree"], 2, "argument --layout: invalid choice: 'tree'"),
        (["plan", "vgg16", "--data", ""], 2, "an argument is empty"),
        (["convert", "vgg16", "--data", "d"], 2, "required: --output"),
        (["adapt", "a.pth", "--device", "cuda", "--images", "0"], 2, "0 is not between 1 and"),
    ],
)
def test_a_mistake_in_the_arguments_is_told_without_torch(words, status, message):
    code, out, err, packages = command(*words)
    assert code == status
    assert packages & HEAVY == set()
    if message:
        assert len(err) == 1
        assert message in err[0]
    else:
        assert out == f"retrofit {retrofit.__version__}\n"


def test_names_are_found_where_type_checkers_find_them():
    tree = ast.parse(Path(retrofit.__file__).read_text())
    found = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("retrofit.")
        for alias in node.names
    }
    assert sorted(found) == sorted(retrofit.__all__)
    for name, module in found.items():
        assert getattr(retrofit, name) is getattr(importlib.import_module(module), name)


def test_no_module_has_a_public_name():
    """Else importing it would put it in the place of the function."""
    modules = {module.name for module in pkgutil.iter_modules(retrofit.__path__)}
    assert "calibration" in modules
    assert modules & set(retrofit.__all__) == set()


def import_in_order(order, results):
    """In a process of its own, as if none of retrofit had been imported there."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "retrofit"]:
        del sys.modules[name]
    kinds = []
    for module in order:
        importlib.import_module(f"retrofit.{module}")
        fresh = sys.modules["retrofit"]
        if module != order[0]:  # the first finds no function in its place, the others do
            kinds += [type(getattr(fresh, name)).__name__ for name in FUNCTIONS]
    space = {}
    exec("from retrofit import *", space)  # noqa: S102
    kinds += [type(space[name]).__name__ for name in FUNCTIONS]
    results.send((set(kinds), dir(fresh), sorted(space.keys() - {"__builtins__"})))


@pytest.mark.parametrize("order", [*itertools.permutations(MODULES)][::30])
def test_functions_stay_functions_in_whatever_order_modules_are_imported(order):
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=import_in_order, args=(order, sender))
    process.start()
    sender.close()
    kinds, listed, brought = receiver.recv()
    process.join()
    assert kinds == {"function"}
    assert listed == brought == sorted(retrofit.__all__)


def test_a_misspelt_name_is_an_attribute_error_that_tells_the_nearest():
    with pytest.raises(AttributeError, match="module 'retrofit' has no attribute 'calibrat'"):
        retrofit.calibrat  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'calibrat' from 'retrofit'"):
        from retrofit import calibrat  # noqa: F401, PLC0415


def test_help_in_python_describes_every_name():
    text = pydoc.plain(pydoc.render_doc(retrofit))
    assert [name for name in dir(retrofit) if name not in text] == ["__version__"]
    assert f"VERSION\n    {retrofit.__version__}\n" in text
    assert re.search(r"add_batchnorm\(\s*model\b", text)  # Python 3.13 breaks long signatures


@pytest.mark.parametrize("name", sorted(set(retrofit.__all__) - {"__version__"}))
def test_what_was_pickled_by_reference_is_found_again(name):
    thing = getattr(retrofit, name)
    assert pickle.loads(pickle.dumps(thing)) is thing  # noqa: S301
