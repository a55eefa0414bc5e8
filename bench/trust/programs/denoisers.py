"""Denoisers drawn at random: a description that can be written as JSON, and the module that it describes.

Shapes: B batch, T tokens, D = 4 channels. A denoiser takes (x, t, y, context): a latent (B, D), (B, T, D) or
(B, 2, 4, 4), a timestep, perhaps labels (B,) and a second stream (B, 2, D). It returns a prediction of x's shape,
alone or in a container.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Description: TypeAlias = dict[str, Any]
"""A JSON object."""

WIDTH = 4
num_classes = 5

_FORMS = ("vector", "tokens", "tokens", "image", "patches", "unet")


def latent_shape(form: str) -> tuple[int, ...]:
    """Return the shape of one sample."""
    return {"vector": (WIDTH,), "tokens": (3, WIDTH)}.get(form, (2, 4, 4))


def draw_denoiser(rng: random.Random) -> Description:
    """Draw a description."""
    form = rng.choice(_FORMS)
    is_sequence = form in ("tokens", "patches")
    two_streams = is_sequence and rng.random() < 0.3
    blocks = [_draw_block(rng, form, two_streams) for _ in range(rng.choice((1, 2, 2, 3)))]
    order = list(range(len(blocks)))
    if rng.random() < 0.3:
        order.append(rng.choice(order))
    return {
        "seed": rng.randrange(1000),
        "form": form,
        "dtype": rng.choice(("float64",) * 8 + ("float32", "float32", "bfloat16")),
        "time": rng.choice(("linear", "frequencies", "table")),
        "label": rng.random() < 0.4,
        "two_streams": two_streams,
        "context": two_streams and rng.random() < 0.6,
        "position": rng.choice(("none", "add", "in place")),
        "blocks": blocks,
        "order": order,
        "skip": rng.choice(("none", "none", "cat", "add")) if len(order) > 1 else "none",
        "result": rng.choice(("tensor",) * 4 + ("tuple", "dict")),
    }


def _draw_block(rng: random.Random, form: str, two_streams: bool) -> Description:
    joint = two_streams and rng.random() < 0.6
    return {
        "joint": joint,
        "parts": [_draw_part(rng) for _ in range(2 if joint else rng.choice((1, 2, 2, 3)))],
        "norm": rng.choice(("none", "layer", "layer", "rms", "group")),
        "norm_position": rng.choice(("pre", "pre", "post")),
        "gate": rng.choice(("none", "modulated", "modulated", "time", "scale", "latent")),
        "split": rng.choice(("chunk", "split", "slice", "unbind", "unsqueeze")),
        "residual": rng.choice(
            ("add",) * 5 + ("flipped", "alpha", "addcmul", "in place", "replace", "subtract", "lerp")
        ),
        "into_the_input": rng.random() < 0.02,
        "twice": not joint and rng.random() < 0.1,
    }


def _draw_part(rng: random.Random, depth: int = 0) -> Description:
    work = rng.choice((*_WORKS, "linear", "mlp", "attention", *(("nested",) if depth == 0 else ())))
    return {
        "work": work,
        "inner": [_draw_part(rng, 1) for _ in range(2)] if work == "nested" else [],
        "dropout": rng.random() < 0.15,
        "buffer": rng.choice(("none",) * 6 + ("persistent", "not persistent")),
        "cast": rng.choice(("none",) * 8 + ("float32",)),
        "in_place": rng.choice(("none",) * 6 + ("mul", "add", "index", "relu")),
        "in_place_on": rng.choice(("a copy",) * 19 + ("the result",)),
        "returns": rng.choice(("tensor",) * 8 + ("pair", "pair of views", "pair with the input", "dict", "view")),
    }


def build_denoiser(description: Description) -> Denoiser:
    """Return the module, its weights drawn from the description's seed, in eval mode."""
    denoiser = Denoiser(description).to(getattr(torch, description["dtype"]))
    generator = torch.Generator().manual_seed(description["seed"])
    with torch.no_grad():
        for parameter in denoiser.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values * 0.5)
    return denoiser.eval()


def _spread(c_BD: Tensor, x: Tensor) -> Tensor:
    """Return a vector for each sample so that it broadcasts over ``x``."""
    if x.ndim == 4:
        return c_BD[:, :, None, None]
    return c_BD[:, None] if x.ndim == 3 else c_BD


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x


def _channels_back(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2) if x.ndim == 4 else x


