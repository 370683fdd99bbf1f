"""Strangers with different adapters share one forward, and none of them can tell."""

import copy
import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path

import adapter_builders
import pytest
import torch
from adapter_builders import (
    ROWS,
    SUBJECTS,
    a_bank,
    a_file,
    adapted_layers,
    in_kohya_words,
    lora_tensors,
)
from torch import nn

from engine.adapters import read_adapter
from engine.config import AdapterSpec
from engine.errors import CheckpointCorrupt, EngineError, UnsupportedRequest
from engine.request import AdapterUse

A, B, C = AdapterUse("a", 0.8), AdapterUse("b", -1.3), AdapterUse("c", 0.45)
NOBODY = [()] * ROWS
BOTH_DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"]
)
EVERY_NETWORK = pytest.mark.parametrize("kind", SUBJECTS)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def is_attention(layer: str) -> bool:
    return layer.endswith(("to_q", "to_k", "to_v", "to_out.0", "q_proj", "v_proj"))


def three_adapters(folder, network, prefix) -> list[AdapterSpec]:
    """Over everything, over the attention only and of another rank, over everything else."""
    return [
        a_file(folder / "a.safetensors", lora_tensors(network, prefix=prefix, seed=1)),
        a_file(
            folder / "b.safetensors",
            lora_tensors(network, prefix=prefix, seed=2, rank=2, only=is_attention),
        ),
        a_file(
            folder / "c.safetensors",
            lora_tensors(
                network, prefix=prefix, seed=3, rank=3, only=lambda name: not is_attention(name)
            ),
        ),
    ]


def alone(row: int, uses: tuple[AdapterUse, ...]) -> list[tuple[AdapterUse, ...]]:
    """The same number of rows, with nobody else adapted."""
    return [uses if other == row else () for other in range(ROWS)]


# --- bits ---


@EVERY_NETWORK
@BOTH_DTYPES
def test_a_row_has_the_same_bits_whatever_adapters_its_neighbours_wear(tmp_path, kind, dtype):
    subject = SUBJECTS[kind]
    network = subject.build().to(dtype)
    plain = subject.call(network, dtype)
    bank = a_bank({subject.name: network}, three_adapters(tmp_path, network, subject.name), dtype)
    worn = [(A,), (), (C, A, B), (replace(A, strength=2.0), B)]

    with bank.rows(worn):
        together = subject.call(network, dtype)

    assert torch.equal(together[1], plain[1])
    for row in (0, 2, 3):
        with bank.rows(alone(row, worn[row])):
            assert torch.equal(subject.call(network, dtype)[row], together[row])
        assert not torch.equal(plain[row], together[row])


@EVERY_NETWORK
@BOTH_DTYPES
def test_a_row_has_the_same_bits_wherever_it_stands(tmp_path, kind, dtype):
    subject = SUBJECTS[kind]
    network = subject.build().to(dtype)
    bank = a_bank({subject.name: network}, three_adapters(tmp_path, network, subject.name), dtype)
    worn = [(A,), (B,), (C, A), ()]
    with bank.rows(worn):
        in_order = subject.call(network, dtype)

    with bank.rows([worn[row] for row in (2, 3, 1, 0)]):
        shuffled = subject.call(network, dtype, order=(2, 3, 1, 0))

    assert torch.equal(shuffled, in_order[[2, 3, 1, 0]])


@EVERY_NETWORK
def test_without_adapters_a_network_computes_what_it_does_without_a_bank(tmp_path, kind):
    subject = SUBJECTS[kind]
    network = subject.build()
    plain = subject.call(network, torch.float32)

    bank = a_bank({subject.name: network}, three_adapters(tmp_path, network, subject.name))

    with bank.rows(NOBODY):
        assert torch.equal(subject.call(network, torch.float32), plain)
    assert torch.equal(subject.call(network, torch.float32), plain)
    assert (bank.hits, bank.misses) == (0, 0)


def test_channels_last_changes_nothing_of_that(tmp_path):
    network = adapter_builders.a_unet().to(memory_format=torch.channels_last)
    bank = a_bank({"unet": network}, three_adapters(tmp_path, network, "unet"))
    worn = [(A,), (), (C, A, B), (B,)]

    with bank.rows(worn):
        together = adapter_builders.call_unet(network, torch.float32)

    for row in range(ROWS):
        with bank.rows(alone(row, worn[row])):
            assert torch.equal(
                adapter_builders.call_unet(network, torch.float32)[row], together[row]
            )


