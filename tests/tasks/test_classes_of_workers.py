"""What a worker does by its capacity class: the device that it needs, the notices that it asks."""

import pytest

from settings import EX_CONFIG, WorkerSettings
from tasks.roles.render import _check_device, _notice_sources
from tests.builders import a_fleet


def a_worker(**said) -> WorkerSettings:
    return WorkerSettings(
        device="cpu",
        broker_url="redis://broker:6379/0",
        handoff_url="redis://handoff:6379/0",
        database_url="postgresql://worker:secret@postgres:5432/darkroom",
        **said,
    )


def test_worker_on_another_device_than_its_class_names_ends_with_the_reason(capsys):
    fleet = a_fleet({"pools.local.classes.spot.gpu_class": "l40s"})

    with pytest.raises(SystemExit) as ended:
        _check_device(a_worker(worker_class="spot"), fleet)

    assert ended.value.code == EX_CONFIG
    assert "gpu_class 'l40s' is not in the name of this worker's device, 'cpu'" in (
        capsys.readouterr().err
    )


def test_worker_on_a_device_that_its_pool_and_its_class_allow_goes_on():
    fleet = a_fleet({"pools.local.gpu_class": "h100", "pools.local.classes.mine.gpu_class": "cpu"})

    _check_device(a_worker(worker_class="mine"), fleet)
    _check_device(a_worker(), a_fleet())


@pytest.mark.parametrize(
    ("market", "asked"),
    [
        ("spot", ["aws", "file"]),
        (None, ["aws", "file"]),
        ("on_demand", ["file"]),
        ("reserved", ["file"]),
    ],
)
def test_cloud_is_asked_for_notices_where_machines_are_rented_on_the_spot_market(market, asked):
    said = {} if market is None else {"pools.local.classes.a.market": market}
    settings = a_worker(preemption_notices="aws,file:/run/{worker}", worker_name="me@here")

    sources = _notice_sources(settings, a_fleet(said))

    assert [source.name for source in sources] == asked
