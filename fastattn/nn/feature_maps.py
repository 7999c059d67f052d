"""Feature maps that are learned, random or know positions: modules run outside the kernels.

They turn queries or keys into non-negative features, which ``linear_attention`` takes as they are
(``feature_map="features"``). Where a map ends in a fused one, it need not run to its end: the
kernels do the rest, see ``for_kernel``. The fused maps, which have nothing to learn, are in
``fastattn.feature_maps``.

    name        features                                        source
    ----------  ----------------------------------------------  ----------------------------------
    hedgehog    softmax over [Wx, -Wx]                          Zhang et al. 2024, arXiv 2402.04347
    t2r         relu(Wx + b)                                    Kasai et al. 2021, arXiv 2103.13076
    performer   exp(wx - |x|^2 / 2), w random and orthogonal    Choromanski et al. 2021, 2009.14794
    cosformer   relu(x) times cos and sin of the position       Qin et al. 2022, arXiv 2202.08791
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastattn.ops import feature_maps as fused_maps
from fastattn.ops.check import MAX_DIM  # what the kernels take


class ProjectedMap(nn.Module):
    """A projection of each head's vectors, and then the fused map of the name ``fused``."""

    fused: str

    def project(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Back to the start, which is the same in every new map."""
        raise NotImplementedError

    def forward(self, x: Tensor, complete: bool = True) -> Tensor:
        """``complete=False`` leaves the fused map at the end to the kernels."""
        projected = self.project(x)
        return fused_maps.get(self.fused).phi(projected) if complete else projected


def for_kernel(phi: nn.Module, x: Tensor) -> tuple[Tensor, str]:
    """What ``linear_attention`` is to be given for ``phi(x)``, and as which ``feature_map``."""
    # A call of the module, so that hooks run: accelerate's bring offloaded weights.
    features: Tensor = phi(x, complete=False) if isinstance(phi, ProjectedMap) else phi(x)
    return features, fused_part(phi)


def fused_part(phi: nn.Module) -> str:
    """Name of the fused map that ``phi`` ends in, or "features"."""
    return phi.fused if isinstance(phi, ProjectedMap) else "features"


class Hedgehog(ProjectedMap):
    """softmax over [Wx, -Wx] with one W (D, F/2) per head.

    W starts as the identity beside random directions. Twice the features of the paper are the
    default: measured on SST-2, the predictions' divergence from softmax attention fell by 15-20 %.

    Args:
        num_heads, head_dim: H and D of the input (B, H, N, D).
        features: F, even; default 4 D, at most 256.

    Shape:
        (B, H, N, D) to (B, H, N, F), in the dtype of the input.
    """

    fused = "softmax"

    def __init__(self, num_heads: int, head_dim: int, features: int | None = None) -> None:
        super().__init__()
        features = _check_features(features, min(4 * head_dim, MAX_DIM))
        if features % 2:
            raise ValueError(f"features must be even, half of them for Wx and -Wx; got {features}")
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, features // 2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        _, head_dim, columns = self.weight.shape
        random = _randn(head_dim, columns) / head_dim**0.5
        random[:, :head_dim] = torch.eye(head_dim, device="cpu")[:, :columns]
        self.weight.copy_(random)

    def project(self, x: Tensor) -> Tensor:
        # Columns of the small weight rather than of the result: a copy less of the latter.
        weight = self.weight.to(x.dtype)
        return _per_head(x, torch.cat([weight, -weight], -1))


class T2R(ProjectedMap):
    """relu(Wx + b), one W (D, F) and b (F) per head.

    Args and shape as ``Hedgehog``; default 2 D features.
    """

    fused = "relu"

    def __init__(self, num_heads: int, head_dim: int, features: int | None = None) -> None:
        super().__init__()
        columns = _check_features(features, min(2 * head_dim, MAX_DIM))
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, columns))
        self.bias = nn.Parameter(torch.empty(num_heads, 1, columns))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.copy_(_randn(*self.weight.shape) / self.weight.shape[1] ** 0.5)
        self.bias.zero_()

    def project(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype)
        return _per_head(x, self.weight.to(x.dtype), bias)


class Performer(nn.Module):
    """FAVOR+: positive orthogonal random features, an unbiased estimate of exp(q.k / sqrt(D)).

    phi(x) = (exp(w_r.x' - |x'|^2 / 2) + 1e-4)_r / sqrt(F) with x' = x / D^(1/4); the w_r are
    Gaussian, orthogonal within blocks of D. Computed in float32.

    Args:
        num_heads, head_dim: H and D of the input (B, H, N, D); all heads share the directions.
        features: F; default 4 D, at most 256.
        is_query: divide each token's features by their largest, which cancels in the quotient.
            Keys can't be treated so; their exponents are cut off where sums could overflow.
        seed: of the directions. Queries and keys need the same ones.

    Shape:
        (B, H, N, D) to (B, H, N, F), in the dtype of the input.
    """

    directions: Tensor

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        features: int | None = None,
        *,
        is_query: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        features = _check_features(features, min(4 * head_dim, MAX_DIM))
        self.is_query, self.seed = is_query, seed
        self.register_buffer("directions", torch.empty(features, head_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        features, head_dim = self.directions.shape
        self.directions.copy_(orthogonal_directions(features, head_dim, self.seed))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            scaled = x.float() * x.shape[-1] ** -0.25
            exponent = torch.matmul(scaled, self.directions.float().T)
            if self.is_query:  # |x'|^2 / 2 is common to the token's features as well
                features = torch.exp(exponent - exponent.detach().amax(-1, keepdim=True))
            else:
                exponent = exponent - scaled.square().sum(-1, keepdim=True) / 2
                largest = 40.0 if x.dtype != torch.float16 else 10.0  # exp(11.1) is its largest
                features = torch.exp(exponent.clamp(max=largest))
            normal: float = self.directions.shape[0] ** -0.5
            return ((features + 1e-4) * normal).to(x.dtype)


class Cosformer(nn.Module):
    """[relu(x) cos(pi i / 2M), relu(x) sin(pi i / 2M)] of token i: attention falls with distance.

    phi(q_i).phi(k_j) = relu(q_i).relu(k_j) cos(pi (i - j) / 2M). M is fixed, so that padding and
    batching change nothing; it is the longest input.

    Args:
        num_heads, head_dim: as ``Hedgehog``; D at most 128, because there are 2 D features.
        max_length: M.

    Shape:
        (B, H, N, D) to (B, H, N, 2 D), N at most ``max_length``.
    """

    def __init__(self, num_heads: int, head_dim: int, *, max_length: int) -> None:
        super().__init__()
        _check_features(2 * head_dim, 2 * head_dim)
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1; got {max_length}")
        self.max_length = max_length

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[-2]
        if tokens > self.max_length:
            raise ValueError(
                f"input has {tokens} tokens, more than max_length={self.max_length} of this map"
            )
        position = torch.arange(tokens, device=x.device, dtype=torch.float32)
        angle = (position * (math.pi / 2 / self.max_length)).unsqueeze(-1)
        positive = torch.relu(x)
        return torch.cat([positive * angle.cos(), positive * angle.sin()], -1).to(x.dtype)


LEARNED = ("hedgehog", "t2r", "performer")  # what a trained model can be given
NAMES = (*LEARNED, "cosformer")


def make_pair(
    name: str, num_heads: int, num_kv_heads: int, head_dim: int, max_length: int | None = None
) -> tuple[nn.Module, nn.Module]:
    """The map of the queries and that of the keys; ``max_length`` is for "cosformer"."""
    if name == "hedgehog":
        return Hedgehog(num_heads, head_dim), Hedgehog(num_kv_heads, head_dim)
    if name == "t2r":
        return T2R(num_heads, head_dim), T2R(num_kv_heads, head_dim)
    if name == "performer":
        query_map = Performer(num_heads, head_dim, is_query=True)
        return query_map, Performer(num_kv_heads, head_dim)
    if name == "cosformer":
        if max_length is None:
            raise ValueError("feature_map='cosformer' needs max_length, the longest input")
        both = Cosformer(num_heads, head_dim, max_length=max_length)
        return both, both
    raise ValueError(f"feature_map must be one of {', '.join(map(repr, NAMES))}; got {name!r}")


def orthogonal_directions(features: int, head_dim: int, seed: int = 0) -> Tensor:
    """(F, D) Gaussian vectors, orthogonal within blocks of D, float32 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(-(-features // head_dim)):
        gaussian = torch.randn(head_dim, head_dim, generator=generator, device="cpu")
        orthogonal, triangular = torch.linalg.qr(gaussian.double())
        # The signs make the distribution uniform over rotations (Mezzadri 2007).
        blocks.append(orthogonal * triangular.diagonal().sign())
    lengths = torch.randn(features, head_dim, generator=generator, device="cpu").norm(dim=-1)
    directions: Tensor = torch.cat(blocks)[:features] * lengths.unsqueeze(-1)
    return directions.float()


def _per_head(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, H, N, D) times (H, D, F), plus (H, 1, F), as one product for each head: short sequences
    and the sums of the weight's gradient over the batch would otherwise be many small ones."""
    batch, heads, tokens, size = x.shape
    rows = x.transpose(0, 1).reshape(heads, batch * tokens, size)
    product = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias, rows, weight)
    return product.view(heads, batch, tokens, weight.shape[-1]).transpose(0, 1)


def _check_features(features: int | None, default: int) -> int:
    features = default if features is None else features
    if not 1 <= features <= MAX_DIM:
        raise ValueError(f"features must be between 1 and {MAX_DIM}; got {features}")
    return features


def _randn(*shape: int) -> Tensor:
    """The same numbers on every machine, also where the default device is "meta"."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, device="cpu")
