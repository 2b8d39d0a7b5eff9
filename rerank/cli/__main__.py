"""`python -m rerank.cli`, as the `rerank` command."""

import sys

from rerank.cli import main

if __name__ == "__main__":
    sys.exit(main())
