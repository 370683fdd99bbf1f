"""Which calls of a network may be made as one.

Rows are found by probing and proved on the network, never guessed.
"""

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from engine.families.calls import (
    CallsDiffer,
    NetworkCall,
    learn,
    probe,
    read,
    tensors_of,
    with_tensors,
    written,
)


def a_call(images: int, step: int, seed: int = 0, **more) -> NetworkCall:
    """Latents per image, one timestep and one mask for all: what a UNet might be given."""
    latents = torch.randn((images, 3, 4), generator=torch.Generator().manual_seed(seed + step))
    return NetworkCall(
        "unet",
        "",
        (latents, torch.tensor(float(step))),
        {"mask": torch.ones(4), "scale": 0.5, **more},
    )


def learned(network, call=a_call):
    """The forms found in the two steps of a trial."""
    runs = [
        [(call(images, step), network(call(images, step))) for step in (1, 2)] for images in (1, 2)
    ]
    return learn([(runs[0], runs[1])], network)


def honest(call: NetworkCall):
    latents, timestep = call.args
    return (latents * call.kwargs["mask"] + timestep.reshape(-1, 1, 1),)


def mixes_rows(call: NetworkCall):
    latents, timestep = call.args
    return (latents - latents.mean() + timestep.reshape(-1, 1, 1),)


def wants_one_timestep(call: NetworkCall):
    latents, timestep = call.args
    return (latents + timestep.reshape(-1)[0],)


def cannot_take_two_timesteps(call: NetworkCall):
    latents, timestep = call.args
    return (latents + timestep.item(),)


def test_calls_of_strangers_at_different_steps_are_made_as_one():
    (form,) = learned(honest)
    early, late = a_call(1, 1, seed=10), a_call(2, 7, seed=20)

    assert form.describe(early, exactly=True)[1] == form.describe(late, exactly=True)[1]
    given = form.split(honest(form.stack([early, late], [1, 2], 3)), [1, 2])

    assert torch.equal(given[0][0], honest(early)[0])
    assert torch.equal(given[1][0], honest(late)[0])


def test_a_bucket_is_filled_with_the_first_row():
    (form,) = learned(honest)
    call = a_call(1, 3)

    latents, timestep = form.stack([call], [1], 4).args

    assert latents.shape == (4, 3, 4)
    assert torch.equal(latents, call.args[0].expand(4, 3, 4))
    assert timestep.tolist() == [3.0] * 4


@pytest.mark.parametrize("network", [mixes_rows, wants_one_timestep, cannot_take_two_timesteps])
def test_a_network_that_does_not_keep_rows_apart_is_found_out(network):
    assert learned(network) == []


def test_arguments_shared_by_all_rows_must_be_equal():
    (form,) = learned(honest)
    call, other = a_call(1, 1), a_call(1, 1)
    other.kwargs["mask"] = torch.zeros(4)

    assert form.describe(call, exactly=False)[1] != form.describe(other, exactly=False)[1]


def test_calls_in_different_cache_contexts_are_not_made_as_one():
    (form,) = learned(honest)
    call = a_call(1, 1)
    other = NetworkCall(call.network, "uncond", call.args, call.kwargs)

    assert form.describe(call, exactly=False)[1] != form.describe(other, exactly=False)[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"mask": None},
        {"mask": torch.ones(1, 4)},
        {"scale": "half"},
        {"more": 1},
        {"scale": object()},
    ],
    ids=["a missing tensor", "another shape", "another type", "another argument", "an object"],
)
def test_a_call_of_a_kind_not_seen_has_no_form(changes):
    (form,) = learned(honest)

    with pytest.raises(CallsDiffer):
        form.describe(a_call(1, 1, **changes), exactly=False)


def test_objects_have_no_form():
    assert learned(honest, lambda images, step: a_call(images, step, cache=object())) == []


def test_a_call_that_counts_images_by_a_number_has_no_form():
    assert learned(honest, lambda images, step: a_call(images, step, num_images=images)) == []


def test_rows_are_found_along_any_axis():
    form = probe(torch.zeros(5, 2, 3), torch.zeros(5, 4, 3))

    stacked = form.stack([torch.ones(5, 2, 3), torch.zeros(5, 1, 3)], [2, 1], 1)

    assert stacked.shape == (5, 4, 3)
    assert [part.shape[1] for part in form.split(stacked, [2, 1])] == [2, 1]


def test_a_size_that_equals_the_number_of_rows_by_chance_is_not_taken_for_it():
    form = probe(torch.zeros(2, 2), torch.zeros(4, 2))

    assert form.stack([torch.zeros(2, 2), torch.zeros(1, 2)], [2, 1], 0).shape == (3, 2)


def test_prompts_of_different_length_meet_only_where_the_bits_do_not_count():
    def call(images: int, step: int, length: int = 5) -> NetworkCall:
        return NetworkCall(
            "transformer",
            "",
            (
                [torch.full((length, 2), float(step)) for _ in range(images)],
                torch.full((images,), step),
            ),
            {},
        )

    def network(call: NetworkCall):
        return ([row * time for row, time in zip(*call.args, strict=True)],)

    (form,) = learned(network, call)
    short, long = call(1, 1, length=3), call(2, 2, length=9)

    assert form.describe(short, exactly=False)[1] == form.describe(long, exactly=False)[1]
    assert form.describe(short, exactly=True)[1] != form.describe(long, exactly=True)[1]
    given = form.split(network(form.stack([short, long], [1, 2], 4)), [1, 2])
    assert [[tuple(row.shape) for row in rows] for (rows,) in given] == [[(3, 2)], [(9, 2), (9, 2)]]


def test_outputs_of_diffusers_are_taken_apart_and_put_together():
    def network(call: NetworkCall):
        return Transformer2DModelOutput(sample=honest(call)[0])

    (form,) = learned(network)
    first, second = form.split(network(form.stack([a_call(1, 1), a_call(1, 2)], [1, 1], 2)), [1, 1])

    assert isinstance(first, Transformer2DModelOutput)
    assert torch.equal(second.sample, honest(a_call(1, 2))[0])


def test_a_value_survives_being_written_down():
    value = (
        {"down": [torch.ones(2), torch.zeros(3)]},
        Transformer2DModelOutput(sample=torch.full((2,), 3.0)),
        None,
        4,
        {7: torch.ones(1)},
    )
    tensors: list[torch.Tensor] = []

    again = read(written(value, tensors), tensors)

    assert isinstance(again[1], Transformer2DModelOutput)
    assert again[2:4] == (None, 4)
    assert list(again[4]) == [7]
    assert all(
        torch.equal(one, other)
        for one, other in zip(tensors_of(value), tensors_of(again), strict=True)
    )


def test_of_a_tensor_without_data_the_shape_is_written_down():
    value = with_tensors(
        [torch.ones(2, 3, dtype=torch.bfloat16)],
        lambda tensor: torch.empty_like(tensor, device="meta"),
    )
    tensors: list[torch.Tensor] = []

    (again,) = read(written(value, tensors), tensors)

    assert tensors == []
    assert again.is_meta
    assert (again.shape, again.dtype) == ((2, 3), torch.bfloat16)


def test_an_object_cannot_be_written_down():
    with pytest.raises(CallsDiffer):
        written([object()], [])


@pytest.mark.parametrize(
    "kind", [["builtins", "eval"], ["subprocess", "Popen"], ["diffusers.utils", "deprecate"]]
)
def test_nothing_but_values_is_made_from_what_is_written(kind):
    with pytest.raises(CallsDiffer):
        read({"kind": kind, "items": []}, [])