def test_a_text_encoder_wears_adapters_one_text_at_a_time(tmp_path):
    network = adapter_builders.a_text_encoder()
    bank = a_bank({"text_encoder_2": network}, three_adapters(tmp_path, network, "text_encoder_2"))
    tokens = torch.tensor([[5, 6, 7, 99]])
    plain = network(tokens)[0]

    with bank.rows([(A,)]):
        adapted = network(tokens)[0]

    assert not torch.equal(adapted, plain)
    assert torch.equal(network(tokens)[0], plain)


def test_it_does_not_matter_in_which_slots_adapters_sit(tmp_path):
    network = adapter_builders.a_unet()
    bank = a_bank({"unet": network}, three_adapters(tmp_path, network, "unet"))
    with bank.rows([(A, B, C)] * ROWS):
        first = adapter_builders.call_unet(network, torch.float32)
    bank.close()

    bank = a_bank({"unet": network}, three_adapters(tmp_path, network, "unet"))
    with bank.rows([(C,), (B,), (), ()]):
        pass
    with bank.rows([(A, B, C)] * ROWS):
        second = adapter_builders.call_unet(network, torch.float32)

    assert torch.equal(first, second)


@EVERY_NETWORK
@BOTH_DTYPES
def test_one_adapter_for_all_rows_is_what_diffusers_and_peft_make_of_it(tmp_path, kind, dtype):
    pytest.importorskip("peft")
    subject = SUBJECTS[kind]
    network = subject.build().to(dtype)
    tensors = lora_tensors(network, prefix=subject.name, seed=1)
    theirs = subject.call(worn_by_peft(network, tensors, subject.name, strength=0.7), dtype).float()

    bank = a_bank({subject.name: network}, [a_file(tmp_path / "a.safetensors", tensors)], dtype)
    with bank.rows([(AdapterUse("a", 0.7),)] * ROWS):
        ours = subject.call(network, dtype).float()

    # Not the bits: peft applies the strength at full width and rounds more often. Measured: 3e-6
    # and 0.07 of the spread.
    assert (ours - theirs).abs().max() <= (1e-5 if dtype == torch.float32 else 0.15) * theirs.std()


def worn_by_peft(network, tensors, prefix: str, strength: float):
    """A copy of the network with one adapter, put on by diffusers."""
    network = copy.deepcopy(network)
    if prefix == "text_encoder":
        from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader

        Loader.load_lora_into_text_encoder(
            tensors, None, network, prefix=prefix, adapter_name="a", lora_scale=strength
        )
    else:
        network.load_lora_adapter(dict(tensors), prefix=prefix, adapter_name="a")
        network.set_adapters(["a"], [strength])
    return network


def test_rows_may_be_left_out_on_the_way_through_a_network(tmp_path):
    network = adapter_builders.a_flux_transformer()
    bank = a_bank({"transformer": network}, three_adapters(tmp_path, network, "transformer"))
    worn = [(A,), (B,), (), (C, A)]
    with bank.rows([worn[3], worn[1], (), ()]):
        expected = adapter_builders.call_flux_transformer(
            network, torch.float32, order=(3, 1, 2, 0)
        )[:2]

    with bank.rows([(), *worn, ()]):
        bank.narrow([4, 2, 3, 0])  # as if the block cache had skipped two
        narrowed = adapter_builders.call_flux_transformer(
            network, torch.float32, order=(3, 1, 2, 0)
        )[:2]
        bank.narrow(None)
        with pytest.raises(EngineError):
            adapter_builders.call_flux_transformer(network, torch.float32)

    assert torch.equal(narrowed, expected)


def test_a_compiled_network_wears_adapters_too(tmp_path):
    network = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    specs = [
        a_file(
            tmp_path / f"{name}.safetensors",
            lora_tensors(network, prefix="transformer", seed=ord(name)),
        )
        for name in "ac"
    ]
    bank = a_bank({"transformer": network}, specs)
    rows = torch.randn(ROWS, 3, 8)
    worn = [(A,), (), (C, A), (A,)]
    plain = network(rows)
    with bank.rows(worn):
        adapted = network(rows)

    network.compile(backend="eager", fullgraph=True)

    assert torch.equal(network(rows), plain)
    with bank.rows(worn):
        assert torch.equal(network(rows), adapted)
    assert torch.equal(network(rows), plain)


