"""The GPU benchmark, as far as a CPU shows it: its plan, what ends a part, and what it judges."""

import json
import sys
import time
from dataclasses import replace

import pytest

from benchmarks.gpu.cells import DEVICE_LOST, Cells, NotHere, Setting
from benchmarks.gpu.checkpoints import a_request, write_checkpoint
from benchmarks.gpu.clocks import DeviceWatch, samples_of, summary_of
from benchmarks.gpu.full_bits import beside_others, full_bits
from benchmarks.gpu.part_process import TAKEN
from benchmarks.gpu.parts import Part, run_part
from benchmarks.gpu.plan import PARTS, ROUND_S, ROUNDS, parts_of_round, seconds_for
from benchmarks.gpu.profiles import busy_and_span, kind_of, profiles
from benchmarks.gpu.report import TARGETS, figures_of, verdict
from benchmarks.gpu.speed import speed
from benchmarks.gpu.stepper import Stepper
from engine.quantisation import QuantisedLinear

FIRST_TESTS_S = 80  # of tests/engine/test_gpu.py, before round 1 (docs/figures.md)


@pytest.fixture
def setting(tmp_path) -> Setting:
    return Setting("cpu", False, True, tmp_path, tmp_path / "traces")


def some_cells(**changes) -> Cells:
    given = {"until": time.time() + 60, "needs_s": {}, "is_lost": lambda: False}
    return Cells(**given | changes)


def told(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def a_speed(images_per_s: float, *, busy: float) -> dict:
    return {
        "images_per_s": images_per_s,
        "latency_s": 1 / images_per_s,
        "busy": {"images_per_s": busy},
        "knee_rows": 8,
    }


def an_sdxl(*, ours: float, busy: float, plain: float = 1.0, batched: float = 1.0) -> Part:
    eager = {
        "plain": {"images_per_s": plain, "latency_s": 1 / plain},
        "ours": a_speed(ours, busy=busy),
        "ours_to_plain": ours / plain,
    }
    return Part(cells={"eager": eager, "plain_batched": {"images_per_s": batched}})


# --- the plan ---


@pytest.mark.parametrize("number", ROUNDS)
def test_every_round_ends_within_nine_minutes(number):
    needed_s = sum(PARTS[name].needs_s for name in parts_of_round(number))

    assert needed_s + (FIRST_TESTS_S if number == 1 else 0) <= ROUND_S


@pytest.mark.parametrize("part", PARTS)
def test_every_cell_of_a_part_is_planned_and_left_out_when_its_seconds_are_not_left(
    part, setting, capsys
):
    cells = some_cells(until=0.0, needs_s=dict.fromkeys(PARTS[part].cells, 1.0))

    TAKEN.get(part, lambda *given: speed(part, *given))(setting, cells)

    lines = told(capsys)
    assert [line["cell"] for line in lines] == list(PARTS[part].cells)
    assert all("left_out" in line for line in lines)


def test_a_part_gets_what_it_needs_and_its_share_of_what_is_over():
    needs_s = {name: PARTS[name].needs_s for name in ("sdxl", "flux")}
    both_s = sum(needs_s.values())

    assert seconds_for("sdxl", ["flux"], 2 * both_s) == pytest.approx(2 * needs_s["sdxl"])
    assert seconds_for("sdxl", ["flux"], both_s - 50) == needs_s["sdxl"]
    assert seconds_for("flux", [], 50) == 50


def test_a_part_without_the_seconds_to_start_is_left_out(tmp_path):
    part = run_part("curves", 3.0, device="cpu", quick=False, tiny=True, traces=tmp_path)

    assert list(part.left_out) == list(PARTS["curves"].cells)
    assert part.failed == {}


# --- what ends a cell or a part ---


def test_a_cell_that_fails_or_is_not_for_this_device_harms_no_other(capsys):
    def fails():
        raise ValueError("no good")

    def not_here():
        raise NotHere("needs a GPU")

    cells = some_cells()
    cells.take("bad", fails)
    cells.take("elsewhere", not_here)
    cells.take("good", lambda: {"figure": 1})

    part = Part()
    for line in told(capsys):
        part.add(line)
    assert part.failed == {"bad": "ValueError: no good"}
    assert part.left_out == {"elsewhere": "needs a GPU"}
    assert part.cells == {"good": {"figure": 1}}


def test_a_lost_device_ends_its_part_with_the_name_of_the_cell(capsys):
    def illegal():
        raise RuntimeError("CUDA error: an illegal memory access")

    with pytest.raises(SystemExit) as ended:
        some_cells(is_lost=lambda: True).take("graphs", illegal)

    part = Part()
    for line in told(capsys):
        part.add(line)
    part.end(ended.value.code, "graphs")
    assert ended.value.code == DEVICE_LOST
    assert "the device was lost" in part.failed["graphs"]
    assert "illegal memory access" in part.failed["graphs"]


def test_a_part_that_is_stopped_names_the_cell_that_was_under_way():
    part = Part(cells={"eager": {}})

    part.end(-9, "overlap")

    assert part.failed == {"overlap": "the process ended by signal 9"}


# --- bits ---


def test_full_bits_finds_images_equal_wherever_their_rows_lie_and_resumed(setting, capsys):
    full_bits("full_bits", setting, some_cells())

    found = [line["found"] for line in told(capsys) if "found" in line]
    assert len(found) == len(PARTS["full_bits"].cells)
    assert all(cell["invariant"] and cell["resumed"] for cell in found)


def test_full_bits_sees_a_network_whose_rows_know_of_each_other(setting):
    spec = write_checkpoint(setting.folder, "sdxl", "tiny")
    stepper = Stepper(spec, "cpu")
    family = stepper.loaded.family
    denoise = family.denoise
    family.denoise = lambda rows: denoise(rows) + rows["latents"].mean()
    request = a_request(spec)
    images = [stepper.started(replace(request, id=str(seed), seed=seed)) for seed in range(4)]

    assert beside_others(stepper, images, 8)["apart_beside_zeros"] > 0


# --- networks ---


def test_drawn_networks_are_quantised_and_upcast_as_those_that_are_read(setting):
    spec = write_checkpoint(setting.folder, "sdxl", "tiny", precision="fp16", quantize="int8")
    loaded = Stepper(spec, "cpu").loaded

    unet = loaded.family.networks()["unet"]
    facts = loaded.facts()
    assert any(isinstance(layer, QuantisedLinear) for layer in unet.modules())
    assert {facts["vae_encoder"], facts["vae_decoder"]} == {"torch.float32"}


# --- profiles and clocks ---


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc", "convolution"),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel", "convolution"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matmul"),
        ("void at::native::vectorized_layer_norm_kernel", "norms"),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel", "norms"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy", "copies"),
        ("void at::native::vectorized_elementwise_kernel", "other"),
        ("aten::addmm", "matmul"),
    ],
)
def test_a_kernel_is_counted_by_the_kind_that_its_name_tells(name, kind):
    assert kind_of(name) == kind


