"""What every branch tells optimizers of its parameters: which decay, which stay fp32, which learn at another pace."""

from __future__ import annotations

import pytest
import torch

from lmtrain.model.branch import Branch, Place, branch_class
from tests.model.row_checks import BRANCHES, D_MODEL

every_branch = pytest.mark.parametrize("name", BRANCHES)
EXACT = {"A_log", "dt_bias", "D", "Lambda", "time_decay", "time_first", "bonus", "bound", "logit", "log_dt"}
EXACT |= {"log_A_real", "A_imag", "C", "state", "recurrent_bias", "input_bias"}
"""Last names of what decays, rates, sinks and initial states are made of: fp32 in every branch."""
NOT_DECAYED = {"rwkv6": {"mix_in", "mix_out", "decay_in", "decay_out"}, "rwkv7": {"inner", "outer"}}
"""Matrices that do not decay, by kind: RWKV's low-rank factors. Neither does any router."""
DECAYED = {"s4d": {"C"}}
"""What decays and is no matrix."""
PACE = {
    "s4d": {"log_dt": 0.1, "log_A_real": 0.1, "A_imag": 0.1},
    "rwkv4": {"time_decay": 2.0, "time_first": 3.0},
    "rwkv6": {"time_decay": 2.0},
    "rwkv7": {"decay.weight": 2.0},
}
"""Factors of the learning rate, by kind."""


def built(name: str) -> Branch:
    with torch.device("meta"):
        return branch_class(BRANCHES[name].kind)(BRANCHES[name], D_MODEL, Place(1, 4, 1, 2))


@every_branch
def test_only_matrices_decay(name: str) -> None:
    """Not biases, norms, convolutions, embeddings of heads, nor what makes a decay; whatever their number of dims."""
    branch, kind = built(name), BRANCHES[name].kind
    for key, info in branch.param_info().items():
        last = key.rpartition(".")[2]
        matrix = info.role == "matrix" and last not in NOT_DECAYED.get(kind, ()) and key != "router.weight"
        assert info.decay == (matrix or last in DECAYED.get(kind, ())), key
        assert info.role != "matrix" or branch.get_parameter(key).dim() >= 2, key


@every_branch
def test_what_makes_a_decay_stays_fp32(name: str) -> None:
    """Together with all of the modules that the engine keeps in fp32, and nothing else."""
    branch = built(name)
    kept = {
        f"{path}.{key}"
        for path, module in branch.named_modules()
        if getattr(module, "keeps_fp32", False)
        for key, _ in module.named_parameters()
    }
    info = branch.param_info()
    assert {key for key, one in info.items() if one.fp32} == kept
    assert {key for key in info if key.rpartition(".")[2] in EXACT} <= kept


@every_branch
def test_what_learns_at_another_pace(name: str) -> None:
    told = {key: one.lr_scale for key, one in built(name).param_info().items() if one.lr_scale != 1}
    wanted = PACE.get(BRANCHES[name].kind, {})
    assert {next(end for end in wanted if key.endswith(end)): scale for key, scale in told.items()} == wanted
