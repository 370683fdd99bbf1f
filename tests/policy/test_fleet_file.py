"""fleet.toml: what an operator may write, and which key is named when it contradicts itself."""

import pytest

from policy.fleet import FleetInvalid, parse_fleet, parse_size
from settings import REPO
from tests.builders import GONE, a_fleet, fleet_text

A_POOL = {"models": ["pocket"], "slots": 16, "max_batch_rows": 16}
BUCKETS = "models.pocket.tiers.quality.bucket_rows"


def problems_of(changes) -> list[str]:
    with pytest.raises(FleetInvalid) as refusal:
        parse_fleet(fleet_text(changes))
    return refusal.value.problems


def test_the_shipped_file_is_valid():
    fleet = parse_fleet((REPO / "fleet.toml").read_text())

    assert fleet.tiers_by_rank == ("fast", "quality", "batch")
    assert fleet.pools_of("pocket") == ("local",)


def test_tiers_are_ordered_by_rank_and_not_by_their_place_in_the_file():
    fleet = a_fleet({"tiers.fast.rank": 9})

    assert fleet.tiers_by_rank == ("quality", "batch", "fast")


def test_a_default_that_is_not_said_is_the_first_of_the_file():
    fleet = a_fleet({"tiers.fast.rank": 9})

    assert (fleet.default_tier(), fleet.default_model()) == ("fast", "pocket")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tiers.fast.rank", -1),
        ("tiers.fast.rank", "first"),
        ("tiers.fast.max_steps", 0),
        ("tiers.fast.max_steps", GONE),
        ("tiers.fast.max_images", 65),
        ("tiers.fast.guaranteed_share", 1.0),
        ("tiers.fast.price_weight", 0),
        ("tiers.fast.price_weight", float("inf")),
        ("tiers.fast.determinism", "perfect"),
        ("tiers.fast.max_stpes", 20),
        ("models.pocket.family", "sdxl-turbo"),
        ("models.pocket.precision", "fp8"),
        ("models.pocket.sizes", []),
        ("models.pocket.created_at", "yesterday"),
        ("models.pocket.max_guidance", float("nan")),
        ("models.pocket.versions", []),
        ("models.pocket.versions.0.quantize", "int3"),
        ("models.pocket.versions.0.sha256", {"unet.safetensors": "abc"}),
        ("models.pocket.versions.0.traffic_weight", -1.0),
        ("models.pocket.adapters.ink", {"source": "ink.safetensors"}),
        ("models.pocket.adapters.ink", {"source": "ink.safetensors", "sha256": "abc"}),
        ("models.pocket.options.seed", [1, 2]),
        ("models.pocket.block_cache_threshold", 1.0),
        ("models.pocket.compile_blocks", "perhaps"),
        ("models.pocket.aliases", ["with space"]),
        ("models.pocket.aliases", [""]),
        ("models.pocket.aliases", "dall-e-3"),
        ("pools.local.attention", "fastest"),
        ("pools.local.slots", 0),
        ("pools.local.models", []),
        ("pools.local.gpu_hour_price", -0.01),
        ("pools.local.classes.spot.gpu_hour_price", -0.01),
        ("pools.local.classes.spot.market", "auction"),
        ("pools.local.gpu_class", ""),
        ("currency", "euros"),
    ],
)
def test_a_wrong_value_is_named_by_its_key(key, value):
    [problem, *_] = problems_of({key: value})

    assert problem.startswith(key)


