"""XGBoost's regressions: trained, asked, and turned to plain JSON and back.

XGBoost trusts what it loads: a child or a feature that isn't there would end the process. So trees
are looked through before it gets them. One thread: small models gain nothing from more, and lose
much where something else is running.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Rows = NDArray[np.float32]  # [rows, features], NaN where there is no such number
Booster = Any

OBJECTIVES = ("reg:squarederror", "reg:quantileerror")
_ONE_THREAD = {"nthread": 1}
_PER_NODE = (
    *("base_weights", "default_left", "left_children", "loss_changes", "parents"),
    *("right_children", "split_conditions", "split_indices", "split_type", "sum_hessian"),
)
_CATEGORIES = ("categories", "categories_nodes", "categories_segments", "categories_sizes")
_NO_PARENT = float(2**31 - 1)  # of the root


def fit(
    settings: Mapping[str, Any],
    rows: Rows,
    labels: Floats,
    rounds: int,
    after: Booster | None = None,
) -> Booster:
    """A regression of the labels, from their mean on, or from where an earlier one ended."""
    import xgboost

    data = xgboost.DMatrix(rows, label=labels, nthread=1)
    start = {"base_score": float(np.mean(labels))} if after is None else {}
    parameters = {**settings, **start, **_ONE_THREAD}
    found = xgboost.train(parameters, data, num_boost_round=rounds, xgb_model=after)
    return from_json(_slim(to_json(found)), rows.shape[1])


def _slim(document: Any) -> Any:
    """Without what only training needs, and leaves with as many digits as mean something."""
    for tree in document["learner"]["gradient_booster"]["model"]["trees"]:
        leaves = [child == -1 for child in tree["left_children"]]
        tree["split_conditions"] = [
            float(f"{value:.5g}") if leaf else value
            for value, leaf in zip(tree["split_conditions"], leaves, strict=True)
        ]
        for name in ("base_weights", "loss_changes"):
            tree[name] = [0.0] * len(leaves)
    return document


def predict(booster: Booster, rows: Rows) -> Floats:
    """A number for each row."""
    import xgboost

    if not len(rows):
        return np.zeros(0)
    return np.asarray(booster.predict(xgboost.DMatrix(rows, nthread=1)), np.float64)


def contributions(booster: Booster, row: Rows) -> Floats:
    """What each feature of one row [1, features] adds to its prediction (SHAP)."""
    import xgboost

    found = booster.predict(xgboost.DMatrix(row, nthread=1), pred_contribs=True)
    return np.asarray(found[0][:-1], np.float64)


def to_json(booster: Booster) -> Any:
    """As XGBoost's own JSON."""
    return json.loads(bytes(booster.save_raw("json")))


def from_json(document: Any, features: int) -> Booster:
    """The inverse of `to_json`. Raises ValueError, KeyError or TypeError for anything else."""
    import xgboost

    _check(document["learner"], features)
    booster = xgboost.Booster(_ONE_THREAD)
    try:
        booster.load_model(bytearray(json.dumps(document, allow_nan=False).encode()))
        predict(booster, np.full((1, features), np.nan, np.float32))  # it looks at some of it late
    except xgboost.core.XGBoostError as error:
        raise ValueError(str(error).splitlines()[0]) from error
    return booster


def _check(learner: Any, features: int) -> None:
    """Raises ValueError unless it is a forest of ours over so many features."""
    numbers = learner["learner_model_param"]
    forest = learner["gradient_booster"]["model"]
    trees = forest["trees"]
    count = len(trees)
    expected = [
        (learner["objective"]["name"] in OBJECTIVES, "the objective"),
        (learner["gradient_booster"]["name"] == "gbtree", "the kind of model"),
        (int(numbers["num_feature"]) == features, "the number of features"),
        (int(numbers["num_class"]) == 0 and int(numbers["num_target"]) == 1, "the outputs"),
        (all(map(math.isfinite, json.loads(numbers["base_score"]))), "the base score"),
        (int(forest["gbtree_model_param"]["num_trees"]) == count, "the number of trees"),
        (int(forest["gbtree_model_param"]["num_parallel_tree"]) == 1, "the number of forests"),
        (forest["iteration_indptr"] == [*range(count + 1)], "the order of trees"),
        (forest["tree_info"] == [0] * count, "the trees' outputs"),
        (not forest.get("cats", {}).get("enc"), "the features' categories"),
        (all(_is_sound(tree, i, features) for i, tree in enumerate(trees)), "a tree"),
    ]
    for fits, what in expected:
        if not fits:
            raise ValueError(f"{what} makes no sense")


def _is_sound(tree: Any, at: int, features: int) -> bool:
    """Whether it is one tree, children after parents, and every split is of a feature there is."""
    sizes = tree["tree_param"]
    nodes = int(sizes["num_nodes"])
    arrays = {name: np.array(tree[name], np.float64) for name in _PER_NODE}
    if nodes < 1 or any(array.shape != (nodes,) for array in arrays.values()):
        return False
    if (int(sizes["num_deleted"]), int(sizes["size_leaf_vector"])) != (0, 1) or tree["id"] != at:
        return False
    left, right = arrays["left_children"], arrays["right_children"]
    own = np.arange(nodes)
    leaves = (left == -1) & (right == -1)
    inner = (own < left) & (left < nodes) & (own < right) & (right < nodes)
    parents = np.full(nodes, _NO_PARENT)
    for children in (left, right):
        parents[children[inner].astype(np.int64)] = own[inner]
    split = arrays["split_indices"]
    return bool(
        (leaves | inner).all()
        and (parents == arrays["parents"]).all()
        and 2 * inner.sum() + 1 == nodes
        and ((split >= 0) & (split < features)).all()
        and not arrays["split_type"].any()
        and not any(tree[name] for name in _CATEGORIES)
        and int(sizes["num_feature"]) == features
        and all(np.isfinite(array).all() for array in arrays.values())
    )
