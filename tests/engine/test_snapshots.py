"""A snapshot carries everything, to anywhere, and whatever is not exactly what was written is
refused with a reason.
"""

import hashlib
import json
import os
import re
import string
import subprocess
import sys
from dataclasses import MISSING, fields, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from engine_builders import a_request
from hypothesis import given, settings
from hypothesis import strategies as st
from test_samplerstate import ALLOWED, an_image, begun, go_on, is_same, made, step_on

from engine.errors import SnapshotRefused
from engine.fingerprint import Fingerprint
from engine.request import AdapterUse, Determinism, Fork, ImageRequest, Picture
from engine.samplerstate import load_generator, load_sampler, save_generator, save_sampler
from engine.snapshots import (
    FORMAT,
    MAX_HEADER_BYTES,
    NOT_IN_THE_DIGEST,
    Snapshot,
    check_fingerprint,
    from_bytes,
    peek,
    request_digest,
    to_bytes,
)

REPO = Path(__file__).parents[2]
properties = settings(deadline=None)  # the machine that runs them is busy with other things too
FACTS = {
    "numerics": 1,
    "weights": "9f2c" * 16,
    "family": "sd",
    "precision": "fp16",
    "bucket_rows": 4,
    "adapters": [],
    "libraries": {"torch": "2.13.0", "diffusers": "0.42.1"},
    "threads": 1,
    "instructions": ["avx2", "avx512f", "fma"],
}


def fingerprinted(**changes) -> Fingerprint:
    facts = FACTS | changes
    return Fingerprint(
        facts, hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    )


