"""What the checkout promises about itself: commands, versions, links, docstrings, clean files."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def _tracked() -> list[Path]:
    try:
        command = ["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"]
        out = subprocess.run(command, capture_output=True, check=True).stdout
        names = [name for name in out.decode().split("\0") if name]
    except (OSError, subprocess.CalledProcessError):  # no git, or an unpacked archive
        folders = ("padkern", "csrc", "tests", "benchmarks", "docs", "python")
        found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
        names = [str(path.relative_to(ROOT)) for path in [*found, *ROOT.glob("*.*")]]
    built = (".so", ".pyc")
    paths = [ROOT / name for name in names if "_build" not in name and not name.endswith(built)]
    return [path for path in paths if path.is_file()]


def _texts() -> list[tuple[Path, str]]:
    suffixes = {".png", ".svg", ".npy", ".parquet", ".safetensors"}
    return [
        (path.relative_to(ROOT), path.read_text(encoding="utf-8"))
        for path in _tracked()
        if path.suffix not in suffixes
    ]


def test_no_machine_paths_and_no_package_index():
    # In pieces, so that this file does not hold what it looks for.
    folders = "|".join(["work", "root", "opt", "home/[a-z]"])
    hosts = "|".join([r"py" + r"pi\.org", "python" + "hosted", r"download\.py" + r"torch"])
    bad = re.compile(rf"(?<![\w.~\]/])/(?:{folders})/|{hosts}")
    found = [
        f"{path}:{number}: {line.strip()[:80]}"
        for path, text in _texts()
        for number, line in enumerate(text.splitlines(), 1)
        if bad.search(line)
    ]
    assert not found


def test_no_large_file():
    large = [path for path in _tracked() if path.stat().st_size > 512 * 1024]
    assert not large


def test_make_commands_of_the_documents_exist():
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))
    assert {"help", "install", "demo", "test", "bench", "lint", "docs", "gpu"} <= targets
    documents = [README, *(p.read_text() for p in ROOT.glob("docs/*.md"))]
    documents.append((ROOT / "CONTRIBUTING.md").read_text())
    used = set()
    for text in documents:
        commands = re.findall(r"^make ([^#\n]+)|`make ([^`]+)`", text, re.MULTILINE)
        words = [word for pair in commands for word in "".join(pair).split()]
        used |= {word for word in words if re.fullmatch(r"[a-z]+", word)}
    assert {"demo", "test"} <= used <= targets


def test_command_lines_of_the_documents_are_understood():
    from typer.main import get_command

    from padkern.cli import app

    commands = get_command(app).commands
    checked = 0
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        blocks = re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL)
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        for line in (line.split(" #")[0].split() for line in lines):
            if line[:1] != ["padkern"]:
                continue
            checked += 1
            assert line[1] in commands, f"{path.name}: {' '.join(line)}"
            options = commands[line[1]].params
            known = {flag for one in options for flag in (*one.opts, *one.secondary_opts)}
            for word in line[2:]:
                assert not word.startswith("-") or word in known, f"{path.name}: {' '.join(line)}"
    assert checked > 8


def test_one_version():
    import padkern

    def find(name: str, pattern: str) -> str:
        match = re.search(pattern, (ROOT / name).read_text(), re.MULTILINE)
        assert match, f"{name} has no version"
        return match[1]

    assert find("pyproject.toml", r'^version = "([^"]+)"') == padkern.__version__
    assert find("CMakeLists.txt", r'PADKERN_VERSION "([^"]+)"') == padkern.__version__
    assert find("CHANGELOG.md", r"^## (\d\S+)") == padkern.__version__


def test_torch_is_pinned_alike():
    pinned = re.findall(r"^torch==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned == ["torch==2.13.0"]
    assert f"TORCH ?= {pinned[0]}" in MAKEFILE


def test_constraints_agree_with_exact_requirements():
    constraints = set((ROOT / "constraints.txt").read_text().split())
    exact = re.findall(r'"([\w.-]+==[\w.]+)"', (ROOT / "pyproject.toml").read_text())
    assert exact
    assert set(exact) <= constraints


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / name).read_text())
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing


def test_the_python_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    results = []
    names: dict[str, object] = {}  # a block may go on where the one before ended
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
        results.append(dict(names))
    library, training, samples = results
    assert training["loss"].isfinite()
    assert library["best"].shape == (2, 10)
    assert library["text"].grad is not None
    assert 0 < samples["p"] <= 1


def _public(tree: ast.Module):
    """Public functions and classes of a module."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node.name, node


def test_public_docstrings():
    missing = []
    for path in sorted((ROOT / "padkern").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        where = path.relative_to(ROOT)
        if ast.get_docstring(tree) is None:
            missing.append(str(where))
        missing += [
            f"{where}: {name}" for name, node in _public(tree) if ast.get_docstring(node) is None
        ]
    assert not missing


def test_every_module_is_in_the_wheel():
    # find_packages passes over a folder without __init__.py, and the wheel then lacks it.
    folders = {path.parent for path in (ROOT / "padkern").rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_every_operation_has_its_derivation():
    for folder in (ROOT / "padkern" / "ops").iterdir():
        if (folder / "native.py").exists():
            assert (folder / "README.md").exists(), f"{folder.name} has no README.md"