# --- slots ---


def test_the_adapter_unused_for_longest_gives_up_its_slot(tmp_path):
    network = adapter_builders.a_text_encoder()
    bank = a_bank(
        {"text_encoder": network}, three_adapters(tmp_path, network, "text_encoder"), slots=2
    )

    for use in (A, B, A, C):
        with bank.rows([(use,)]):
            pass
    with bank.rows([(A,), (C,)]):
        pass

    assert (bank.hits, bank.misses, bank.evictions) == (3, 3, 1)


def test_an_adapter_leaves_nothing_behind_in_its_slot(tmp_path):
    network = adapter_builders.a_unet()
    bank = a_bank({"unet": network}, three_adapters(tmp_path, network, "unet"), slots=1)
    seen = []

    for use in (B, A, B, C, A):
        with bank.rows(alone(1, (use,))):
            seen.append(adapter_builders.call_unet(network, torch.float32))

    assert bank.evictions == 4
    assert torch.equal(seen[2], seen[0])
    assert torch.equal(seen[4], seen[1])


def test_a_forward_cannot_wear_more_adapters_than_there_are_slots(tmp_path):
    network = adapter_builders.a_text_encoder()
    bank = a_bank(
        {"text_encoder": network}, three_adapters(tmp_path, network, "text_encoder"), slots=2
    )

    with pytest.raises(EngineError, match="3 different adapters"), bank.rows([(A,), (B,), (C,)]):
        pass
    with pytest.raises(UnsupportedRequest, match="3 are more than the 2"):
        bank.check((A, B, C))


def test_what_forwards_of_as_many_rows_wear_is_written_to_the_same_memory(tmp_path):
    network = adapter_builders.a_unet()
    bank = a_bank({"unet": network}, three_adapters(tmp_path, network, "unet"))

    places = []
    for worn in ([(A,), (), (B,), ()], [(C,), (A,), (), ()]):
        with bank.rows(worn):
            call = bank._call
            places.append([part.data_ptr() for part in (*call.slots, *call.strengths)])

    assert places[0] == places[1]


def test_slots_take_the_memory_they_say(tmp_path):
    network = nn.Sequential(nn.Linear(6, 10), nn.Conv2d(4, 8, 3))
    spec = a_file(tmp_path / "a.safetensors", lora_tensors(network, prefix="unet", seed=1, rank=4))

    bank = a_bank({"unet": network}, [spec], torch.bfloat16, slots=8)

    assert bank.slots == 1  # no more than there are adapters
    assert bank.size_bytes == 2 * (1 + bank.slots) * 4 * (6 + 10 + 4 * 9 + 8)


def test_a_forward_of_another_number_of_rows_is_refused(tmp_path):
    network = adapter_builders.a_unet()
    bank = a_bank({"unet": network}, three_adapters(tmp_path, network, "unet"))

    with (
        pytest.raises(EngineError, match=r"lie over 3 rows, but unet\.\S+ was given 4"),
        bank.rows([(A,), (B,), ()]),
    ):
        adapter_builders.call_unet(network, torch.float32)


def test_after_a_failure_nobody_wears_anything(tmp_path):
    network = adapter_builders.a_unet()
    plain = adapter_builders.call_unet(network, torch.float32)
    bank = a_bank({"unet": network}, three_adapters(tmp_path, network, "unet"))

    with pytest.raises(RuntimeError, match="out of luck"), bank.rows([(A,)] * ROWS):
        raise RuntimeError("out of luck")

    assert torch.equal(adapter_builders.call_unet(network, torch.float32), plain)


def test_a_closed_bank_leaves_the_networks_as_they_were(tmp_path):
    network = adapter_builders.a_unet()
    plain = adapter_builders.call_unet(network, torch.float32)
    before = {name: set(vars(layer)) for name, layer in network.named_modules()}
    specs = three_adapters(tmp_path, network, "unet")
    bank = a_bank({"unet": network}, specs)
    with pytest.raises(ValueError, match="another bank"):
        a_bank({"unet": network}, specs)
    with bank.rows([(A,)] * ROWS):
        adapter_builders.call_unet(network, torch.float32)

    bank.close()
    bank.close()

    assert {name: set(vars(layer)) for name, layer in network.named_modules()} == before
    assert not any(layer._forward_hooks for layer in network.modules())
    assert torch.equal(adapter_builders.call_unet(network, torch.float32), plain)