def a_picture(*shape, seed=0) -> Picture:
    return Picture(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def a_full_request(**changes) -> ImageRequest:
    """Every field away from its default."""
    given = {
        "owner": "somebody",
        "policy_version": "7",
        "negative_prompt": 'a "green" star\nof ☆ and \\',
        "init_image": a_picture(64, 64, 3, seed=1),
        "mask": a_picture(64, 64, seed=2),
        "strength": 0.1 + 0.2,
        "control_image": a_picture(64, 64, 3, seed=3),
        "clip_skip": 2,
        "adapters": (AdapterUse("ink", 0.7), AdapterUse("paper")),
        "options": {
            "true_cfg_scale": 4.0,
            "max_sequence_length": 256,
            "use_resolution_binning": False,
            "clean": "no",
        },
        "keep_steps": (1, 3),
        "fork": Fork("earlier", 3),
        "determinism": Determinism.REPRODUCIBLE,
        "bucket_rows": 8,
        "rank": 3,
        "may_skip_blocks": False,
    }
    return a_request(**given | changes)


def a_snapshot(**changes) -> Snapshot:
    bits = fingerprinted()
    given = {
        "request": a_request(),
        "family": "sd",
        "fingerprint": bits.sha256,
        "fingerprint_facts": bits.facts,
        "step": 3,
        "num_steps": 20,
        "tensors": {
            "latents": torch.arange(16.0).reshape(1, 4, 2, 2),
            "generator": save_generator(torch.Generator().manual_seed(5)),
        },
        "facts": {
            "sampler": {
                "class": "DDIMScheduler",
                "fields": {"_step_index": None, "lambda": [{"float": "-inf"}, 0.1, -1e-320]},
            }
        },
    }
    return Snapshot(**given | changes)


def sealed_again(blob: bytes, change) -> bytes:
    """What a hand other than the engine's could have written.

    The blob with `change(about)` made, under a seal that fits.
    """
    header_end = 8 + int.from_bytes(blob[:8], "little")
    text = json.loads(blob[8:header_end])["__metadata__"]["darkroom-snapshot"]
    about = change(json.loads(text.split(" ", 3)[3]))
    text = f"{FORMAT:04d} {0:012d} {'0' * 64} {json.dumps(about)}"
    return with_a_fitting_seal(
        safetensors.torch.save(safetensors.torch.load(blob), {"darkroom-snapshot": text})
    )


def with_a_fitting_seal(blob: bytes) -> bytes:
    where = re.search(rb"\d{4} \d{12} [0-9a-f]{64} ", blob).start()
    blob = blob[: where + 5] + f"{len(blob):012d}".encode() + blob[where + 17 :]
    checksum = hashlib.sha256(blob[: where + 18] + blob[where + 82 :]).hexdigest()
    return blob[: where + 18] + checksum.encode() + blob[where + 82 :]


def refusal(read, blob: bytes) -> str | None:
    """Why it is refused; None where it is taken."""
    try:
        read(blob)
    except SnapshotRefused as refused:
        return str(refused)
    return None


# --- what is carried ---


def test_everything_comes_back():
    snapshot = a_snapshot(request=a_full_request())

    read = from_bytes(to_bytes(snapshot))

    assert [
        is_same(getattr(read, part.name), getattr(snapshot, part.name)) for part in fields(Snapshot)
    ] == [True] * len(fields(Snapshot))


def test_every_field_of_a_request_comes_back():
    request = a_full_request()
    defaults = {
        part.name: part.default_factory() if part.default is MISSING else part.default
        for part in fields(ImageRequest)
        if part.default is not MISSING or part.default_factory is not MISSING
    }
    assert [name for name, default in defaults.items() if getattr(request, name) == default] == []

    read = from_bytes(to_bytes(a_snapshot(request=request))).request

    for part in fields(ImageRequest):
        assert (type(getattr(read, part.name)), getattr(read, part.name)) == (
            type(getattr(request, part.name)),
            getattr(request, part.name),
        )


texts = st.text(st.characters(codec=None), max_size=20)  # lone surrogates too
numbers = st.floats(allow_nan=False, allow_infinity=False)
pictures = st.builds(
    a_picture, st.integers(1, 5), st.integers(1, 5), st.just(3), seed=st.integers(0, 9)
)
requests = st.builds(
    a_request,
    texts,
    prompt=texts,
    guidance=numbers | st.integers(0, 20),
    seed=st.integers(0, 2**63 - 1),
    init_image=st.none() | pictures,
    adapters=st.lists(st.builds(AdapterUse, texts, numbers), max_size=3).map(tuple),
    options=st.dictionaries(texts, texts | st.integers() | numbers | st.booleans(), max_size=3),
    keep_steps=st.lists(st.integers(0, 50)).map(tuple),
    fork=st.none() | st.builds(Fork, texts, st.integers(0, 50)),
)


@properties
@given(requests)
def test_any_request_comes_back_and_keeps_its_digest(request):
    read = from_bytes(to_bytes(a_snapshot(request=request))).request

    assert read == request
    assert request_digest(read) == request_digest(request)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.int64,
        torch.uint8,
        torch.bool,
    ],
)
def test_tensors_come_back_in_type_layout_and_bits(dtype):
    values = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).to(dtype)
    tensors = {
        "plain": values,
        "channels last": values.to(memory_format=torch.channels_last),
        "turned": values.permute(3, 1, 0, 2),
        "number": values[0, 0, 0, 1],
        "none at all": values[:0],
    }

    assert is_same(from_bytes(to_bytes(a_snapshot(tensors=tensors))).tensors, tensors)


def test_a_part_of_a_larger_tensor_is_carried_without_the_rest():
    whole = torch.randn(1000, 1000)
    tensors = {"column": whole[:, :1], "spread": whole[:1, :1].expand(3, 2), "again": whole[:, :1]}

    blob = to_bytes(a_snapshot(tensors=tensors))

    read = from_bytes(blob).tensors
    assert len(blob) < 20_000
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_equal_snapshots_are_equal_bytes():
    written = to_bytes(a_snapshot(request=a_full_request()))

    assert to_bytes(a_snapshot(request=a_full_request())) == written
    assert to_bytes(from_bytes(written)) == written


def test_a_snapshot_that_was_read_shares_no_memory():
    tensors = {"latents": torch.zeros(4)}
    snapshot = a_snapshot(tensors=tensors, request=a_full_request())
    blob = to_bytes(snapshot)
    read, again = from_bytes(blob), from_bytes(blob)

    for tensor in (tensors["latents"], again.tensors["latents"]):
        tensor.fill_(9)
    again.request.init_image.pixels[:] = 9

    assert torch.equal(read.tensors["latents"], torch.zeros(4))
    assert read.request == snapshot.request
    assert torch.equal(from_bytes(blob).tensors["latents"], torch.zeros(4))


