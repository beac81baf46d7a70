"""The arrows between modules, and the sizes that keep them readable."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import userdiff

PACKAGE = Path(userdiff.__file__).parent
SCRIPT = PACKAGE.parent / "batch_generate.py"

TORCH_FREE = {
    "parsing",
    "config",
    "planning",
    "images",
    "table",
    "manifest",
    "record",
    "thumbnails",
    "facts",
    "gallery",
    "audit",
    "agreement",
    "joining",
    "halting",
    "likeness",
    "inspection",
    "findings",
}
STAGES = {
    *TORCH_FREE,
    "conditioning",
    "models",
    "sampling",
    "training",
    "loading",
    "launcher",
    "contact",
    "coordination",
    "cuda_graph",
    "acceleration",
    "computing",
}

# module -> what it may import besides the standard library: names without a dot in front are modules of the package
# where there is one of that name, else other packages
MAY_IMPORT = {
    "__init__": set(),
    "__main__": {"cli"},
    "parsing": set(),
    "config": {"parsing"},
    "planning": {"numpy"},
    "images": {"numpy", "PIL"},
    "table": {"numpy", "images"},
    "manifest": {"numpy", "planning", "images", "table"},
    "record": {"filelock"},
    "thumbnails": {"PIL"},
    "facts": {"parsing", "record", "table"},
    "gallery": {"PIL", "facts", "manifest", "record", "table", "thumbnails"},
    "audit": {"numpy", "facts", "images", "manifest", "parsing", "record", "table"},
    "agreement": {"manifest", "record", "table"},
    "joining": {"agreement", "gallery", "halting", "images", "manifest", "parsing", "record", "table"},
    "likeness": {"numpy"},
    "inspection": {"numpy", "PIL", "audit", "likeness", "manifest"},
    "findings": {"facts", "inspection", "likeness"},
    "halting": set(),
    "conditioning": {"torch", "safetensors"},
    "models": {"torch", "diffusers"},
    "sampling": {"torch"},
    "cuda_graph": {"torch"},
    "acceleration": {"cuda_graph", "torch"},
    "training": {"conditioning", "models", "planning", "sampling", "torch"},
    "loading": {
        "acceleration",
        "config",
        "conditioning",
        "cuda_graph",
        "models",
        "parsing",
        "record",
        "sampling",
        "torch",
        "diffusers",
    },
    "computing": {
        "acceleration",
        "config",
        "cuda_graph",
        "halting",
        "loading",
        "planning",
        "sampling",
        "table",
        "numpy",
        "torch",
    },
    "reproducing": {
        "computing",
        "config",
        "images",
        "loading",
        "manifest",
        "parsing",
        "planning",
        "record",
        "table",
        "numpy",
        "torch",
    },
    "launcher": {"torch.distributed"},
    "contact": {"torch.distributed"},
    "coordination": {"contact", "halting", "launcher", "torch.distributed"},
    "console": {
        "config",
        "coordination",
        "facts",
        "gallery",
        "halting",
        "images",
        "loading",
        "manifest",
        "parsing",
        "planning",
        "progress",
        "table",
        "tqdm",
    },
    "sharing": {"config", "coordination", "halting"},
    "progress": {"tqdm"},
    "folder": {
        "config",
        "console",
        "coordination",
        "gallery",
        "halting",
        "images",
        "launcher",
        "manifest",
        "parsing",
        "planning",
        "record",
        "sharing",
        "table",
    },
    "runner": {
        *STAGES,
        "console",
        "folder",
        "progress",
        "sharing",
        "numpy",
        "PIL",
        "torch",
        "diffusers",
        "accelerate",
        "tqdm",
    },
    "cli": {*TORCH_FREE, "coordination", "progress", "runner"},
}
LATE_IN_CLI = {"coordination", "progress", "runner"}  # inside the functions that need torch

MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
SOURCES = sorted(path.relative_to(PACKAGE.parent).as_posix() for path in [*PACKAGE.rglob("*.py"), SCRIPT])


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def statements(node, *, inside_functions=True):
    """Every node below this one, but what only a type checker runs; optionally without the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if not inside_functions and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from statements(child, inside_functions=inside_functions)