@pytest.mark.parametrize(
    ("changes", "key", "reason"),
    [
        ({"tiers.batch.rank": 0}, "tiers.batch.rank", "taken by another tier"),
        (
            {"tiers.fast.default_steps": 21},
            "tiers.fast.default_steps",
            "must not exceed max_steps (20)",
        ),
        ({"tiers.fast.guaranteed_share": 0.8}, "tiers.*.guaranteed_share", "less than 1"),
        (
            {"tiers.fast.max_megapixels": 0.01},
            "tiers.fast.max_megapixels",
            "no size of model 'pocket' fits",
        ),
        (
            {"pools.local.models": ["pocket", "poket"]},
            "pools.local.models",
            "'poket' is not a model",
        ),
        (
            {"pools.local.row_buckets": [4, 2]},
            "pools.local.row_buckets",
            "ascending numbers from 1 to max_batch_rows (16)",
        ),
        (
            {"pools.local.classes": {"spot": {"slots": 3}}},
            "pools.local.classes.spot.slots",
            "3 is less than tiers.",
        ),
        ({"pools.local.row_buckets": [4, 32]}, "pools.local.row_buckets", "ascending numbers"),
        (
            {"pools.local.row_buckets": [], "models.pocket.cuda_graphs": True},
            "pools.local.row_buckets",
            "name some sizes, or leave the key out",
        ),
        (
            {"models.pocket.pipeline_class": "SanaPipeline"},
            "models.pocket.pipeline_class",
            "means nothing to family 'sd'",
        ),
        (
            {"models.pocket.options": {"eta": 0.5}},
            "models.pocket.options.eta",
            "means nothing to family 'sd'",
        ),
        (
            {"models.pocket.block_cache_threshold": 0.1},
            "models.pocket.block_cache_threshold",
            "means nothing to family 'sd'",
        ),
        (
            {
                "pools.big.max_batch_rows": 1,
                "models.large.tiers.quality.bucket_rows": {"1024x1024": 1},
            },
            "pools.big.max_batch_rows",
            "model 'large' with guidance takes 2 rows; accepted: 2 to 1024",
        ),
        ({"pools.big.slots": 7}, "pools.big.slots", "less than tiers.quality.max_images (8)"),
        ({"pools.big": GONE}, "models.large", "must be in a pool, is in none"),
        (
            {
                "pools.results": {"models": ["pocket"], "slots": 8, "max_batch_rows": 8},
                "pools.local": GONE,
            },
            "pools.results",
            "results queues",
        ),
        ({"models.pocket.aliases": ["large"]}, "models.pocket.aliases", "'large' is taken"),
        ({"models.pocket.aliases": ["a", "a"]}, "models.pocket.aliases", "'a' is taken"),
        (
            {"models.pocket.aliases": ["a"], "models.large.aliases": ["a"]},
            "models.large.aliases",
            "'a' is taken",
        ),
        (
            {"models.pocket.default_sampler": "unipc"},
            "models.pocket.default_sampler",
            "one of samplers",
        ),
        (
            {"models.pocket.default_guidance": 15.5},
            "models.pocket.default_guidance",
            "must not exceed max_guidance (15.0)",
        ),
        (
            {"models.pocket.versions.0.traffic_weight": 0.0},
            "models.pocket.versions",
            "traffic_weight above 0",
        ),
        ({"models.pocket.tiers.slow.default_steps": 4}, "models.pocket.tiers.slow", "not a tier"),
        (
            {"models.pocket.tiers.fast.default_steps": 21},
            "models.pocket.tiers.fast.default_steps",
            "exceeds the tier's max_steps",
        ),
        (
            {"models.large.tiers.fast.default_guidance": 20.5},
            "models.large.tiers.fast.default_guidance",
            "exceeds max_guidance (20.0)",
        ),
        ({"models.pocket.tiers.quality": GONE}, BUCKETS, "'128x128' needs 2 to 16 rows"),
        (
            {"models.pocket.tiers.quality.bucket_rows.128x192": 17},
            "models.pocket.tiers.quality.bucket_rows",
            "'128x192' needs 2 to 16 rows",
        ),
        ({f"{BUCKETS}.128x128": 1}, BUCKETS, "'128x128' needs 2 to 16 rows"),
    ],
)
def test_a_contradiction_is_named_by_its_key(changes, key, reason):
    found = problems_of(changes)

    assert any(problem.startswith(f"{key}:") and reason in problem for problem in found), found


def test_a_name_that_could_not_be_part_of_a_queue_s_is_refused():
    assert problems_of({"pools.Big Ones": A_POOL})[0].startswith('pools."Big Ones"')


def test_two_versions_may_not_share_an_id():
    versions = [{"id": "1", "source": "a"}, {"id": "1", "source": "b"}]

    assert problems_of({"models.pocket.versions": versions}) == [
        "models.pocket.versions: ids must differ"
    ]


def test_every_problem_is_told_at_once():
    found = problems_of(
        {
            "tiers.fast.default_steps": 21,
            "models.pocket.default_sampler": "unipc",
            "pools.big.slots": 1,
        }
    )

    assert {problem.partition(":")[0] for problem in found} >= {
        "tiers.fast.default_steps",
        "models.pocket.default_sampler",
        "pools.big.slots",
    }


def test_a_file_that_is_not_toml_is_refused_with_its_line():
    with pytest.raises(FleetInvalid, match=r"not TOML: .*line 2"):
        parse_fleet('currency = "EUR"\nrank = first\n')


