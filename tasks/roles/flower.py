"""Run Flower, which shows queues and tasks in a browser, behind a user and a password."""

import logging
import os
from typing import Any, cast

from celery import Celery

from edges import telemetry
from edges.broker import make_celery
from policy.current import CurrentFleet
from policy.fleet import Fleet
from settings import FlowerSettings


def build(settings: FlowerSettings, fleet: Fleet) -> Celery:
    """Make the Celery app that Flower looks at, and take from Flower what acts."""
    _keep_flower_from_acting()
    return make_celery(settings, fleet)


def serve(settings: FlowerSettings, fleet: CurrentFleet) -> int | None:
    """Run Flower until told to end."""
    telemetry.configure_logs("WARNING")  # it tells of every request
    # It asks workers for what they answer only once they are ready, and warns of each that is not.
    logging.getLogger("flower.inspector").setLevel(logging.ERROR)
    user, password = settings.flower_user, settings.flower_password.get_secret_value()
    # By the environment and not by an argument: arguments are for everybody to see.
    os.environ["FLOWER_BASIC_AUTH"] = f"{user}:{password}"
    host, _, port = settings.flower_bind.rpartition(":")
    celery = build(settings, fleet.fleet)
    return cast("int | None", celery.start(["flower", f"--address={host}", f"--port={port}"]))


def _keep_flower_from_acting() -> None:
    """Take away Flower's routes that start, stop or change something. Leans on its names."""
    from flower import urls
    from flower.api import control, tasks

    acting = {tasks.TaskApply, tasks.TaskAsyncApply, tasks.TaskSend, tasks.TaskAbort}

    def acts(route: Any) -> bool:
        handler = getattr(route, "handler_class", None) or route[1]
        return handler in acting or handler.__module__ == control.__name__

    urls.handlers[:] = [route for route in urls.handlers if not acts(route)]
