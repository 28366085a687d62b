"""The direction of imports, the owners of heavy libraries, names, and the size of files, all over the syntax tree."""

import ast
import builtins
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("jaxsearch", "train", "serve", "configs")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80

# What everything speaks of, errors and records, lies below the ground floor.
FLOORS = {
    "errors": -2,
    "data.records": -1,
    "losses": 0,
    "metrics": 0,
    "buckets": 0,
    "sharding": 0,
    "files": 0,
    "data": 1,
    "nn": 1,
    "calibration": 1,
    "checkpoints": 2,
    "encoder": 2,
    "judge": 2,
    "ranker": 2,
    "retrieval": 3,
    "scoring": 3,
    "search": 4,
    "bundle": 5,
}
SAME_FLOOR = {(model, "checkpoints") for model in ("encoder", "judge", "ranker")}
"""A model reads and writes its own folder; otherwise root modules of one floor are strangers."""

REACH = {
    "configs": {"configs", "train"},
    "train": {"train", "jaxsearch"},
    "serve": {"serve", "jaxsearch"},
    "jaxsearch": {"jaxsearch"},
}
OWNERS = {
    "array_record": ("jaxsearch.data.builders",),
    "bm25s": ("jaxsearch.retrieval.lexical",),
    "fastapi": ("serve",),
    "gguf": ("jaxsearch.nn.gguf", "train.llama_scorer"),
    "grain": ("jaxsearch.data.batches",),
    "httpx": ("serve",),
    "huggingface_hub": ("jaxsearch.data.assets",),
    "ir_measures": ("jaxsearch.metrics",),
    "llama_cpp": ("train.llama_scorer",),
    "lmdb": (),
    "matplotlib": ("train.plots", "serve.load_report"),
    "jinja2": ("train.report_html",),
    "orjson": ("serve",),
    "prometheus_client": ("serve",),
    "psutil": ("train", "serve"),
    "pyarrow": ("jaxsearch.data.sources",),
    "pydantic": ("serve",),
    "ray": (),
    "scann": ("jaxsearch.retrieval.scann",),
    "sklearn": ("jaxsearch.calibration",),
    "starlette": ("serve",),
    "tensorboardX": ("train.loop",),
    "tensorflow": (),
    "tensorflow_datasets": ("jaxsearch.data.builders",),
    "torch": ("train.torch_peer", "train.torch_scorers"),
    "transformers": ("train.torch_peer", "train.torch_scorers"),
    "sentence_transformers": ("train.torch_scorers",),
    "uvicorn": ("serve",),
}
WITHOUT_JAX = ("serve.batcher", "jaxsearch.metrics", "jaxsearch.scoring.load")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}


@functools.cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def statements(module: str, *, at_import: bool) -> Iterator[ast.AST]:
    """Every node; with `at_import` those that run when the module is imported."""
    waiting: list[ast.AST] = [tree_of(module)]
    while waiting:
        node = waiting.pop()
        yield node
        if not (at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            waiting.extend(ast.iter_child_nodes(node))


@functools.cache
def imports_of(module: str, *, at_import: bool) -> frozenset[str]:
    """Dotted names that a module imports; a name imported from one of our packages counts as the module it is."""
    found = set()
    for node in statements(module, at_import=at_import):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide where a name comes from"
            assert node.module is not None
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            ours = full & MODULES.keys()
            found |= ours
            if full != ours:
                found.add(node.module)
    return frozenset(found)


def reached(module: str) -> set[str]:
    """What is imported, directly or not, when a module is; the packages around a module count."""
    seen, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in MODULES:
            waiting += imports_of(name, at_import=True)
            waiting += [parent for parent in [name.rpartition(".")[0]] if parent]
    return seen


def floor_of(module: str) -> int:
    inside = module.removeprefix("jaxsearch.")
    return FLOORS[inside] if inside in FLOORS else FLOORS[inside.split(".")[0]]


def is_stranger(importer: str, imported: str) -> bool:
    """Whether a module of the library must not know another one."""
    one, other = (
        importer.removeprefix("jaxsearch.").split("."),
        imported.removeprefix("jaxsearch.").split("."),
    )
    if one[0] == other[0] and floor_of(importer) >= floor_of(imported):
        return False
    return floor_of(imported) >= floor_of(importer) and (one[0], other[0]) not in SAME_FLOOR


@pytest.mark.parametrize("module", MODULES)
def test_a_folder_reaches_only_what_lies_before_it(module):
    folder = module.split(".")[0]
    ours = {name.split(".")[0] for name in imports_of(module, at_import=False)} & set(FOLDERS)
    assert ours <= REACH[folder]


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("jaxsearch.")])
def test_imports_go_down_the_floors(module):
    ours = [name for name in imports_of(module, at_import=False) if name.startswith("jaxsearch.")]
    strangers = [name for name in ours if is_stranger(module, name)]
    assert not strangers, f"{module} is on floor {floor_of(module)}"


