"""What belongs to one placed pipeline: a copy of it would go on working on the original."""

from __future__ import annotations

from typing import NoReturn

from ..errors import RunError


class NotCopied:
    """Something that placing puts on a pipeline or its components."""

    def __reduce_ex__(self, _: object) -> NoReturn:
        """Refuse `copy.deepcopy` and pickle: a copied module's methods would go on working on the original.

        Raises:
            RunError: always.
        """
        raise RunError(
            "a placed pipeline cannot be copied or pickled, nor can its components: their borders belong to it",
            where="pipeline",
            hint="unplace(pipeline), copy it, then place(pipeline, resolved) the original and the copy",
        )
