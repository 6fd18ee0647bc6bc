"""Items added to a finished run by text alone, and how they are stored beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from padkern.data.bins import FrequencyBins
from padkern.data.dataset import Dataset
from padkern.models.growth import add_items
from padkern.models.triple_expert import ExpertModel
from padkern.pad.folder import RunFolder
from padkern.pad.gate import fit_new_items, held_out

if TYPE_CHECKING:
    from padkern.pad.stored import LoadedRun

__all__ = ["grown_run", "load_added", "store_added"]

_NAME = "added"


def grown_run(
    run: LoadedRun,
    items: Sequence[str],
    *,
    vectors: np.ndarray | None = None,
    texts: Sequence[str] | None = None,
    cold_tolerance: float | None = None,
    device: str = "cpu",
) -> LoadedRun:
    """A run whose catalogue has more items; see :meth:`padkern.pad.stored.LoadedRun.add_items`."""
    items = list(items)
    texts = None if texts is None else list(texts)
    if cold_tolerance is None:
        cold_tolerance = run.cold_tolerance
    elif not 0 <= cold_tolerance < 1:
        raise ValueError(f"cold_tolerance must be at least 0 and below 1, got {cold_tolerance}")
    elif not _fits_gate(run) or run.model.gate.form == "sigmoid":
        raise ValueError(
            "cold_tolerance must not be given: no held-out gate of the run raises unseen items"
        )
    _check_names(items, texts, run.dataset)
    if vectors is None:
        vectors = _embedded(run, texts, device)
    raw = np.asarray(vectors)
    width = len(run.transform.mean)
    if raw.shape != (len(items), width) or raw.dtype.kind != "f":
        raise ValueError(
            f"vectors must be floats [{len(items)}, {width}], one row for each item in the width "
            f"of the run's text matrix, got {raw.dtype}{list(raw.shape)}"
        )
    raw = raw.astype(np.float32)
    if not np.isfinite(raw).all():
        raise ValueError("vectors must be finite, found NaN or Inf")
    texts = texts or [""] * len(items)
    origin = run.origin or run
    if run.added is not None:
        # All from the run as trained: then it does not matter whether items come at once.
        earlier = slice(-len(run.added), None)
        raw = np.concatenate([run.added, raw])
        items, texts = run.dataset.items[earlier] + items, run.dataset.texts[earlier] + texts
    # Where the caller's block records no gradients, the fit still needs them.
    with torch.inference_mode(False):
        grown = replace(_appended(origin, items, texts, raw), cold_tolerance=cold_tolerance)
        _fit_unseen(grown)
    return grown


def _fits_gate(run: LoadedRun) -> bool:
    """Whether the run's gate was fitted on held-out targets and has a row for unseen items."""
    learned = run.config.disentangle.gate.learned
    return learned == "heldout" and run.model.unseen_bin is not None


def _appended(run: LoadedRun, items: list[str], texts: list[str], raw: np.ndarray) -> LoadedRun:
    """The run with items at the end of its catalogue, its gate as it was."""
    padded = np.concatenate([np.zeros((1, raw.shape[1]), np.float32), raw])
    moved = torch.from_numpy(run.transform.apply(padded)[1:])
    count = len(items)
    before = run.dataset
    frequency = np.concatenate([run.split.train_frequency, np.zeros(count, dtype=np.int64)])
    return replace(
        run,
        dataset=Dataset(
            name=before.name,
            users=before.users,
            items=before.items + items,
            sequences=before.sequences,
            timestamps=before.timestamps,
            texts=before.texts + texts,
            provenance=before.provenance,
        ),
        split=replace(run.split, train_frequency=frequency),
        bins=_grown_bins(run.bins, count),
        scorers={row: _grown(scorer, raw, moved) for row, scorer in run.scorers.items()},
        added=raw,
        origin=run,
    )


