"""Predict what a job will take and when it will be done.

The guesses are made from jobs like it, and corrected by how wrong the last guesses were.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from policy.steps import Denoising

# Used before the first image of a model and size, for fair order needs a number.
UNSEEN_ROW_STEP_S_PER_MEGAPIXEL = 0.5
UNSEEN_FIXED_S_PER_MEGAPIXEL = 1.0
RATIO_STRIDE = 0.05  # how far one job moves a learnt quantile, as a share of it
FIRST_RATIOS = (1.0, 2.0)


@dataclass(frozen=True)
class DeviceCost:
    """The device seconds of one model and size.

    row_step_s: of one row in one denoise step.  fixed_s: of encode and decode.
    """

    row_step_s: float
    fixed_s: float


@dataclass(frozen=True)
class EtaRatios:
    """Quantiles of actual / guessed time to the end."""

    p50: float
    p90: float


@dataclass(frozen=True)
class QueuedFlow:
    """The queued jobs of one tenant in one tier: a flow of fair queuing. cost_s: device seconds."""

    weight: float
    jobs: int
    cost_s: float

    def before(self, lead_s: float) -> tuple[float, float]:
        """Count its (device seconds, jobs) that are released while virtual time moves by `lead_s`.

        That is weight * lead_s device seconds, or all it has.
        """
        given_s = min(self.cost_s, max(0.0, lead_s) * self.weight)
        jobs = self.jobs * given_s / self.cost_s if self.cost_s > 0 else self.jobs
        return given_s, jobs


class TierQueue:
    """The queued jobs of all tenants in one tier.

    Laid out so that what goes before a place is found without a walk through all flows. jobs,
    cost_s, weights: of all flows, added up.
    """

    def __init__(self, flows: Iterable[QueuedFlow] = ()) -> None:
        ordered = sorted(flows, key=_span_s)
        self._spans_s = [_span_s(flow) for flow in ordered]
        self._costs_s = list(accumulate((flow.cost_s for flow in ordered), initial=0.0))
        self._jobs = list(accumulate((flow.jobs for flow in ordered), initial=0))
        self._weights = list(accumulate((flow.weight for flow in ordered), initial=0.0))
        rates = (flow.jobs / span if (span := _span_s(flow)) > 0 else 0.0 for flow in ordered)
        self._rates = list(accumulate(rates, initial=0.0))
        self.jobs = self._jobs[-1]
        self.cost_s = self._costs_s[-1]
        self.weights = self._weights[-1]

    def before(self, lead_s: float) -> tuple[float, float]:
        """Count (device seconds, jobs) that fair queuing releases before a job.

        lead_s: how far the job's start tag is ahead of virtual time.  The sum over all flows: some
        are all released by then, each of the others has had its part. A little more of the job's
        own tenant may be ahead than that: rounding to whole jobs is left to the learnt ratios.
        """
        lead_s = max(0.0, lead_s)
        through = bisect_right(self._spans_s, lead_s)
        seconds = self._costs_s[through] + lead_s * (self.weights - self._weights[through])
        return seconds, self._jobs[through] + lead_s * (self._rates[-1] - self._rates[through])


def _span_s(flow: QueuedFlow) -> float:
    """Return how far virtual time moves until all of the flow is released."""
    return flow.cost_s / flow.weight


@dataclass(frozen=True)
class Eta:
    """Seconds until a job's images are stored.

    Half of such jobs are done within `p50_s`, nine of ten within `p90_s`.
    """

    p50_s: float
    p90_s: float


def predicted_s(
    cost: DeviceCost | None, *, width_px: int, height_px: int, denoising: Denoising, num_images: int
) -> float:
    """Predict the device seconds of a whole job."""
    megapixels = width_px * height_px / 1e6
    unseen = DeviceCost(
        UNSEEN_ROW_STEP_S_PER_MEGAPIXEL * megapixels, UNSEEN_FIXED_S_PER_MEGAPIXEL * megapixels
    )
    known = cost or unseen
    row_steps = denoising.steps * denoising.rows
    return num_images * (row_steps * known.row_step_s + known.fixed_s)


def raw_eta_s(
    *, ahead_s: float, image_device_s: float, devices: int, concurrent_images: float
) -> float:
    """Estimate the seconds to the job's end, before the learnt correction.

    All that is ahead, spread over the devices, then the job beside the images that share its
    device.

    ahead_s: device seconds queued and running that go first.  image_device_s: of one image of the
    job. concurrent_images: that will share its device, itself included; its wall time is that many
    times its device time.
    """
    return ahead_s / max(1, devices) + image_device_s * max(1.0, concurrent_images)


def corrected(raw_s: float, ratios: EtaRatios | None) -> Eta:
    """Correct the guess by the learnt ratios. p90 is never below p50."""
    p50, p90 = (ratios.p50, ratios.p90) if ratios is not None else FIRST_RATIOS
    return Eta(p50_s=raw_s * p50, p90_s=raw_s * max(p50, p90))


def learn_ratios(known: EtaRatios | None, ratio: float, *, observed: int) -> EtaRatios:
    """Move both quantiles by one more actual / guessed.

    They converge to values with half and nine tenths of such ratios below them. Stochastic
    approximation of a quantile (Robbins, Monro 1951) in the logarithm: up by stride * q when the
    ratio is above, down by stride * (1 - q) when it is below. The first few move it in larger
    strides.
    """
    if not (math.isfinite(ratio) and ratio > 0):
        return known or EtaRatios(*FIRST_RATIOS)
    stride = max(RATIO_STRIDE, 1.0 / (1 + observed))
    p50, p90 = (known.p50, known.p90) if known is not None else FIRST_RATIOS
    return EtaRatios(p50=_moved(p50, ratio, 0.5, stride), p90=_moved(p90, ratio, 0.9, stride))


def _moved(quantile: float, ratio: float, share: float, stride: float) -> float:
    move = stride * share if ratio > quantile else -stride * (1 - share)
    return min(1e3, max(1e-3, quantile * math.exp(move)))