class Linear(nn.Module):
    """A linear layer over the channels; of an image it returns a permuted view."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return _channels_back(self.linear(_channels_last(x)))


class Mlp(nn.Module):
    """Two linear layers and an activation, which may write in place."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 6), nn.SiLU(inplace=in_place), nn.Linear(6, WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return _channels_back(self.layers(_channels_last(x)))


class Attention(nn.Module):
    """Two heads over the tokens of a sequence or the pixels of an image; a vector is one token."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        last = _channels_last(x)
        tokens = last.reshape(x.shape[0], -1, WIDTH)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return _channels_back(self.out(mixed).reshape(last.shape))


class Softmax(nn.Module):
    """Attention written out, with one head and chunks of the projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        last = _channels_last(x)
        q, k, v = self.qkv(last.reshape(x.shape[0], -1, WIDTH)).chunk(3, dim=-1)
        weights = torch.softmax(q @ k.transpose(-1, -2) / 2.0, dim=-1)
        return _channels_back((weights @ v).view(last.shape))


class Convolution(nn.Module):
    """A convolution over pixels or tokens; of a sequence it returns a transposed view."""

    def __init__(self) -> None:
        super().__init__()
        self.over_pixels = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.over_tokens = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        if x.ndim == 4:
            return self.over_pixels(x)  # type: ignore[no-any-return]
        if x.ndim == 3:
            return self.over_tokens(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]
        return self.over_tokens(x[:, :, None])[:, :, 0]  # type: ignore[no-any-return]


class Keep(nn.Module):
    """Returns its input."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x


class Mean(nn.Module):
    """Returns the mean of each sample in the shape of the input: strides are 0."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return torch.tanh(x).mean(dim=tuple(range(1, x.ndim)), keepdim=True).expand_as(x)