def test_gaps_are_what_no_kernel_fills():
    busy, span = busy_and_span([(10.0, 14.0), (12.0, 16.0), (20.0, 21.0)])

    assert busy == 7
    assert span == 11


def test_a_profile_leaves_a_trace_and_seconds_by_kind(setting, capsys):
    only_one = some_cells(needs_s=dict.fromkeys(list(PARTS["profile"].cells)[1:], 1000.0))

    profiles(setting, only_one)

    (found,) = [line["found"] for line in told(capsys) if "found" in line]
    assert found["seconds_by_kind"]["convolution"] > 0
    assert found["seconds_by_kind"]["attention"] > 0
    assert len(found["longest"]) > 5
    assert found["gaps_s"] is None
    assert (setting.traces / found["trace"]).stat().st_size > 0


def test_clocks_tell_what_held_the_device_back_before_after_and_meanwhile():
    samples = samples_of(
        "345, 2619, 70.12, 30, 0x0000000000000001\n"
        "1980, 3201, 690.50, 61, 0x0000000000000004\n"
        "[N/A], 3201, 690.50, 61, 0x0000000000000000\n"
        "1755, 3201, 699.10, 66, 0x0000000000000044\n"
    )

    summary = summary_of(samples)

    assert summary["before"]["sm_mhz"] == 345
    assert summary["after"]["power_w"] == 699.1
    assert summary["meanwhile"]["sm_mhz"] == [345, 1755, 1980]
    assert summary["held_back_by"] == ["hw_thermal_slowdown", "sw_power_cap"]


def test_clocks_are_asked_for_before_and_after():
    line = "1980, 3201, 690.50, 61, 0x0000000000000000"
    with DeviceWatch([sys.executable, "-S", "-c", f"print({line!r})"]) as watch:
        pass

    assert watch.summary()["samples"] == 2
    assert watch.summary()["held_back_by"] == []


@pytest.mark.parametrize("command", [[], ["no-nvidia-smi-here"]])
def test_clocks_are_not_available_where_nobody_tells_them(command):
    with DeviceWatch(command) as watch:
        pass

    assert watch.summary() == "not available"


# --- what is judged ---


def test_a_figure_is_the_best_of_the_variants_of_all_parts():
    parts = {
        "sdxl": an_sdxl(ours=1.0, busy=1.2, batched=1.5),
        "sdxl_quantised": Part(cells={"float8_graphs": a_speed(1.1, busy=2.5)}),
    }

    figures = figures_of(parts)

    assert figures["sdxl_best_images_per_s"] == 2.5
    assert figures["sdxl_best_variant"] == "float8_graphs"
    assert figures["sdxl_busy_to_plain_batched"] == pytest.approx(0.8)


def test_nothing_is_judged_on_a_cpu_and_of_tiny_networks_only_bits():
    bits = Part(cells={"sdxl": {"invariant": True, "resumed": False}})
    parts = {"full_bits": bits, "sdxl": an_sdxl(ours=2.0, busy=2.5)}

    on_cpu = verdict(parts, tiny=True, is_cuda=False)
    tiny_on_gpu = verdict(parts, tiny=True, is_cuda=True)
    on_gpu = verdict(parts, tiny=False, is_cuda=True)

    assert on_cpu["met"] == {}
    assert set(on_cpu["not_judged"]) == set(on_cpu["targets"])
    assert tiny_on_gpu["met"] == {"share_invariant": True, "share_resumed": False}
    assert on_gpu["met"]["sdxl_best_images_per_s"] is True
    assert on_gpu["not_judged"] == {}


def test_targets_are_what_others_reach():
    bounds = {target.figure: target.bound for target in TARGETS}

    assert bounds["sdxl_best_images_per_s"] == 2.4
    assert bounds["flux_best_latency_s"] == 2.7
