"""What text of people's own may be kept beside a job: whatever people write, and nothing that steers the machine that shows it."""

import re

# Control characters, and halves of a pair.
_NOT_HUMAN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def is_human(text: str) -> bool:
    """Is there no control character and no lone surrogate in it? Every script, every space, joiners and marks are welcome."""
    return _NOT_HUMAN.search(text) is None
