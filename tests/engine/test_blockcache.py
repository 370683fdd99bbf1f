"""The block cache saves an image what it would save alone, whoever shares its forwards, and touches
nobody else.
"""

import copy
import zlib

import pytest
import torch
from torch import nn

from engine.blockcache import BlockCache, RowKey
from engine.errors import EngineError, UnsupportedRequest

FAMILIES = ("flux", "sd3")
THRESHOLD = {"flux": 0.35, "sd3": 0.41}  # of these random weights: hits and misses about evenly
TOKENS, WIDTH = 5, 32  # of the text
PLENTY = 1 << 30


def a_network(family, seed=0):
    """A transformer of the real class with six blocks and random weights."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    torch.manual_seed(seed)
    common = {
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": WIDTH,
        "pooled_projection_dim": WIDTH,
    }
    if family == "flux":
        network = FluxTransformer2DModel(
            **common,
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=4,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        )
    else:
        network = SD3Transformer2DModel(
            **common,
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=6,
            caption_projection_dim=64,
            pos_embed_max_size=8,
        )
    return network.eval()


class Image:
    """A denoise under way, by Euler steps.

    `rows` texts see the same latents, and their predictions are averaged.
    """

    def __init__(self, id, family, *, num_steps=20, rows=1, seed=None):
        generator = torch.Generator().manual_seed(zlib.crc32(id.encode()) if seed is None else seed)
        self.id, self.num_steps, self.rows, self.step = id, num_steps, rows, 0
        self.latents = torch.randn(
            (1, 16, 16) if family == "flux" else (1, 4, 8, 8), generator=generator
        )
        self.text = torch.randn((rows, TOKENS, WIDTH), generator=generator)
        self.pooled = torch.randn((rows, WIDTH), generator=generator)

    @property
    def is_done(self):
        return self.step == self.num_steps

    @property
    def keys(self):
        return [
            RowKey(image_id=self.id, row=row, step=self.step, num_steps=self.num_steps)
            for row in range(self.rows)
        ]

    @property
    def inputs(self):
        return (
            self.latents.expand(self.rows, *self.latents.shape[1:]),
            self.text,
            self.pooled,
            torch.full((self.rows,), 1 - self.step / self.num_steps),
        )

    def advance(self, prediction):
        self.latents = self.latents - prediction.mean(0, keepdim=True) / self.num_steps
        self.step += 1


def call(network, latents, text, pooled, sigma, **more):
    if type(network).__name__.startswith("Flux"):
        at = torch.arange(4.0)
        more |= {"guidance": torch.full((len(latents),), 3.5), "txt_ids": torch.zeros(TOKENS, 3)}
        more["img_ids"] = torch.cartesian_prod(torch.zeros(1), at, at)
    else:
        sigma = sigma * 1000
    return network(
        latents,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=sigma,
        return_dict=False,
        **more,
    )[0]


@torch.inference_mode()
def step(network, cache, images, *, uncached=()):
    """One forward for all these images, as the engine makes it; without a cache if it is None."""
    inputs = [torch.cat(parts) for parts in zip(*(image.inputs for image in images), strict=True)]
    if cache is None:
        prediction = call(network, *inputs)
    else:
        with cache.rows(
            [None if image.id in uncached else key for image in images for key in image.keys]
        ):
            prediction = call(network, *inputs)
    for image, rows in zip(
        images, torch.split(prediction, [image.rows for image in images]), strict=True
    ):
        image.advance(rows)


def denoised(network, cache, image):
    while not image.is_done:
        step(network, cache, [image])
    return image.latents


def a_cache(network, family, **changes):
    return BlockCache(
        network,
        **{"threshold": THRESHOLD[family], "max_bytes": PLENTY, "warmup_steps": 0, "last_steps": 0}
        | changes,
    )


@torch.inference_mode()
def native(network, family, image):
    """The latents by FirstBlockCache of diffusers, a request on its own, and how many rows it
    computed in full.
    """
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    network = copy.deepcopy(network)
    computed = []
    if family == "sd3":
        # SD3's last block returns no text, which FirstBlockCache of diffusers 0.42 fails on;
        # nothing after it reads the text.
        last, forward = network.transformer_blocks[-1], network.transformer_blocks[-1].forward
        last.forward = lambda **arguments: (
            arguments["encoder_hidden_states"],
            forward(**arguments)[1],
        )
    network.transformer_blocks[1].attn.register_forward_hook(lambda *call: computed.append(1))
    apply_first_block_cache(network, FirstBlockCacheConfig(threshold=THRESHOLD[family]))
    while not image.is_done:
        predictions = []
        for row in range(image.rows):
            _set_cache_context(network, CacheContext(str(row)))
            predictions.append(call(network, *(part[row : row + 1] for part in image.inputs)))
        image.advance(torch.cat(predictions))
    return image.latents, len(computed)


@pytest.mark.parametrize("family", FAMILIES)
def test_alone_it_gives_the_bits_of_diffusers_own_cache(family):
    network = a_network(family)
    cache = a_cache(network, family)
    expected, rows_computed = native(network, family, Image("a", family, seed=1))

    latents = denoised(network, cache, Image("a", family, seed=1))

    assert torch.equal(latents, expected)
    assert cache.rows_computed == rows_computed
    assert cache.rows_computed + cache.rows_skipped == 20
    assert 4 <= cache.rows_skipped <= 16


@pytest.mark.parametrize("family", FAMILIES)
def test_it_does_so_in_company_that_comes_and_goes(family):
    """Within 1e-6 of latents around 3: a forward of another number of rows rounds otherwise."""
    network = a_network(family)
    cache = a_cache(network, family)
    make = {
        "early": lambda: Image("early", family, num_steps=20, seed=1),
        "guided": lambda: Image("guided", family, num_steps=16, rows=2, seed=2),
        "short": lambda: Image("short", family, num_steps=6, seed=3),
        "late": lambda: Image("late", family, num_steps=12, rows=2, seed=4),
        "parked": lambda: Image("parked", family, num_steps=14, seed=5),
    }
    joins = {"early": 0, "guided": 0, "parked": 1, "short": 3, "late": 7}
    images = {name: make_one() for name, make_one in make.items()}

    turn = 0
    while not all(image.is_done for image in images.values()):
        present = [
            image for name, image in images.items() if joins[name] <= turn and not image.is_done
        ]
        present = [image for image in present if image.id != "parked" or not 4 <= turn < 9]
        # never in the same place for long
        step(network, cache, present[turn % len(present) :] + present[: turn % len(present)])
        turn += 1

    expected = {name: native(network, family, make_one()) for name, make_one in make.items()}
    for name, image in images.items():
        assert torch.allclose(image.latents, expected[name][0], rtol=0, atol=1e-6), name
    assert cache.rows_computed == sum(rows_computed for _, rows_computed in expected.values())
    total = sum(image.num_steps * image.rows for image in images.values())
    assert cache.rows_computed + cache.rows_skipped == total
    assert total / 5 <= cache.rows_skipped <= total * 4 / 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_threshold_of_zero_changes_no_bit(family, dtype):
    """Not even when nothing changed at all from one step to the next."""
    network = a_network(family).to(dtype)
    cache = a_cache(network, family, threshold=0.0)
    images = [Image(id, family) for id in "abc"]
    inputs = [
        torch.cat(parts).to(dtype)
        for parts in zip(*(image.inputs for image in images), strict=True)
    ]

    with torch.inference_mode():
        expected = call(network, *inputs)
        for number in range(3):
            with cache.rows(
                [RowKey(image_id=image.id, row=0, step=number, num_steps=3) for image in images]
            ):
                assert torch.equal(call(network, *inputs), expected)

    assert (cache.rows_computed, cache.rows_skipped, cache.rows_remembered) == (9, 0, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_warm_up_and_last_steps_are_computed_in_full(family):
    network = a_network(family)
    cache = a_cache(network, family, threshold=1e9, warmup_steps=3, last_steps=2)
    image, skipped_at = Image("a", family, num_steps=9), []

    while not image.is_done:
        before = cache.rows_skipped
        step(network, cache, [image])
        skipped_at += [image.step - 1] * (cache.rows_skipped - before)

    assert skipped_at == [3, 4, 5, 6]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_without_a_key_is_computed_whatever_its_neighbours_skip(family):
    network = a_network(family)
    cache = a_cache(network, family, threshold=1e9)
    plain, cached, alone = (Image(id, family, seed=1) for id in ("plain", "cached", "alone"))

    while not plain.is_done:
        step(network, cache, [plain, cached], uncached=["plain"])
    denoised(network, None, alone)

    assert torch.allclose(plain.latents, alone.latents, atol=1e-5)
    assert not torch.allclose(cached.latents, alone.latents, atol=1e-2)
    assert (cache.rows_computed, cache.rows_skipped, cache.rows_remembered) == (1, 19, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_repeated_step_gives_the_same_bits(family):
    network = a_network(family)
    cache = a_cache(network, family)
    once, twice = Image("once", family, seed=1), Image("twice", family, seed=1)

    while not once.is_done:
        step(network, cache, [once])
        kept = twice.latents
        step(network, cache, [twice])
        # the forward was fine, something after it failed
        twice.latents, twice.step = kept, twice.step - 1
        step(network, cache, [twice])

    assert torch.equal(once.latents, twice.latents)


def test_another_run_under_the_same_id_starts_anew():
    network = a_network("flux")
    cache = a_cache(network, "flux")
    first = denoised(network, cache, Image("a", "flux", seed=1))

    assert torch.equal(denoised(network, cache, Image("a", "flux", seed=1)), first)


# Its memory


def test_memory_of_an_image_can_be_given_back():
    network = a_network("flux")
    cache = a_cache(network, "flux")
    step(network, cache, [Image("a", "flux", rows=2), Image("b", "flux")])
    per_row = cache.size_bytes // 3

    cache.forget("a")
    cache.forget("never seen")

    assert (cache.rows_remembered, cache.size_bytes) == (1, per_row)
    cache.close()
    assert (cache.rows_remembered, cache.size_bytes) == (0, 0)


def test_a_row_takes_two_images_and_a_text_of_the_networks_width():
    network = a_network("flux")
    cache = a_cache(network, "flux")

    step(network, cache, [Image("a", "flux"), Image("b", "flux")])

    assert cache.size_bytes == 2 * 4 * (2 * 16 * 64 + TOKENS * 64 + 1)
    tensors = [
        tensor
        for memory in cache._memories.values()
        for tensor in (memory.first, memory.text, memory.image)
    ]
    # no batch's
    assert (
        sorted(tensor.untyped_storage().nbytes() for tensor in tensors)
        == [4 * TOKENS * 64] * 2 + [4 * 16 * 64] * 4
    )


def test_the_last_step_leaves_nothing_behind():
    network = a_network("sd3")
    cache = a_cache(network, "sd3", last_steps=1)

    denoised(network, cache, Image("a", "sd3", num_steps=4))

    assert (cache.rows_remembered, cache.size_bytes) == (0, 0)


def test_it_never_remembers_more_than_its_bytes_and_drops_the_least_recently_used():
    network = a_network("flux")
    step(network, measured := a_cache(network, "flux"), [Image("a", "flux")])
    cache = a_cache(network, "flux", threshold=1e9, max_bytes=2 * measured.size_bytes)
    a, b, c = (Image(id, "flux") for id in "abc")

    for image in (a, b, a, c):
        step(network, cache, [image])
        assert cache.size_bytes <= cache.max_bytes

    assert cache.rows_skipped == 1
    step(network, cache, [a])
    assert cache.rows_skipped == 2
    step(network, cache, [b])
    assert cache.rows_skipped == 2  # c had taken its place


def test_an_image_that_does_not_fit_beside_its_neighbours_is_computed():
    network = a_network("flux")
    step(network, measured := a_cache(network, "flux"), [Image("a", "flux")])
    cache = a_cache(network, "flux", threshold=1e9, max_bytes=2 * measured.size_bytes)
    images = [Image(id, "flux") for id in "abc"]

    for _ in range(5):
        step(network, cache, images)
        assert cache.size_bytes <= cache.max_bytes

    assert (cache.rows_computed, cache.rows_skipped) == (3 + 4, 2 * 4)


def test_an_image_larger_than_the_cache_is_not_kept():
    network = a_network("flux")
    cache = a_cache(network, "flux", threshold=1e9, max_bytes=1000)

    denoised(network, cache, Image("a", "flux", num_steps=4))

    assert (cache.rows_remembered, cache.size_bytes, cache.rows_skipped) == (0, 0, 0)


# The network


def test_outside_of_rows_the_network_is_as_it_was():
    network = a_network("flux")
    image = Image("a", "flux")
    with torch.inference_mode():
        expected = call(network, *image.inputs)
    cache = a_cache(network, "flux", threshold=1e9)
    step(network, cache, [Image("a", "flux")])

    with torch.inference_mode():
        assert torch.equal(call(network, *image.inputs), expected)
        with cache.rows(image.keys):
            call(network, *image.inputs)
            # only the first forward within it is cached
            assert torch.equal(call(network, *image.inputs), expected)
    assert all(
        block._compiled_call_impl is None
        for block in [*network.transformer_blocks, *network.single_transformer_blocks]
    )


def test_a_failed_forward_leaves_the_network_and_the_memories_as_they_were():
    network = a_network("flux")
    cache = a_cache(network, "flux")
    image = Image("a", "flux")
    step(network, cache, [image])
    size_bytes = cache.size_bytes
    fuse = network.single_transformer_blocks[1].register_forward_pre_hook(lambda *call: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        step(network, cache, [Image("b", "flux")])

    fuse.remove()
    assert (cache.rows_remembered, cache.size_bytes) == (1, size_bytes)
    assert all(
        block._compiled_call_impl is None
        for block in [*network.transformer_blocks, *network.single_transformer_blocks]
    )


def test_compiled_blocks_stay_compiled_and_whole():
    network = a_network("flux")
    cache = a_cache(network, "flux")
    expected = denoised(network, cache, Image("eager", "flux", seed=1, num_steps=6))
    rows_skipped, seen = cache.rows_skipped, []

    def backend(graph, example_inputs):
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    network.compile_repeated_blocks(backend=backend, fullgraph=True, dynamic=True)
    latents = denoised(network, cache, Image("compiled", "flux", seed=1, num_steps=6))

    assert 2 <= len(seen) <= 4  # one or two for each class of blocks: the cache is in none of them
    assert torch.allclose(latents, expected, atol=1e-5)
    assert cache.rows_skipped == 2 * rows_skipped > 0


def test_offsets_laid_over_a_batch_by_row_can_follow_the_rows():
    """As adapters are: here each row's own offset, added within a later block."""
    network = a_network("flux")
    offsets, now = {"a": 0.0, "b": 2.0, "c": -2.0}, []
    network.single_transformer_blocks[2].proj_out.register_forward_hook(
        lambda module, inputs, output: output + torch.tensor(now).view(-1, 1, 1)
    )

    def denoise_together(ids):
        images, cache = [Image(id, "flux", seed=ord(id)) for id in ids], a_cache(network, "flux")
        whole, told = [offsets[id] for id in ids], []

        def narrow(rows):
            told.append(rows)
            now[:] = whole if rows is None else [whole[row] for row in rows]

        while not images[0].is_done:
            now[:] = whole
            inputs = [
                torch.cat(parts) for parts in zip(*(image.inputs for image in images), strict=True)
            ]
            with (
                torch.inference_mode(),
                cache.rows([key for image in images for key in image.keys], narrow=narrow),
            ):
                prediction = call(network, *inputs)
            for image, rows in zip(images, prediction.split(1), strict=True):
                image.advance(rows)
        return [image.latents for image in images], told

    together, told = denoise_together("abc")

    for id, latents in zip("abc", together, strict=True):
        assert torch.allclose(latents, denoise_together(id)[0][0], atol=1e-5)
    assert any(rows and len(rows) < 3 for rows in told)
    assert told[1::2] == [None] * (len(told) // 2)


# What it refuses


def test_a_unet_is_refused():
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
        layers_per_block=1,
    )

    with pytest.raises(UnsupportedRequest, match="UNet2DConditionModel has no transformer blocks"):
        BlockCache(unet, threshold=0.1, max_bytes=PLENTY)