def test_a_size_is_width_times_height_in_multiples_of_eight():
    assert parse_size("512x768") == (512, 768)


@pytest.mark.parametrize(
    "text",
    [
        "512",
        "512X512",
        "x512",
        "512x",
        "512x513",
        "0x0",
        "-8x8",
        "8 x8",
        "4104x8",
        "٨x8",
        "1e2x8",
        "512x512x512",
        "",
    ],
)
def test_anything_else_is_not_a_size(text):
    with pytest.raises(ValueError, match=r"multiples of 8|WIDTHxHEIGHT"):
        parse_size(text)


def renamed(name: str, key: str) -> str:
    """The shipped file with its model under another name; `key` is how the tables write it."""
    text = (REPO / "fleet.toml").read_text()
    return text.replace("models.pocket", f"models.{key}").replace('["pocket"]', f'["{name}"]')


@pytest.mark.parametrize("name", ["sd3.5", "FLUX.1-dev", "v1.5_pruned", "2.1"])
def test_a_model_may_be_called_as_its_makers_do(name):
    fleet = parse_fleet(renamed(name, f'"{name}"'))

    assert fleet.pools_of(name) == ("local",)


def test_versions_and_adapters_may_have_dots_too():
    fleet = a_fleet(
        {
            "models.pocket.versions.0.id": "1.5",
            "models.pocket.adapters": {"ink.v2": {"source": "ink", "sha256": "0" * 64}},
        }
    )

    assert list(fleet.models["pocket"].adapters) == ["ink.v2"]


def test_a_dotted_name_without_quotes_is_one_sentence_that_says_how_to_write_it():
    with pytest.raises(FleetInvalid) as refusal:
        parse_fleet(renamed("sd3.5", "sd3.5"))

    assert refusal.value.problems == ['models.sd3.5: a name with a dot is quoted: [models."sd3.5"]']


def test_so_is_a_dotted_name_of_an_adapter_or_beside_a_model_of_its_first_part():
    text = (REPO / "fleet.toml").read_text()
    more = '\n[models.pocket.adapters.ink.v2]\nsource = "ink"\n[models.pocket.2.1]\nfamily = "sd"\n'

    with pytest.raises(FleetInvalid) as refusal:
        parse_fleet(text + more)

    assert refusal.value.problems == [
        'models.pocket.2.1: a name with a dot is quoted: [models."pocket.2.1"]',
        "models.pocket.adapters.ink.v2: a name with a dot is quoted:"
        ' [models.pocket.adapters."ink.v2"]',
    ]


def test_an_error_quotes_a_dotted_name_as_the_file_does():
    with pytest.raises(FleetInvalid) as refusal:
        parse_fleet(renamed("sd3.5", '"sd3.5"').replace("max_guidance = 15.0", "max_guidance = 1"))

    assert refusal.value.problems == [
        'models."sd3.5".default_guidance: must not exceed max_guidance (1.0)'
    ]


@pytest.mark.parametrize("name", ["org/model", "with space", ".hidden", "a" * 64])
def test_a_name_that_is_none_is_told_what_a_name_is(name):
    with pytest.raises(FleetInvalid) as refusal:
        parse_fleet(renamed(name, f'"{name}"'))

    assert "a name has letters, digits, '.', '_' and '-'" in refusal.value.problems[0]


def test_licence_and_date_need_not_be_said():
    fleet = a_fleet({"models.pocket.licence": GONE, "models.pocket.created_at": GONE})

    assert fleet.models["pocket"].licence == "unknown"


@pytest.mark.parametrize(
    "changes",
    [
        {"models.pocket.family": "flux"},
        {"models.pocket.max_guidance": 1.0, "models.pocket.default_guidance": 1.0},
    ],
)
def test_an_image_of_one_row_may_be_pinned_to_one(changes):
    fleet = a_fleet({f"{BUCKETS}.128x128": 1, **changes})

    assert fleet.models["pocket"].tiers["quality"].bucket_rows["128x128"] == 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"models.pocket.family": "flux", "models.pocket.guidance_distilled": False},
        {"models.pocket.family": "pipeline"},
    ],
)
def test_an_image_that_may_take_two_rows_is_not(changes):
    assert problems_of({f"{BUCKETS}.128x128": 1, **changes}) == [
        f"{BUCKETS}: '128x128' needs 2 to 16 rows, for tier quality is reproducible"
    ]
