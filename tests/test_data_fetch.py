"""Finding data sets by name, and the checked download (no network is touched)."""

from __future__ import annotations

import hashlib
import os
import urllib.error
from pathlib import Path

import pytest

from padkern.data import fetch, prime_pantry, read_dataset, resolve_dataset
from padkern.errors import DataError, EnvError

# Read before the fixture below hides it.
REAL_DATA = os.environ.get("PADKERN_DATA", "")

RAW = {
    prime_pantry.HISTORY: b",user,history\n0,ann,\"['A1', 'B2', 'A1']\"\n1,bob,\"['B2']\"\n",
    prime_pantry.METADATA: b'asin,title\nB2,"Wrap &amp; Foil,  75 ft"\nA1,Milk\n',
    prime_pantry.FREQUENCY: b"id,fre\n0,0\n1,0\n2,1\n",
}


@pytest.fixture(autouse=True)
def _isolated(tmp_path, monkeypatch):
    monkeypatch.setenv("PADKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PADKERN_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def served(monkeypatch):
    """Addresses asked for; the small files above count as the right ones."""
    digests = {name: hashlib.sha256(raw).hexdigest() for name, raw in RAW.items()}
    monkeypatch.setattr(fetch, "FILES", digests)
    asked = []

    def opener(address):
        asked.append(address)
        return RAW[address.rsplit("/", 1)[1]]

    opener.asked = asked
    return opener


def shop(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "sequences.tsv").write_text("user\titems\nu\ta b\nv\tb a\n")
    return folder


def test_an_existing_path_comes_first(tmp_path):
    folder = shop(tmp_path / "prime_pantry")
    assert resolve_dataset(folder) == folder
    assert resolve_dataset("prime_pantry") == Path("prime_pantry")
    assert resolve_dataset(folder / "sequences.tsv") == folder / "sequences.tsv"


def test_then_padkern_data_then_the_cache(tmp_path, monkeypatch):
    cached = shop(tmp_path / "cache" / "toys")
    assert resolve_dataset("toys") == cached
    given = shop(tmp_path / "data" / "toys")
    monkeypatch.setenv("PADKERN_DATA", str(tmp_path / "data"))
    assert resolve_dataset("toys") == given
    assert read_dataset("toys").name == "toys"


@pytest.mark.parametrize("name", ["no_such_set", "no/such/folder", "../x", " ", ".hidden"])
def test_unknown_names(name, served):
    with pytest.raises(DataError, match="no such file or folder"):
        resolve_dataset(name, opener=served)
    assert not served.asked


def test_download_converts_once(tmp_path, served):
    folder = resolve_dataset("prime_pantry", opener=served)
    assert folder == tmp_path / "cache" / "prime_pantry"
    assert len(served.asked) == 3
    assert all(prime_pantry.COMMIT in address for address in served.asked)
    assert (folder / "items.tsv").read_text() == "item\ttext\nB2\tWrap & Foil, 75 ft\nA1\tMilk\n"
    assert (folder / "sequences.tsv").read_text() == "user\titems\nann\tA1 B2 A1\nbob\tB2\n"
    assert read_dataset("prime_pantry").items == ["", "B2", "A1"]
    resolve_dataset("prime_pantry", opener=served)
    assert len(served.asked) == 3
    assert [path.name for path in folder.parent.iterdir()] == ["prime_pantry"]


def test_a_wrong_file_is_refused_and_nothing_stays(tmp_path, served, monkeypatch):
    monkeypatch.setitem(RAW, prime_pantry.METADATA, b"asin,title\nB2,other\nA1,Milk\n")
    with pytest.raises(DataError, match=r"metadata_Prime_Pantry.csv: SHA-256 is \w{64}, expected"):
        resolve_dataset("prime_pantry", opener=served)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route to host"), TimeoutError("timed out")]
)
def test_no_network_says_what_to_do(error):
    def opener(address):
        raise error

    with pytest.raises(EnvError) as caught:
        resolve_dataset("prime_pantry", opener=opener)
    message = str(caught.value)
    assert "PADKERN_DATA" in message
    assert "cannot download" in message
    assert "\n" not in message


def test_a_cache_that_cannot_be_made(tmp_path, served, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PADKERN_CACHE", str(tmp_path / "file"))
    with pytest.raises(EnvError, match="PADKERN_CACHE"):
        resolve_dataset("prime_pantry", opener=served)


@pytest.mark.parametrize(
    "cell", ["['a', 'b'", "__import__('os').getcwd()", "[1, 2]", "[]", "['a b']", "'ab'"]
)
def test_history_that_is_no_list_of_ids(tmp_path, cell):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / prime_pantry.METADATA).write_bytes(RAW[prime_pantry.METADATA])
    text = f',user,history\n0,ann,"[\'A1\']"\n1,bob,"{cell}"\n'
    (raw / prime_pantry.HISTORY).write_text(text)
    with pytest.raises(DataError, match=r"line 3, column 'history': must be a list"):
        prime_pantry.convert_folder(raw, tmp_path)


def test_default_cache_folder(monkeypatch):
    monkeypatch.delenv("PADKERN_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert fetch.cache_folder() == Path("/home/someone/.cache/padkern")


@pytest.mark.data
def test_conversion_of_the_real_files(tmp_path):
    raw = Path(REAL_DATA) / "prime_pantry" / "raw"
    if not REAL_DATA or not raw.is_dir():
        pytest.skip("needs PADKERN_DATA with prime_pantry/raw")
    for name, digest in prime_pantry.FILES.items():
        assert hashlib.sha256((raw / name).read_bytes()).hexdigest() == digest
    prime_pantry.convert_folder(raw, tmp_path)
    for name in ("sequences.tsv", "items.tsv"):
        assert (tmp_path / name).read_bytes() == (raw.parent / name).read_bytes()
