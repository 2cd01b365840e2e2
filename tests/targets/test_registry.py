"""Targets by name."""

from __future__ import annotations

import json

import pytest

from topiarist.errors import TargetError
from topiarist.targets import registry
from topiarist.targets.spec import TargetSpec


def test_profiles_have_their_vector_shape() -> None:
    x86 = [n for n in registry.names() if n.startswith("x86-")]
    shapes = {n: (registry.get(n).lanes, registry.get(n).registers) for n in x86}
    assert shapes == {"x86-sse4": (4, 16), "x86-avx2": (8, 16), "x86-avx512": (16, 32)}


@pytest.mark.parametrize("name", registry.names()[1:])
def test_a_specification_survives_json(name: str) -> None:
    spec = registry.get(name)
    assert TargetSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_specifications_of_older_bundles_lack_what_came_later() -> None:
    values = registry.get("x86-avx2").to_json()
    for later in ("clusters", "lane_fma"):
        del values[later]
    assert TargetSpec.from_json(values) == registry.get("x86-avx2")


def test_a_profile_is_plain_json() -> None:
    spec = registry.get("x86-avx2")
    assert json.loads(json.dumps(spec.to_json()))["tvm_target"]["mcpu"] == "x86-64-v3"


def test_wider_sets_need_all_features_of_narrower_ones() -> None:
    sse4, avx2, avx512 = (
        set(registry.get(f"x86-{isa}").required_features) for isa in ("sse4", "avx2", "avx512")
    )
    assert sse4 < avx2 < avx512


@pytest.mark.parametrize("name", ["x86-avx51", "avx2"])
def test_unknown_name_gets_the_nearest(name: str) -> None:
    with pytest.raises(TargetError, match=r"did you mean .*x86-avx.*targets list"):
        registry.get(name)


def test_unknown_name_without_a_near_one() -> None:
    with pytest.raises(TargetError, match=r"no target 'zzz'; `topiarist targets list`"):
        registry.get("zzz")
