"""Rules and dashboards: they name metrics and columns that there are, and show all of them."""

import json
import re
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from urllib.parse import urlencode

import httpx
import pytest
import yaml

from cli.sql import ask
from darkroom_client import Client
from fleet.stack import Stack
from settings import REPO
from tests.builders import until
from tests.edges.test_metric_names import COUNTERS, GAUGES, HISTOGRAMS

FOLDER = REPO / "deploy" / "observability"
BOARDS = sorted((FOLDER / "grafana" / "dashboards").glob("*.json"))
RULES = yaml.safe_load((FOLDER / "rules.yml").read_text())
RECORDED = {
    rule["record"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule
}
# Metrics that no panel and no rule shows, and why.
NOT_SHOWN = {
    "darkroom_checkpoints_total": "snapshots that went well; those that did not are shown",
    "darkroom_decoders_died_total": "logged, each with its picture",
    "darkroom_duplicate_messages_total": "harmless by design",
    "darkroom_events_dropped_total": "of slow readers, who read again",
    "darkroom_events_sent_total": "what streams cost; their number is shown",
    "darkroom_fleet_unreadable_total": "the revision of each process is shown",
    "darkroom_inputs_brought_total": "the time it takes is shown",
    "darkroom_inputs_gone_total": "jobs that fail of it count in their tier's objective",
    "darkroom_jobs_erased_total": "in the audit log",
    "darkroom_limits_local_total": "Redis is away then, which is shown",
    "darkroom_notices_total": "the jobs that were preempted are shown",
    "darkroom_pictures_kept_total": "in the audit log",
    "darkroom_pictures_refused_total": "answers of the gateway are shown by status",
    "darkroom_previews_dropped_total": "the hand-off's fill is shown",
    "darkroom_requests_replayed_total": "harmless by design",
    "darkroom_snapshots_refused_total": "the steps that were lost are shown",
    "darkroom_texts_unread_total": "told to the tenant, job by job",
    "darkroom_transaction_conflicts_total": "repeated at once",
    "darkroom_upload_spool_reserved_bytes": "the uploads under way are shown",
    "darkroom_webhooks_deferred_total": "those that are pending are shown",
    "darkroom_weights_stage_seconds": "the bytes per second are shown",
}


def panels(board: Path) -> list[dict]:
    return json.loads(board.read_text())["panels"]


def queries() -> list[tuple[str, str]]:
    """Every PromQL expression, with where it stands."""
    found = [
        (f"{board.stem}: {panel['title']}", target["expr"])
        for board in BOARDS
        for panel in panels(board)
        for target in panel["targets"]
        if "expr" in target
    ]
    rules = [rule for group in RULES["groups"] for rule in group["rules"]]
    return found + [(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules]


def named(expression: str) -> set[str]:
    """The metrics that an expression reads, a histogram by its own name."""
    names = set(re.findall(r"\bdarkroom[_:][a-z0-9_:]+", expression))
    return {
        name.removesuffix("_bucket") if name.removesuffix("_bucket") in HISTOGRAMS else name
        for name in names
    }


def labels_of(expression: str) -> set[tuple[str, str]]:
    """(metric, label) of each selector."""
    return {
        (name.removesuffix("_bucket"), label)
        for name, selector in re.findall(r"(darkroom_[a-z0-9_]+)\{([^}]*)\}", expression)
        for label in re.findall(r"(\w+)\s*[=!]", selector)
    }


def test_every_metric_of_a_panel_or_rule_exists_and_has_the_labels_that_it_is_chosen_by():
    known = COUNTERS | HISTOGRAMS | GAUGES

    for where, expression in queries():
        assert named(expression) <= known.keys() | RECORDED, where
        for metric, label in labels_of(expression):
            assert label in known[metric], f"{where}: {metric} has no label {label}"


def test_every_metric_is_in_a_panel_or_rule_or_is_listed_as_not_shown():
    shown = set().union(*(named(expression) for _, expression in queries()))

    assert (COUNTERS | HISTOGRAMS | GAUGES).keys() - shown - NOT_SHOWN.keys() == set()
    assert NOT_SHOWN.keys() & shown == set()


def test_every_alert_has_a_severity_a_summary_and_its_line_in_the_documents():
    told = (REPO / "docs" / "operating.md").read_text()

    for group in RULES["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                assert rule["labels"]["severity"] in ("page", "ticket")
                assert rule["annotations"]["summary"]
                assert f"`{rule['alert']}`" in told, rule["alert"]


def test_dashboards_have_an_id_of_their_own_and_ask_provisioned_sources():
    provisioned = FOLDER / "grafana" / "provisioning" / "datasources" / "darkroom.yml"
    sources = {each["uid"] for each in yaml.safe_load(provisioned.read_text())["datasources"]}

    boards = [json.loads(board.read_text()) for board in BOARDS]
    assert len({board["uid"] for board in boards}) == len(BOARDS) == 5
    for board in boards:
        assert {panel["datasource"]["uid"] for panel in board["panels"]} <= sources


def test_tables_of_dashboards_are_what_the_auditor_may_read(stack):
    for board in BOARDS:
        for panel in panels(board):
            for target in panel["targets"]:
                if "rawSql" in target:
                    sql = target["rawSql"].replace("${job:sqlstring}", "'nothing'")
                    assert ask(stack.env["AUDITOR_DATABASE_URL"], sql).columns, panel["title"]


def promtool(*arguments: str, cwd: Path = FOLDER) -> subprocess.CompletedProcess[str]:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (apt-get install prometheus)")
    return subprocess.run(
        ["promtool", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_rules_are_sound_and_alert_when_they_should():
    for command in (("check", "rules", "rules.yml"), ("test", "rules", "rules.test.yml")):
        done = promtool(*command)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_query_of_a_panel_is_promql(tmp_path):
    rules = [
        {"record": f"panel:{number}", "expr": expression}
        for number, (_, expression) in enumerate(queries())
    ]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))

    done = promtool("check", "rules", str(file))

    assert done.returncode == 0, done.stdout + done.stderr


def test_overlay_of_compose_adds_services_to_networks_and_files_that_there_are():
    whole = yaml.safe_load((REPO / "docker-compose.yml").read_text())
    added = yaml.safe_load((REPO / "docker-compose.observability.yml").read_text())

    assert set(added["services"]) == {"prometheus", "alertmanager", "grafana"}
    for service in added["services"].values():
        assert set(service["networks"]) <= set(whole["networks"])
        assert re.fullmatch(r"\$\{\w+:-[\w./-]+:v?\d+\.\d+\.\d+\}", service["image"])
        for port in service["ports"]:
            assert ":-127.0.0.1:" in port
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in added["volumes"] or (REPO / source).exists(), volume
    scraped = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"][0]
    assert set(scraped["dns_sd_configs"][0]["names"]) <= set(whole["services"])


@pytest.mark.slow
def test_prometheus_reads_a_running_stack_and_evaluates_every_panel(tmp_path, monkeypatch):
    """With the rules, as they are shipped. A metric that only trouble makes may have no series."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (apt-get install prometheus)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("METRICS_PORT", "19400")
    folder = Path(tempfile.mkdtemp(prefix="darkroom-tests-"))
    stack = Stack(folder / "data")
    try:
        stack.up(wait_s=280)
        with Client(stack.env["DARKROOM_URL"], stack.env["DARKROOM_API_KEY"]) as client:
            client.wait(client.create_job("a large red circle", tier="fast", seed=1).id)
        shown = panels_shown(stack, address, tmp_path)
    finally:
        stack.down()
        shutil.rmtree(folder, ignore_errors=True)

    assert {
        "fleet: Gateway: p50 and p99",
        "fleet: Workers",
        "objectives: Met in the last hour",
        "objectives: Burn rate, 1 h",
        "engine: Rows of a forward; forwards per second",
        "engine: Where the device's time goes",
        "cost: Tenants that have spent their month's budget",
    } <= shown


def panels_shown(stack: Stack, address: str, folder: Path) -> set[str]:
    """Run Prometheus beside the stack; return the queries that find something."""
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(FOLDER / "rules.yml")]
    del config["alerting"]
    targets = [f"127.0.0.1:{port}" for port in metric_ports(stack)]
    config["scrape_configs"] = [{"job_name": "darkroom", "static_configs": [{"targets": targets}]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = ["prometheus", f"--config.file={folder}/prometheus.yml"]
    command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}"]
    log = (folder / "log").open("w")
    server = subprocess.Popen(command, stdout=log, stderr=log)

    def asked(expression: str) -> list:
        url = f"http://{address}/api/v1/query?{urlencode({'query': expression})}"
        answer = httpx.get(url, trust_env=False).json()
        assert answer["status"] == "success", (expression, answer)
        return answer["data"]["result"]

    def up() -> int:
        try:
            return sum(float(each["value"][1]) for each in asked("up"))
        except httpx.TransportError:
            return 0

    try:
        until(lambda: up() == len(targets), what="a scrape of every process")
        until(lambda: asked("darkroom:slo_burn_rate"), what="the first burn rate")
        time.sleep(2)
        return {where for where, expression in queries() if asked(expression)}
    finally:
        server.terminate()
        server.wait(timeout=30)
        log.close()


def metric_ports(stack) -> list[int]:
    """The ports at which processes of the stack tell their metrics."""
    ports = []
    for status in stack.status():
        if status.pid:
            environment = Path(f"/proc/{status.pid}/environ").read_text().split("\0")
            ports += [
                int(line.partition("=")[2])
                for line in environment
                if line.startswith("METRICS_PORT=") and not line.endswith("=0")
            ]
    return ports
