"""``python -m dop_search`` is ``dop-search``."""

from dop_search.app.cli.entry import search

if __name__ == "__main__":
    search()
