"""Everything besides the request that can change a bit of an image, as facts and as their sha256.

Why a pinned bucket gives fixed bits: a kernel's choice of tiles, of splits along the summed axis
and of vector or scalar code depends on the shapes it is given, mostly on the number of rows of the
small matmuls, and with it the order in which numbers are added. Rows never mix, so with every shape
constant each row is computed by the same instructions whatever the other rows hold. A diffusion
step has a constant number of tokens; the row count is all that varies, and padding every forward to
`bucket_rows` holds that still too. Encode and decode run one at a time. What is left is listed
here. Two images with equal requests and equal fingerprints have equal bits; a resume elsewhere is
exact only on an equal fingerprint.
"""

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

NUMERICS = 1  # raise it with every change to engine/ that can change a bit
LIBRARIES = ("torch", "diffusers", "transformers", "tokenizers", "numpy", "safetensors")


@dataclass(frozen=True)
class Fingerprint:
    """Facts (plain JSON values) and the hex sha256 of their canonical JSON."""

    facts: dict[str, Any]
    sha256: str


def fingerprint(
    *,
    weights_digest: str,
    family: str,
    precision: str,
    bucket_rows: int | None,
    adapters: list[dict[str, Any]],
    block_cache: dict[str, Any] | None,
    fork: str,
    speed: dict[str, bool],
    device_facts: dict[str, Any],
    family_facts: dict[str, Any],
) -> Fingerprint:
    """Gather the facts.

    `bucket_rows` None says that neighbours may change the last bits: no promise is made then.

    adapters: name, sha256 and strength of each.  block_cache: when it skips blocks, None where
    every block is computed. fork: sha256 of the latents that the image started from, "" for its own
    noise. speed: what `acceleration.py` did.
    """
    facts: dict[str, Any] = {
        "numerics": NUMERICS,
        "weights": weights_digest,
        "family": family,
        "precision": precision,
        "bucket_rows": bucket_rows,
        "adapters": adapters,
        "speed": speed,
        "block_cache": block_cache,
        "fork": fork,
        "libraries": {name: version(name) for name in LIBRARIES},
        **device_facts,
        **family_facts,
    }
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return Fingerprint(facts, hashlib.sha256(canonical.encode()).hexdigest())
