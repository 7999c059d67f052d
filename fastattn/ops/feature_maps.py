"""Feature maps phi: what stands in for the softmax kernel exp(q.k) ~ phi(q).phi(k).

Each map says its name, its number of features, phi for queries and for keys, and the derivative,
in plain PyTorch: the reference backend computes with these and every kernel is tested against
them (``csrc/feature_maps.h`` is the same list in C++). ``linear_attention`` takes the name; the
maps are fused into the kernels, so phi(q) and phi(k) never exist in memory.

    name        phi(x)                                       source
    ----------  -------------------------------------------  ------------------------------------
    elu         x + 1 where x > 0, else exp(x)               Katharopoulos et al. 2020
    relu        max(x, 0)                                    Cai et al. 2022 (EfficientViT)
    identity    x; only with normalize=False                 Schlag et al. 2021
    exp         exp(x), kept finite                          Choromanski et al. 2021 (softmax+)
    softmax     softmax over the features of each token      Shen et al. 2018
    cosine      [1, x / |x|], so phi(q).phi(k) = 1 + cos     Su 2020 (kexue.fm/archives/7546)
    efficient   queries: softmax over features; keys:        Shen et al. 2018 (Efficient
                softmax over tokens; no denominator          Attention); not causal
    features    x, which the caller asserts is >= 0          learned or random maps run outside
"""

from __future__ import annotations

import difflib

import torch
from torch import Tensor

EXP_CLAMP = 40.0  # exp(40) ~ 2.4e17: a sum of a million such features is finite in float32
ZERO_NORM = 1e-12  # a vector this short has no direction


