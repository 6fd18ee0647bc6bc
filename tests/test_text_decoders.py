"""Decoder language models as text encoders: pooling, padding, attention; tiny models made here."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from padkern.text import embed_texts, load_text

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["red", "green", "blue", "wrap", "candy", "soap", "milk", "tea", "salt", "rice", "soup"]
POOLINGS = ("mean", "weighted", "last", "cls")
SIZE = {
    "vocab_size": len(WORDS) + 3,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}
TEXTS = ["red", "green blue wrap candy soap", "milk tea", "salt rice soup red green blue wrap", ""]


def save_tokenizer(folder, **special):
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[BOS]", *WORDS])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", model_max_length=64, **special
    ).save_pretrained(folder)


def save_model(folder, kind: str, **options):
    torch.manual_seed(0)
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(**SIZE))
    elif kind == "mistral":  # sliding windows
        config = transformers.MistralConfig(**SIZE, num_key_value_heads=1, sliding_window=3)
        model = transformers.MistralModel(config)
    elif kind == "causal_lm":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE))
    else:
        model = transformers.LlamaModel(transformers.LlamaConfig(**SIZE))
    model.save_pretrained(folder, **options)
    save_tokenizer(folder, eos_token="[UNK]")
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Kind -> folder, made on first use."""
    made: dict[str, str] = {}

    def get(kind: str) -> str:
        if kind not in made:
            made[kind] = save_model(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return get


def states_alone(folder: str, text: str, attention: str) -> np.ndarray:
    """States of one text by itself, without padding; bidirectional by a mask of zeros."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    options = {}
    if attention == "bidirectional":
        options["attention_mask"] = torch.zeros(1, 1, ids.shape[1], ids.shape[1])
    with torch.no_grad():
        return model(input_ids=ids, **options).last_hidden_state[0].double().numpy()


def pooled(states: np.ndarray, pooling: str) -> np.ndarray:
    if pooling == "weighted":
        steps = np.arange(1, len(states) + 1)
        return (steps[:, None] * states).sum(0) / steps.sum()
    return {"mean": states.mean(0), "last": states[-1], "cls": states[0]}[pooling]


@pytest.mark.parametrize("attention", ["model", "bidirectional"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", ["llama", "bert", "mistral"])
def test_pooling_equals_each_text_alone(models, kind, pooling, attention):
    folder = models(kind)
    options = {"pooling": pooling, "attention": attention, "normalize": False}
    together = embed_texts(TEXTS, folder, batch_tokens=10_000, **options)
    alone = embed_texts(TEXTS, folder, batch_tokens=1, **options)
    np.testing.assert_allclose(together, alone, rtol=0, atol=2e-5)
    assert not together[-1].any()
    for row, text in enumerate(TEXTS[:-1]):
        want = pooled(states_alone(folder, text, attention), pooling)
        np.testing.assert_allclose(together[row], want, rtol=0, atol=2e-5)


def test_weighted_mean_trusts_later_tokens(models):
    folder = models("llama")
    mean, weighted = (
        embed_texts(TEXTS[:4], folder, pooling=name, normalize=False)
        for name in ("mean", "weighted")
    )
    last = embed_texts(TEXTS[:4], folder, pooling="last", normalize=False)
    assert np.abs(mean - weighted).max(axis=1).min() > 1e-3
    distance = [np.linalg.norm(rows - last, axis=1) for rows in (weighted, mean)]
    assert (distance[0] < distance[1]).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_tokenizers_padding_side_changes_nothing(models, tmp_path, pooling, side):
    folder = tmp_path / "model"
    shutil.copytree(models("llama"), folder)
    save_tokenizer(folder, pad_token="[PAD]", padding_side=side)
    got = embed_texts(TEXTS, str(folder), pooling=pooling, batch_tokens=10_000)
    want = embed_texts(TEXTS, models("llama"), pooling=pooling, batch_tokens=10_000)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_bidirectional_attention_sees_what_comes_later(models, kind):
    texts = ["red green blue wrap candy", "red green blue wrap soap"]
    options = {"pooling": "cls", "normalize": False}
    causal = embed_texts(texts, models(kind), **options)
    np.testing.assert_allclose(causal[0], causal[1], rtol=0, atol=1e-6)
    both = embed_texts(texts, models(kind), attention="bidirectional", **options)
    assert np.abs(both[0] - both[1]).max() > 1e-3


def test_a_bidirectional_model_stays_as_it_is(models):
    plain, asked = (
        embed_texts(TEXTS, models("bert"), attention=name) for name in ("model", "bidirectional")
    )
    np.testing.assert_allclose(plain, asked, rtol=0, atol=1e-5)


def test_half_precision_with_an_open_mask_is_finite(models):
    exact, half = (
        embed_texts(TEXTS[:4], models("llama"), attention="bidirectional", dtype=dtype)
        for dtype in ("float32", "bfloat16")
    )
    assert np.isfinite(half).all()
    assert 0 < np.abs(exact - half).max() < 0.2


def test_an_architecture_without_a_switch_is_named(models, monkeypatch):
    real = transformers.LlamaModel.forward

    def causal_always(self, input_ids=None, attention_mask=None, **options):
        return real(self, input_ids=input_ids, **options)

    def two_dimensions(self, input_ids=None, attention_mask=None, **options):
        if attention_mask.ndim != 2:
            raise ValueError("attention_mask must have two dimensions\nand no more")
        return real(self, input_ids=input_ids, attention_mask=attention_mask, **options)

    for forward, reason in (
        (causal_always, "the mask has no effect"),
        (two_dimensions, "attention_mask must have two dimensions"),
    ):
        monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
        with pytest.raises(ValueError, match=rf"attention='bidirectional'.*llama.*{reason}"):
            embed_texts(["red"], models("llama"), attention="bidirectional")


def test_unknown_attention_and_static_vectors():
    with pytest.raises(ValueError, match="attention must be one of model, bidirectional, got 'x'"):
        embed_texts(["red"], "anywhere", attention="x")
    with pytest.raises(ValueError, match="pooling must be one of mean, weighted, last, cls"):
        embed_texts(["red"], "anywhere", pooling="max")


def test_attention_is_part_of_the_cache_key(models, tmp_path):
    folder = models("llama")
    plain = embed_texts(TEXTS, folder, cache_dir=tmp_path)
    both = embed_texts(TEXTS, folder, cache_dir=tmp_path, attention="bidirectional")
    assert len(list(tmp_path.glob("*/embeddings.npy"))) == 2
    assert np.abs(plain - both).max() > 1e-3
    again = embed_texts(TEXTS, folder, cache_dir=tmp_path, attention="bidirectional")
    np.testing.assert_array_equal(both, again)


def test_checkpoints_with_a_head_and_in_shards_give_the_same_states(tmp_path):
    head = save_model(tmp_path / "head", "causal_lm")
    got = embed_texts(TEXTS, head, pooling="weighted")
    whole = transformers.LlamaForCausalLM.from_pretrained(head).model
    whole.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    save_tokenizer(tmp_path / "shards", eos_token="[UNK]")
    shards = embed_texts(TEXTS, str(tmp_path / "shards"), pooling="weighted")
    np.testing.assert_array_equal(got, shards)
    assert np.abs(got[0] - got[1]).max() > 1e-3


def test_load_text_passes_pooling_and_attention_on(models):
    from types import SimpleNamespace

    dataset = SimpleNamespace(name="tiny", items=["", "a", "b"], texts=["", *TEXTS[1:3]])
    options = {"pooling": "last", "attention": "bidirectional"}
    matrix = load_text(models("llama"), dataset, **options)
    np.testing.assert_array_equal(matrix[1:], embed_texts(TEXTS[1:3], models("llama"), **options))
