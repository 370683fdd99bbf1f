"""Some two hundred uploads that no gateway should fall over.

None is taken for what it is not, none is a fault, memory is bounded.
"""

from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from tests.app.problem import assert_problem
from tests.pictures import SECRET, decoded, harmless, hostile

pytestmark = pytest.mark.slow

MOST_MEMORY = 1_000_000_000  # what AT_ONCE decodes of the largest pictures may add, and some more


@pytest.fixture(scope="module")
def gateway_memory(stack):
    """(now, peak) of the gateway's process in bytes; the peak since the first call."""
    [process] = psutil.Process(stack.pid("gateway")).children()

    def read() -> tuple[int, int]:
        with open(f"/proc/{process.pid}/status") as file:
            fields = dict(line.split(":", 1) for line in file)
        return tuple(int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))

    with open(f"/proc/{process.pid}/clear_refs", "w") as file:
        file.write("5")
    return read


def send(tenant, content: bytes, kind: str) -> httpx.Response:
    return tenant.post("/v1/files", content=content, headers={"Content-Type": kind})


def test_no_hostile_upload_is_accepted_or_is_a_fault_and_memory_stays_bounded(
    new_tenant, gateway_memory, capsys
):
    tenant, uploads = new_tenant(), list(hostile())
    before, _ = gateway_memory()

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda upload: send(tenant, upload[1], "image/png"), uploads))
    wrongly_called = [send(tenant, content, "image/jpeg") for _, content in uploads[:40]]

    after, peak = gateway_memory()
    for answer in answers + wrongly_called:
        assert_problem(answer, 422, "invalid-picture")
    assert tenant.get("/v1/files").json()["data"] == []
    assert tenant.get("/healthz").status_code == 200
    assert peak - before < MOST_MEMORY
    with capsys.disabled():
        count = len(answers) + len(wrongly_called)
        print(
            f" [{count} hostile uploads: gateway {before >> 20} MiB before, {peak >> 20} at "
            f"most, {after >> 20} after]",
            end="",
        )


def test_strange_pictures_are_accepted_and_nothing_else_of_them_is_kept(new_tenant, gateway_memory):
    tenant = new_tenant()

    for name, content in harmless():
        answer = send(tenant, content, "application/octet-stream")
        assert answer.status_code == 201, name
        kept = httpx.get(tenant.get(answer.json()["url"]).headers["Location"], trust_env=False)
        assert kept.headers["Content-Type"] == "image/png"
        assert decoded(kept.content).format == "PNG"
        assert not any(part in kept.content for part in (SECRET, b"<script", b"PK\x03\x04")), name

    assert gateway_memory()[1] < MOST_MEMORY
