"""Failure codes, states, events and formats: one list each, and what others say of them agrees."""

import inspect

import pytest
from click import Choice

import cli.generate
import cli.job_options
import cli.jobs
import cli.many
import darkroom_client.downloads
import darkroom_client.jobs
from edges.encoding import OPTIONS
from policy.failures import FAILURES, FailureCode, is_our_fault, told_detail
from policy.formats import FORMATS, extension_of
from policy.states import ACTIVE_STATES, FINAL_STATES, TAKEN_BACK, JobState
from policy.webhooks import ENDED_EVENTS, event_of

OURS = {
    "attempts_exhausted",
    "out_of_memory",
    "input_gone",
    "run_deadline",
    "not_stored",
    "internal",
}
KEPT_INSIDE = {"attempts_exhausted", "internal"}


def test_failures_say_of_every_code_whose_fault_it_is():
    assert set(FAILURES) == set(FailureCode)


@pytest.mark.parametrize("code", list(FailureCode))
def test_failures_are_ours_where_another_try_may_do_better(code):
    assert is_our_fault(code.value) is (code in OURS)


@pytest.mark.parametrize("code", list(FailureCode))
def test_failures_tell_no_insides(code):
    assert told_detail(code.value, "why") == (None if code in KEPT_INSIDE else "why")


@pytest.mark.parametrize("code", [None, "", "of a later version"])
def test_failures_of_an_unknown_code_are_told_nothing_of(code):
    assert told_detail(code, "why") is None
    assert not is_our_fault(code)


def test_states_are_final_or_active_and_never_both():
    assert {*FINAL_STATES, *ACTIVE_STATES} == set(JobState)
    assert not {*FINAL_STATES} & {*ACTIVE_STATES}
    assert {*TAKEN_BACK} < {*FINAL_STATES}


def test_states_have_an_event_of_their_own_each_once_final():
    assert ENDED_EVENTS == (
        "job.succeeded",
        "job.failed",
        "job.rejected",
        "job.canceled",
        "job.expired",
    )
    assert tuple(event_of(state) for state in FINAL_STATES) == ENDED_EVENTS


def test_states_are_the_same_to_the_client_and_the_command_line():
    [option] = [option for option in cli.jobs.jobs.params if option.name == "state"]

    assert {*FINAL_STATES} == darkroom_client.jobs.FINAL_STATES
    assert isinstance(option.type, Choice)
    assert list(option.type.choices) == [state.value for state in JobState]
    for state in set(FINAL_STATES) - {JobState.SUCCEEDED}:
        # of the lines that --retry-failed begins again
        assert f'"{state}"' in inspect.getsource(cli.many)


def test_formats_are_the_same_to_the_encoder_the_client_and_the_command_line():
    extensions = {kind.content_type: kind.extension for kind in FORMATS.values()}

    assert list(OPTIONS) == list(FORMATS)
    assert extensions == darkroom_client.downloads._EXTENSIONS
    assert {
        name: f".{kind.extension}" for name, kind in FORMATS.items()
    } == cli.job_options.EXTENSIONS
    assert set(cli.generate.FORMATS.values()) == set(FORMATS)
    assert {f".{kind.extension}" for kind in FORMATS.values()} <= set(cli.generate.FORMATS)


def test_formats_know_the_extension_of_what_is_stored():
    assert [extension_of(kind.content_type) for kind in FORMATS.values()] == ["png", "webp", "jpg"]
    with pytest.raises(KeyError):
        extension_of("image/gif")
