"""Dynamic convolutions against a float64 reference: both forms, all shapes, image by image."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from tests.dynamic_models import draw_masks
from tests.schedules import references
from tests.schedules.building import TARGETS, check_written, pack_view, relative_error, run_all
from tests.schedules.kernel_contract import (
    RELU,
    TOLERANCE,
    ConvCase,
    FloatArray,
    Problem,
    make_problem,
    site_of,
    y_before,
)
from topiarist.schedules.cpu import mix
from topiarist.schedules.cpu.dynamic import DynamicConfig
from topiarist.schedules.cpu.dynamic_kernel import DynamicDirect
from topiarist.schedules.cpu.kernels import BlockSparse, DirectSparse
from topiarist.schedules.kernel import ConvSite
from topiarist.schedules.kernels import CPU_KERNELS, DYNAMIC_KERNELS, kernels_for
from topiarist.schedules.workload import Mixture, signature
from topiarist.targets import registry
from topiarist.targets.spec import TargetSpec

EXPERTS = 4
KERNEL = DynamicDirect()
ONE = {"kernel": (1, 1), "padding": (0, 0, 0, 0)}


@dataclass(frozen=True)
class Case:
    """A layer, positions in the union of its masks, and experts that have each of them."""

    conv: ConvCase
    union: int = 3
    holders: int = 2


CASES = {
    "plain": Case(ConvCase(channels=8)),
    "batch": Case(ConvCase(channels=8, batch=3, residual="operand", activation=RELU)),
    "all_positions": Case(ConvCase(channels=8, batch=2), union=9, holders=4),
    "empty": Case(ConvCase(channels=8, batch=2, residual="operand"), union=0),
    "one_expert": Case(ConvCase(channels=8, batch=2), union=2, holders=1),
    "stride_2": Case(ConvCase(channels=8, strides=(2, 2), plane=(14, 14), batch=2)),
    "on_or_off": Case(ConvCase(channels=8, batch=2, **ONE), union=1),  # type: ignore[arg-type]
    "off": Case(ConvCase(channels=8, batch=2, **ONE), union=0),  # type: ignore[arg-type]
    "in_place": Case(ConvCase(channels=8, batch=2, residual="in_place", part=True)),
    "threads": Case(ConvCase(channels=8, batch=2, threads=2, outputs=32, activation=RELU)),
    "primes": Case(ConvCase(channels=7, outputs=5, plane=(11, 6), batch=2), union=5),
    "blocks_of_inputs": Case(ConvCase(channels=72, outputs=16, plane=(7, 7), batch=2)),
    "kernel_5x5": Case(ConvCase(channels=4, kernel=(5, 5), padding=(2, 2, 2, 2)), union=7),
}


@dataclass(frozen=True)
class Dynamic:
    """A problem with its experts [P, O, I, kh, kw] and shares [N, P, O]."""

    problem: Problem
    experts: FloatArray
    shares: FloatArray

    def wanted(self) -> Any:
        """In float64, each image with its own kernel."""
        p, one = self.problem, replace(self.problem.workload, batch=1)
        images = [
            references.conv(
                one,
                p.x[n : n + 1],
                np.einsum("po,poiyx->oiyx", share.astype(np.float64), self.experts),
                p.bias,
                None if p.residual is None else p.residual[n : n + 1],
            )
            for n, share in enumerate(self.shares)
        ]
        return np.concatenate(images)


def dynamic(case: Case, lanes: int, density: float = 1.0) -> Dynamic:
    """The case with random experts, so many of whose weights are not zero."""
    rng = np.random.default_rng(3)
    problem = make_problem(case.conv, lanes)
    w = problem.workload
    masks = draw_masks(rng, w.kernel, case.union, case.holders, EXPERTS)
    shape = EXPERTS, w.out_channels, w.in_channels, *w.kernel
    experts = rng.standard_normal(shape, np.float32) * masks[:, None, None]
    experts *= rng.random(shape) < density
    shares = rng.random((w.batch, EXPERTS, w.out_channels), np.float32)
    weight = (experts != 0).any(axis=0).astype(np.float32)
    holders = tuple(tuple(np.flatnonzero(at).tolist()) for at in masks.reshape(EXPERTS, -1).T)
    workload = replace(
        w, sparsity=signature(weight, "unstructured"), mixture=Mixture(EXPERTS, holders)
    )
    return Dynamic(replace(problem, workload=workload, weight=weight), experts, shares)


def fitting(site: ConvSite) -> list[DynamicConfig]:
    """The configurations, most promising first."""
    assert KERNEL.refuses(site.workload, site.target) is None
    return [config for config in KERNEL.knobs(site) if KERNEL.fits(site, config)]


def arguments(d: Dynamic, constants: list[Any]) -> list[Any]:
    """x, constants, bias, residual, y."""
    p = d.problem
    args = [pack_view(p.views.x, p.x), *constants, p.bias]
    if p.views.residual is not None:
        args.append(pack_view(p.views.residual, p.residual))
    return [*args, y_before(p)]


def check(d: Dynamic, results: dict[str, FloatArray]) -> None:
    wanted = d.wanted()
    for name, y in results.items():
        got = check_written(d.problem.views.y, y_before(d.problem), y)
        assert relative_error(got, wanted) < TOLERANCE, name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_image_is_convolved_with_its_own_kernel(case: Case, target: TargetSpec) -> None:
    """In both forms and both orders; the outputs hold NaN before."""
    d = dynamic(case, target.lanes)
    site = site_of(d.problem, target, case.conv.threads)
    configs = fitting(site)
    forms = {(c.shared, c.tiles_outside): c for c in reversed(configs)}
    assert len(forms) == (3 if case.union else 2)
    several = {*forms.values(), configs[-1]}
    if case.conv.channels > 64:
        several |= {next(c for c in configs if c.in_block < 64 and c.shared == s) for s in (0, 1)}
    named = {str(config): config for config in several}
    names = {text: f"config_{i}" for i, text in enumerate(named)}
    calls = {
        names[text]: arguments(d, [KERNEL.pack(site, config, d.experts)[0], d.shares.ravel()])
        for text, config in named.items()
    }
    functions = {names[t]: KERNEL.prim_func(site, c, names[t]) for t, c in named.items()}
    check(d, run_all(functions, target, calls))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", [DirectSparse(), BlockSparse()], ids=lambda k: k.name)
@pytest.mark.parametrize("threads", [1, 2])
def test_scattered_experts_are_mixed_for_the_sparse_kernels(
    kernel: Any, target: TargetSpec, threads: int
) -> None:
    """The mixed values are those of the nonzeros, visit by visit."""
    conv = ConvCase(channels=21, batch=3, threads=threads, residual="operand", activation=RELU)
    d = dynamic(Case(conv, union=4), target.lanes, density=0.2)
    w = d.problem.workload
    assert w.scattered and KERNEL.refuses(w, target) == "zeros are scattered over the experts"
    assert kernel.refuses(w, target) is None
    site = site_of(d.problem, target, threads)
    config = next(c for c in kernel.knobs(site) if kernel.fits(site, c))
    values, offsets, starts, order = kernel.pack(site, config, d.problem.weight)
    experts = mix.pack_experts(site, config, d.experts, d.problem.weight)
    shape = mix.MixShape.of(site, config, EXPERTS)
    mixing = mix.mix_prim_func("mix", shape, target.lanes, threads)
    before = np.full_like(values, np.nan)
    mixed = run_all(
        {"mix": mixing}, target, {"mix": [d.shares.ravel(), experts, starts, order, before]}
    )
    args = arguments(d, [mixed["mix"], offsets, starts, order])
    check(d, run_all({"conv": kernel.prim_func(site, config, "conv")}, target, {"conv": args}))


def test_a_weight_stands_for_experts_that_mix_to_it() -> None:
    """So that the kernel can be timed and checked without a network that computes shares."""
    target = registry.get("x86-avx2")
    d = dynamic(CASES["batch"], target.lanes)
    site = site_of(d.problem, target)
    config = fitting(site)[0]
    packed, shares = KERNEL.pack(site, config, d.problem.weight)
    assert shares.shape == (3 * EXPERTS * 8,) and np.all(shares == 1 / EXPERTS)
    assert packed.sum() / EXPERTS == pytest.approx(d.problem.weight.sum(), rel=1e-6)


def test_kernels_of_constants_and_of_mixtures_refuse_each_others_layers() -> None:
    target = registry.get("x86-avx512")
    mixture = dynamic(CASES["plain"], target.lanes).problem.workload
    constant = replace(mixture, mixture=None)
    for kernel in CPU_KERNELS:
        assert kernel.refuses(mixture, target), kernel.name
    for kernel in DYNAMIC_KERNELS:
        assert kernel.refuses(constant, target) == "its weights are constants"
        assert kernel in kernels_for(target)
    assert "mixture" not in constant.to_json()
    assert mixture.to_json()["mixture"]["experts"] == EXPERTS
