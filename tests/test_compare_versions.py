"""The comparison of two versions: who runs when, what is timed, what is told."""

from __future__ import annotations

import importlib.util
import json
import stat
import sys
from pathlib import Path

import pytest

_PATH = Path(__file__).resolve().parents[1] / "python" / "compare_versions.py"
_SPEC = importlib.util.spec_from_file_location("compare_versions", _PATH)
compare_versions = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(compare_versions)

# Stands for padkern: writes down how it was called, and leaves the files of a run.
PROGRAM = """#!{python}
import json, pathlib, sys
arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(json.dumps([{name!r}, *arguments]) + "\\n")
if arguments == ["--version"]:
    print("padkern {name}")
elif {name!r} == "broken":
    print("first line\\nno such data", file=sys.stderr)
    sys.exit(3)
elif arguments[0] == "embed":
    pathlib.Path(arguments[arguments.index("--out") + 1]).write_text("vectors")
else:
    out = pathlib.Path(arguments[arguments.index("--out") + 1])
    out.mkdir()
    cells = {{"test": {{"all": {{"hit@10": {hit}, "ndcg@10": 0.05}}}}}}
    seconds = {{"pad": {seconds}, "pad/evaluation": 0.5}}
    content = {{"seconds": seconds, "models": {{"pad": cells}}}}
    (out / "metrics.json").write_text(json.dumps(content))
"""


def _environment(folder, name, log, seconds=1.0, hit=0.08):
    program = folder / name / "bin" / "padkern"
    program.parent.mkdir(parents=True)
    text = PROGRAM.format(python=sys.executable, log=str(log), name=name, seconds=seconds, hit=hit)
    program.write_text(text)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder / name


def _main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["compare_versions.py", *map(str, arguments)])
    compare_versions.main()


def test_versions_run_in_turn_on_one_text_matrix(tmp_path, monkeypatch, capsys):
    log, out = tmp_path / "log", tmp_path / "results" / "versions.json"
    old = _environment(tmp_path, "before", log, seconds=6.0)
    new = _environment(tmp_path, "after", log, seconds=2.0, hit=0.09)
    options = ["--data", "shop", "--text", "minilm", "--seed", 7, "--set", "a=1", "b=2"]
    _main(monkeypatch, old, new, *options, "--rounds", 2, "--out", out)
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert [call[0] for call in calls if call[1] == "run"] == ["before", "after", "after", "before"]
    assert [call[0] for call in calls if call[1] == "embed"] == ["after"]
    texts = {call[call.index("--text") + 1] for call in calls if call[1] == "run"}
    assert len(texts) == 1
    assert texts.pop().endswith("text.safetensors")
    run = next(call for call in calls if call[1] == "run")
    assert run[run.index("--seed") + 1] == "7"
    assert [run[i + 1] for i, word in enumerate(run) if word == "--set"] == ["a=1", "b=2"]
    printed = capsys.readouterr().out
    assert "| pad | 6.00 | 2.00 | 3.00x |" in printed
    assert "| pad | 8.00 / 5.00 | 9.00 / 5.00 |" in printed
    result = json.loads(out.read_text())
    assert result["versions"]["old"] == {"path": "before", "version": "padkern before"}
    assert len(result["runs"]["new"]) == 2
    one = result["runs"]["old"][0]
    assert sum(one["seconds"].values()) == pytest.approx(one["wall"])
    walls = [run["wall"] for run in result["runs"]["new"]]
    assert result["median"]["new"]["wall"] == pytest.approx(sum(walls) / 2)


def test_a_matrix_file_is_taken_as_it_is(tmp_path, monkeypatch):
    log, matrix = tmp_path / "log", tmp_path / "vectors.npy"
    matrix.write_text("vectors")
    sides = [_environment(tmp_path, name, log) for name in ("a", "b")]
    _main(monkeypatch, *sides, "--data", "shop", "--text", matrix, "--rounds", 1)
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert all(call[call.index("--text") + 1] == str(matrix) for call in calls if "run" in call)
    assert not [call for call in calls if call[1] == "embed"]


def test_rows_and_phases_of_one_version_alone_are_shown():
    old = {"wall": 4.0, "seconds": {"a": 3.0}, "rows": {"x": {"hit@10": 0.1, "ndcg@10": 0.05}}}
    new = {"wall": 2.0, "seconds": {"b": 1.0}, "rows": {"y": {"hit@10": 0.2, "ndcg@10": 0.1}}}
    text = compare_versions.markdown({"median": {"old": old, "new": new}})
    assert "| a | 3.00 | - | - |" in text
    assert "| b | - | 1.00 | - |" in text
    assert "| whole run | 4.00 | 2.00 | 2.00x |" in text
    assert "| y | - | 20.00 / 10.00 |" in text


def test_failures_are_told(tmp_path, monkeypatch, capsys):
    log = tmp_path / "log"
    good, broken = (_environment(tmp_path, name, log) for name in ("good", "broken"))
    options = ["--data", "shop", "--text", "minilm"]
    with pytest.raises(SystemExit, match=r"(?s)padkern embed failed:.*no such data"):
        _main(monkeypatch, good, broken, *options)
    with pytest.raises(SystemExit, match="neither bin/padkern nor"):
        _main(monkeypatch, good, tmp_path / "nothing", *options)
    with pytest.raises(SystemExit):
        _main(monkeypatch, good, good, *options, "--rounds", 0)
    assert "--rounds must be at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        _main(monkeypatch, good, good, *options, "--work", tmp_path)
    assert "--work must be empty" in capsys.readouterr().err


def test_a_source_tree_runs_with_this_interpreter(tmp_path, monkeypatch):
    (tmp_path / "padkern").mkdir()
    (tmp_path / "padkern" / "__init__.py").write_text("")
    (tmp_path / "padkern" / "__main__.py").write_text("import sys; print('tree', sys.argv[1])")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    assert compare_versions.call(tmp_path, "--version") == "tree --version\n"
