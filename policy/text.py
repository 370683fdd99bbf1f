"""Decide which text a tenant may keep beside a job.

Whatever people write, but nothing that controls the terminal or program that shows it.
"""

import re

# Control characters and lone surrogates.
_NOT_HUMAN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def is_human(text: str) -> bool:
    """Tell whether the text has no control character and no lone surrogate.

    Every script, every space, joiners and marks are accepted.
    """
    return _NOT_HUMAN.search(text) is None
