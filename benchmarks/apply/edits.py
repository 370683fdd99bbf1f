"""Put one revision of the fleet after another in force while jobs keep coming."""

import copy
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from benchmarks.lib import fleet_file
from benchmarks.lib.integrity.probe import StackProbe, wait_until
from benchmarks.lib.integrity.underload import Disturbance
from benchmarks.lib.progress import log_progress
from settings import REPO

FOLLOWERS = ("gateway", "results", "sweeper")
FOLLOWS_WITHIN_S = 60.0
WORKERS_WITHIN_S = 600.0
GONE_TIER = "batch"


class Edits(Disturbance):
    """Edits fleet.toml as an operator would, and waits for everybody after each edit.

    follow_s: seconds from the commit until each follower had the revision. workers_s: until every
    worker went by it. refused: edits that were refused, as they should be.
    """

    def __init__(self, probe: StackProbe, file: Path, before_removal: Callable[[], None]) -> None:
        """Know the file. before_removal: called before a tier is taken away."""
        super().__init__("edits")
        self.follow_s: list[float] = []
        self.workers_s: list[float] = []
        self.refused = 0
        self._probe = probe
        self._file = file
        self._tables = fleet_file.read(file)
        self._before_removal = before_removal

    def act(self) -> None:
        """Do all edits in order."""
        for edit in (
            self._add_a_model,
            self._change_weights,
            self._remove_a_tier,
            self._make_a_mistake,
            self._go_back,
            self._kill_a_worker_on_the_way,
        ):
            log_progress(edit.__name__.strip("_").replace("_", " "))
            edit()

    def _add_a_model(self) -> None:
        self._followed(lambda: self._apply_with("tiny-2"))

    def _change_weights(self) -> None:
        tables = copy.deepcopy(self._tables)
        first, second = tables["models"]["tiny"]["versions"]
        first["traffic_weight"], second["traffic_weight"] = 1, 3
        self._apply(tables)

    def _remove_a_tier(self) -> None:
        self._before_removal()
        tables = copy.deepcopy(self._tables)
        del tables["tiers"][GONE_TIER]
        self._apply(tables)

    def _make_a_mistake(self) -> None:
        tables = copy.deepcopy(self._tables)
        for pool in tables["pools"].values():
            pool["models"] = ["nothing"]
        self._file.write_text(fleet_file.text_of(tables))
        if self._command("apply", str(self._file)):
            self.refused += 1

    def _go_back(self) -> None:
        self._followed(lambda: self._command("rollback", "1"))

    def _kill_a_worker_on_the_way(self) -> None:
        def act() -> int:
            status = self._apply_with("tiny-3")
            self._probe.stack.kill(self._probe.workers[0], signal.SIGKILL)
            return status

        self._followed(act)

    def _apply_with(self, name: str) -> int:
        """Apply the first fleet with one more model: the same weights under another name."""
        tables = copy.deepcopy(self._tables)
        versions = tables["models"]["tiny"]["versions"][:1]
        tables["models"][name] = tables["models"]["tiny"] | {"aliases": [], "versions": versions}
        for pool in tables["pools"].values():
            pool["models"] = ["tiny", name]
        self._file.write_text(fleet_file.text_of(tables))
        return self._command("apply", str(self._file))

    def _apply(self, tables: fleet_file.Tables) -> None:
        self._file.write_text(fleet_file.text_of(tables))
        self._followed(lambda: self._command("apply", str(self._file)))

    def _command(self, *arguments: str) -> int:
        command = [sys.executable, "-m", "cli", "--data-dir", str(self._probe.stack.data_dir)]
        done = subprocess.run(
            [*command, "fleet", *arguments], cwd=REPO, capture_output=True, text=True, check=False
        )
        log_progress(f"fleet {arguments[0]}: {(done.stderr or done.stdout).strip()[-300:]}")
        return done.returncode

    def _followed(self, act: Callable[[], int]) -> None:
        """Put a revision in force, and wait until everybody goes by it."""
        if status := act():
            raise RuntimeError(f"the command ended with {status}")
        [newest] = self._probe.sql(
            "SELECT number, applied_at FROM fleet_revisions ORDER BY number DESC LIMIT 1"
        )
        number, applied_at = newest["number"], newest["applied_at"]
        for name in FOLLOWERS:
            taken_over = self._taken_over(name, number)
            self.follow_s.append((taken_over - applied_at).total_seconds())
        behind = "SELECT count(*) AS n FROM workers WHERE fleet_revision IS DISTINCT FROM :number"
        rows = "SELECT count(*) AS n FROM workers WHERE fleet_revision = :number"
        everybody = len(self._probe.workers)

        def all_follow() -> bool:
            here = self._probe.sql(rows, number=number)[0]["n"]
            return bool(here == everybody and self._probe.sql(behind, number=number)[0]["n"] == 0)

        if not wait_until(all_follow, WORKERS_WITHIN_S, every_s=0.2):
            raise TimeoutError(f"not all workers went by revision {number}")
        [now] = self._probe.sql("SELECT clock_timestamp() AS at")
        self.workers_s.append((now["at"] - applied_at).total_seconds())

    def _taken_over(self, name: str, number: int) -> datetime:
        """Return when the process took the revision over, by its log."""
        found: list[datetime] = []

        def has_it() -> bool:
            for line in self._probe.stack.log_path(name).read_text().splitlines():
                if "fleet_revision_taken_over" in line:
                    event = json.loads(line)
                    if event["number"] == number:
                        found.append(datetime.fromisoformat(event["timestamp"]))
            return bool(found)

        if not wait_until(has_it, FOLLOWS_WITHIN_S, every_s=0.1):
            raise TimeoutError(f"{name} did not take revision {number} over")
        return found[-1]
