"""Mimetic initialisation of state-space mixers (arXiv 2410.11135): a layer that starts as linear attention.

Steps are 1 whatever the token, rates -1 / length: a state loses 1 / e over ``length`` tokens. Keys and queries are the
same projection, so that a token finds its like; the convolution hands on its own token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch
from torch import Generator, Tensor

from lmtrain.model.branch import Init, ParamInfo
from lmtrain.model.init import constant


def mimetic(
    info: dict[str, ParamInfo], length: int, *, steps: str, taps: Iterable[str], biases: Iterable[str]
) -> dict[str, ParamInfo]:
    """``info`` of a mixer with ``decay.{A_log,dt_bias}`` and ``{B,C}.weight`` of one shape, with these initial values.

    steps: the projection that steps depend on the token by. taps and biases: of the convolutions.
    """
    inits: dict[str, Init] = {
        "decay.A_log": constant(-math.log(length)),
        "decay.dt_bias": constant(math.log(math.expm1(1.0))),
        steps: constant(0.0),
        **dict.fromkeys(taps, own_token),
        **dict.fromkeys(biases, constant(0.0)),
    }
    alike = {"C.weight": dataclasses.replace(info["B.weight"], drawn_as="B.weight")}
    return info | alike | {name: dataclasses.replace(info[name], init=init) for name, init in inits.items()}


def own_token(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Taps ``[channels, width]`` of a convolution that does nothing."""
    taps = torch.zeros(shape)
    taps[:, -1] = 1
    return taps
