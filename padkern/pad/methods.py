"""Every method that PAD is compared with, behind one name each.

All of them see the same training rows, text matrix, candidates and bins, and are selected on the
same validation targets: what :class:`padkern.pad.phases.Phases` holds. ``docs/methods.md`` says
where a method differs from its paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from padkern.errors import UsageError
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
        UsageError: an unknown name, or data that the method cannot be trained on.
    """
    if name not in METHODS:
        raise UsageError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name].train(phases)


def _knobs(section: str, *more: str) -> tuple[str, ...]:
    """Keys of one phase's budget and optimiser, alike for every trained method."""
    own = ("lr", "epochs", "batch_size", "weight_decay")
    return (*(f"{section}.{key}" for key in own), "model.dropout", *more)


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
    pretrained, _ = phases.pretrain()
    aligned, _ = phases.align(pretrained)
    warm = phases.config.disentangle.start_language == "trained"
    return phases.disentangle(pretrained, aligned, phases.language()[0] if warm else None)[0]


_PAD = "arXiv:2412.04107"

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
            "pretrain",
            f"IDs alone: PAD's first phase ({_PAD}), SASRec (arXiv:1808.09781)",
            _pretrain,
            _knobs("pretrain"),
        ),
        Method(
            "text",
            "text alone: the language expert, which scores in the text space",
            _text,
            _knobs("language"),
        ),
        Method(
            "id_plus_text",
            "one encoder on zero-initialised ID + projected text, with the recency path",
            _id_plus_text,
            _knobs("id_plus_text"),
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
