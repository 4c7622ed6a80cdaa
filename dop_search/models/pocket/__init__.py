"""The bundled models: small LLaVA models trained by ``experiments/pocket/`` on rendered images.

The wheel has the default one, ``deep``; a clone and the source distribution have all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from dop_search.utils.errors import DopError

__all__ = ["POCKET_VARIANTS", "PocketVariant", "pocket_path"]

PocketVariant = Literal["deep", "shallow", "stretched", "describing"]
POCKET_VARIANTS: tuple[PocketVariant, ...] = get_args(PocketVariant)
"""``deep`` and ``shallow`` differ in training alone: auxiliary losses read the text states after decoder layers 6 and 9
in ``deep``, after 2 and 5 in ``shallow``. That decides in which layers text reads the image, so what differs between
the two is planted and says nothing about large models (``experiments/pocket/README.md``). ``stretched`` has 18 layers:
``deep`` with its last six layers twice, trained on. ``describing`` is ``deep``, trained on to describe a picture place
by place in 81 to 90 tokens (question family ``describe_places``), the only one that gives long answers."""


def pocket_path(variant: str = "deep") -> Path:
    """Directory of a bundled model, for ``from_pretrained``; DopError an unknown variant, or one that is not here: an
    installed package has ``deep`` alone."""
    if variant not in POCKET_VARIANTS:
        raise DopError(f"variant must be one of {POCKET_VARIANTS}, but got {variant!r}")
    path = Path(__file__).parent / variant
    if not (path / "model.safetensors").is_file():
        raise DopError(
            f"the pocket model {variant!r} is not in {str(path)!r}: an installed package has 'deep' alone, a clone of "
            f"the repository has all; run the clone's command, or point to its dop_search/models/pocket/{variant}"
        )
    return path
