"""Encoders behind one protocol: GRU4Rec and Caser against padded plain torch, and plug-ins."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from padkern import TripleExpert
from padkern.data.batch import pack
from padkern.models import registry
from padkern.models.build import build_encoder
from padkern.models.caser import Caser
from padkern.models.encoder import PackedEncoder
from padkern.models.gru4rec import GRU4Rec
from padkern.models.registry import register_encoder
from padkern.ops.keyed_dropout import channel_keep, mix_seed

ROOT = Path(__file__).resolve().parents[1]

D, L, WIDE, WINDOW, FILTERS, VERTICAL = 12, 9, 10, 4, 3, 2
LENGTHS = [4, 1, 9, 2, 7, 1, 5]
SEED, STEP = 987654321, 12
NAMES = ["gru4rec", "caser"]
ALL = [*NAMES, "sasrec", "sasrec_pre_ln"]


def make_net(name: str, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module
    if name == "gru4rec":
        net = GRU4Rec(D, L, num_layers=2, dropout=dropout, hidden=WIDE)
    elif name == "caser":
        sizes = {"window": WINDOW, "horizontal": FILTERS, "vertical": VERTICAL}
        net = Caser(D, L, dropout=dropout, **sizes)
    else:
        net = build_encoder(name, D, L, num_layers=2, num_heads=2, dropout=dropout)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.to(dtype)


def make_batch(dtype: torch.dtype = torch.float64, lengths=LENGTHS):
    offsets = torch.from_numpy(np.cumsum([0, *lengths]))
    packed = pack(torch.ones(int(offsets[-1]), dtype=torch.int64), offsets, L)
    x = torch.randn(int(offsets[-1]), D, generator=torch.Generator().manual_seed(1))
    return x.to(dtype), packed.keyed(SEED, STEP)


# -- padded references: every sequence in L slots, real tokens last -------------------------------

REAL = torch.arange(L) >= L - torch.tensor(LENGTHS)[:, None]  # [B, L]


def drop(net: nn.Module, x: Tensor, place: int) -> Tensor:
    """Masks of real tokens in their place; what padding gets is no matter."""
    if not net.dropout:
        return x
    tokens = torch.zeros(REAL.shape, dtype=torch.int64)
    tokens[REAL] = torch.arange(int(REAL.sum()))
    seed = mix_seed(SEED, place)
    keep = channel_keep(net.dropout, seed, STEP, tokens.flatten(), x.shape[2]).view(x.shape)
    return x * keep / (1 - net.dropout)


def padded_gru(net: GRU4Rec, x: Tensor) -> Tensor:
    """The equations of the cell (PyTorch's, reset after the product), slot by slot; a padding slot
    leaves the state zero."""
    x = drop(net, x, 0)
    for number, layer in enumerate(net.layers):
        state = x.new_zeros(len(x), WIDE)
        states = []
        for slot in range(L):
            inputs = x[:, slot] @ layer.weight_ih_l0.T + layer.bias_ih_l0
            before = state @ layer.weight_hh_l0.T + layer.bias_hh_l0
            (r, z, n), (hr, hz, hn) = inputs.chunk(3, 1), before.chunk(3, 1)
            r, z = torch.sigmoid(r + hr), torch.sigmoid(z + hz)
            new = (1 - z) * torch.tanh(n + r * hn) + z * state
            state = torch.where(REAL[:, slot, None], new, state)
            states.append(state)
        x = drop(net, torch.stack(states, 1), number + 1)
    return net.out(x)


def padded_caser(net: Caser, x: Tensor) -> Tensor:
    """The image of every slot cut out of zero-padded rows, filters as convolutions over it."""
    rows = F.pad(x.masked_fill(~REAL[:, :, None], 0.0), (0, 0, WINDOW - 1, 0))
    features = []
    for slot in range(L):
        image = rows[:, slot : slot + WINDOW].transpose(1, 2)  # [B, d, window]
        low = [F.relu(filters(image)).amax(2) for filters in net.horizontal]
        tall = torch.einsum("bdl,vl->bvd", image, net.vertical.weight).flatten(1)
        features.append(torch.cat([*low, tall], 1))
    return net.out(F.relu(net.mix(drop(net, torch.stack(features, 1), 0))))


PADDED = {"gru4rec": padded_gru, "caser": padded_caser}


def gradients(net: nn.Module, x: Tensor, states: Tensor) -> dict[str, Tensor]:
    weights = torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view(states.shape)
    leaves = dict(net.named_parameters()) | {"x": x}
    found = torch.autograd.grad((states * weights).sum(), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_packed_equals_padded(name, dropout, dtype, limit):
    net = make_net(name, dropout, dtype).train()
    x, packed = make_batch(dtype)
    x.requires_grad_()
    states = net(x, packed)
    got = gradients(net, x, states)

    double = make_net(name, dropout, dtype).double()
    # Padding slots hold large numbers: whatever leaks shows.
    slots = torch.full((len(LENGTHS), L, D), 50.0, dtype=torch.float64)
    leaf = x.detach().double().requires_grad_()
    want_states = PADDED[name](double, slots.masked_scatter(REAL[:, :, None], leaf))[REAL]
    want = gradients(double, leaf, want_states)

    assert states.dtype == dtype
    assert (states - want_states).norm() <= limit * want_states.norm()
    for key, gradient in want.items():
        assert gradient.norm() > 0, key
        assert (got[key] - gradient).norm() <= limit * gradient.norm(), key


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [9], [2, 2], [1, 9, 1]])
@pytest.mark.parametrize("name", NAMES)
def test_sequences_alone_give_the_same_states(name, lengths):
    net = make_net(name).eval()
    x, packed = make_batch(lengths=lengths)
    together = net(x, packed)
    for low, high in zip(packed.offsets[:-1], packed.offsets[1:], strict=True):
        alone = pack(packed.items[low:high], torch.tensor([0, high - low]), L)
        torch.testing.assert_close(net(x[low:high], alone), together[low:high], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_no_sequences_give_no_states(name):
    net = make_net(name).eval()
    packed = pack(torch.zeros(0, dtype=torch.int64), torch.tensor([0]), L)
    for last in (False, True):
        assert net(torch.zeros(0, D, dtype=torch.float64), packed, last=last).shape == (0, D)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_leaks_from_other_sequences_or_from_the_future(name):
    net = make_net(name).eval()
    x, packed = make_batch()
    want = net(x, packed)
    for start, end in ((5, 14), (12, 14)):  # sequence 2, then its last two tokens
        spoilt = x.clone()
        spoilt[start:end] = torch.nan
        states = net(spoilt, packed)
        clean = torch.ones(len(x), dtype=torch.bool)
        clean[start:end] = False
        assert states[start:end].isnan().any(1).all()
        torch.testing.assert_close(states[clean], want[clean], rtol=0, atol=1e-14)
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(net(leaf, packed)[clean].sum(), leaf)
        assert (gradient[start:end] == 0).all()
        assert (gradient[clean].abs().sum(1) > 0).all()


def test_a_caser_state_sees_its_window_alone():
    net = make_net("caser").eval()
    x, packed = make_batch(lengths=[9])
    want = net(x, packed)
    x[2] += 1
    changed = (net(x, packed) - want).abs().amax(1) > 1e-9
    assert changed.tolist() == [2 <= t < 2 + WINDOW for t in range(9)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [False, True])
def test_last_states_are_those_of_all(name, training):
    net = make_net(name, 0.3).train(training)
    x, packed = make_batch()
    x.requires_grad_()
    every, last = net(x, packed)[packed.last], net(x, packed, last=True)
    assert last.shape == (len(LENGTHS), D)
    assert (last - every).norm() <= 1e-12 * every.norm()
    want, got = gradients(net, x, every), gradients(net, x, last)
    for key, gradient in want.items():
        assert (got[key] - gradient).norm() <= 1e-10 * gradient.norm(), key


@pytest.mark.parametrize("name", NAMES)
def test_masks_depend_on_the_key_alone(name):
    net = make_net(name, 0.4).train()
    x, packed = make_batch()
    first = net(x, packed)
    torch.manual_seed(5)
    assert torch.equal(net(x, packed), first)
    for other in (packed.keyed(SEED + 1, STEP), packed.keyed(SEED, STEP + 1)):
        assert not torch.equal(net(x, other), first)
    assert not torch.equal(net(x, packed.stream(1)), first)
    net.eval()
    assert torch.equal(net(x, packed), net(x, packed.keyed(1, 1)))


def test_a_gru_computes_no_padding(monkeypatch):
    net = make_net("gru4rec").eval()
    x, packed = make_batch()
    rows = []
    for layer in net.layers:
        layer.register_forward_hook(lambda module, args, out: rows.append(out[0].data.shape[0]))
    net(x, packed)
    assert rows == [sum(LENGTHS)] * 2


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_gives_the_same_states(name):
    net, x, packed = make_net(name), *make_batch()
    other = build_encoder(name, D, L, num_layers=2, num_heads=2, dropout=0.0, **(
        {"hidden": WIDE} if name == "gru4rec"
        else {"window": WINDOW, "horizontal": FILTERS, "vertical": VERTICAL}
    )).double()  # fmt: skip
    assert not torch.equal(other(x, packed), net(x, packed))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x, packed), net(x, packed))
    names = {"gru4rec": "layers.1.weight_hh_l0", "caser": "horizontal.2.weight"}
    assert names[name] in net.state_dict()


@pytest.mark.parametrize("name", NAMES)
def test_compiled_encoder_gives_the_same(name):
    """Caser in one graph; of GRU4Rec torch leaves nn.GRU itself to eager mode."""
    net = make_net(name, 0.3).train()
    x, packed = make_batch()
    x.requires_grad_()
    want_states = net(x, packed)
    want = gradients(net, x, want_states)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=name == "caser")
    states = compiled(x, packed)
    torch.testing.assert_close(states, want_states, rtol=0, atol=1e-12)
    for key, gradient in gradients(net, x, states).items():
        torch.testing.assert_close(gradient, want[key], rtol=1e-10, atol=1e-12, msg=key)
    if name == "gru4rec":
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="GRU"):
            torch.compile(net, backend="aot_eager", fullgraph=True)(x, packed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no usable CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_states_and_gradients_on_the_gpu(name):
    net = make_net(name, 0.3).train()
    x, packed = make_batch()
    x.requires_grad_()
    want_states = net(x, packed)
    want = gradients(net, x, want_states)
    net.cuda()
    moved = x.detach().cuda().requires_grad_()
    states = net(moved, packed.to("cuda"))
    torch.testing.assert_close(states.cpu(), want_states, rtol=1e-10, atol=1e-12)
    for key, gradient in gradients(net, moved, states).items():
        torch.testing.assert_close(gradient.cpu(), want[key], rtol=1e-9, atol=1e-12, msg=key)


# -- experts and plug-ins --------------------------------------------------------------------------


def make_triple(**options) -> TripleExpert:
    torch.manual_seed(0)
    text = F.normalize(torch.randn(31, 12), dim=1)
    text[0] = 0
    bins = torch.arange(31).clamp(max=4)
    return TripleExpert(30, text, bins, dim=8, max_len=6, **options)


ITEMS, OFFSETS = torch.tensor([1, 2, 4, 5, 6]), torch.tensor([0, 3, 5])
TARGETS = torch.tensor([2, 4, 5, 6, 8])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("language", ["text_space", "projected"])
def test_every_expert_has_an_encoder_of_its_own(name, language):
    model = make_triple(encoder=name, language=language).double().eval()
    tables = model.tables()
    packed = pack(ITEMS, OFFSETS, 6)
    states = model(ITEMS, OFFSETS, last=False)
    parts = states.split([table.shape[1] for table in tables], 1)
    for number, expert in enumerate(model.experts.values()):
        alone = expert.encode(tables[number], packed)
        torch.testing.assert_close(parts[number], alone, rtol=0, atol=1e-12)
    encoders = {id(p) for e in model.experts.values() for p in e.encoder.parameters()}
    each = len(list(model.experts["rec"].encoder.parameters()))
    assert len(encoders) == 3 * each
    # Item vectors of one expert do not reach the states of another.
    tables[1] = tables[1] + 1
    changed = model.encode(tables, packed).split([table.shape[1] for table in tables], 1)
    assert [torch.equal(a, b) for a, b in zip(changed, parts, strict=True)] == [True, False, True]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["ce", "bce"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trains_under_autocast(name, kind, dtype):
    model = make_triple(encoder=name).eval()
    packed = pack(ITEMS, OFFSETS, 6)
    negatives = torch.tensor([[9], [10], [12], [13], [14]]) if kind == "bce" else None
    want = model.loss(packed, TARGETS, negatives=negatives)
    with torch.autocast("cpu", dtype):
        loss = model.loss(packed, TARGETS, negatives=negatives)
        loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, want, rtol=0.05, atol=0.02)
    weight = {"gru4rec": "layers.0.weight_ih_l0", "caser": "horizontal.0.weight"}[name]
    gradient = model.experts["rec"].encoder.get_parameter(weight).grad
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0


def test_options_reach_the_encoder():
    model = make_triple(encoder="caser", encoder_options={"window": 3, "vertical": 1})
    assert model.experts["language"].encoder.vertical.weight.shape == (1, 3)
    model = make_triple(encoder="gru4rec", num_layers=3, encoder_options={"hidden": 5})
    assert [layer.hidden_size for layer in model.experts["aligned"].encoder.layers] == [5, 5, 5]


class LastItem(PackedEncoder):
    """The vector of the token itself, scaled: the smallest encoder there is."""

    def __init__(self, dim, max_len, *, num_layers, num_heads, dropout):
        super().__init__(dim, max_len, dropout)
        self.scale = nn.Parameter(torch.ones(num_layers))

    def forward(self, x, packed, *, last=False):
        x = self.masks(packed).drop(x * self.scale.prod(), 0)
        return x.index_select(0, packed.last) if last else x


@pytest.fixture
def last_item(monkeypatch):
    """The name of a registered encoder."""
    monkeypatch.setattr(registry, "_REGISTERED", {})
    register_encoder("last_item", LastItem)
    return "last_item"


@pytest.mark.parametrize("by_name", [False, True])
def test_an_encoder_of_ones_own(last_item, by_name):
    model = make_triple(encoder=last_item if by_name else LastItem, pool_decay=None, num_layers=3)
    states = model.eval()(ITEMS, OFFSETS)
    assert torch.equal(states[:, :8], model.tables()[0][[4, 6]])
    assert model.experts["rec"].encoder.scale.shape == (3,)
    model.train().loss(pack(ITEMS, OFFSETS, 6).keyed(1, 2), TARGETS).backward()
    assert model.experts["rec"].encoder.scale.grad.abs().max() > 0


def test_the_encoder_of_the_documentation_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/backbones.md").read_text(), re.DOTALL)
    names: dict = {"__name__": "backbones"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_REGISTERED", {})
        for block in blocks:
            exec(compile(block, "backbones.md", "exec"), names)
    assert len(re.findall(r"^    +\S", blocks[0], re.MULTILINE)) <= 24
    assert names["states"].shape == (2, 16 + 16 + 32)
    assert len(names["model"].experts["rec"].encoder.out) == 3
    assert names["config"].model.encoder == "pointwise"

    net = names["PointwiseAttention"](D, L, dropout=0.3).double().train()
    x, packed = make_batch()
    every = net(x, packed)
    assert torch.equal(net(x, packed), every)
    assert not torch.equal(net(x, packed.keyed(1, 1)), every)
    assert torch.equal(net(x, packed, last=True), every[packed.last])
    net.eval()
    every = net(x, packed)
    spoilt = x.clone()
    spoilt[12:14] += 1  # the last two tokens of sequence 2
    changed = (net(spoilt, packed) - every).abs().amax(1) > 1e-9
    assert changed.nonzero().flatten().tolist() == [12, 13]
    for low, high in zip(packed.offsets[:-1], packed.offsets[1:], strict=True):
        alone = pack(packed.items[low:high], torch.tensor([0, high - low]), L)
        torch.testing.assert_close(net(x[low:high], alone), every[low:high], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: make_triple(encoder="lstm"), ValueError, "encoder must be one of caser, gru4rec"),
        (lambda: make_triple(encoder=lambda *_, **__: 3), TypeError, "give an nn.Module, got int"),
        (
            lambda: make_triple(encoder=lambda dim, n, **_: LastItem(
                dim + 1, n, num_layers=1, num_heads=1, dropout=0.0
            )),
            ValueError, "a module with dim = 8, got 9",
        ),
        (
            lambda: make_triple(encoder=lambda dim, n, **_: nn.Linear(dim, dim)),
            ValueError, "a module with dim = 8, got none",
        ),
        (
            lambda: make_triple(encoder="caser", encoder_options={"height": 2}),
            TypeError, "unexpected keyword argument 'height'",
        ),
        (lambda: register_encoder("caser", LastItem), ValueError, "other than caser, gru4rec"),
        (lambda: register_encoder("a b", LastItem), ValueError, "got 'a b'"),
        (lambda: register_encoder("mine", 3), TypeError, "factory must be callable, got int"),
        (lambda: Caser(D, 4, window=5), ValueError, "window must lie in 1..4 (max_len), got 5"),
        (lambda: Caser(D, 4, window=0), ValueError, "window must lie in 1..4"),
        (lambda: Caser(D, L, horizontal=0), ValueError, "horizontal must be at least 1, got 0"),
        (lambda: Caser(D, L, vertical=0), ValueError, "vertical must be at least 1, got 0"),
        (lambda: GRU4Rec(D, L, num_layers=0), ValueError, "num_layers must be at least 1, got 0"),
        (lambda: GRU4Rec(D, L, hidden=0), ValueError, "hidden must be at least 1, got 0"),
        (lambda: GRU4Rec(D, L, dropout=1.0), ValueError, "dropout must be at least 0 and below 1"),
        (lambda: Caser(D, L, dropout=-0.1), ValueError, "dropout must be at least 0 and below 1"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
