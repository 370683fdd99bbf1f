"""Lines for whoever watches a benchmark run; results go to standard output."""

import sys
import time


def log_progress(what: str) -> None:
    """Print a line with the time to standard error."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)