def _fit_unseen(grown: LoadedRun) -> None:
    """Fits the weights of unseen items in the grown model to the larger catalogue."""
    if not _fits_gate(grown):
        return
    config, model, origin = grown.config.disentangle.gate, grown.model, grown.origin
    assert origin is not None  # _appended sets both
    assert grown.added is not None
    if grown.cold_tolerance is not None:
        config = config.model_copy(update={"cold_tolerance": grown.cold_tolerance})
    seen = origin.split.train_frequency > 0
    before = origin.model
    logit = fit_new_items(
        before, held_out(before, grown.split.valid, seen), config,
        share=len(grown.added) / grown.dataset.num_items, seed=grown.config.seed,
        mask_repeats=grown.config.evaluation.mask_repeats,
    )  # fmt: skip
    _set_unseen(model, logit[model.gate.unseen_row(model.unseen_bin)])


@torch.no_grad()
def _set_unseen(model: ExpertModel, weights: torch.Tensor) -> None:
    model.gate.logit[model.gate.unseen_row(model.unseen_bin)] = weights


def store_added(folder: RunFolder, run: LoadedRun) -> None:
    """Writes the added items into the run's folder; `load_run` then gives the grown run.

    The folder keeps the weights as they were trained and, beside them, ids, texts and raw vectors
    of all items added so far, and the gate's weights of unseen items.

    Raises:
        ValueError: nothing was added.
    """
    if run.added is None:
        raise ValueError("run must have added items (LoadedRun.add_items), it has none")
    count = len(run.added)
    names = {"items": run.dataset.items[-count:], "texts": run.dataset.texts[-count:]}
    tensors = {"vectors": torch.from_numpy(run.added)}
    model = run.model
    if model.unseen_bin is not None:
        row = model.gate.unseen_row(model.unseen_bin)
        tensors["unseen_logit"] = model.gate.logit.detach()[row].cpu().contiguous()
    folder.save_tensors(_NAME, tensors, names | {"cold_tolerance": run.cold_tolerance})


def load_added(folder: RunFolder, run: LoadedRun) -> LoadedRun:
    """The run with the items that `store_added` wrote; the run itself where there are none."""
    if not folder.has(_NAME):
        return run
    tensors, names = folder.load_tensors(_NAME)
    grown = _appended(run, names["items"], names["texts"], tensors["vectors"].numpy())
    if "unseen_logit" in tensors:  # else from before it was stored: the weights stay as trained
        _set_unseen(grown.model, tensors["unseen_logit"])
    return replace(grown, cold_tolerance=names.get("cold_tolerance"))


def _check_names(items: list[str], texts: list[str] | None, dataset: Dataset) -> None:
    if not items:
        raise ValueError("items must hold at least one item id")
    known = dataset.item_ids()
    new: set[str] = set()
    for item in items:
        if not isinstance(item, str) or not item:
            raise ValueError(f"items must be non-empty strings, got {item!r}")
        if item in known:
            raise ValueError(f"items must be new to the run, {item!r} is in its catalogue")
        if item in new:
            raise ValueError(f"items must be given once, {item!r} is there twice")
        new.add(item)
    if texts is not None and len(texts) != len(items):
        raise ValueError(f"texts must have {len(items)} entries like items, got {len(texts)}")


def _embedded(run: LoadedRun, texts: list[str] | None, device: str) -> np.ndarray:
    """Raw vectors of texts by the encoder of the run."""
    from padkern.text import default_cache_dir, embed_texts, is_matrix_file

    if texts is None:
        raise ValueError("vectors or texts must be given")
    source = run.text_source
    if source is None or is_matrix_file(source):
        raise ValueError(
            "vectors must be given: the run's own came from "
            + ("an unknown source" if source is None else f"the matrix file {source}")
        )
    return embed_texts(texts, source, device=device, cache_dir=default_cache_dir())


def _grown_bins(bins: FrequencyBins, count: int) -> FrequencyBins:
    new_bin = int(bins.item_bins.max()) if bins.unseen_bin is None else bins.unseen_bin
    item_bins = np.concatenate([bins.item_bins, np.full(count, new_bin, dtype=np.int64)])
    return replace(bins, item_bins=item_bins, edges=(*bins.edges[:-1], bins.edges[-1] + count))


def _grown(scorer: Any, raw: np.ndarray, moved: torch.Tensor) -> Any:
    """A scorer over the grown catalogue: trained models see transformed vectors."""
    if isinstance(scorer, ExpertModel):
        return add_items(scorer, moved)
    return scorer.add_items(raw)
