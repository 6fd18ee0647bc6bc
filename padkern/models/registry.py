"""Encoders by name: those of the library, and those that a program registers.

Loads no torch, so that a configuration can be checked without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from padkern.models.encoder import SequenceEncoder

    #: ``factory(dim, max_len, *, num_layers, num_heads, dropout)`` gives a fresh encoder.
    EncoderFactory = Callable[..., SequenceEncoder]

#: Encoders of the library.
BUILT_IN = ("caser", "gru4rec", "sasrec", "sasrec_pre_ln")
_REGISTERED: dict[str, EncoderFactory] = {}


def register_encoder(name: str, factory: EncoderFactory) -> None:
    """Makes an encoder of your own known by name, for ``model.encoder`` of a configuration.

    A process that opens or resumes a run with such an encoder must register it first. A name that
    was registered before is replaced.

    Args:
        name: an identifier that is not the name of a built-in encoder.
        factory: called as ``factory(dim, max_len, num_layers=, num_heads=, dropout=)``; gives an
            ``nn.Module`` with fresh weights after
            :class:`padkern.models.encoder.SequenceEncoder`.

    Raises:
        TypeError: the factory cannot be called.
        ValueError: the name is no identifier or taken by a built-in encoder.
    """
    if not name.isidentifier() or name in BUILT_IN:
        raise ValueError(f"name must be an identifier other than {_list(BUILT_IN)}, got {name!r}")
    if not callable(factory):
        raise TypeError(f"factory must be callable, got {type(factory).__name__}")
    _REGISTERED[name] = factory


def registered_encoder(name: str) -> EncoderFactory | None:
    """The factory of a registered name, ``None`` for any other."""
    return _REGISTERED.get(name)


def check_encoder_name(name: str) -> None:
    """Raises ValueError for a name that is neither built in nor registered."""
    known = [*BUILT_IN, *_REGISTERED]
    if name not in known:
        raise ValueError(
            f"encoder must be one of {_list(known)} or registered by "
            f"padkern.models.registry.register_encoder, got {name!r}"
        )


def _list(names) -> str:
    return ", ".join(names)
