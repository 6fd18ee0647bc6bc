"""The CUDA kernels of MK-MMD against the reference, emulated on the host and on a GPU.

The emulation (``tests/cpp/cuda_emulation.h``) runs the kernels' own source; it cannot show races
between threads nor what a GPU rounds differently.
"""

from __future__ import annotations

import shutil
import subprocess
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from padkern import _backends, _native, mkmmd_loss
from padkern.ops.mkmmd import cuda_impl
from padkern.ops.mkmmd.op import mkmmd_fused
from padkern.ops.mkmmd.reference import DEFAULT_ALPHAS, mkmmd_loss_ref
from padkern.testing import assert_mkmmd_matches_reference, make_mkmmd_inputs, relative_error

ROOT = Path(__file__).resolve().parents[1]
# Rows below, at and above a tile of 64, widths around the step of 16, the chunk of 64 and the
# limits 128 and 256 of the gradient kernels, more than one strip of 256 columns.
SHAPES = [
    (2, 2, 1),
    (2, 3, 8),
    (7, 11, 5),
    (63, 65, 15),
    (64, 64, 16),
    (65, 129, 17),
    (33, 40, 64),
    (40, 33, 65),
    (20, 70, 128),
    (9, 13, 129),
    (12, 66, 256),
    (7, 11, 257),
    (150, 130, 260),
]
FAMILIES = ["gaussian", "laplacian", "inverse_multiquadric", "rational_quadratic"]


