"""A command that imports this (``imports=[support.without_pictures]``) leaves its picture files empty."""

import matplotlib.figure

from support.pictures import save_nothing

matplotlib.figure.Figure.savefig = save_nothing  # type: ignore[method-assign,assignment]
