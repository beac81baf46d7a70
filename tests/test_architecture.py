"""The arrows between the folders, and what else keeps the house readable."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import userdiff

PACKAGE = Path(userdiff.__file__).parent
SOURCES = sorted(path.relative_to(PACKAGE.parent).as_posix() for path in PACKAGE.rglob("*.py"))
BASE = {"conditions", "config", "identity", "seeds", "shard", "shutdown", "text"}
FOLDERS = {"dataset", "demo", "diffusion", "job", "judge", "tools"}
ARROWS = {  # folder, or module beside the folders -> what it may import of the package
    "config": {"shard", "text"},
    "dataset": BASE,
    "diffusion": BASE,
    "tools": {*BASE, "dataset", "diffusion.generate", "diffusion.model"},
    "judge": {*BASE, "dataset", "diffusion.conditioning"},
    "job": {*BASE, "dataset", "diffusion", "tools.preview"},
    "cli": {*BASE, "dataset", "job", "judge", "tools"},
    "__main__": {"cli"},
    "demo": {*BASE, "dataset", "diffusion", "tools", "cli"},
    **{name: set() for name in ("__init__", "conditions", "identity", "seeds", "shard", "shutdown", "text")},
}
WITH_TORCH = {"diffusion", "job", "judge", "demo", "tools.reproduce"}
HEAVY = {"torch", "diffusers", "accelerate", "safetensors", "transformers"}


def imports(source: str) -> set[str]:
    """Return what a file imports, wherever in it but for the type checker; modules of the package without `userdiff.`."""
    tree = ast.parse((PACKAGE.parent / source).read_text(encoding="utf-8"))
    checks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    unseen = {child for check in checks for child in ast.walk(check)}
    names: set[str] = set()
    for node in ast.walk(tree):
        if node in unseen:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}, line {node.lineno}: imports are absolute"
            is_module = [(PACKAGE.parent / Path(*f"{node.module}.{alias.name}".split("."))) for alias in node.names]
            modules = [path.with_suffix(".py").exists() or path.is_dir() for path in is_module]
            names |= {
                f"{node.module}.{a.name}" if m else str(node.module) for a, m in zip(node.names, modules, strict=True)
            }
    return {name.removeprefix("userdiff.") for name in names if name.partition(".")[0] not in sys.stdlib_module_names}


def place(source: str) -> str:
    """Return a file's name as imports have it: `dataset.rows`."""
    return ".".join(Path(source).relative_to("userdiff").with_suffix("").parts)


def is_within(name: str, allowed: set[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in allowed)


@pytest.mark.parametrize("source", SOURCES)
def test_a_file_imports_along_the_arrows(source):
    where = place(source)
    home = where.partition(".")[0]
    ours = {name for name in imports(source) if is_within(name, {*ARROWS, *FOLDERS})}
    assert {name for name in ours if not is_within(name, {*ARROWS[home], home})} == set()
    libraries = {name.partition(".")[0] for name in imports(source)} & HEAVY
    assert not libraries or is_within(where, WITH_TORCH)
    assert "accelerate" not in libraries or is_within(where, {"job.run", "demo"})
    text = (PACKAGE.parent / source).read_text(encoding="utf-8")
    assert "import_module" not in text or where == "__init__"  # would escape this test


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_a_folder_has_a_sentence_few_modules_and_no_circle(folder):
    sources = [source for source in SOURCES if source.startswith(f"userdiff/{folder}/")]
    modules = {place(source): imports(source) for source in sources if not source.endswith("__init__.py")}
    assert ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text()))
    assert 0 < len(modules) <= 10
    TopologicalSorter({name: found & modules.keys() for name, found in modules.items()}).prepare()


def test_the_arrows_are_read_wherever_they_stand():
    """The reading itself: without it, an empty answer would pass for an innocent file."""
    assert {"job.run", "tools.merge", "config"} <= imports("userdiff/cli.py")
    assert "diffusers" not in imports("userdiff/diffusion/sampler.py")  # for the type checker alone


def test_what_needs_no_torch_does_not_load_it():
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\nprint(*sys.modules)"
    light = [place(source) for source in SOURCES if not is_within(place(source), {*WITH_TORCH, "__main__"})]
    names = [f"userdiff.{name}".removesuffix(".__init__") for name in light]
    done = subprocess.run([sys.executable, "-c", code, *names], check=False, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert set(names) <= loaded, done.stderr
    assert loaded.isdisjoint({*HEAVY, "tqdm"})


def test_the_script_is_thin():
    text = (PACKAGE.parent / "batch_generate.py").read_text()
    assert len(text.splitlines()) <= 20
    assert text.count("import") == 2


@pytest.mark.parametrize("name", userdiff.__all__)
def test_public_names_are_there(name):
    assert getattr(getattr(userdiff, name), "__name__", "__version__") == name


def test_the_public_names_are_those_a_user_needs():
    classes = {"JobConfig", "UsageError", "UserConditionEncoder"}
    functions = {"generate_samples", "item_seed", "load_model", "make_image", "parse_args"}
    assert set(userdiff.__all__) == {*classes, *functions, "__version__"}
    with pytest.raises(AttributeError, match="module 'userdiff' has no attribute 'generate_sample'"):
        _ = userdiff.generate_sample
