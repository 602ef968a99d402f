"""Networks for the tests of structured pruning."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_engine.train._torchvision import import_torchvision


@pytest.fixture(scope="session")
def torchvision_models() -> ModuleType:
    """torchvision's definitions, also beside a PyTorch build that its compiled operators do not fit."""
    return import_torchvision().models


def conv_bn(inputs: int, outputs: int, kernel: int = 3, **options: object) -> nn.Sequential:
    options = {"padding": kernel // 2, "bias": False, **options}
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, **options), nn.BatchNorm2d(outputs), nn.ReLU())


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 3, 1), nn.Conv2d(3, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))))


class Shuffle(nn.Module):
    """A ShuffleNet unit: half passes through, half is computed, the channels are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            conv_bn(half, half, 1), nn.Conv2d(half, half, 3, 1, 1, groups=half), conv_bn(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        x = torch.cat([first, self.branch(second)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Attention(nn.Module):
    """Self-attention with a fused qkv projection, written as most code bases write it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q * self.head_dim**-0.5) @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, length, -1))


class GroupedQueryAttention(nn.Module):
    """Several query heads share a key head; separate projections."""

    def __init__(self, width: int, heads: int, key_heads: int) -> None:
        super().__init__()
        self.heads, self.key_heads, self.head_dim = heads, key_heads, width // heads
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, key_heads * self.head_dim, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k, v = (p(x).view(batch, length, self.key_heads, self.head_dim).transpose(1, 2) for p in (self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True)
        return self.out(out.transpose(1, 2).reshape(batch, length, -1))


class EveryOperator(nn.Module):
    """Two inputs, three outputs, and every family of operators that the analysis has a rule for; `OtherOperators` has
    the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12)
        self.residual = nn.Sequential(conv_bn(12, 7), nn.Conv2d(7, 12, 3, 1, 1))  # an odd count
        self.grouped = nn.Sequential(conv_bn(12, 12, 3, groups=3), conv_bn(12, 10, 1))
        self.depthwise = nn.Sequential(conv_bn(10, 10, 3, groups=10), nn.Conv2d(10, 8, 1, bias=False))
        self.transposed = nn.ConvTranspose2d(8, 6, 2, 2)
        self.gate = Gate(6)
        self.group_norm, self.prelu = nn.GroupNorm(3, 6), nn.PReLU(6)
        self.twin = nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")  # called twice: shared weights
        self.shuffle = Shuffle(12)
        self.dilated = nn.Conv2d(12, 9, 3, padding=2, dilation=2)
        self.instance_norm = nn.InstanceNorm2d(9, affine=True)
        self.glu = nn.Conv2d(9, 10, 1)
        self.pixels = nn.Conv2d(5, 8, 1)
        self.head = nn.Linear(2 * 16, 5)
        self.embedding = nn.Embedding(11, 12)
        self.position = nn.Parameter(torch.randn(1, 6, 12))
        self.attention, self.gqa = Attention(12, 3), GroupedQueryAttention(12, 6, 3)
        self.torch_attention = nn.MultiheadAttention(12, 4, batch_first=True)
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(12, 9), nn.GELU(), nn.Linear(9, 12))
        self.conv1d = nn.Conv1d(12, 7, 3, padding=1)
        self.tokens = nn.Linear(7, 4)

    def forward(self, image: Tensor, words: Tensor) -> dict[str, Tensor]:
        x = self.stem(image)
        x = F.relu(x + self.residual(x))
        y = self.depthwise(self.grouped(x))
        y = self.gate(self.transposed(F.max_pool2d(y, 2)))
        y = self.prelu(self.group_norm(y))
        y = self.twin(F.hardswish(self.twin(y)))
        z = self.instance_norm(self.dilated(self.shuffle(x)))
        z = F.pixel_shuffle(self.pixels(F.glu(self.glu(z), 1)), 2)
        z = F.interpolate(z, size=y.shape[-2:], mode="bilinear")
        both = torch.cat([y[:, :, :8, :8], F.pad(z, (0, 0, 0, 0, 1, 1))[:, :, :8, :8]], 1)
        a, b, c = both.split([3, 4, 3], 1)
        pooled = torch.stack([a.amax((2, 3)), c.mean((2, 3))], -1).flatten(1)
        flat = torch.cat([F.adaptive_avg_pool2d(b, 2).flatten(1), pooled, F.adaptive_avg_pool2d(a, 1).flatten(1)], 1)
        logits = self.head(F.pad(flat, (0, 32 - flat.shape[1])))

        t = self.embedding(words) + self.position
        t = t + self.attention(self.norms[0](t))
        t = t + self.gqa(self.norms[1](t))
        t = t + self.torch_attention(t, t, t, need_weights=False)[0]
        t = t + self.mlp(self.norms[2](t))
        sequence = self.tokens(F.leaky_relu(self.conv1d(t.transpose(1, 2))).permute(0, 2, 1))
        return {"logits": logits, "sequence": sequence, "features": y.mean(1)}


class OtherOperators(nn.Module):
    """What `EveryOperator` leaves out: the rarer operators, and the rarer ways of writing the common ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.shuffle = nn.Sequential(
            nn.Conv2d(12, 12, 1, groups=3), nn.ChannelShuffle(3), nn.Conv2d(12, 6, 1, groups=3)
        )
        self.grouped_up = nn.ConvTranspose2d(6, 8, 2, 2, groups=2)
        self.folded, self.patches = nn.Conv2d(32, 5, 1), nn.Linear(12 * 9, 7)
        self.volume = nn.Sequential(nn.Conv3d(2, 6, 3, padding=1), nn.ReLU(), nn.ConvTranspose3d(6, 4, 2, 2))
        self.sequence = nn.Sequential(nn.Conv1d(7, 8, 3), nn.Tanh(), nn.ConvTranspose1d(8, 6, 3))
        self.left, self.right = nn.Linear(6, 10), nn.Linear(6, 10, bias=False)
        self.rms, self.words = nn.RMSNorm(6), nn.Embedding(9, 10, padding_idx=0)
        self.matrix, self.shift = nn.Parameter(torch.randn(10, 8)), nn.Parameter(torch.randn(8))
        self.mixed, self.head = nn.Linear(8, 9), nn.Linear(18, 4)
        self.grid = nn.Buffer(torch.rand(1, 4, 4, 2) * 2 - 1)
        self.order = nn.Buffer(torch.tensor([2, 0, 1, 3]))

    def image(self, x: Tensor) -> list[Tensor]:
        x = F.elu(self.stem(F.pad(x, (1, 1, 1, 1), mode="replicate"))[:, :, 1:-1, 1:-1])
        y = self.grouped_up(F.gelu(self.shuffle(x)))
        y = self.folded(F.pixel_unshuffle(F.avg_pool2d(y, 2), 2))
        y = F.grid_sample(y, self.grid.expand(len(y), -1, -1, -1), align_corners=False)
        y = torch.roll(y, 1, -1).flip(2) * y.softmax(-1) + torch.zeros_like(y)
        x = self.patches(F.unfold(F.lp_pool2d(x, 2, 2), 3).transpose(1, 2))  # (N, L, 7)
        x = self.sequence(F.softplus(x.mT))  # (N, 6, L)
        return [x.movedim(1, 2), y.std((2, 3)), torch.var_mean(y, (2, 3))[1], y.flatten(2).logsumexp(-1)]

    def mix(self, x: Tensor, words: Tensor) -> Tensor:
        x = self.rms(x)
        a, b = torch.tanh(self.left(x)), self.right(x).sigmoid()  # (N, L, 10)
        alike = torch.einsum("nlc,nmc->nlm", a, b).softmax(-1)
        a = torch.baddbmm(a, alike, b)
        a = torch.bmm(alike.tril(), a) + self.words(words).repeat(1, 2, 1) + self.words(words).repeat_interleave(2, 1)
        heads = a.view(len(a), -1, 2, 5).swapaxes(1, 2)
        mask = torch.ones(4, 4, dtype=torch.bool).tril()
        heads = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
        a = heads.transpose(1, 2).reshape(a.shape)
        a = a.index_select(1, self.order)[:, self.order]
        first, second, third = a.split_with_sizes([1, 2, 1], 1)
        fourth, fifth = second.tensor_split(2, 1)
        a = torch.concat([first, third, fourth, fifth], 1).sort(1)[0].cumsum(1)
        flat = torch.mm(a.reshape(-1, 10), self.matrix)
        flat = torch.addmm(self.shift, flat.T.t(), torch.eye(8, dtype=flat.dtype))
        out = self.mixed(F.silu(flat)).view(len(a), -1, 9)
        pair = torch.stack([out.narrow(1, 0, 2), out.narrow(1, 2, 2)]).unbind(0)
        both = torch.cat([pair[0].select(1, 0), torch.maximum(pair[1].amax(1), pair[0].amin(1))], 1)
        return self.head(both)

    def forward(self, image: Tensor, volume: Tensor, words: Tensor) -> tuple[Tensor, ...]:
        tokens, *rest = self.image(image)
        return (self.mix(tokens, words), self.volume(volume).mean((2, 3, 4)), *rest)


def randomise_(model: nn.Module) -> nn.Module:
    """Norms that do something, no zeros anywhere."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.3, 1.0).mul_(torch.randint(0, 2, parameter.shape) * 2 - 1)
        elif not parameter.any():
            parameter.data.normal_(0, 0.05)
    return model.eval()


def zero_rows_(model: nn.Module, share: float, seed: int = 0) -> nn.Module:
    """Zero random rows of random layers, with their biases or without, and sometimes columns, as pruners leave them."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> float:
        return float(torch.rand((), generator=generator))

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm):
            if module.weight is None or draw() < 0.3:
                continue
            weight = module.weight.data
            if isinstance(module, nn.modules.conv._ConvTransposeNd):
                weight = weight.transpose(0, 1)
            rows = torch.rand(weight.shape[0], generator=generator) < share
            weight[rows] = 0
            if module.bias is not None and draw() < 0.5:
                module.bias.data[rows] = 0
            if weight.ndim > 1 and draw() < 0.3:
                weight[:, torch.rand(weight.shape[1], generator=generator) < share] = 0
    return model


@pytest.fixture
def every_operator() -> nn.Module:
    return randomise_(EveryOperator())
