"""The packed encoder against a padded one in plain torch: values and every gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from padkern.data.batch import pack, pack_ragged
from padkern.data.dataset import Ragged
from padkern.models.build import build_expert
from padkern.models.sasrec import SASRec
from padkern.models.triple_expert import ExpertModel
from padkern.ops.keyed_dropout import attention_keep, channel_keep, mix_seed

D, L, HEADS, LAYERS = 24, 9, 3, 3
LENGTHS = [4, 1, 9, 2, 7, 1, 5]
SEED, STEP = 987654321, 12


def make_net(norm: str, dropout: float, dtype: torch.dtype) -> SASRec:
    torch.manual_seed(0)
    net = SASRec(D, L, num_layers=LAYERS, num_heads=HEADS, norm=norm, dropout=dropout)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net.to(dtype)


def make_batch(dtype: torch.dtype):
    offsets = torch.from_numpy(np.cumsum([0, *LENGTHS]))
    packed = pack(torch.ones(int(offsets[-1]), dtype=torch.int64), offsets, L)
    x = torch.randn(int(offsets[-1]), D, generator=torch.Generator().manual_seed(1))
    return x.to(dtype), packed.keyed(SEED, STEP)


class Padded:
    """The same encoder on [B, L] slots, real tokens last, written out step by step."""

    def __init__(self, net: SASRec, dropout: float, stream: int) -> None:
        self.net, self.p = net, dropout
        lengths = torch.tensor(LENGTHS)
        start = L - lengths[:, None]
        self.slots = torch.arange(L)
        self.real = self.slots >= start  # [B, L]
        self.within = (self.slots - start).clamp_min(0)
        self.tokens = (lengths.cumsum(0) - lengths)[:, None] + self.within
        self.root = mix_seed(SEED, stream)

    def drop(self, x: Tensor, place: int) -> Tensor:
        if not self.p:
            return x
        seed = mix_seed(self.root, place)
        keep = channel_keep(self.p, seed, STEP, self.tokens.flatten(), D).view(x.shape)
        return x * keep / (1 - self.p)

    def attend(self, module, x: Tensor, place: int) -> Tensor:
        q, k, v = module.qkv(x).view(len(x), L, 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(2, 3) / (D // HEADS) ** 0.5
        seen = (self.slots[:, None] >= self.slots) & self.real[:, None]  # [B, query, key]
        weights = torch.softmax(scores + torch.where(seen, 0.0, -1e9)[:, None], 3)
        if self.p:
            seed = mix_seed(self.root, place)
            keep = attention_keep(self.p, seed, STEP, torch.arange(len(x)), HEADS, L)
            rows = self.within[:, None, :, None].expand(-1, HEADS, -1, L)
            columns = self.within[:, None, None, :].expand(-1, HEADS, L, -1)
            keep = keep.gather(2, rows).gather(3, columns)
            weights = weights * keep / (1 - self.p)
        return module.out((weights @ v).transpose(1, 2).reshape(x.shape))

    def __call__(self, x: Tensor) -> Tensor:
        net = self.net
        x = x + net.position(self.slots)
        if net.norm == "post":
            x = net.edge_norm(x)
        x = self.drop(x, 0)
        for number, block in enumerate(net.blocks):
            place = 3 * number + 1
            inner = block.norm1(x) if block.pre else x
            x = x + self.drop(self.attend(block.attention, inner, place), place + 1)
            x = x if block.pre else block.norm1(x)
            inner = block.norm2(x) if block.pre else x
            h = block.up(inner)
            h = block.down(F.gelu(h) if block.pre else F.relu(h))
            x = x + self.drop(h, place + 2)
            x = x if block.pre else block.norm2(x)
        return net.edge_norm(x) if net.norm == "pre" else x


def gradients(net: SASRec, x: Tensor, states: Tensor) -> dict[str, Tensor]:
    weights = torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view(states.shape)
    leaves = dict(net.named_parameters()) | {"x": x}
    found = torch.autograd.grad((states * weights).sum(), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_packed_equals_padded(norm, dropout, dtype, limit):
    net = make_net(norm, dropout, dtype).train()
    x, packed = make_batch(dtype)
    x.requires_grad_()
    states = net(x, packed.stream(3))
    got = gradients(net, x, states)

    double = make_net(norm, dropout, dtype).double()
    padded = Padded(double, dropout, stream=3)
    # Padding slots hold large numbers: whatever leaks shows.
    slots = torch.full((len(LENGTHS), L, D), 50.0, dtype=torch.float64)
    leaf = x.detach().double().requires_grad_()
    want_states = padded(slots.masked_scatter(padded.real[:, :, None], leaf))[padded.real]
    want = gradients(double, leaf, want_states)

    assert (states - want_states).norm() <= limit * want_states.norm()
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() <= limit * gradient.norm(), name


def test_masks_depend_on_the_key_alone():
    net = make_net("post", 0.4, torch.float32).train()
    x, packed = make_batch(torch.float32)
    first = net(x, packed)
    torch.manual_seed(5)
    assert torch.equal(net(x, packed), first)
    for other in (packed.keyed(SEED + 1, STEP), packed.keyed(SEED, STEP + 1)):
        assert not torch.equal(net(x, other), first)
    assert torch.equal(net(x, packed.keyed(SEED, STEP)), first)
    assert not torch.equal(net(x, packed.stream(1)), first)
    net.eval()
    assert torch.equal(net(x, packed), net(x, packed.keyed(1, 1)))


def test_masks_without_a_key_follow_torchs_generator():
    net = make_net("pre", 0.4, torch.float32).train()
    x, _ = make_batch(torch.float32)
    packed = pack_ragged(Ragged.from_lists([[1] * n for n in LENGTHS]), L)
    torch.manual_seed(3)
    first, second = net(x, packed), net(x, packed)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(net(x, packed), first)


def make_experts():
    """Text, bins, two experts of unlike kinds and a batch, for models of four-item histories."""
    text = torch.randn(9, 6)
    bins = torch.tensor([0, *[1] * 8])
    options = {"dim": 6, "max_len": 4, "dropout": 0.5, "language": "projected"}
    experts = {kind: build_expert(kind, 8, text, **options) for kind in ("id", "text")}
    packed = pack_ragged(Ragged.from_lists([[1, 2, 3], [4, 5, 6, 7], [8]]), 4)
    return text, bins, experts, packed.keyed(SEED, STEP)


def test_experts_of_a_model_have_masks_of_their_own():
    text, bins, experts, packed = make_experts()
    model = ExpertModel({"a": experts["id"], "b": experts["id"]}, text, bins).train()
    table = torch.randn(9, 6)
    first, second = model.encode([table, table], packed).split(6, 1)
    assert torch.equal(first, experts["id"].encode(table, packed.stream(0)))
    assert torch.equal(second, experts["id"].encode(table, packed.stream(1)))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("last", [False, True])
def test_a_model_that_shares_an_expert_changes_no_mask_of_the_first(last):
    text, bins, experts, packed = make_experts()
    model = ExpertModel(experts, text, bins).train()
    before = model.encode(model.tables(), packed, last=last)
    swapped = ExpertModel(dict(reversed(experts.items())), text, bins).train()
    ExpertModel({"alone": experts["text"]}, text, bins)
    assert torch.equal(model.encode(model.tables(), packed, last=last), before)
    # In the other order the experts have each other's masks, so their states are others.
    text_states, id_states = swapped.encode(swapped.tables(), packed, last=last).split(6, 1)
    assert not torch.equal(id_states, before[:, :6])
    assert not torch.equal(text_states, before[:, 6:])
    assert torch.equal(
        id_states, experts["id"].encode(swapped.tables()[1], packed.stream(1), last=last)
    )


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("training", [False, True])
def test_last_states_are_those_of_all(norm, training):
    """Without dropout by a last block of its own, with it by selection."""
    net = make_net(norm, 0.3, torch.float64).train(training)
    x, packed = make_batch(torch.float64)
    x.requires_grad_()
    every, last = net(x, packed)[packed.last], net(x, packed, last=True)
    assert last.shape == (len(LENGTHS), D)
    assert (last - every).norm() <= 1e-12 * every.norm()
    want, got = gradients(net, x, every), gradients(net, x, last)
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() <= 1e-10 * gradient.norm(), name


def test_last_block_computes_last_tokens_only(monkeypatch):
    net = make_net("post", 0.3, torch.float64).eval()
    x, packed = make_batch(torch.float64)
    rows = []
    for block in net.blocks:
        block.up.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    net(x, packed, last=True)
    assert rows == [len(x)] * (LAYERS - 1) + [len(LENGTHS)]