# --- what may be asked for ---


@pytest.mark.parametrize(
    ("uses", "problem"),
    [
        ((AdapterUse("z"),), "'z' is none of a, b, c"),
        ((A, AdapterUse("a", 0.2)), "named twice"),
        ((AdapterUse("a", float("nan")),), "not within -10..10"),
        ((AdapterUse("a", float("-inf")),), "not within -10..10"),
        ((AdapterUse("a", 10.5),), "not within -10..10"),
    ],
)
def test_adapters_that_no_row_can_wear_are_refused(tmp_path, uses, problem):
    network = adapter_builders.a_text_encoder()
    bank = a_bank({"text_encoder": network}, three_adapters(tmp_path, network, "text_encoder"))

    with pytest.raises(UnsupportedRequest, match=problem) as refusal:
        bank.check(uses)
    with pytest.raises(UnsupportedRequest, match=problem), bank.rows([(), uses]):
        pass

    assert refusal.value.field == "adapters"


def test_the_facts_name_file_strength_order_and_rank(tmp_path):
    network = adapter_builders.a_text_encoder()
    specs = three_adapters(tmp_path, network, "text_encoder")
    bank = a_bank({"text_encoder": network}, specs)
    sha256 = {spec.name: hashlib.sha256(Path(spec.path).read_bytes()).hexdigest() for spec in specs}

    assert bank.names() == ["a", "b", "c"]
    assert bank.digest("b") == sha256["b"]
    assert json.loads(json.dumps(bank.facts((C, AdapterUse("a", 2))))) == [
        {"name": "c", "sha256": sha256["c"], "strength": 0.45, "padded_rank": 4},
        {"name": "a", "sha256": sha256["a"], "strength": 2.0, "padded_rank": 4},
    ]


# --- what a file may look like ---


def read(path, network, tensors, prefix: str, metadata=None):
    """What a file's tensors change, by layer."""
    spec = a_file(path / "read.safetensors", tensors, metadata)
    return read_adapter(spec, {prefix: network}, max_rank=64, dtype=torch.float32).updates


def same(first, second) -> bool:
    """Do two files change the same layers by the same numbers?"""
    return first.keys() == second.keys() and all(
        torch.equal(first[place].down, second[place].down)
        and torch.equal(first[place].up, second[place].up)
        for place in first
    )


@EVERY_NETWORK
def test_files_of_kohyas_trainer_say_the_same_in_other_words(tmp_path, kind):
    subject = SUBJECTS[kind]
    network = subject.build()
    tensors = lora_tensors(network, prefix=subject.name, seed=1, rank=4)
    halved = {key: tensor / 2 if "lora_B" in key else tensor for key, tensor in tensors.items()}

    assert same(
        read(tmp_path, network, in_kohya_words(tensors, alpha=2), subject.name),
        read(tmp_path, network, halved, subject.name),
    )


@pytest.mark.parametrize("prefix", ["base_model.model", "diffusion_model"])
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_what_peft_saves_and_comfyui_takes_says_the_same(tmp_path, kind, prefix):
    subject = SUBJECTS[kind]
    network = subject.build()
    tensors = lora_tensors(network, prefix=subject.name, seed=1)
    stem = f"{subject.name}."
    renamed = {f"{prefix}.{name.removeprefix(stem)}": each for name, each in tensors.items()}

    assert same(
        read(tmp_path, network, renamed, subject.name),
        read(tmp_path, network, tensors, subject.name),
    )


def test_each_layer_has_its_own_alpha(tmp_path):
    network = adapter_builders.a_unet()
    tensors = lora_tensors(network, prefix="unet", seed=1, rank=4, only=is_attention)
    in_kohyas = in_kohya_words(tensors, alpha=4)
    layer = next(
        key.removesuffix(".alpha") for key in in_kohyas if key.endswith("attn1_to_k.alpha")
    )
    in_kohyas[f"{layer}.alpha"] = torch.tensor(8.0)

    plain = read(tmp_path, network, tensors, "unet")
    scaled = read(tmp_path, network, in_kohyas, "unet")

    changed = {
        name
        for (_, name) in plain
        if not torch.equal(plain["unet", name].up, scaled["unet", name].up)
    }
    assert {name.replace(".", "_") for name in changed} == {layer.removeprefix("lora_unet_")}
    assert all(torch.equal(scaled["unet", name].up, 2 * plain["unet", name].up) for name in changed)