def test_no_import_forms_a_cycle():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path, module))
        if module in MODULES and module not in done:
            for name in imports_of(module, at_import=False):
                visit(name, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_are_imported_by_their_owners_only(module):
    for name in imports_of(module, at_import=False):
        library = name.split(".")[0]
        if library in OWNERS:
            owned = any(module == owner or module.startswith(f"{owner}.") for owner in OWNERS[library])
            assert owned, f"{module} imports {library}, which belongs to {OWNERS[library] or 'nobody'}"


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith("serve")])
def test_the_library_and_the_launchers_import_where_heavy_libraries_are_absent(module):
    heavy = {name.split(".")[0] for name in reached(module)} & OWNERS.keys()
    if module.startswith("jaxsearch.data.builders."):
        heavy -= {"tensorflow_datasets"}
    if module in ("train.torch_peer", "train.torch_scorers"):
        heavy -= {"torch", "transformers"}
    if module == "train.llama_scorer":
        heavy -= {"gguf", "llama_cpp"}
    assert not heavy, f"importing {module} imports {heavy}"


@pytest.mark.parametrize("module", WITHOUT_JAX)
def test_what_needs_no_jax_imports_none(module):
    assert not {name.split(".")[0] for name in reached(module)} & {"jax", "flax", "optax", "orbax"}


@pytest.mark.parametrize("module", MODULES)
def test_every_name_is_bound_somewhere(module):
    """Linters take names in shape annotations for names of code, so that they cannot look for this."""
    bound, used = {*dir(builtins), "__file__", "__doc__", "__name__"}, set()
    for node in ast.walk(tree_of(module)):
        match node:
            case ast.Name():
                (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
            case ast.alias():
                bound.add((node.asname or node.name).partition(".")[0])
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() | ast.ExceptHandler():
                bound.add(node.name)
            case ast.MatchAs() | ast.MatchStar():
                bound.add(node.name)
            case ast.arg():
                bound.add(node.arg)
    assert not used - bound


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_keep_their_budget(module):
    text = MODULES[module].read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{module}.{node.name}"


@pytest.mark.parametrize("module", [name for name, path in MODULES.items() if path.stat().st_size])
def test_every_module_says_what_it_is(module):
    assert ast.get_docstring(tree_of(module))


def test_the_rules_find_what_they_forbid():
    assert is_stranger("jaxsearch.losses", "jaxsearch.metrics")
    assert is_stranger("jaxsearch.nn.bert", "jaxsearch.data.batches")
    assert is_stranger("jaxsearch.encoder", "jaxsearch.ranker")
    assert is_stranger("jaxsearch.data.records", "jaxsearch.data.sources")
    assert is_stranger("jaxsearch.scoring.prefill", "jaxsearch.bundle")
    assert not is_stranger("jaxsearch.data.sources", "jaxsearch.data.records")
    assert not is_stranger("jaxsearch.nn.convert", "jaxsearch.nn.bert")
    assert not is_stranger("jaxsearch.judge", "jaxsearch.checkpoints")
    assert "jax" in {name.split(".")[0] for name in reached("jaxsearch.retrieval.exact")}
