"""Defaults for a new model's table, and the text of fleet.toml with that table in it."""

import tomllib
from datetime import UTC, datetime

import pytest

from cli.fleet_text import NotWritable, model_text, with_model
from policy.fleet import parse_fleet, parse_size
from policy.proposals import CheckpointFacts, fitting_samplers, propose
from settings import REPO

SHIPPED = (REPO / "fleet.toml").read_text()
NOW = datetime(2026, 11, 30, tzinfo=UTC)


def proposed(facts: CheckpointFacts, text: str = SHIPPED, **more) -> dict:
    version = {"id": "1", "source": "new", "sha256": {"unet/config.json": "0" * 64}}
    return propose(
        facts,
        parse_fleet(text),
        title="New",
        pool="local",
        precision="bf16",
        created_at=NOW,
        version=version,
        **more,
    )


KINDS = {
    "sd": CheckpointFacts(family="sd", scheduler="PNDMScheduler", native_side_px=512),
    "sd2": CheckpointFacts(family="sd", scheduler="DDIMScheduler", native_side_px=768),
    "lcm": CheckpointFacts(family="sd", scheduler="LCMScheduler", few_steps=True),
    "sdxl": CheckpointFacts(family="sdxl", scheduler="EulerDiscreteScheduler", native_side_px=1024),
    "turbo": CheckpointFacts(
        family="sdxl", scheduler="EulerAncestralDiscreteScheduler", few_steps=True
    ),
    "sd3": CheckpointFacts(family="sd3", native_side_px=1024),
    "dev": CheckpointFacts(family="flux", native_side_px=1024),
    "schnell": CheckpointFacts(family="flux", few_steps=True, guidance_distilled=False),
    "fill": CheckpointFacts(family="flux", only_repaints=True),
    "edit": CheckpointFacts(family="pipeline", pipeline_class="FluxKontextPipeline"),
    "tiny": CheckpointFacts(family="sd", native_side_px=64),
}