def test_a_peft_config_in_the_header_is_followed_as_diffusers_does(tmp_path):
    pytest.importorskip("peft")
    network = adapter_builders.a_flux_transformer()
    tensors = lora_tensors(network, prefix="transformer", seed=1, rank=4, only=is_attention)
    targets = [name for name in adapted_layers(network) if is_attention(name)]
    config = {
        "r": 4,
        "lora_alpha": 6,
        "alpha_pattern": {"transformer_blocks.1.attn.to_q": 3},
        "target_modules": targets,
        "use_rslora": True,
    }
    noted = json.dumps({f"transformer.{key}": fact for key, fact in config.items()})
    spec = a_file(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": noted})
    theirs = copy.deepcopy(network)
    theirs.load_lora_adapter(
        dict(tensors), prefix="transformer", adapter_name="a", metadata=json.loads(noted)
    )
    expected = adapter_builders.call_flux_transformer(theirs, torch.float32)

    bank = a_bank({"transformer": network}, [spec])
    with bank.rows([(AdapterUse("a"),)] * ROWS):
        adapted = adapter_builders.call_flux_transformer(network, torch.float32)

    assert (adapted - expected).abs().max() <= 1e-5 * expected.std()


def test_the_text_encoder_words_of_older_trainers_are_known(tmp_path):
    network = adapter_builders.a_text_encoder()
    tensors = lora_tensors(network, prefix="text_encoder", seed=1)
    older = {
        key.replace(".lora_A.", ".lora_linear_layer.down.").replace(
            ".lora_B.", ".lora_linear_layer.up."
        ): tensor
        for key, tensor in tensors.items()
    }

    assert same(
        read(tmp_path, network, older, "text_encoder"),
        read(tmp_path, network, tensors, "text_encoder"),
    )


def test_a_text_encoder_without_the_level_of_older_releases_takes_their_files(tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel

    network = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=100,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    tensors = lora_tensors(network, prefix="text_encoder.text_model", seed=1)

    updates = read(tmp_path, network, tensors, "text_encoder")

    assert {name for _, name in updates} == set(adapted_layers(network))
    assert same(read(tmp_path, network, in_kohya_words(tensors, alpha=4), "text_encoder"), updates)


SGM_NAMES = {
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_2_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_3_1_transformer_blocks_0_attn1_to_q": (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    ),
    "input_blocks_3_1_transformer_blocks_1_ff_net_0_proj": (
        "down_blocks.1.attentions.0.transformer_blocks.1.ff.net.0.proj"
    ),
    "middle_block_1_transformer_blocks_0_attn2_to_out_0": (
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
    ),
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_0_0_emb_layers_1": "up_blocks.0.resnets.0.time_emb_proj",
    "output_blocks_1_0_skip_connection": "up_blocks.0.resnets.1.conv_shortcut",
    "output_blocks_1_1_proj_in": "up_blocks.0.attentions.1.proj_in",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "out_2": "conv_out",
}


def test_layers_of_sdxl_are_known_by_their_names_in_the_original_repository(tmp_path):
    network = adapter_builders.an_sdxl_unet()
    tensors = lora_tensors(
        network, prefix="unet", seed=1, only=lambda name: name in SGM_NAMES.values()
    )
    original = {}
    for theirs, ours in SGM_NAMES.items():
        original[f"lora_unet_{theirs}.lora_down.weight"] = tensors[f"unet.{ours}.lora_A.weight"]
        original[f"lora_unet_{theirs}.lora_up.weight"] = tensors[f"unet.{ours}.lora_B.weight"]
        original[f"lora_unet_{theirs}.alpha"] = torch.tensor(4.0)

    assert same(read(tmp_path, network, original, "unet"), read(tmp_path, network, tensors, "unet"))


def test_layers_of_flux_are_known_by_their_names_in_the_original_repository(tmp_path):
    network = adapter_builders.a_flux_transformer()
    fused = {
        "lora_unet_double_blocks_1_img_attn_qkv": [
            f"transformer_blocks.1.attn.to_{part}" for part in "qkv"
        ],
        "lora_unet_double_blocks_0_txt_mlp_2": ["transformer_blocks.0.ff_context.net.2"],
        "lora_unet_single_blocks_1_linear2": ["single_transformer_blocks.1.proj_out"],
        "lora_unet_img_in": ["x_embedder"],
        "lora_unet_final_layer_linear": ["proj_out"],
    }
    original, expected = {}, {}
    for theirs, ours in fused.items():
        pairs = lora_tensors(
            network, prefix="transformer", seed=1, only=lambda name, ours=ours: name in ours
        )
        down = pairs[f"transformer.{ours[0]}.lora_A.weight"]
        ups = [pairs[f"transformer.{name}.lora_B.weight"] for name in ours]
        original[f"{theirs}.lora_down.weight"] = down
        original[f"{theirs}.lora_up.weight"] = torch.cat(ups)
        original[f"{theirs}.alpha"] = torch.tensor(2.0)
        for name, up in zip(ours, ups, strict=True):
            expected |= {
                f"transformer.{name}.lora_A.weight": down,
                f"transformer.{name}.lora_B.weight": up / 2,
            }

    assert same(
        read(tmp_path, network, original, "transformer"),
        read(tmp_path, network, expected, "transformer"),
    )


def test_the_fused_layer_of_a_flux_single_block_becomes_four(tmp_path):
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        # diffusers knows this layer at its real width only
        network = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    stem = "lora_unet_single_blocks_0_linear1"
    down, up = torch.randn(2, 3072), torch.randn(3 * 3072 + 12288, 2)

    updates = read(
        tmp_path,
        network,
        {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up},
        "transformer",
    )

    block = "single_transformer_blocks.0"
    names = [f"{block}.attn.to_q", f"{block}.attn.to_k", f"{block}.attn.to_v", f"{block}.proj_mlp"]
    assert updates.keys() == {("transformer", name) for name in names}
    assert torch.equal(torch.cat([updates["transformer", name].up for name in names], dim=1), up.T)


def test_an_adapter_stays_the_same_whatever_becomes_of_its_file(tmp_path):
    network = adapter_builders.a_unet()
    specs = three_adapters(tmp_path, network, "unet")
    bank = a_bank({"unet": network}, specs, slots=1)
    with bank.rows([(A,)] * ROWS):
        before = adapter_builders.call_unet(network, torch.float32)

    with Path(specs[0].path).open("r+b") as file:
        file.seek(-1000, 2)
        file.write(bytes(1000))
    with bank.rows([(B,)] * ROWS):
        pass

    with bank.rows([(A,)] * ROWS):
        assert torch.equal(adapter_builders.call_unet(network, torch.float32), before)


# --- what a file may not look like ---


def refusal_of(spec: AdapterSpec, network, **changes) -> EngineError:
    with pytest.raises(EngineError) as refusal:
        a_bank({"unet": network}, [spec], **changes)
    assert not any(layer._forward_hooks for layer in network.modules())
    return refusal.value


def test_a_file_that_is_missing_altered_or_no_safetensors_is_corrupt(tmp_path):
    network = adapter_builders.a_unet()
    sound = a_file(tmp_path / "style.safetensors", lora_tensors(network, prefix="unet", seed=1))
    data = Path(sound.path).read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(data[:-10])
    disguised = tmp_path / "disguised.safetensors"
    torch.save({"unet.conv_in.lora_A.weight": torch.zeros(4, 4)}, disguised)
    pickled = tmp_path / "pickled.safetensors"
    pickled.write_bytes(pickle.dumps({"unet.conv_in.lora_A.weight": 0}))

    for spec, problem in [
        (
            AdapterSpec(name="style", path=str(tmp_path / "gone.safetensors")),
            "'style' cannot be read: No such file",
        ),
        (replace(sound, sha256="ab" * 32), "'style' has sha256"),
        (AdapterSpec(name="style", path=str(cut)), "'style' is no safetensors file"),
        (AdapterSpec(name="style", path=str(disguised)), "'style' is no safetensors file"),
        (AdapterSpec(name="style", path=str(pickled)), "'style' is no safetensors file"),
    ]:
        refusal = refusal_of(spec, network)
        assert isinstance(refusal, CheckpointCorrupt)
        assert refusal.file == spec.path
        assert problem in refusal.problem
    a_bank({"unet": network}, [replace(sound, sha256=hashlib.sha256(data).hexdigest().upper())])


def test_weights_that_are_not_finite_in_the_checkpoints_dtype_are_corrupt(tmp_path):
    network = adapter_builders.a_unet().half()
    tensors = lora_tensors(network, prefix="unet", seed=1, only=is_attention)
    large = next(iter(tensors))
    tensors[large][0, 0] = 1e5  # beyond fp16

    refusal = refusal_of(
        a_file(tmp_path / "style.safetensors", tensors), network, dtype=torch.float16
    )

    assert isinstance(refusal, CheckpointCorrupt)
    assert large.removesuffix(".lora_A.weight") in refusal.problem


BARE_TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
TO_Q = f"unet.{BARE_TO_Q}"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({f"{TO_Q}.lora_magnitude_vector": torch.ones(32)}, "is a DoRA"),
        ({f"{TO_Q}.dora_scale": torch.ones(32)}, "is a DoRA"),
        ({f"{TO_Q}.lokr_w1": torch.ones(4, 4)}, "no part of a plain LoRA"),
        ({f"{TO_Q}.lora_B.bias": torch.ones(32)}, "no part of a plain LoRA"),
        ({f"{TO_Q}.lora_B.weight": None}, "no complete pair of matrices"),
        ({f"{TO_Q}.lora_A.weight": None, f"{TO_Q}.lora_B.weight": None}, "changes nothing"),
        ({f"{TO_Q}.lora_down.weight": torch.ones(4, 32)}, "holds a tensor twice"),
        ({f"{TO_Q}.lora_A.weight": torch.tensor(1.0)}, "no complete pair of matrices"),
        (
            {
                f"{TO_Q}.lora_A.weight": torch.ones(0, 32),
                f"{TO_Q}.lora_B.weight": torch.ones(32, 0),
            },
            "no complete pair of matrices",
        ),
        ({f"{TO_Q}.lora_B.weight": torch.ones(33, 4)}, "whose weight is [32, 32]"),
        ({f"{TO_Q}.lora_A.weight": torch.ones(3, 32)}, "whose weight is [32, 32]"),
        ({f"{TO_Q}.alpha": torch.ones(2)}, "more than one alpha"),
        (
            {
                "unet.nowhere.lora_A.weight": torch.ones(4, 8),
                "unet.nowhere.lora_B.weight": torch.ones(8, 4),
            },
            "a layer that is not here",
        ),
        (
            {
                "lora_unet_nowhere.lora_down.weight": torch.ones(4, 8),
                "lora_unet_nowhere.lora_up.weight": torch.ones(8, 4),
            },
            "not here",
        ),
        (
            {
                "text_encoder_2.q.lora_A.weight": torch.ones(4, 8),
                "text_encoder_2.q.lora_B.weight": torch.ones(8, 4),
            },
            "not here",
        ),
        (
            {
                f"{TO_Q.removeprefix('unet.')}.lora_{half}.weight": torch.ones(*shape)
                for half, shape in (("A", (4, 32)), ("B", (32, 4)))
            },
            "twice",
        ),
    ],
)
def test_a_file_that_is_no_lora_for_these_networks_is_unsupported(tmp_path, changes, problem):
    network = adapter_builders.a_unet()
    tensors = (
        lora_tensors(network, prefix="unet", seed=1, only=lambda name: f"unet.{name}" == TO_Q)
        | changes
    )
    spec = a_file(
        tmp_path / "style.safetensors",
        {key: tensor for key, tensor in tensors.items() if tensor is not None},
    )

    refusal = refusal_of(spec, network)

    assert isinstance(refusal, UnsupportedRequest)
    assert refusal.problem.startswith("'style' ")
    assert problem in refusal.problem


def test_names_of_an_original_repository_that_nobody_translates_are_unsupported(tmp_path):
    network = adapter_builders.an_sd3_transformer()
    stem = "lora_unet_joint_blocks_0_x_block_attn_proj"
    tensors = {
        f"{stem}.lora_down.weight": torch.ones(4, 32),
        f"{stem}.lora_up.weight": torch.ones(32, 4),
    }

    with pytest.raises(
        UnsupportedRequest,
        match=(
            "'read' changes 'lora_unet_joint_blocks_0_x_block_attn_proj', a layer that is not here"
        ),
    ):
        read(tmp_path, network, tensors, "transformer")


def test_a_rank_beyond_the_limit_is_unsupported(tmp_path):
    network = adapter_builders.a_unet()
    spec = a_file(
        tmp_path / "style.safetensors",
        lora_tensors(network, prefix="unet", seed=1, rank=8, only=is_attention),
    )

    assert "'style' has rank 8" in str(refusal_of(spec, network, max_rank=7))
    a_bank({"unet": network}, [spec], max_rank=8)