def test_tensors_come_back_where_torch_would_have_put_them():
    tensors = {f"{length} bytes": torch.ones(length, dtype=torch.uint8) for length in range(1, 9)}

    read = from_bytes(to_bytes(a_snapshot(tensors=tensors))).tensors

    assert [tensor.data_ptr() % 64 for tensor in read.values()] == [0] * 8


def test_an_older_snapshot_lacks_the_newest_fields_and_has_their_defaults():
    request = a_full_request()

    blob = sealed_again(
        to_bytes(a_snapshot(request=request)),
        lambda about: about["request"].pop("clip_skip") and about,
    )

    assert from_bytes(blob).request == replace(request, clip_skip=0)


def test_facts_that_are_not_plain_cannot_be_written():
    for facts in ({"a": torch.ones(1)}, {"a": float("nan")}, {("a",): 1}):
        with pytest.raises(SnapshotRefused, match="not plain enough"):
            to_bytes(a_snapshot(facts=facts))
    with pytest.raises(SnapshotRefused, match=f"take more than {MAX_HEADER_BYTES} bytes"):
        to_bytes(a_snapshot(facts={"a": "a" * MAX_HEADER_BYTES}))


# --- what is refused ---


@pytest.fixture(scope="module")
def small() -> bytes:
    return to_bytes(
        a_snapshot(tensors={"latents": torch.arange(4.0)}, fingerprint_facts={}, facts={})
    )


def test_every_flipped_bit_is_found(small):
    for place in range(len(small)):
        for bit in range(8):
            damaged = bytearray(small)
            damaged[place] ^= 1 << bit
            with pytest.raises(SnapshotRefused):
                from_bytes(bytes(damaged))
            with pytest.raises(SnapshotRefused):
                peek(bytes(damaged))


def test_every_missing_byte_is_found(small):
    for length in range(len(small)):
        with pytest.raises(
            SnapshotRefused, match=rf"truncated: {length} of {len(small)} bytes|no snapshot"
        ):
            from_bytes(small[:length])


def test_bytes_too_many_are_found(small):
    with pytest.raises(SnapshotRefused, match="damaged: its checksum does not match its bytes"):
        from_bytes(small + b"\0")


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\0",
        b"\xff" * 100,
        b"not a snapshot at all" * 9,
        safetensors.torch.save({"a": torch.ones(2)}, {"format": "pt"}),
    ],
    ids=["nothing", "a byte", "a huge length", "text", "other tensors"],
)
def test_other_bytes_are_no_snapshot(blob):
    for read in (from_bytes, peek):
        with pytest.raises(SnapshotRefused, match="these bytes are no snapshot"):
            read(blob)


@properties
@given(st.data())
def test_garbage_is_refused_whatever_it_looks_like(small, data):
    """Cut out, doubled, mixed, in front, behind and alone."""
    start, end = data.draw(st.integers(0, len(small))), data.draw(st.integers(0, len(small)))
    garbage = small[:start] + data.draw(st.binary(max_size=200)) + small[end:]

    if garbage == small:
        assert from_bytes(garbage).request == from_bytes(small).request
    else:
        for read in (from_bytes, peek):
            with pytest.raises(SnapshotRefused):
                read(garbage)


@properties
@given(st.data())
def test_a_seal_that_fits_does_not_make_it_a_snapshot(small, data):
    """Only a forger gets this far.

    Even then there is a reason or a request that the engine checks, never another exception.
    """
    header_end = 8 + int.from_bytes(small[:8], "little")
    place = data.draw(st.integers(0, len(small) - 1).filter(lambda place: not 8 <= place < 150))
    length = data.draw(st.integers(0, min(8, header_end - place) if place < header_end else 8))
    printable = st.text(string.printable, min_size=length, max_size=length).map(str.encode)
    forged = with_a_fitting_seal(
        small[:place] + data.draw(printable | st.binary(max_size=12)) + small[place + length :]
    )

    assert "" not in (refusal(from_bytes, forged), refusal(peek, forged))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=5,
)