def as_kontext_makes_it(size: str, max_area: int = 1024**2) -> str:
    """What diffusers' FluxKontextPipeline makes of a size that is asked for."""
    width, height = parse_size(size)
    sides = (round((max_area * ratio) ** 0.5) for ratio in (width / height, height / width))
    return "x".join(str(side // 16 * 16) for side in sides)


@pytest.mark.parametrize("sizes", [(), ("32x32",), ("832x1248",), ("640x480",)])
def test_kontext_is_offered_in_sizes_that_it_makes(sizes):
    table = proposed(KINDS["edit"], sizes=sizes)

    options = table.get("options", {})
    area = {key: value for key, value in options.items() if key == "max_area"}
    assert [as_kontext_makes_it(size, **area) for size in table["sizes"]] == table["sizes"]
    assert options.get("_auto_resize", True) is not bool(area)
    assert (
        parse_fleet(with_model(SHIPPED, "edit", table, "local")).models["edit"].options == options
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_proposed_table_fits_the_shipped_file(kind):
    changed = with_model(SHIPPED, "new-1.0", proposed(KINDS[kind]), "local")

    fleet = parse_fleet(changed)

    assert list(fleet.models) == ["pocket", "new-1.0"]
    assert fleet.pools["local"].models == ("pocket", "new-1.0")


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("sd", {"default_sampler": "euler", "default_guidance": 7.5}),
        ("sd2", {"default_sampler": "ddim", "sizes": ["768x768", "576x1024", "1024x576"]}),
        ("lcm", {"samplers": ["lcm"], "max_guidance": 2.0}),
        ("turbo", {"default_sampler": "euler_a", "default_guidance": 1.0}),
        ("sd3", {"default_sampler": "flow_euler"}),
        ("dev", {"default_guidance": 3.5}),
        ("schnell", {"guidance_distilled": False}),
        ("fill", {"default_guidance": 30.0}),
        ("edit", {"samplers": ["default"], "default_guidance": 2.5}),
        ("tiny", {"sizes": ["64x64"]}),
    ],
)
def test_defaults_are_those_with_which_such_checkpoints_work(kind, told):
    table = proposed(KINDS[kind])

    assert {key: table[key] for key in told} == told


def test_a_distilled_checkpoint_makes_few_steps_in_every_tier():
    tiers = proposed(KINDS["turbo"])["tiers"]

    assert tiers["quality"]["default_steps"] == tiers["batch"]["default_steps"] == 4
    assert "fast" not in tiers  # it makes four steps anyway


def test_another_makes_as_many_as_it_needs_and_the_tier_allows():
    tiers = proposed(KINDS["dev"])["tiers"]

    assert {name: own["default_steps"] for name, own in tiers.items()} == {
        "fast": 20,
        "quality": 28,
        "batch": 28,
    }


def test_reproducible_forwards_have_fewer_rows_where_images_are_large_or_take_one():
    rows = {
        kind: next(iter(proposed(KINDS[kind])["tiers"]["quality"]["bucket_rows"].values()))
        for kind in ("tiny", "sdxl", "dev")
    }

    assert rows == {"tiny": 8, "sdxl": 4, "dev": 2}


def test_samplers_that_are_proposed_are_those_of_the_engine():
    from engine.samplers import FLOW_SAMPLERS, SAMPLERS

    for kind, facts in KINDS.items():
        known = FLOW_SAMPLERS if facts.family in ("sd3", "flux") else SAMPLERS
        known = ["default"] if kind == "edit" else known
        assert [name for name in fitting_samplers(facts) if name not in known] == []


def test_the_file_s_own_text_stays_as_it_was():
    changed = with_model(SHIPPED, "new", proposed(KINDS["sd"]), "local")

    before = SHIPPED.replace('models = ["pocket"]', 'models = ["pocket", "new"]')
    assert changed.startswith(before.rstrip())


@pytest.mark.parametrize(
    "written",
    [
        'models = ["pocket",]',
        'models=[ "pocket" ]  # a "note" ]',
        'models = [\n    "pocket"   # tiny ]\n]',
        'models = [\n    "pocket",\n  ]',
        "models = ['pocket']",
    ],
)
def test_a_pool_s_list_is_found_however_it_is_written(written):
    text = SHIPPED.replace('models = ["pocket"]', written)

    changed = with_model(text, "new", proposed(KINDS["sd"]), "local")

    assert tomllib.loads(changed)["pools"]["local"]["models"] == ["pocket", "new"]
    for note in ('# a "note" ]', "# tiny ]"):
        assert (note in written) == (note in changed)


def test_a_pool_on_one_line_gets_the_model_as_well():
    pool = SHIPPED.partition("[pools.local]\n")[2]
    lines = [line.partition("#")[0].strip() for line in pool.splitlines()]
    text = f"pools.local = {{ {', '.join(lines)} }}\n" + SHIPPED.partition("[pools.local]")[0]

    changed = with_model(text, "new", proposed(KINDS["sd"]), "local")

    assert parse_fleet(changed).pools["local"].models == ("pocket", "new")


def test_a_file_of_another_shape_is_refused_and_not_spoilt():
    text = 'models = { pocket = { title = "Pocket" } }\npools.local.models = ["pocket"]\n'

    with pytest.raises(NotWritable, match=r"pools\.local\.models: .*by hand"):
        with_model(text, "new", proposed(KINDS["sd"]), "local")


def test_a_table_is_written_as_toml_reads_it():
    table = proposed(KINDS["schnell"]) | {
        "options": {"max_area": 1048576, "name": 'a "b" \\ ü'},
        "adapters": {"ink.v2": {"source": "ink", "sha256": "1" * 64}},
    }

    read = tomllib.loads(model_text("FLUX.1", table))["models"]["FLUX.1"]

    assert read == table
