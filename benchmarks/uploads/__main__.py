"""What hostile bodies cost the gateway: processor time for each, and what /healthz does meanwhile.

    python -m benchmarks.uploads [--quick]

5,000 generated bodies and 60 of some 30 MB (bodies.py) go to the routes that take pictures: four
fifths one by one, for what each takes of the gateway's process and of its decoders, the others
through eight clients at once. All the while another process asks /healthz fifty times a second. No
worker runs, so what is accepted waits.
"""

import argparse
import sys

from benchmarks.lib.stack import GATEWAY_ONLY, running_stack, temporary_folder
from benchmarks.uploads.measurement import FULL, QUICK, measure
from benchmarks.uploads.report import report_run


def main() -> int:
    """Measure, print a table and one line of JSON; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="140 bodies and 9 large ones; ends within a minute",
    )
    options = parser.parse_args()
    with temporary_folder() as folder, running_stack(folder, without=GATEWAY_ONLY) as stack:
        findings = measure(stack, QUICK if options.quick else FULL)
    return report_run(findings)


if __name__ == "__main__":
    sys.exit(main())