@properties
@given(st.sampled_from([part.name for part in fields(Snapshot)] + ["layouts"]), anything)
def test_a_forged_fact_is_refused_or_handed_on_for_the_engine_to_check(small, name, value):
    forged = sealed_again(small, lambda about: about | {name: value})

    for problem in (refusal(from_bytes, forged), refusal(peek, forged)):
        assert (
            problem is None
            or "not laid out as format 1" in problem
            or "what this engine does not know" in problem
        )


def test_another_format_is_refused_by_its_number(small):
    newer = small.replace(b"0001 ", b"0002 ", 1)

    with pytest.raises(
        SnapshotRefused, match="the snapshot is of format 2, this engine reads format 1"
    ):
        from_bytes(newer)


def test_a_field_of_tomorrow_is_refused_by_its_name():
    blob = to_bytes(a_snapshot(request=a_full_request()))

    for change in (
        lambda about: about["request"].update(aura=1),
        lambda about: about["request"]["fork"].update(aura=1),
    ):
        with pytest.raises(SnapshotRefused, match="has what this engine does not know: aura"):
            from_bytes(sealed_again(blob, lambda about, change=change: change(about) or about))


def test_a_header_beyond_measure_is_refused_unread(small):
    huge = sealed_again(small, lambda about: about | {"facts": {"a": "a" * MAX_HEADER_BYTES}})

    for read in (from_bytes, peek):
        with pytest.raises(SnapshotRefused, match=r"header has \d+ bytes, more than"):
            read(huge)


# --- looking at it, and whether it fits ---


def test_a_label_can_be_read_without_torch():
    blob = to_bytes(a_snapshot(request=a_full_request(id="é")))
    look = (
        "import sys, json, dataclasses; from engine.snapshots import peek; "
        "label = peek(sys.stdin.buffer.read());"
        "assert not {'torch', 'numpy', 'diffusers'} & set(sys.modules); "
        "print(json.dumps(dataclasses.asdict(label)))"
    )

    printed = subprocess.run(
        [sys.executable, "-c", look], input=blob, cwd=REPO, capture_output=True, check=True
    ).stdout

    assert json.loads(printed) == {
        "request_id": "é",
        "request_digest": request_digest(a_full_request()),
        "family": "sd",
        "fingerprint": fingerprinted().sha256,
        "step": 3,
        "num_steps": 20,
        "size_bytes": len(blob),
    }


def test_a_snapshot_fits_its_own_fingerprint():
    check_fingerprint(from_bytes(to_bytes(a_snapshot())), fingerprinted())


def test_a_refusal_names_the_facts_that_differ():
    here = fingerprinted(
        libraries={"torch": "2.12.1", "diffusers": "0.42.1", "numpy": "2.4.6"},
        threads=2,
        bucket_rows=None,
        adapters=["ink"],
    )
    del here.facts["numerics"]

    with pytest.raises(SnapshotRefused) as refused:
        check_fingerprint(from_bytes(to_bytes(a_snapshot())), here)

    assert str(refused.value) == (
        'the snapshot was made where other bits come out: adapters [] there, ["ink"] here; '
        "bucket_rows 4 there, null here; libraries.numpy unknown there, 2.4.6 here; "
        "libraries.torch 2.13.0 there, 2.12.1 here; numerics 1 there, unknown here; "
        "threads 1 there, 2 here"
    )


OTHERWISE = {
    "id": "other",
    "group": "other",
    "owner": "other",
    "policy_version": "other",
    "checkpoint": "other",
    "prompt": "other",
    "negative_prompt": "other",
    "width_px": 96,
    "height_px": 96,
    "num_steps": 5,
    "guidance": 5.0,
    "sampler": "euler",
    "seed": 8,
    "init_image": a_picture(64, 64, 3, seed=9),
    "mask": None,
    "strength": 0.3,
    "control_image": a_picture(64, 64, 3, seed=1),
    "clip_skip": 1,
    "adapters": (AdapterUse("ink", 0.8), AdapterUse("paper")),
    "options": {"true_cfg_scale": 4.5},
    "keep_steps": (2,),
    "fork": Fork("earlier", 2),
    "determinism": Determinism.BEST_EFFORT,
    "bucket_rows": 4,
    "rank": 0,
    "may_skip_blocks": True,
}


