"""What tests of every part share: comparison with a float64 reference, and outputs that show when nobody wrote them."""

from __future__ import annotations

import torch

__all__ = ["assert_close_to_fp64", "poison_", "poisoned", "random_sparse"]


def assert_close_to_fp64(
    actual: torch.Tensor, reference: torch.Tensor, bound: float = 1e-5, name: str = "output"
) -> None:
    """Fails unless ``actual`` lies within ``bound`` × the largest magnitude of ``reference`` everywhere.

    Example:
        >>> assert_close_to_fp64(torch.ones(3), torch.ones(3, dtype=torch.float64))

    Args:
        actual: what the code under test returned, of any dtype.
        reference: the same computed in float64 (float32 inputs widened first), of the same shape. Its infinities and
            NaNs must be met exactly.
        bound: allowed error as a fraction of the reference's scale. 1e-5 is the project's bound for float32.
        name: what to call it in the message.
    """
    assert reference.dtype == torch.float64, f"the reference is {reference.dtype}; compute it in float64"
    assert actual.shape == reference.shape, f"{name} has shape {tuple(actual.shape)}, not {tuple(reference.shape)}"
    actual = actual.detach().to("cpu", torch.float64)
    reference = reference.detach().cpu()
    if reference.numel() == 0:
        return
    finite = reference.isfinite()
    same_special = ((actual == reference) | (actual.isnan() & reference.isnan()))[~finite]
    assert bool(same_special.all()), f"{name}: {int((~same_special).sum())} infinities or NaNs differ"
    error = (actual[finite] - reference[finite]).abs()
    if error.numel() == 0:
        return
    scale = float(reference[finite].abs().max())
    worst = float("inf") if bool(error.isnan().any()) else float(error.max())
    assert worst <= bound * scale, (
        f"{name}: largest error {worst:.3g}, which is {worst / scale if scale else float('inf'):.3g} of the scale "
        f"{scale:.3g}; the bound is {bound:.3g}; "
        f"{int((~(error <= bound * scale)).sum())} of {error.numel()} elements are outside"
    )


def poison_(tensor: torch.Tensor) -> torch.Tensor:
    """Fills a tensor, in place, with something no kernel computes: NaN, or 0x7f in every byte of an integer."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(int.from_bytes(b"\x7f" * tensor.element_size(), "little"))


def poisoned(*shape: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> torch.Tensor:
    """A new tensor filled by `poison_`: what an output is before a kernel writes it."""
    return poison_(torch.empty(*shape, dtype=dtype, device=device))


def random_sparse(
    *shape: int, sparsity: float = 0.9, dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:
    """A normal random tensor in which about ``sparsity`` of the elements are exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64)
    kept = torch.rand(*shape, generator=generator, dtype=torch.float64) >= sparsity
    return torch.where(kept, values, 0.0).to(dtype)
