"""Processes that decode what strangers send.

They answer as the plain functions do, die alone, and are shared fairly.
"""

import contextlib
import io
import os
import signal
import threading

import psutil
import pytest
from PIL import Image

from edges import decoders, pictures
from edges.decoders import Decoders, FairSemaphore, TooBusy
from edges.pictures import NotAPicture
from tests.builders import until
from tests.pictures import KINDS, a_picture, encoded, png


@pytest.fixture(scope="module")
def two():
    """Two decoders, running."""
    two = Decoders()
    two.normalise(png(), tenant=None)
    yield two
    two.close()


def processes() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.ZombieProcess):  # of another test, and no decoder
            if "edges.decoders" in " ".join(child.cmdline()):
                found.append(child)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_answers_as_the_function_does(two, kind):
    content = encoded(a_picture(), kind)

    assert (
        two.normalise(content, tenant=1)
        == two.normalise(io.BytesIO(content), tenant=1)
        == pictures.normalise(content)
    )


def test_a_refusal_has_its_reason_and_the_decoder_goes_on(two):
    before = {process.pid for process in processes()}

    with pytest.raises(NotAPicture, match="is not a PNG, JPEG or WebP file"):
        two.normalise(b"<svg/>", tenant=1)

    assert two.normalise(png(), tenant=1).mode == "RGB"
    assert before <= {process.pid for process in processes()}


def test_masks_and_holes_are_judged_there_too(two):
    hole = Image.new("RGBA", (8, 8), (255, 255, 255, 0))

    assert two.has_hole(png(hole), 4, 4, tenant=1)
    assert not two.selects(png(Image.new("L", (8, 8))), 4, 4, tenant=1)


def test_a_decoder_that_dies_takes_its_picture_with_it_and_nothing_else():
    own = Decoders(at_once=1)
    own.normalise(png(), tenant=1)
    [process] = [each for each in processes() if each.pid == own._idle[0]._process.pid]

    class Deadly(io.BytesIO):
        def read(self, size=-1):
            process.send_signal(signal.SIGKILL)
            process.wait()
            return super().read(size)

    with pytest.raises(NotAPicture, match="takes more to decode"):
        own.normalise(Deadly(png() * 1000), tenant=1)

    assert own.normalise(png(), tenant=1).mode == "RGB"
    own.close()


def test_where_no_decoder_starts_no_picture_is_called_bad(monkeypatch):
    monkeypatch.setattr(decoders.sys, "executable", "/bin/false")
    own = Decoders(at_once=1)

    with pytest.raises(TooBusy):
        own.normalise(png(), tenant=1)

    monkeypatch.undo()
    assert own.normalise(png(), tenant=1).mode == "RGB"
    own.close()


def test_a_decoder_knows_nothing_of_the_gateway_s_environment(two, monkeypatch):
    monkeypatch.setenv("S3_SECRET_ACCESS_KEY", "secret")
    own = Decoders(at_once=1)
    own.normalise(png(), tenant=1)

    assert "S3_SECRET_ACCESS_KEY" not in psutil.Process(own._idle[0]._process.pid).environ()
    own.close()


def test_a_picture_may_use_so_much_processor_time_and_no_more(two):
    process = psutil.Process(two._idle[-1]._process.pid)
    soft, _ = process.rlimit(psutil.RLIMIT_CPU)

    assert 0 < soft <= sum(process.cpu_times()[:2]) + decoders.CPU_S + 1
    assert process.rlimit(psutil.RLIMIT_AS)[0] < 3_000_000_000


def test_decoders_end_with_their_gateway():
    reading, writing = os.pipe()
    own = Decoders(at_once=1)
    own.normalise(png(), tenant=1)
    process = psutil.Process(own._idle[0]._process.pid)
    os.close(reading)
    os.close(writing)

    own._idle[0]._process.stdin.close()  # as the end of the gateway does

    until(
        lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE,
        within_s=10,
        what="the decoder's end",
    )
    own.close()


def test_more_than_a_few_at_once_wait_and_then_are_told_to_come_later():
    turns = FairSemaphore(2, wait_s=0.05, max_waiting=16)

    with turns.one("a"), turns.one("b"), pytest.raises(TooBusy), turns.one("c"):
        pass

    with turns.one("c"):
        pass


def test_a_file_is_read_only_when_its_turn_has_come(two):
    own = Decoders(at_once=1, wait_s=0.05)
    file = io.BytesIO(png())
    file.seek(3)

    with own._turns.one("other"), pytest.raises(TooBusy):
        own.normalise(file, tenant=1)

    assert file.tell() == 3
    own.close()


def test_a_tenant_with_many_pictures_holds_up_only_itself():
    """Ten of one tenant wait for two turns when a second and a third tenant come with one each:
    those are next.
    """
    turns, order, release = FairSemaphore(2, wait_s=60, max_waiting=16), [], threading.Semaphore(0)

    def decode(tenant):
        with turns.one(tenant):
            order.append(tenant)
            release.acquire()

    threads = [
        threading.Thread(target=decode, args=(tenant,))
        for tenant in ["many"] * 10 + ["second", "third"]
    ]
    for place, thread in enumerate(threads):
        thread.start()
        until(lambda place=place: len(order) + len(turns._waiting) == place + 1, what="its place")
    for count in range(3, 13):
        release.release()
        until(lambda count=count: len(order) == count, what="the next turn")
    for _ in threads:
        release.release()
    for thread in threads:
        thread.join()

    assert order[:4] == ["many", "many", "second", "third"]


def test_a_tenant_may_have_only_so_many_waiting():
    turns = FairSemaphore(1, wait_s=60, max_waiting=1)
    waiting = threading.Thread(target=lambda: turns.one("a").__enter__())

    with turns.one("a"):
        waiting.start()
        until(lambda: len(turns._waiting) == 1, what="one that waits")
        with pytest.raises(TooBusy), turns.one("a"):
            pass
    waiting.join()


def test_a_picture_that_cannot_be_read_to_its_end_leaves_nothing_to_the_next():
    own = Decoders(at_once=1)

    class Broken(io.BytesIO):
        def read(self, size=-1):
            if self.tell():
                raise OSError("the disk is gone")
            return super().read(1000)

    with pytest.raises(NotAPicture):
        own.normalise(Broken(png() * 1000), tenant=1)

    assert own.normalise(png(), tenant=1) == pictures.normalise(png())
    own.close()
