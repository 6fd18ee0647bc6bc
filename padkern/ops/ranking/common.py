"""What the launchers of every backend check of the raw op's arguments."""

from __future__ import annotations

from torch import Tensor


def check_arguments(
    width: int,
    user_states: Tensor,
    item_matrix: Tensor,
    panels: Tensor,
    largest: Tensor,
    order: Tensor | None,
    targets: Tensor | None,
    seen_offsets: Tensor,
) -> None:
    """Raises ValueError for dtypes and shapes that do not belong together; panels are ``width``
    items wide."""
    users, dtype = user_states.shape[0], user_states.dtype
    items, dim = item_matrix.shape[0] - 1, item_matrix.shape[1]
    if item_matrix.dtype != dtype or panels.dtype != dtype or largest.dtype != dtype:
        raise ValueError(f"item_matrix and panels must be {dtype} like user_states")
    if user_states.shape[1] != dim or panels.shape != (-(-items // width), dim, width):
        raise ValueError(
            f"panels must be those of item_matrix {list(item_matrix.shape)}, "
            f"got {list(panels.shape)}"
        )
    for name, ids, size in (
        ("order", order, items),
        ("targets", targets, users),
        ("seen_offsets", seen_offsets, users + 1),
    ):
        if ids is not None and tuple(ids.shape) != (size,):
            raise ValueError(f"{name} must have shape [{size}], got {list(ids.shape)}")