@pytest.mark.parametrize("name", [part.name for part in fields(ImageRequest)])
def test_a_digest_sees_every_field_but_those_that_no_pixel_depends_on(name):
    request = a_full_request()
    other = replace(request, **{name: OTHERWISE[name]})
    assert other != request

    is_seen = request_digest(other) != request_digest(request)

    assert is_seen == (name not in {"id", "group", "owner", "rank", "keep_steps"})
    assert is_seen == (name not in NOT_IN_THE_DIGEST)


def test_equal_requests_have_one_digest_however_they_are_said():
    request = a_full_request(guidance=4.0, strength=1.0, options={"a": 1, "b": 2})
    said = a_full_request(guidance=4, strength=1, options={"b": 2, "a": 1})

    assert said == request
    assert request_digest(said) == request_digest(request)


# --- a whole image ---


def an_image_in_flight(name, dtype=torch.float32, shape=(1, 4, 4, 4), num_steps=6):
    """Step by step: (snapshot of it before this step, its latents then)."""
    sampler = begun(name, num_steps)
    latents, generator = an_image(sampler, dtype, shape)
    for step in range(len(sampler.timesteps)):
        tensors, facts = save_sampler(sampler)
        tensors = {f"sampler.{field}": tensor for field, tensor in tensors.items()}
        tensors |= {"latents": latents, "generator": save_generator(generator)}
        yield (
            a_snapshot(
                step=step,
                num_steps=num_steps,
                tensors=tensors,
                facts={"name": name, "sampler": facts},
            ),
            latents,
        )
        latents = step_on(sampler, step, latents, generator)
    yield None, latents


def gone_on_with(blob: bytes) -> torch.Tensor:
    """The final latents of an image that another process began."""
    snapshot = from_bytes(blob)
    sampler = made(snapshot.facts["name"])
    tensors = {
        name.removeprefix("sampler."): tensor
        for name, tensor in snapshot.tensors.items()
        if name.startswith("sampler.")
    }
    load_sampler(sampler, tensors, snapshot.facts["sampler"], "cpu")
    return go_on(
        sampler,
        snapshot.step,
        snapshot.tensors["latents"],
        load_generator(snapshot.tensors["generator"]),
    )


def bits(latents: torch.Tensor) -> str:
    return hashlib.sha256(latents.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def test_a_fresh_process_goes_on_from_every_step_with_every_sampler(tmp_path):
    expected = {}
    for name in ALLOWED:
        for dtype in (torch.float32, torch.bfloat16):
            *begun_at, (_, final) = an_image_in_flight(name, dtype)
            for snapshot, _ in begun_at:
                file = f"{len(expected)}.safetensors"
                (tmp_path / file).write_bytes(to_bytes(snapshot))
                expected[file] = bits(final)
    assert len(expected) >= 2 * 6 * len(ALLOWED)
    assert len(set(expected.values())) > len(ALLOWED)  # they do not all come to the same

    go = (
        "import sys, json, pathlib, torch; torch.set_num_threads(1); "
        "from test_snapshots import bits, gone_on_with;"
        "print(json.dumps({file.name: bits(gone_on_with(file.read_bytes())) "
        "for file in pathlib.Path(sys.argv[1]).iterdir()}))"
    )
    environment = os.environ | {"PYTHONPATH": f"{REPO}{os.pathsep}{Path(__file__).parent}"}
    printed = subprocess.run(
        [sys.executable, "-c", go, str(tmp_path)],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout

    assert json.loads(printed.splitlines()[-1]) == expected


@pytest.mark.parametrize(("name", "kibibytes"), [("epsilon/euler", 64), ("epsilon/dpmpp_2m", 144)])
def test_a_512_px_image_without_its_embeddings_is_small(name, kibibytes):
    *_, (snapshot, _), _ = an_image_in_flight(name, torch.float16, (1, 4, 64, 64), num_steps=20)

    assert len(to_bytes(snapshot)) < kibibytes * 1024