class FeatureMap:
    """One map phi: R^D -> R^F and its derivative.

    ``x`` is (..., tokens, D), the query already scaled; phi(x) is (..., tokens, F). The
    ``*_backward`` methods give d(loss)/dx from ``grad`` = d(loss)/dphi(x). ``mask`` is a bool
    tensor that broadcasts to (..., tokens, 1), True where a key takes part; only a map whose keys
    see each other (``is_separable`` False) reads it, the others are masked by their caller.
    """

    name: str
    is_nonnegative = True  # else the denominator can vanish: normalize=True is an error
    is_separable = True  # phi(k_j) depends on k_j alone: without it no causal form and no state

    def num_features(self, head_dim: int) -> int:
        return head_dim

    def phi(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def phi_backward(self, x: Tensor, grad: Tensor) -> Tensor:
        raise NotImplementedError

    def query(self, x: Tensor, normalize: bool = True) -> Tensor:
        return self.phi(x)

    def query_backward(self, x: Tensor, grad: Tensor, normalize: bool = True) -> Tensor:
        return self.phi_backward(x, grad)

    def key(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.phi(x)

    def key_backward(self, x: Tensor, grad: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.phi_backward(x, grad)

    def __repr__(self) -> str:
        return f"feature_maps.get({self.name!r})"


class Elu(FeatureMap):
    """elu(x) + 1, never computed as expm1(x) + 1: that rounds to 0 in bfloat16 at x = -8."""

    name = "elu"

    def phi(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))

    def phi_backward(self, x: Tensor, grad: Tensor) -> Tensor:
        return grad * torch.exp(x.clamp(max=0))


class Relu(FeatureMap):
    """max(x, 0). A query or key with no positive feature attends to nothing: its row is 0."""

    name = "relu"

    def phi(self, x: Tensor) -> Tensor:
        return x.clamp(min=0)

    def phi_backward(self, x: Tensor, grad: Tensor) -> Tensor:
        return torch.where(x > 0, grad, 0)


class Identity(FeatureMap):
    """x itself: unnormalised linear attention."""

    name = "identity"
    is_nonnegative = False

    def phi(self, x: Tensor) -> Tensor:
        return x

    def phi_backward(self, x: Tensor, grad: Tensor) -> Tensor:
        return grad


class Features(Identity):
    """x itself, which the caller asserts is non-negative: the output of a map run outside."""

    name = "features"
    is_nonnegative = True


class Exp(FeatureMap):
    """exp(x), kept finite.

    Keys: exp(min(x, 40)). Queries under normalize=True: exp(x - max_d x), because a factor common
    to a query's features cancels between numerator and denominator; the maximum is a constant to
    the derivative for the same reason. Queries under normalize=False: as keys.
    """

    name = "exp"

    def phi(self, x: Tensor) -> Tensor:
        return torch.exp(x.clamp(max=EXP_CLAMP))

    def phi_backward(self, x: Tensor, grad: Tensor) -> Tensor:
        return torch.where(x <= EXP_CLAMP, grad * self.phi(x), 0)

    def query(self, x: Tensor, normalize: bool = True) -> Tensor:
        return torch.exp(x - x.detach().amax(-1, keepdim=True)) if normalize else self.phi(x)

    def query_backward(self, x: Tensor, grad: Tensor, normalize: bool = True) -> Tensor:
        return grad * self.query(x) if normalize else self.phi_backward(x, grad)


class Softmax(FeatureMap):
    """softmax over the D features of each token, for queries and keys alike."""

    name = "softmax"

    def phi(self, x: Tensor) -> Tensor:
        return torch.softmax(x, -1)

    def phi_backward(self, x: Tensor, grad: Tensor) -> Tensor:
        return _softmax_backward(self.phi(x), grad, dim=-1)


class Cosine(FeatureMap):
    """[1, x / |x|]: phi(q).phi(k) = 1 + cos(q, k) >= 0. The zero vector gives [1, 0]."""

    name = "cosine"

    def num_features(self, head_dim: int) -> int:
        return head_dim + 1

    def phi(self, x: Tensor) -> Tensor:
        unit, _ = self._unit_and_length(x)
        return torch.cat([torch.ones_like(x[..., :1]), unit], -1)

    def phi_backward(self, x: Tensor, grad: Tensor) -> Tensor:
        unit, length = self._unit_and_length(x)
        grad_unit = grad[..., 1:]
        tangential = grad_unit - unit * (unit * grad_unit).sum(-1, keepdim=True)
        return torch.where(length <= ZERO_NORM, 0, tangential / length.clamp(min=ZERO_NORM))

    @staticmethod
    def _unit_and_length(x: Tensor) -> tuple[Tensor, Tensor]:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.where(length <= ZERO_NORM, 0, x / length.clamp(min=ZERO_NORM)), length


class Efficient(Softmax):
    """Queries: softmax over the features. Keys: softmax over the tokens that take part, for each
    feature. Rows then sum to one by themselves, so there is no denominator."""

    name = "efficient"
    is_separable = False

    def key(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if x.shape[-2] == 0:
            return x.clone()
        if mask is None:
            return torch.softmax(x, -2)
        weight = torch.softmax(x.masked_fill(~mask, float("-inf")), -2)
        return torch.where(mask, weight, 0)  # also turns the NaN of "every key masked" into 0

    def key_backward(self, x: Tensor, grad: Tensor, mask: Tensor | None = None) -> Tensor:
        return _softmax_backward(self.key(x, mask), grad, dim=-2)


def _softmax_backward(p: Tensor, grad: Tensor, dim: int) -> Tensor:
    return p * (grad - (p * grad).sum(dim, keepdim=True))


FEATURE_MAPS: dict[str, FeatureMap] = {
    feature_map.name: feature_map
    for feature_map in (
        Elu(),
        Relu(),
        Identity(),
        Exp(),
        Softmax(),
        Cosine(),
        Efficient(),
        Features(),
    )
}


def names() -> list[str]:
    """The names that ``feature_map=`` accepts."""
    return list(FEATURE_MAPS)


def get(name: str) -> FeatureMap:
    """The fused feature map of that name; ValueError (with the nearest name) if there is none."""
    try:
        return FEATURE_MAPS[name]
    except (KeyError, TypeError):
        raise unknown(name) from None


def name_of(feature_map: FeatureMap) -> str:
    """The name of a fused map; ValueError for what only looks like one."""
    if FEATURE_MAPS.get(feature_map.name) is not feature_map:
        raise ValueError(
            f"feature_map is a {type(feature_map).__name__}, which is none of the maps inside the "
            "kernels (fastattn.feature_maps.get(name)); a map of your own is a module or function "
            "that gives non-negative features"
        )
    return feature_map.name


def unknown(name: object) -> ValueError:
    """The error for what is no feature map, with the nearest name."""
    near = difflib.get_close_matches(str(name).lower(), FEATURE_MAPS, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return ValueError(
        f"feature_map must be one of {', '.join(map(repr, FEATURE_MAPS))}, or a module or function "
        f"that gives non-negative features; got {name!r}{hint}"
    )