@pytest.fixture(scope="session")
def emulation(tmp_path_factory):
    """The C interface of the CUDA library over host memory."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    path = tmp_path_factory.mktemp("cuda") / "emulation.so"
    folder = ROOT / "tests" / "cpp"
    subprocess.run(
        [
            *(compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"),
            *(f"-I{ROOT / 'csrc'}", f"-I{folder}"),
            *(str(folder / "cuda_emulation.cpp"), "-o", str(path)),
        ],
        check=True,
    )
    return _native.open_cuda(path)


@contextmanager
def _no_stream(device):
    yield 0


@pytest.fixture
def emulated(emulation, monkeypatch):
    """Routes the cuda backend to the emulation; gives the function that sets its freedoms."""
    monkeypatch.setattr(_native, "load_cuda", lambda: _native.CudaLibrary(emulation, ""))
    monkeypatch.setattr(_backends, "why_not_cuda", lambda *_: None)
    monkeypatch.setattr(cuda_impl, "_current_stream", _no_stream)

    def set_freedom(late_copies=True, backward=False, shared_limit=227 * 1024):
        import ctypes

        emulation.padkern_emulation(int(late_copies), int(backward), ctypes.c_int64(shared_limit))

    set_freedom()
    return set_freedom


_GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(
            not torch.cuda.is_available(), reason="torch finds no usable CUDA device"
        ),
    ],
)


@pytest.fixture(params=["cpu", _GPU])
def device(request):
    """Where the inputs are: on the host with emulated kernels, or on a GPU with the real ones."""
    if request.param == "cpu":
        request.getfixturevalue("emulated")
    else:
        library = _native.load_cuda()
        if library.library is None:
            pytest.skip(library.reason)
    return request.param


def _loss(device, source, target, **options):
    """The cuda backend on copies of CPU tensors that keep their strides; back on the CPU."""

    def move(value):
        if not isinstance(value, torch.Tensor) or device == "cpu":
            return value
        return value.to(device, memory_format=torch.preserve_format)

    options = {name: move(value) for name, value in options.items()}
    return mkmmd_loss(move(source), move(target), backend="cuda", **options).cpu()


def _check(device, source, target, **options):
    assert_mkmmd_matches_reference(partial(_loss, device), source, target, **options)


def _derivatives(loss, source, target, **options):
    """Value and gradients by every floating tensor, on fresh leaves."""
    given = {"source": source, "target": target, **options}
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in given.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and "weight" not in name
    }
    value = loss(**(given | leaves))
    return [value.detach(), *torch.autograd.grad(value, list(leaves.values()))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype, device, poisoned_empty):
    source, target = make_mkmmd_inputs(*shape, dtype)
    for estimator in ("unbiased", "biased"):
        _check(device, source, target, estimator=estimator)
        expected = mkmmd_loss_ref(source.double(), target.double(), estimator=estimator)
        found = _loss(device, source, target, estimator=estimator)
        assert abs(float(found) - float(expected)) < (5e-6 if dtype == torch.float32 else 1e-12)


def test_one_row_each(device, poisoned_empty):
    _check(device, *make_mkmmd_inputs(1, 1, 3), estimator="biased")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [9, 140, 270])
@pytest.mark.parametrize("kernel", [*FAMILIES, "energy"])
def test_kernels(kernel, width, dtype, device, poisoned_empty):
    source, target = make_mkmmd_inputs(40, 70, width, dtype)
    _check(device, source, target, kernel=kernel)
    _check(device, source, target, kernel=kernel, estimator="biased")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [17, 129, 257])
@pytest.mark.parametrize("kernel", FAMILIES)
def test_learned_bandwidths_and_weights(kernel, width, dtype, device, poisoned_empty):
    source, target = make_mkmmd_inputs(30, 70, width, dtype)
    options = {
        "kernel": kernel,
        "alphas": torch.tensor([0.3, 2.0, 1.0, 0.11], dtype=torch.float64)[::1],
        "betas": torch.tensor([1.0, -0.5, 0.2, 2.0], dtype=torch.float64),
        "sigma_sq": torch.tensor(0.8 * width, dtype=torch.float64),
    }
    for estimator in ("unbiased", "biased"):
        options["estimator"] = estimator
        exact = _derivatives(mkmmd_loss_ref, source.double(), target.double(), **options)
        found = _derivatives(partial(_loss, device), source, target, **options)
        # Parameters: against the size of what their gradient is a difference of.
        sizes = [None, None, None, 0.4, 0.5, 1.0 / width]
        limit = 2e-6 if dtype == torch.float32 else 1e-13
        for actual, wanted, size in zip(found, exact, sizes, strict=True):
            if size is not None:
                assert float((actual - wanted).abs().max()) < 10 * limit * size
            elif wanted.dim() == 0:
                assert abs(float(actual) - float(wanted)) < limit
            else:
                assert relative_error(actual, wanted) < 5 * limit


@pytest.mark.parametrize(
    "alphas",
    [(1.0,), (2.0, 0.5), (0.1, 0.7, 3.0), (1.0,) * 3, tuple(2.0**k for k in range(-6, 7))],
    ids=str,
)
def test_alphas(alphas, device):
    source, target = make_mkmmd_inputs(37, 53, 9)
    _check(device, source, target, alphas=alphas)
    _check(device, source, target, alphas=alphas, sigma_sq=3.5, betas=[0.5] * len(alphas))
    _check(device, source.double(), target.double(), alphas=alphas)
    _check(device, source, target, alphas=torch.tensor(alphas, dtype=torch.bfloat16))


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("width", [17, 258])
def test_weights(estimator, width, device):
    source, target = make_mkmmd_inputs(70, 29, width)
    weight = torch.rand(70)
    weight[3::7] = 0
    mask = torch.rand(29) > 0.3
    mask[:2] = True
    for source_weight in (weight, weight.half()[::1], 1e-20 * weight.double()):
        for target_weight in (None, mask):
            options = {"source_weight": source_weight, "target_weight": target_weight}
            _check(device, source, target, estimator=estimator, **options)
            _check(device, source.double(), target, estimator=estimator, **options)


def test_masked_rows_are_not_read(device):
    source, target = make_mkmmd_inputs(20, 30, 6)
    weight = torch.ones(20)
    weight[:5] = 0
    broken = source.clone()
    broken[:5] = float("nan")
    broken.requires_grad_()
    loss = _loss(device, broken, target, source_weight=weight)
    # With a gradient wanted too, because the value alone is added up in another order.
    whole = _loss(device, source.clone().requires_grad_(), target, source_weight=weight)
    assert loss.item() == whole.item()
    assert loss.item() == pytest.approx(_loss(device, source[5:], target).item(), abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, broken)
    assert gradient[:5].eq(0).all()
    assert gradient[5:].isfinite().all()


def test_tllib_and_cross(device):
    source, target = make_mkmmd_inputs(70, 70, 20)
    _check(device, source, target, estimator="tllib")
    weights = torch.rand(70), torch.rand(66)
    for width in (20, 300):
        source, target = make_mkmmd_inputs(70, 66, width)

        def fused(source, target, width=width):
            inputs = [t.to(device) for t in (source, target)]
            sigma_sq = torch.tensor(2.0 * width, device=device)
            pair = [w.to(device) for w in weights]
            arguments = (*inputs, sigma_sq, *pair, DEFAULT_ALPHAS, None, "gaussian", "cross")
            return mkmmd_fused(*arguments, "float32", "cuda").cpu()

        exact = partial(
            mkmmd_loss_ref,
            sigma_sq=2.0 * width,
            estimator="cross",
            source_weight=weights[0].double(),
            target_weight=weights[1].double(),
        )
        expected = _derivatives(exact, source.double(), target.double())
        for actual, wanted in zip(_derivatives(fused, source, target), expected, strict=True):
            assert relative_error(actual, wanted) < 5e-6


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float64),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_dtypes(dtypes, device):
    source, target = make_mkmmd_inputs(30, 41, 33)
    _check(device, source.to(dtypes[0]), target.to(dtypes[1]))


def test_strides_change_no_bit(device):
    source, target = make_mkmmd_inputs(41, 33, 19)
    wide = torch.full((82, 45), float("nan"))
    wide[::2, 3:41:2] = source
    views = [source.t().contiguous().t(), wide[::2, 3:41:2], source.flip(0).contiguous().flip(0)]
    expected = _derivatives(partial(_loss, device), source, target)
    for view in views:
        assert torch.equal(view, source)
        for actual, wanted in zip(
            _derivatives(partial(_loss, device), view, target), expected, strict=True
        ):
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [6, 300])
def test_degenerate_and_nan(width, dtype, device, poisoned_empty):
    same = torch.randn(1, width, dtype=dtype).expand(70, width).clone()
    for estimator, value in (("unbiased", 0.0), ("biased", 0.0), ("tllib", 2 / 69)):
        found = _derivatives(partial(_loss, device, estimator=estimator), same, same)
        assert found[0].item() == pytest.approx(value, rel=1e-6)
        assert all(g.eq(0).all() for g in found[1:])
    source, target = make_mkmmd_inputs(9, 70, width, dtype)
    zero = torch.zeros((), dtype=dtype)
    found = _derivatives(partial(_loss, device), source, target, sigma_sq=zero)
    assert all(g.eq(0).all() for g in found)
    for bandwidth in (-1.0, float("nan")):
        sigma_sq = torch.tensor(bandwidth, dtype=dtype)
        for result in _derivatives(partial(_loss, device), source, target, sigma_sq=sigma_sq):
            assert result.isnan().all()
    for bad in (float("nan"), float("inf")):
        source[2, 3] = bad
        for options in ({}, {"sigma_sq": torch.tensor(2.0)}):
            for result in _derivatives(partial(_loss, device), source, target, **options):
                assert result.isnan().all()


def test_scale_offset_and_far_rows(device):
    """Nothing depends on the unit, little on an offset; vanishing kernels keep their gradient."""
    source, target = make_mkmmd_inputs(40, 50, 12)
    expected = _derivatives(mkmmd_loss_ref, source.double(), target.double())
    for unit in (2.0**-60, 2.0**40):
        found = _derivatives(partial(_loss, device), source * unit, target * unit)
        assert abs(float(found[0]) - float(expected[0])) < 2e-6
        for actual, wanted in zip(found[1:], expected[1:], strict=True):
            assert relative_error(actual.double() * unit, wanted) < 5e-6
    # The rounding of the shifted rows themselves is 2^-14.
    found = _derivatives(partial(_loss, device), source + 1024, target + 1024)
    assert abs(float(found[0]) - float(expected[0])) < 1e-3
    for kernel in ("gaussian", "laplacian"):
        _check(device, source, target, sigma_sq=0.05, alphas=(1.0,), kernel=kernel)


def test_one_far_row(device):
    source, target = make_mkmmd_inputs(40, 50, 12)
    source[3] *= 100  # sets the range of the packed rows, and shifts the mean
    _check(device, source, target, sigma_sq=12.0)


@pytest.mark.parametrize("width", [5, 250, 600])
def test_identical_rows_of_root_kernels_are_at_distance_zero(width, device):
    source = torch.randn(3, width).repeat(30, 1)
    value = _loss(device, source[:45], source[45:], kernel="energy", estimator="biased")
    # Both samples hold the same three rows equally often.
    assert abs(float(value)) < 2e-6 * width**0.5


def test_single_product_on_request(device):
    source, target = make_mkmmd_inputs(70, 80, 64)
    exact = _derivatives(mkmmd_loss_ref, source.double(), target.double())
    three = _derivatives(partial(_loss, device), source, target)
    one = _derivatives(partial(_loss, device, precision="tf32"), source, target)
    for coarse, fine, wanted in zip(one[1:], three[1:], exact[1:], strict=True):
        assert relative_error(fine, wanted) < 1e-6
        assert 1e-5 < relative_error(coarse, wanted) < 2e-3
    # Rows of half the size are split all the same.
    halves = source.half(), target.half()
    fine, same = (_loss(device, *halves, precision=p).item() for p in ("float32", "tf32"))
    assert fine == same


def test_results_repeat_to_the_bit(device):
    for shape in ((70, 80, 40), (200, 150, 20), (130, 130, 270)):
        source, target = make_mkmmd_inputs(*shape)
        first, second = (_derivatives(partial(_loss, device), source, target) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(70, 80, 40), (66, 10, 200), (70, 9, 270)], ids=str)
def test_what_a_gpu_leaves_open_does_not_matter(shape, emulated):
    """When copies happen, in which order threads run, one column tile in memory or two."""
    source, target = make_mkmmd_inputs(*shape)
    loss = partial(_loss, "cpu")
    alphas = torch.tensor([0.5, 1.0])
    for options in ({}, {"alphas": alphas, "kernel": "laplacian"}):
        expected = _derivatives(loss, source, target, **options)
        for freedom in (
            {"late_copies": False},
            {"backward": True},
            {"shared_limit": 163 * 1024, "backward": True},
            {"shared_limit": 112 * 1024},
        ):
            emulated(**freedom)
            for a, b in zip(_derivatives(loss, source, target, **options), expected, strict=True):
                assert torch.equal(a, b), freedom
        emulated()


@pytest.mark.parametrize("width", [1, 64, 256, 257])
def test_shared_memory_of_an_sm_80_is_enough(width, emulated):
    emulated(shared_limit=163 * 1024)
    source, target = make_mkmmd_inputs(5, 6, width)
    alphas, betas = torch.linspace(0.1, 6.4, 64), torch.ones(64)
    for rows in (source, source.double()):
        _derivatives(partial(_loss, "cpu"), rows, target, alphas=alphas, betas=betas)


def test_errors_of_the_library(emulated):
    source, target = make_mkmmd_inputs(9, 8, 250)
    emulated(shared_limit=99 * 1024)
    with pytest.raises(RuntimeError, match=r"gradients of 250 columns need .* shared memory"):
        _loss("cpu", source.requires_grad_(), target)
    with pytest.raises(ValueError, match="tllib estimator needs equal sizes, got 9 and 8"):
        cuda_impl.mkmmd_value_cuda(
            *(source, target, None, None, None, None, None, [1.0]),
            *("gaussian", "tllib", "float32"),
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tile", "call"])
def test_emulated_kernels_under_sanitizers(name, tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    folder, program = ROOT / "tests" / "cpp", tmp_path / name
    subprocess.run(
        [
            *(compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"),
            *("-fsanitize=address,undefined", "-fno-sanitize-recover"),
            *(f"-I{ROOT / 'csrc'}", f"-I{folder}", str(folder / f"test_cuda_{name}.cpp")),
            *("-o", str(program)),
        ],
        check=True,
    )
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "all passed" in result.stdout


def test_a_library_of_another_version_is_refused(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    source, path = tmp_path / "old.cpp", tmp_path / "old.so"
    source.write_text('extern "C" int padkern_cuda_abi() { return 0; }\n')
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    with pytest.raises(OSError, match="function is missing"):
        _native.open_cuda(path)
    names = ("params_bytes", "workspace_bytes")
    more = "".join(f"long padkern_mkmmd_{name}() {{ return 0; }}\n" for name in names)
    source.write_text(
        f'extern "C" {{ int padkern_cuda_abi() {{ return 0; }}\n{more}'
        "int padkern_mkmmd() { return 0; } const char* padkern_cuda_error_text() { return 0; } }\n"
    )
    path = path.with_name("other.so")  # a path that the loader has not seen
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    with pytest.raises(OSError, match="version 0, this padkern needs"):
        _native.open_cuda(path)


# ---- on a GPU alone ----------------------------------------------------------------------------


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("torch finds no usable CUDA device")
    if _native.load_cuda().library is None:
        pytest.skip(_native.load_cuda().reason)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(672, 672, 128), (4096, 3000, 64), (2000, 2100, 1024)], ids=str)
def test_large_shapes_on_a_gpu(shape, gpu):
    source, target = make_mkmmd_inputs(*shape)
    inputs = source.cuda().double(), target.cuda().double()
    expected = [t.cpu() for t in _derivatives(mkmmd_loss_ref, *inputs)]
    found = _derivatives(partial(_loss, "cuda"), source, target)
    assert abs(float(found[0]) - float(expected[0])) < 5e-6
    for actual, wanted in zip(found[1:], expected[1:], strict=True):
        assert relative_error(actual, wanted) < 1e-5
    again = _derivatives(partial(_loss, "cuda"), source, target)
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))


@pytest.mark.gpu
def test_a_cuda_graph_replays(gpu):
    source, target = (t.cuda() for t in make_mkmmd_inputs(300, 200, 40))
    arguments = (source, target, None, None, None, None, None, DEFAULT_ALPHAS)
    arguments += ("gaussian", "unbiased", "float32", False)
    cuda_impl.mkmmd_value_grad_cuda(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cuda_impl.mkmmd_value_grad_cuda(*arguments)
    for seed in (1, 2, 3):
        for buffer, rows in zip(
            (source, target), make_mkmmd_inputs(300, 200, 40, seed=seed), strict=True
        ):
            buffer.copy_(rows)
        graph.replay()
        for a, b in zip(captured, cuda_impl.mkmmd_value_grad_cuda(*arguments), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_emulation_and_gpu_agree(gpu, emulated, monkeypatch):
    """The same source, so what differs is the rounding inside matrix units and of exp2."""
    source, target = make_mkmmd_inputs(70, 80, 40)
    emulated_result = _derivatives(partial(_loss, "cpu"), source, target)
    monkeypatch.undo()
    found = _derivatives(partial(_loss, "cuda"), source, target)
    for a, b in zip(found, emulated_result, strict=True):
        assert relative_error(a, b) < 5e-6