def test_blocks_it_does_not_know_are_refused():
    from diffusers import PixArtTransformer2DModel

    pixart = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=2,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
    )

    with pytest.raises(UnsupportedRequest, match="BasicTransformerBlock"):
        BlockCache(pixart, threshold=0.1, max_bytes=PLENTY)


def test_a_network_of_one_block_has_nothing_to_skip():
    network = nn.Module()
    network.transformer_blocks = a_network("sd3").transformer_blocks[:1]

    with pytest.raises(UnsupportedRequest):
        BlockCache(network, threshold=0.1, max_bytes=PLENTY)


def test_another_number_of_rows_is_refused():
    network = a_network("flux")
    image = Image("a", "flux")

    with (
        pytest.raises(EngineError, match="2 rows where the block cache was told of 1"),
        a_cache(network, "flux").rows(image.keys),
    ):
        call(network, *(torch.cat([part, part]) for part in image.inputs))


def test_tensors_of_unknown_rows_are_refused():
    network = a_network("sd3")
    image = Image("a", "sd3")

    with (
        pytest.raises(UnsupportedRequest, match="joint_attention_kwargs"),
        a_cache(network, "sd3").rows(image.keys),
    ):
        call(network, *image.inputs, joint_attention_kwargs={"ip_hidden_states": torch.zeros(1)})


def test_a_control_network_between_the_blocks_is_refused():
    network = a_network("flux")
    cache = a_cache(network, "flux", threshold=1e9)
    images = [Image("a", "flux"), Image("b", "flux")]
    step(network, cache, images[:1])
    inputs = [torch.cat(parts) for parts in zip(*(image.inputs for image in images), strict=True)]

    with (
        pytest.raises(EngineError, match="control network"),
        torch.inference_mode(),
        cache.rows([*images[0].keys, *images[1].keys]),
    ):
        call(network, *inputs, controlnet_block_samples=[torch.zeros(2, 16, 64)])


def test_its_facts_are_what_changes_bits():
    cache = BlockCache(a_network("flux"), threshold=0.1, max_bytes=PLENTY)

    assert cache.facts() == {"threshold": 0.1, "warmup_steps": 2, "last_steps": 1}
