"""Every method that PAD is compared with, and PAD's own rows, behind one name each.

All of them see the same training rows, text, candidates and bins, and are selected on the same
validation targets: what :class:`padkern.pad.phases.Phases` holds. ``docs/methods.md`` says where a
method differs from its paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from padkern.errors import UsageError
from padkern.pad import rivals
from padkern.pad.baselines import MostPop, TextKNN
from padkern.pad.evaluation import Scorer
from padkern.pad.phases import Phases


@dataclass(frozen=True)
class Method:
    """One method of the comparison.

    Attributes:
        name: key in :data:`METHODS`.
        describe: one line, with the source.
        train: gives the trained scorer from data, text, configuration and seed.
        tunable: configuration keys that tuning may vary.
    """

    name: str
    describe: str
    train: Callable[[Phases], Scorer]
    tunable: tuple[str, ...]


def train_method(name: str, phases: Phases) -> Scorer:
    """Trains a method from scratch, phases that it builds on included.

    Args:
        name: a key of :data:`METHODS`.
        phases: data, text, configuration and seed; ``raw_text`` is needed by methods that measure
            the text themselves.

    Returns:
        A scorer for :func:`padkern.pad.evaluation.evaluate`. Its validation figures are those of
        ``phases.validation(name, scorer)``: a gate fitted on these targets is cross-fitted there.

    Raises:
        UsageError: an unknown name.
        ValueError: data or sizes that the method cannot take, or ``raw_text`` is missing.
    """
    if name not in METHODS:
        raise UsageError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name].train(phases)


def _most_pop(phases: Phases) -> Scorer:
    return MostPop(phases.train_frequency)


def _text_knn(phases: Phases) -> Scorer:
    config = phases.config
    return TextKNN(
        phases.raw("text_knn"), decay=config.text.knn_decay, max_len=config.model.max_len
    )


def _pretrain(phases: Phases) -> Scorer:
    return phases.pretrain()[0]


def _text(phases: Phases) -> Scorer:
    return phases.language()[0]


def _id_plus_text(phases: Phases) -> Scorer:
    return phases.id_plus_text()[0]


def _aligned(phases: Phases) -> Scorer:
    return phases.align(phases.pretrain()[0])[0]


def _pad(phases: Phases) -> Scorer:
    config = phases.config.disentangle
    pretrained, _ = phases.pretrain()
    # Without the aligned expert nothing is taken from phase 2.
    aligned = phases.align(pretrained)[0] if "aligned" in config.experts else pretrained
    warm = config.start_language == "trained" and "language" in config.experts
    return phases.disentangle(pretrained, aligned, phases.language()[0] if warm else None)[0]


def _knobs(section: str, *more: str) -> tuple[str, ...]:
    """Keys of one phase's budget and optimiser, alike for every trained method."""
    own = ("lr", "epochs", "batch_size", "weight_decay")
    return (*(f"{section}.{key}" for key in own), "model.dropout", *more)


_PAD = "arXiv:2412.04107"
_RIVAL = _knobs("id_plus_text", "rivals.recency_path")

#: Name -> method, in the order of the comparison.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("most_pop", "most popular items in training; untrained", _most_pop, ()),
        Method(
            "text_knn",
            "nearest items by text, recent history weighted most; untrained",
            _text_knn,
            ("text.knn_decay",),
        ),
        Method(
            "item_knn",
            "nearest items by shared users (doi 10.1145/371920.372071); closed form",
            rivals.item_knn,
            ("rivals.knn_neighbours", "rivals.knn_shrinkage", "rivals.knn_decay"),
        ),
        Method(
            "ease",
            "linear autoencoder without self-loops (EASE, arXiv:1905.03375); closed form",
            rivals.ease,
            ("rivals.ease_l2",),
        ),
        Method(
            "ials",
            "matrix factorisation by alternating least squares (iALS, arXiv:2110.14037)",
            rivals.ials,
            (
                "model.dim",
                "rivals.ials_sweeps",
                "rivals.ials_unobserved",
                "rivals.ials_l2",
                "rivals.ials_exponent",
            ),
        ),
        Method(
            "pretrain",
            f"IDs alone: PAD's first phase ({_PAD}), by default SASRec (arXiv:1808.09781)",
            _pretrain,
            _knobs("pretrain"),
        ),
        Method(
            "llminit",
            "IDs that start at the text's principal components (arXiv:2309.09261)",
            rivals.llminit,
            _RIVAL,
        ),
        Method(
            "text",
            "text alone: the language expert, which scores in the text space",
            _text,
            _knobs("language"),
        ),
        Method(
            "morec",
            "text alone through a small network (MoRec in two stages, arXiv:2303.13835)",
            rivals.morec,
            _RIVAL,
        ),
        Method(
            "unisrec",
            "text alone through a mixture of whitening maps (UniSRec, arXiv:2206.05941)",
            rivals.unisrec,
            (*_RIVAL, "rivals.adaptor_experts"),
        ),
        Method(
            "id_plus_text",
            "one encoder on zero-initialised ID + projected text, with the recency path",
            _id_plus_text,
            _knobs("id_plus_text"),
        ),
        Method(
            "id_text_sum",
            "one encoder on ID + projected text, added, in their plain form",
            rivals.id_text_sum,
            _RIVAL,
        ),
        Method(
            "id_text_cat",
            "one encoder on ID and projected text, side by side",
            rivals.id_text_cat,
            _RIVAL,
        ),
        Method(
            "alphafuse",
            "frozen text with IDs in its least used directions (AlphaFuse, arXiv:2504.19218)",
            rivals.alphafuse,
            (*_RIVAL, "rivals.null_dim"),
        ),
        Method(
            "llm_esr",
            "ID and text views that attend to one another (LLM-ESR, arXiv:2405.20646)",
            rivals.llm_esr,
            _RIVAL,
        ),
        Method(
            "aligned",
            f"ID + text with MK-MMD alignment: PAD's second phase ({_PAD})",
            _aligned,
            _knobs("align", "align.gamma"),
        ),
        Method(
            "pad",
            f"three experts under a frequency gate ({_PAD})",
            _pad,
            _knobs("disentangle", "align.gamma"),
        ),
    )
}