def imported_names(node):
    """Dotted names an import statement loads; a name taken from the package itself may be a module of it."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: imports are absolute"
        if node.module == "userdiff":
            return [f"userdiff.{alias.name}" for alias in node.names]
        return [str(node.module)]
    return []


def imports(source, *, inside_functions=True):
    """What a file imports besides the standard library; modules of the package without `userdiff.`."""
    tree = ast.parse((PACKAGE.parent / source).read_text(encoding="utf-8"))
    nodes = statements(tree, inside_functions=inside_functions)
    names = {name for node in nodes for name in imported_names(node)}
    return {name.removeprefix("userdiff.") for name in names if name.partition(".")[0] not in sys.stdlib_module_names}


def is_within(name, allowed):
    return any(name == other or name.startswith(f"{other}.") for other in allowed)


# The arrows


def test_every_module_has_its_place():
    assert set(MODULES) == set(MAY_IMPORT)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_place_allows(module):
    found = imports(f"userdiff/{module}.py")
    assert {name for name in found if not is_within(name, MAY_IMPORT[module])} == set()


def test_the_arrows_are_read_wherever_they_stand():
    """The reading itself: without it, an empty answer would pass for an innocent module."""
    assert {"torch", "planning", "images"} - imports("userdiff/manifest.py") == {"torch"}
    assert imports("userdiff/cli.py") >= LATE_IN_CLI
    assert "diffusers" not in imports("userdiff/sampling.py")  # for the type checker alone
    assert "config" in imports("userdiff/runner.py")


def test_the_command_line_loads_torch_late():
    assert not imports("userdiff/cli.py", inside_functions=False) & LATE_IN_CLI


@pytest.mark.parametrize("source", SOURCES)
def test_only_the_runner_and_the_script_know_accelerate(source):
    knows = is_within("accelerate", {name.partition(".")[0] for name in imports(source)})
    assert not knows or source in {"userdiff/runner.py", "batch_generate.py"}


def test_the_script_is_thin():
    assert imports("batch_generate.py") <= {"cli", "accelerate"}
    assert len(SCRIPT.read_text(encoding="utf-8").splitlines()) <= 20


@pytest.mark.parametrize("source", [source for source in SOURCES if "/demo/" not in source])
def test_nothing_imports_the_demo(source):
    assert not {name for name in imports(source) if is_within(name, {"demo"})}


@pytest.mark.parametrize("source", SOURCES)
def test_no_module_is_imported_by_a_name_that_is_computed(source):
    """`import_module` would escape this file; only the package's own public names are loaded that way."""
    text = (PACKAGE.parent / source).read_text(encoding="utf-8")
    assert "__import__" not in text
    assert "import_module" not in text or source == "userdiff/__init__.py"


def test_modules_without_torch_do_not_load_it():
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\nprint(*sys.modules)"
    names = ["userdiff", *(f"userdiff.{module}" for module in sorted({*TORCH_FREE, "cli"}))]
    finished = subprocess.run(
        [sys.executable, "-c", code, *names], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    loaded = set(finished.stdout.split())
    assert loaded >= set(names)
    assert loaded.isdisjoint({"torch", "diffusers", "accelerate", "transformers", "safetensors", "tqdm"})


# Public names


@pytest.mark.parametrize("name", userdiff.__all__)
def test_public_names_are_there(name):
    assert getattr(getattr(userdiff, name), "__name__", "__version__") == name


def test_the_public_names_are_those_a_user_needs():
    assert set(userdiff.__all__) == {
        "JobConfig",
        "UsageError",
        "UserConditionEncoder",
        "__version__",
        "generate_samples",
        "item_seed",
        "load_model",
        "make_image",
        "parse_args",
    }


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'userdiff' has no attribute 'generate_sample'"):
        _ = userdiff.generate_sample


# Sizes


@pytest.mark.parametrize("source", SOURCES)
def test_modules_and_functions_stay_short(source):
    text = (PACKAGE.parent / source).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert {node.name: n for node in functions if (n := node.end_lineno - node.lineno + 1) > 50} == {}
