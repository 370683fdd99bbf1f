"""What was promised of the engine."""

from benchmarks.lib.verdict import Target

TARGETS = (
    Target("others_p99_to_ours_of_4_steps_at_0.8x", ">=", 3.0),  # we aim for 4
    Target("our_images_per_s_to_others_at_1.5x", ">=", 1.0),
    Target("device_share", ">=", 0.97),
    Target("mixed_adapters_to_one", "<=", 1.25),
    Target("leak_kib_per_request", "<", 2.0),
    Target("leak_growth", "<", 0.02),
)