class FromCondition(nn.Module):
    """Known before the loop: it does not look at the latent, but at its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return _spread(self.linear(c), x).expand_as(x)


class Parameter(nn.Module):
    """Known at compile time: a view of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.empty(1, WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return _spread(self.value, x).expand_as(x)


class Wide(nn.Module):
    """Returns some columns of a wider projection."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return _channels_back(self.wide(_channels_last(x))[..., WIDTH : 2 * WIDTH])


class Product(nn.Module):
    """A matrix product with a parameter, by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(WIDTH, WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return _channels_back(torch.einsum("...i,ij->...j", _channels_last(x), self.matrix))


class Nested(nn.Module):
    """Sublayers one after another."""

    def __init__(self, parts: list[Description]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Part(part) for part in parts)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for layer in self.layers:
            x = _joined(layer(x, c))
        return x


_WORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": Linear,
    "mlp": Mlp,
    "mlp in place": lambda: Mlp(in_place=True),
    "attention": Attention,
    "softmax": Softmax,
    "convolution": Convolution,
    "keep": Keep,
    "mean": Mean,
    "from condition": FromCondition,
    "parameter": Parameter,
    "wide": Wide,
    "product": Product,
}


class Part(nn.Module):
    """One sublayer: work, and what is done to its result before it is returned."""

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.how = description
        work = description["work"]
        self.work = Nested(description["inner"]) if work == "nested" else _WORKS[work]()
        self.dropout = nn.Dropout(0.5) if description["dropout"] else nn.Identity()
        if description["buffer"] != "none":
            self.register_buffer("factor", torch.tensor([0.75]), persistent=description["buffer"] == "persistent")

    def forward(self, x: Tensor, c: Tensor) -> Any:  # noqa: ANN401 - a tensor, or a container of tensors
        h: Tensor = self.dropout(self.work(x, c))
        if self.how["cast"] != "none":
            h = torch.tanh(h.to(getattr(torch, self.how["cast"]))).to(x.dtype)
        if self.how["buffer"] != "none":
            h = h * self.get_buffer("factor")
        if self.how["in_place"] != "none":
            # Writing into what a site may hold is refused by us, into what repeats (an expanded stream) by torch.
            h = self._write(h.clone() if self.how["in_place_on"] == "a copy" or 0 in h.stride() else h)
        return self._result(h, x)

    def _write(self, h: Tensor) -> Tensor:
        match self.how["in_place"]:
            case "mul":
                h.mul_(0.5)
            case "add":
                h += 0.25
            case "index":
                h[..., 0] = 0.5 * h[..., 1]
            case "relu":
                F.relu(h, inplace=True)
        return h

    def _result(self, h: Tensor, x: Tensor) -> object:
        match self.how["returns"]:
            case "pair":
                return h, 0.5 * h
            case "pair of views":
                return h, h[..., :1]
            case "pair with the input":
                return h, x
            case "dict":
                return {"h": h, "none": None, "number": 2}
            case "view":
                return h.flatten().view(h.shape) if h.is_contiguous() else h.transpose(0, -1).transpose(0, -1)
        return h


def _joined(result: object) -> Tensor:
    """Return one tensor made from all that a part returned."""
    if isinstance(result, tuple):
        first, second = result
        return first + 0.25 * second  # type: ignore[no-any-return]
    if isinstance(result, dict):
        return result["h"] / result["number"]  # type: ignore[no-any-return]
    assert isinstance(result, Tensor)
    return result


class Norm(nn.Module):
    """A norm over the channels."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind != "none":
            norms = {"layer": nn.LayerNorm(WIDTH), "rms": nn.RMSNorm(WIDTH), "group": nn.GroupNorm(2, WIDTH)}
            self.norm: nn.Module = norms[kind]

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "none":
            return x
        if self.kind == "group":
            return self.norm(x.transpose(1, 2)).transpose(1, 2) if x.ndim == 3 else self.norm(x)  # type: ignore[no-any-return]
        return _channels_back(self.norm(_channels_last(x)))


class Block(nn.Module):
    """Residual sublayers with norms, modulation and gates."""

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.how = description
        count = len(description["parts"])
        self.parts = nn.ModuleList(Part(part) for part in description["parts"])
        self.norms = nn.ModuleList(Norm(description["norm"]) for _ in range(count))
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH * count) if description["gate"] == "modulated" else None
        self.scale = nn.Parameter(torch.empty(WIDTH)) if description["gate"] == "scale" else None

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        vectors = self._vectors(c, x)
        for _ in range(2 if self.how["twice"] else 1):
            for index, (part, norm) in enumerate(zip(self.parts, self.norms, strict=True)):
                x = self._residual(x, c, part, norm, vectors[3 * index : 3 * index + 3])
        return x

    def _vectors(self, c: Tensor, x: Tensor) -> list[Tensor]:
        """Return shift, scale and gate of each sublayer."""
        if self.modulation is None:
            return []
        count = 3 * len(self.parts)
        projected: Tensor = self.modulation(c)
        match self.how["split"]:
            case "chunk":
                vectors = projected.chunk(count, dim=-1)
            case "split":
                vectors = torch.split(projected, WIDTH, dim=1)
            case "slice":
                vectors = tuple(projected[:, WIDTH * i : WIDTH * (i + 1)] for i in range(count))
            case "unbind":
                vectors = projected.view(-1, count, WIDTH).unbind(1)
            case _:
                if x.ndim == 3:
                    return list(projected[:, None].chunk(count, dim=-1))
                vectors = projected.chunk(count, dim=-1)
        return [_spread(vector, x) for vector in vectors]

    def _residual(self, x: Tensor, c: Tensor, part: nn.Module, norm: nn.Module, vectors: list[Tensor]) -> Tensor:
        pre = self.how["norm_position"] == "pre"
        h: Tensor = norm(x) if pre else x
        if vectors:
            h = h * (1 + vectors[1]) + vectors[0]
        h = _joined(part(h, c))
        if not pre:
            h = norm(h)
        return self._add(x, h, self._gate(x, c, vectors))

    def _gate(self, x: Tensor, c: Tensor, vectors: list[Tensor]) -> Tensor | None:
        match self.how["gate"]:
            case "modulated":
                return vectors[2]
            case "time":
                return _spread(torch.sigmoid(c), x)
            case "scale":
                assert self.scale is not None
                return _spread(self.scale[None], x)
            case "latent":
                return torch.sigmoid(x)
        return None

    def _add(self, x: Tensor, h: Tensor, gate: Tensor | None) -> Tensor:
        how = self.how["residual"]
        if how == "addcmul" and gate is not None:
            return torch.addcmul(x, gate, h)
        if gate is not None:
            h = gate * h
        if self.how["into_the_input"]:
            x += h
            return x
        match how:
            case "flipped":
                return h + x
            case "alpha":
                return torch.add(x, h, alpha=0.5)
            case "in place":
                y = x.clone()
                y += h
                return y
            case "replace":
                return h
            case "subtract":
                return x - h
            case "lerp":
                return torch.lerp(x, h, 0.3)
        return x + h


class Joint(nn.Module):
    """Two streams of tokens that attend to each other, each with a sublayer of its own after that."""

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.ours, self.theirs = Linear(), Linear()
        self.attention = Softmax()
        self.first, self.second = (Part(part) for part in description["parts"])
        self.gates = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, context: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        gate, other_gate = self.gates(c)[:, None].chunk(2, dim=-1)
        tokens = torch.cat([self.ours(x, c), self.theirs(context, c)], dim=1)
        mine, others = self.attention(tokens, c).split([x.shape[1], context.shape[1]], dim=1)
        x = x + gate * mine
        context = context + other_gate * others
        return x + _joined(self.first(x, c)), context + _joined(self.second(context, c))


class Denoiser(nn.Module):
    """What a description describes."""

    def __init__(self, description: Description) -> None:
        super().__init__()
        self.how = description
        form = description["form"]
        self.time_in = nn.Linear(1, WIDTH)
        self.frequencies = nn.Linear(4, WIDTH)
        self.table = nn.Embedding(8, WIDTH)
        self.labels = nn.Embedding(num_classes + 1, WIDTH)
        self.position = nn.Parameter(torch.empty(WIDTH))
        self.context = nn.Parameter(torch.empty(1, 2, WIDTH))
        self.blocks = nn.ModuleList((Joint if b["joint"] else Block)(b) for b in description["blocks"])
        self.fuse = nn.Linear(2 * WIDTH, WIDTH)
        if form == "patches":
            self.patch_in = nn.Conv2d(2, WIDTH, 2, stride=2)
            self.patch_out = nn.Linear(WIDTH, 8)
        if form in ("image", "unet"):
            self.conv_in, self.conv_out = nn.Conv2d(2, WIDTH, 1), nn.Conv2d(WIDTH, 2, 3, padding=1)
        if form == "unet":
            self.down, self.up = nn.Conv2d(WIDTH, WIDTH, 2, stride=2), nn.Conv2d(2 * WIDTH, WIDTH, 1)

    def forward(self, x: Tensor, t: Any, y: Tensor | None = None, context: Tensor | None = None) -> object:  # noqa: ANN401
        c = self._condition(t, x)
        if y is not None:
            c = c + self.labels(y)
        h = self._enter(x)
        if self.how["position"] == "add":
            h = h + _spread(self.position[None], h)
        elif self.how["position"] == "in place":
            h = h.clone()
            h += _spread(self.position[None], h)
        other = self.context.expand(x.shape[0], -1, -1) if context is None else context
        h = self._leave(self._through(h, other, c))
        match self.how["result"]:
            case "tuple":
                return h, c
            case "dict":
                return {"sample": h, "extra": None}
        return h

    def _condition(self, t: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        dtype = self.position.dtype
        t_B = torch.as_tensor(t).to(dtype)
        t_B = t_B.expand(x.shape[0]) if t_B.ndim == 0 else t_B
        match self.how["time"]:
            case "linear":
                c: Tensor = torch.sin(self.time_in(t_B[:, None]))
            case "table":
                c = self.table((t_B * 3).long().clamp(0, 7))
            case _:
                angles = t_B[:, None] * torch.exp(-torch.arange(2, dtype=dtype))[None]
                c = F.silu(self.frequencies(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)))
        return c

    def _enter(self, x: Tensor) -> Tensor:
        match self.how["form"]:
            case "patches":
                return self.patch_in(x).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]
            case "image" | "unet":
                return self.conv_in(x)  # type: ignore[no-any-return]
        return x

    def _leave(self, h: Tensor) -> Tensor:
        match self.how["form"]:
            case "patches":
                patches = self.patch_out(h).view(-1, 2, 2, 2, 2, 2)
                return torch.einsum("bhwpqc->bchpwq", patches).reshape(-1, 2, 4, 4)
            case "image" | "unet":
                return self.conv_out(h)  # type: ignore[no-any-return]
        return h

    def _through(self, h: Tensor, other: Tensor, c: Tensor) -> Tensor:
        order = self.how["order"]
        middle = len(order) // 2
        kept = h
        for number, index in enumerate(order):
            if number == middle:
                kept = h
                if self.how["form"] == "unet":
                    h = self.down(h)
            if number == len(order) - 1 and number > 0:
                h = self._skip(h, kept)
            block = self.blocks[index]
            if isinstance(block, Joint):
                h, other = block(h, other, c)
            else:
                h = block(h, c)
        if self.how["form"] == "unet":
            h = self.up(torch.cat([F.interpolate(h, scale_factor=2.0, mode="nearest"), kept], dim=1))
        return h + other.mean(dim=1, keepdim=True) if self.how["two_streams"] else h

    def _skip(self, h: Tensor, kept: Tensor) -> Tensor:
        if h.shape != kept.shape:
            return h
        match self.how["skip"]:
            case "cat":
                both = torch.cat([_channels_last(h), _channels_last(kept)], dim=-1)
                return _channels_back(self.fuse(both))
            case "add":
                return h + kept
        return h
