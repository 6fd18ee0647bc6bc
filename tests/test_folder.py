"""Run folders: atomic writes, lock, verification on load, recovery after a kill."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from padkern.errors import CheckpointError, EnvError
from padkern.pad.folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    with RunFolder(tmp_path / "run") as opened:
        yield opened


def _tensors(value=1.0):
    return {
        "a/weight": torch.full((3, 2), value, dtype=torch.float64),
        "ids": torch.arange(5),
        "half": torch.ones(4, dtype=torch.bfloat16),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
    }


def test_json_round_trip_and_plain_values(folder):
    folder.write_json(
        "m.json", {"x": np.float32(0.5), "n": np.int64(3), "bad": float("nan"), "v": np.arange(2)}
    )
    assert folder.read_json("m.json") == {"x": 0.5, "n": 3, "bad": None, "v": [0, 1]}
    folder.write_yaml("config.yaml", "a: ü\n")
    assert folder.read_text("config.yaml") == "a: ü\n"
    assert sorted(os.listdir(folder.path)) == [".lock", "config.yaml", "m.json"]


def test_written_files_obey_the_umask(folder):
    before = os.umask(0o027)
    try:
        path = folder.write_json("m.json", {})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_missing_and_broken_json_name_the_file(folder):
    with pytest.raises(CheckpointError, match=r"m\.json: no such file"):
        folder.read_json("m.json")
    folder.write_text("m.json", "{")
    with pytest.raises(CheckpointError, match=r"m\.json: not valid JSON"):
        folder.read_json("m.json")


def test_jsonl_torn_line_and_truncate(folder):
    assert folder.read_jsonl("log.jsonl") == []
    for i in range(3):
        folder.append_jsonl("log.jsonl", {"i": i})
    with open(folder.file("log.jsonl"), "ab") as file:
        file.write(b'{"i": 3, "torn')
    assert [r["i"] for r in folder.read_jsonl("log.jsonl")] == [0, 1, 2]
    folder.append_jsonl("log.jsonl", {"i": 4})
    assert [r["i"] for r in folder.read_jsonl("log.jsonl")] == [0, 1, 2, 4]
    folder.truncate_jsonl("log.jsonl", 2)
    folder.append_jsonl("log.jsonl", {"i": 5})
    assert [r["i"] for r in folder.read_jsonl("log.jsonl")] == [0, 1, 5]
    with pytest.raises(ValueError, match="keep"):
        folder.truncate_jsonl("log.jsonl", -1)


def test_jsonl_bad_whole_line_is_named(folder):
    folder.write_text("log.jsonl", '{"i": 0}\nnonsense\n')
    with pytest.raises(CheckpointError, match=r"log\.jsonl: line 2 is not JSON"):
        folder.read_jsonl("log.jsonl")


def test_tensors_round_trip_bit_for_bit(folder):
    tensors = _tensors()
    tensors["view"] = tensors["ids"].view(5, 1)  # shares memory, safetensors alone would refuse
    tensors["strided"] = torch.arange(6.0).view(2, 3).T
    folder.save_tensors("models/pad", tensors, {"epoch": 3, "best": 0.1})
    loaded, meta = folder.load_tensors("models/pad")
    assert meta == {"epoch": 3, "best": 0.1}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    assert sorted(os.listdir(folder.path / "models")) == ["pad"]


def test_has_remove_and_replace(folder):
    assert not folder.has("models/pad")
    with pytest.raises(CheckpointError, match="models/pad: no such checkpoint"):
        folder.load_tensors("models/pad")
    folder.save_tensors("models/pad", _tensors(1.0), {})
    folder.save_tensors("models/pad", _tensors(2.0), {})
    assert float(folder.load_tensors("models/pad")[0]["a/weight"][0, 0]) == 2.0
    folder.remove("models/pad")
    assert not folder.has("models/pad")
    folder.remove("models/pad")
    assert os.listdir(folder.path / "models") == []


@pytest.mark.parametrize("name", ["tensors.safetensors", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "grow", "missing", "link"])
def test_damage_is_refused_with_file_and_reason(folder, name, damage):
    path = folder.save_tensors("c", _tensors(), {"epoch": 1}) / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:-1])
    elif damage == "grow":
        path.write_bytes(data + b" ")
    elif damage == "missing":
        path.unlink()
    else:
        path.rename(folder.path / "elsewhere")
        path.symlink_to(folder.path / "elsewhere")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        folder.load_tensors("c")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(version=2), "format version 2"),
        (lambda m: m.update(format="other"), "not a padkern-tensors manifest"),
        (lambda m: m.update(files="x"), "'files' must be a list"),
        (lambda m: m["files"].pop(), "must list"),
        (lambda m: m["files"].append(m["files"][0]), "must list"),
        (lambda m: m["files"][0].update(name="../../etc/passwd"), "must list"),
        (lambda m: m["files"][0].update(size=-1), "the manifest says -1"),
        (lambda m: m["files"][0].pop("sha256"), "SHA-256 differs"),
    ],
)
def test_lying_manifests_are_refused(folder, change, reason):
    path = folder.save_tensors("c", _tensors(), {}) / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=reason):
        folder.load_tensors("c")


def test_a_valid_digest_over_nonsense_is_still_refused(folder):
    import hashlib

    target = folder.save_tensors("c", _tensors(), {})
    data = (2**63).to_bytes(8, "little") + b"{}"
    (target / "tensors.safetensors").write_bytes(data)
    manifest = json.loads((target / "MANIFEST.json").read_text())
    manifest["files"][0].update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    (target / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        folder.load_tensors("c")


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "", "a\\b", "c:x", "a\0b"])
def test_paths_that_leave_the_folder_are_refused(folder, name):
    for call in (
        lambda: folder.write_text(name, ""),
        lambda: folder.read_text(name),
        lambda: folder.save_tensors(name, {}, {}),
        lambda: folder.load_tensors(name),
    ):
        with pytest.raises(CheckpointError, match="not a path inside"):
            call()


def test_linked_folders_are_refused(folder, tmp_path):
    (tmp_path / "outside").mkdir()
    (folder.path / "models").symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="symbolic links are refused"):
        folder.save_tensors("models/pad", _tensors(), {})


def _exit_at(step):
    """Makes this process die, without clean-up, at its ``step``-th file-system call."""
    count = 0

    def guard(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == step:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    for module, name in (
        (os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir"), (shutil, "rmtree"),
    ):  # fmt: skip
        setattr(module, name, guard(getattr(module, name)))


def test_a_kill_at_any_step_leaves_a_valid_checkpoint(tmp_path):
    deaths = 0
    for step in range(1, 40):
        path = tmp_path / f"run{step}"
        with RunFolder(path) as writer:
            writer.save_tensors("models/pad", _tensors(1.0), {"version": 1})
            writer.write_json("m.json", {"version": 1})
        child = os.fork()
        if child == 0:
            try:
                _exit_at(step)
                writer = RunFolder(path)
                writer.write_json("m.json", {"version": 2})
                writer.save_tensors("models/pad", _tensors(2.0), {"version": 2})
            finally:
                os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        deaths += code == 9
        for reader in (RunFolder(path, create=False), RunFolder(path)):  # before and after sweeping
            tensors, meta = reader.load_tensors("models/pad")
            assert meta["version"] in (1, 2)
            assert float(tensors["a/weight"][0, 0]) == meta["version"]
            assert reader.read_json("m.json")["version"] in (1, 2)
            reader.close()
        assert sorted(os.listdir(path)) == [".lock", "m.json", "models"]
        assert os.listdir(path / "models") == ["pad"]
        if code == 0:
            assert meta["version"] == 2
            break
    assert code == 0
    assert deaths >= 10


def test_a_failed_write_keeps_the_old_version(folder, monkeypatch):
    folder.save_tensors("c", _tensors(1.0), {})
    rename, calls = os.rename, []

    def full(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(EnvError, match=r"c: cannot write \d+ bytes: No space left on device"):
        folder.save_tensors("c", _tensors(2.0), {})
    assert float(folder.load_tensors("c")[0]["a/weight"][0, 0]) == 1.0
    assert sorted(os.listdir(folder.path)) == [".lock", "c"]


def test_second_writer_is_refused_and_readers_are_not(folder):
    folder.write_json("m.json", {})
    with pytest.raises(CheckpointError, match=f"PID {os.getpid()}"):
        RunFolder(folder.path)
    reader = RunFolder(folder.path, create=False)
    assert reader.read_json("m.json") == {}
    with pytest.raises(CheckpointError, match="reading only"):
        reader.write_json("m.json", {})
    folder.close()
    RunFolder(folder.path).close()


def test_lock_of_a_dead_process_is_taken_over(tmp_path):
    code = (
        "import os, sys\nfrom padkern.pad.folder import RunFolder\n"
        "folder = RunFolder(sys.argv[1])\nprint(os.getpid(), flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == -9
    assert (tmp_path / ".lock").read_text() == done.stdout
    with RunFolder(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_reading_needs_a_folder_and_foreign_folders_are_not_swept(tmp_path):
    with pytest.raises(CheckpointError, match="no such run folder"):
        RunFolder(tmp_path / "none", create=False)
    (tmp_path / "mine.tmp-1").mkdir()
    with RunFolder(tmp_path):
        assert (tmp_path / "mine.tmp-1").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvError, match="cannot create the run folder"):
        RunFolder(tmp_path / "file")
