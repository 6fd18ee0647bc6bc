"""The command line: one tiny run through every command, broken input, exit codes, start-up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from padkern import __version__
from padkern.cli import _spread, main

SMALL = [
    "--set", "model.dim=8", "model.num_layers=1", "evaluation.resamples=100", "text.pca=4",
    *(f"{phase}.epochs=1" for phase in ("pretrain", "language", "id_plus_text", "align")),
    "disentangle.epochs=1", "disentangle.gate.steps=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """Forty items of four kinds, sixty users who stay with one kind; a matrix of text vectors."""
    folder = tmp_path_factory.mktemp("shop")
    rng = np.random.default_rng(0)
    names = [f"i{k}" for k in range(40)]
    texts = [f"kind {k % 4} thing {k}" for k in range(40)]
    lines = [f"{name}\t{text}\n" for name, text in zip(names, texts, strict=True)]
    (folder / "items.tsv").write_text("item\ttext\n" + "".join(lines))
    rows = ["user\titems\n"]
    for user in range(60):
        kind = [k for k in range(40) if k % 4 == user % 4]
        chosen = rng.permutation(kind)[: rng.integers(4, 9)]
        rows.append(f"u{user}\t{' '.join(names[k] for k in chosen)}\n")
    (folder / "sequences.tsv").write_text("".join(rows))
    matrix = np.hstack([np.eye(4)[np.arange(40) % 4], 0.3 * rng.normal(size=(40, 4))])
    np.save(folder / "text.npy", matrix.astype(np.float32))
    (folder / "text.items.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


@pytest.fixture(scope="module")
def trained(shop, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    words = ["run", "--data", str(shop), "--text", str(shop / "text.npy"), "--out", str(out)]
    assert main([*words, "--device", "cpu", "--seed", "3", "--quiet", *SMALL]) == 0
    return out


def run_line(shop: Path, out: Path, *more: str) -> list[str]:
    return ["run", "--data", str(shop), "--text", str(shop / "text.npy"), "--out", str(out), *more]


def error_line(capsys) -> str:
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("padkern: error: ")
    assert "Traceback" not in captured.out
    return lines[0]


# ---- one real run --------------------------------------------------------------------------------


def test_run_writes_the_whole_folder(trained):
    found = set(os.listdir(trained))
    assert {
        "config.yaml", "run.json", "audit.json", "metrics.jsonl", "metrics.json",
        "comparison.json", "gate.json", "models", "ranks", "dataset", "report.html",
    } <= found  # fmt: skip
    metrics = json.loads((trained / "metrics.json").read_text())
    rows = {"most_pop", "text_knn", "pretrain", "text", "id_plus_text", "aligned", "pad"}
    assert set(metrics["models"]) == rows
    assert metrics["seed"] == 3
    for row in rows:
        for part in ("valid", "test"):
            overall = metrics["models"][row][part]["all"]
            assert overall["count"] == 60
            assert 0 <= overall["ndcg@10"] <= overall["hit@10"] <= 1
    assert not [path for path in trained.rglob("*") if path.suffix in (".pt", ".pkl", ".pickle")]
    record = json.loads((trained / "run.json").read_text())
    assert record["request"]["text"].endswith("text.npy")
    report = (trained / "report.html").read_text()
    assert report.count("<svg") >= 3
    assert "http" not in report.replace("http://www.w3.org/", "")


def test_run_prints_audit_epochs_and_tables(shop, tmp_path, capsys):
    assert main(run_line(shop, tmp_path / "run", "--device", "cpu", *SMALL)) == 0
    said = capsys.readouterr().out
    for part in (
        "users / items", "pretrain epoch 1", "tokens/s", "Hit@10 / NDCG@10", "id_plus_text",
        "pad - pretrain", "report: ",
    ):  # fmt: skip
        assert part in said, part
    assert "\x1b[" not in said  # plain lines when standard output is not a terminal


def test_evaluate_repeats_the_stored_figures(trained, capsys):
    stored = json.loads((trained / "metrics.json").read_text())["models"]
    for row in ("text_knn", "pretrain", "pad"):
        assert main(["evaluate", str(trained), "--row", row, "--json"]) == 0
        again = json.loads(capsys.readouterr().out)["metrics"]["all"]
        assert again["hit@10"] == stored[row]["test"]["all"]["hit@10"]
        assert again["mrr"] == pytest.approx(stored[row]["test"]["all"]["mrr"], rel=1e-6)
    assert main(["evaluate", str(trained), "--split", "valid", "--row", "most_pop"]) == 0
    assert "most_pop on valid" in capsys.readouterr().out


def test_recommend_by_user_and_by_history(trained, capsys):
    assert main(["recommend", str(trained), "--history", "i0,i4", "-k", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 5
    assert not {"i0", "i4"} & {entry["item"] for entry in found}
    scores = [entry["score"] for entry in found]
    assert scores == sorted(scores, reverse=True)
    for entry in found:
        assert sum(entry["shares"].values()) == pytest.approx(1, abs=1e-5)
    assert main(["recommend", str(trained), "--user", "u7", "-k", "3"]) == 0
    said = capsys.readouterr().out
    assert "user u7" in said
    assert "kind " in said
    assert said.count(" %") >= 3


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--user", "nobody"], "'nobody' is not a user"),
        (["--history", "i0,zzz"], "'zzz' is not an item"),
        (["--history", " , "], "at least one item"),
        ([], "either --user"),
        (["--user", "u1", "--history", "i1"], "either --user"),
    ],
)
def test_recommend_usage_errors(trained, capsys, words, part):
    assert main(["recommend", str(trained), *words]) == 2
    assert part in error_line(capsys)


def test_report_can_be_written_again(trained, capsys):
    (trained / "report.html").unlink()
    assert main(["report", str(trained)]) == 0
    assert Path(capsys.readouterr().out.strip()) == trained / "report.html"
    assert (trained / "report.html").exists()


def test_an_existing_run_is_never_overwritten(shop, trained, capsys):
    before = (trained / "metrics.json").read_bytes()
    assert main(run_line(shop, trained)) == 2
    assert "--resume" in error_line(capsys)
    assert (trained / "metrics.json").read_bytes() == before


def test_resume_of_a_finished_run_gives_the_same_figures(trained, capsys):
    before = json.loads((trained / "metrics.json").read_text())["models"]
    assert main(["run", "--out", str(trained), "--resume", "--device", "cpu", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert json.loads((trained / "metrics.json").read_text())["models"] == before


def test_a_stopped_run_resumes_to_the_same_figures(shop, trained, tmp_path, monkeypatch, capsys):
    from padkern.pad.folder import RunFolder

    save = RunFolder.save_tensors

    def stop(self, name, *args):
        if name == "models/aligned":
            os.kill(os.getpid(), signal.SIGTERM)
        return save(self, name, *args)

    out = tmp_path / "run"
    monkeypatch.setattr(RunFolder, "save_tensors", stop)
    handler = signal.getsignal(signal.SIGTERM)
    words = ["--device", "cpu", "--seed", "3", "--quiet", *SMALL]
    assert main(run_line(shop, out, *words)) == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    monkeypatch.setattr(RunFolder, "save_tensors", save)
    assert not (out / "metrics.json").exists()
    assert main(["evaluate", str(out)]) == 4
    assert "models/" in error_line(capsys)
    assert main([*run_line(shop, out, *words), "--resume"]) == 0
    figures = [json.loads((run / "metrics.json").read_text())["models"] for run in (trained, out)]
    assert figures[0] == figures[1]
    for row in ("pretrain", "pad"):
        weights = [run / "models" / row / "tensors.safetensors" for run in (trained, out)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    epochs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seen = [(record["phase"], record["epoch"]) for record in epochs]
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--set", "model.dim=16"], "differ from it"),
        (["--preset", "parity"], "--preset parity"),
        (["--text", "minilm"], "--text minilm"),
        (["--shuffle-text"], "--shuffle-text"),
    ],
)
def test_resume_refuses_other_options(trained, capsys, words, part):
    assert main(["run", "--out", str(trained), "--resume", *words]) == 2
    assert part in error_line(capsys)


def test_a_folder_with_other_things_in_it_is_refused(shop, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("")
    assert main(run_line(shop, tmp_path)) == 2
    assert "not empty" in error_line(capsys)
    assert main([*run_line(shop, tmp_path), "--resume"]) == 2
    assert "no run to resume" in error_line(capsys)
    assert os.listdir(tmp_path) == ["thesis.tex"]


# ---- usage, checkpoints, environment -------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--set", "model.dimm=8"], "model.dimm"),
        (["--set", "model.dim=many"], "model.dim"),
        (["--set", "text.null_space=4"], "null_space needs pca=null"),
        (["--set", "model.dim"], "key=value"),
        (["--preset", "dirty"], "--preset must be clean or parity"),
        (["--device", "abacus"], "not a torch device"),
        (["--on-bad-rows", "ignore"], "--on-bad-rows must be"),
        (["--columns", "usr=u"], "unknown name 'usr'"),
        (["--filter", "k_core=0"], "--filter k_core=0"),
        (["--filter", "k_core"], "takes NAME=VALUE"),
    ],
)
def test_run_usage_errors(shop, tmp_path, capsys, words, part):
    out = tmp_path / "run"
    assert main(run_line(shop, out, *words)) == 2
    assert part in error_line(capsys)
    assert not out.exists()


def test_run_needs_data(tmp_path, capsys):
    assert main(["run", "--out", str(tmp_path / "run")]) == 2
    assert "--data is needed" in error_line(capsys)


@pytest.mark.parametrize("words", [["nope"], ["run"], ["run", "--out"], ["evaluate"], ["--nope"]])
def test_unknown_words_are_usage_errors(words):
    assert main(words) == 2


def test_damaged_runs_exit_with_4(trained, tmp_path, capsys):
    assert main(["evaluate", str(tmp_path / "none")]) == 4
    assert "no such run folder" in error_line(capsys)
    assert main(["report", str(tmp_path)]) == 4
    assert "metrics.json" in error_line(capsys)
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    weights = copy / "models" / "pad" / "tensors.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert main(["recommend", str(copy), "--user", "u1"]) == 4
    assert "SHA-256" in error_line(capsys)


def test_missing_device_and_package_exit_with_5(shop, tmp_path, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(run_line(shop, tmp_path / "run", "--device", "cuda")) == 5
    assert "no usable CUDA device" in error_line(capsys)


def test_unexpected_errors_hide_the_traceback_unless_debug(monkeypatch, capsys):
    import padkern.environment

    def broken():
        raise ZeroDivisionError("oh\nno")

    monkeypatch.setattr(padkern.environment, "facts", broken)
    assert main(["env"]) == 1
    assert "ZeroDivisionError: oh no (--debug shows where)" in error_line(capsys)
    with pytest.raises(ZeroDivisionError):
        main(["env", "--debug"])


# ---- broken input --------------------------------------------------------------------------------

ITEMS = "item\ttext\na\tapple\nb\tpear\nc\tplum\nd\tfig\n"
LOG = "user\titem\ttimestamp\n"
GOOD = LOG + "".join(f"{u}\t{i}\t{t}\n" for u in "uvw" for t, i in enumerate("abcd"))


def _write(folder: Path, interactions: str | bytes | None = GOOD, items: str | bytes = ITEMS):
    for name, content in (("interactions.tsv", interactions), ("items.tsv", items)):
        if content is not None:
            raw = content if isinstance(content, bytes) else content.encode()
            (folder / name).write_bytes(raw)


BROKEN = {
    "ragged row": ({"interactions": GOOD + "u\ta\n"}, ["interactions.tsv", "line 14"]),
    "bad timestamp": (
        {"interactions": GOOD + "u\ta\tsoon\n"},
        ["interactions.tsv", "line 14", "timestamp", "soon"],
    ),
    "unknown item": (
        {"interactions": GOOD + "u\tzzz\t9\n"},
        ["interactions.tsv", "line 14", "item", "zzz"],
    ),
    "empty file": ({"interactions": ""}, ["interactions.tsv", "empty"]),
    "header only": ({"interactions": LOG}, ["interactions.tsv"]),
    "duplicate item": ({"items": ITEMS + "a\tagain\n"}, ["items.tsv", "line 6", "'a'"]),
    "non-UTF-8": (
        {"interactions": GOOD.encode() + b"u\t\xff\xfe\t9\n"},
        ["interactions.tsv", "line 14", "UTF-8"],
    ),
    "one user": (
        {"interactions": LOG + "u\ta\t1\nu\tb\t2\nu\tc\t3\n"},
        ["interactions.tsv", "one user"],
    ),
    "no warm item": (
        {"interactions": "".join(line + "\n" for line in GOOD.splitlines() if line[-1] != "3")},
        ["no warm item"],
    ),
    "matrix with a missing id": ({}, ["text.npy", "have no row", "'d'"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_input_is_one_line_and_exit_code_3(tmp_path, capsys, kind):
    content, parts = BROKEN[kind]
    data = tmp_path / "data"
    data.mkdir()
    _write(data, **content)
    names = "abc" if kind == "matrix with a missing id" else "abcd"
    np.save(data / "text.npy", np.eye(4, dtype=np.float32)[: len(names)])
    (data / "text.items.txt").write_text("".join(f"{name}\n" for name in names))
    out = tmp_path / "run"
    words = run_line(data, out, "--quiet", "--device", "cpu", "--filter", "k_core=1")
    assert main(words) == 3
    line = error_line(capsys)
    for part in parts:
        assert part in line, (part, line)
    assert not out.exists()


def test_quarantine_keeps_the_bad_rows(shop, tmp_path):
    import shutil

    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(shop, data)
    with open(data / "sequences.tsv", "a") as file:
        file.write("u99\ti1 nowhere i2 i3\n")
    words = run_line(data, out, "--quiet", "--device", "cpu", "--on-bad-rows", "quarantine")
    assert main([*words, *SMALL]) == 0
    assert "nowhere" in (out / "quarantine.jsonl").read_text()


# ---- embed, config, env, start-up ----------------------------------------------------------------


def test_embed_writes_a_matrix_that_run_accepts(shop, tmp_path, capsys):
    out = tmp_path / "again.parquet"
    words = ["embed", "--data", str(shop), "--text", str(shop / "text.npy"), "--out", str(out)]
    assert main([*words, "--pca", "3"]) == 0
    assert "40 items x 3" in capsys.readouterr().out
    from padkern.text import load_matrix

    matrix = load_matrix(out, ["", *(f"i{k}" for k in range(40))])
    assert matrix.shape == (41, 3)
    assert np.abs(matrix[1:].mean(0)).max() < 1e-5
    assert main(words) == 2
    assert "--force" in error_line(capsys)
    assert main([*words, "--force"]) == 0


@pytest.mark.parametrize(
    ("out", "more", "part"),
    [
        ("m.txt", [], "must end in"),
        ("none/m.npy", [], "no such folder"),
        ("m.npy", ["--pca", "0"], "pca must be"),
        ("m.npy", ["--whiten", "2"], "whiten must be"),
        ("m.npy", ["--null-space", "2", "--pca", "3"], "null_space must be 0 where pca is set"),
        ("m.npy", ["--all-but-top", "-1"], "all_but_top must be"),
        ("m.npy", ["--null-space", "9"], "null_space must be at most 7"),
    ],
)
def test_embed_usage_errors(shop, tmp_path, capsys, out, more, part):
    words = ["embed", "--data", str(shop), "--text", str(shop / "text.npy")]
    assert main([*words, "--out", str(tmp_path / out), *more]) == 2
    assert part in error_line(capsys)


def test_config_shows_what_a_run_would_use(capsys):
    import yaml

    assert main(["config", "--set", "model.dim=32", "seed=5"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["model"]["dim"], shown["seed"]) == (32, 5)
    assert main(["config", "--preset", "parity"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["loss"]["kind"] == "bce"


def test_env_names_what_matters_and_never_fails(capsys, monkeypatch):
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    for name in ("padkern", "python", "cpu", "native core", "threads", "cuda", "triton", "torch"):
        assert name in said
    import padkern.environment as environment

    monkeypatch.setattr(environment, "_core", lambda: 1 / 0)
    assert "ZeroDivisionError" in environment.facts()["native core"]


def test_one_set_takes_several_values():
    words = ["run", "--set", "a=1", "b.c=2", "--out", "x=y", "--set", "d=3", "e"]
    assert _spread(words) == [
        "run", "--set", "a=1", "--set", "b.c=2", "--out", "x=y", "--set", "d=3", "e",
    ]  # fmt: skip


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["run", "--help"]])
def test_help_and_version_load_nothing_heavy(words):
    code = (
        "import sys\nfrom padkern.cli import main\n"
        f"code = main({words!r})\n"
        "heavy = {'torch', 'numpy', 'rich', 'pyarrow', 'transformers', 'yaml'}\n"
        "print('LOADED', sorted(heavy & set(sys.modules)), code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert done.stdout.strip().endswith("LOADED [] 0")
    if words == ["--version"]:
        assert done.stdout.startswith(f"padkern {__version__}\n")
