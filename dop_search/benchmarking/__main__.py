"""``python -m dop_search.benchmarking``: ``dop-bench`` on a machine with nothing but torch and transformers."""

import sys

from dop_search.benchmarking.cli import main

if __name__ == "__main__":
    sys.exit(main())
