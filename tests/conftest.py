"""Devices, seeds, and what only some runs have: ``--long``, ``--slow``."""

import os
import tempfile
import warnings
from pathlib import Path

import pytest

# Before torch starts OpenMP: threads that wait give up their core, which is 4 times faster where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # a thread for each worker; tests of threads set their own number
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Inductor's cache does not ask for which instruction set it has compiled.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    str(Path(tempfile.gettempdir()) / f"fused_reg_inductor_{os.environ.get('ATEN_CPU_CAPABILITY', 'native')}"),
)

import torch

pytest.register_assert_rewrite("oracle")

EXTRA = {
    "long": "repeats a promise in more combinations, trains, or compiles",
    "slow": "takes minutes or gigabytes",
}
REQUIRE_CUDA = os.environ.get("FUSED_REG_REQUIRE_CUDA") == "1"


def cuda_is_built() -> bool:
    from fused_reg import _ops

    return "cuda_architectures" in _ops.library.build_info()


def pytest_addoption(parser):
    for name, what in EXTRA.items():
        parser.addoption(f"--{name}", action="store_true", help=f"also run what {what}")


def left_out(config) -> dict[str, str]:
    return {name: what for name, what in EXTRA.items() if not config.getoption(f"--{name}")}


def pytest_report_header(config):
    return [f"without what {what}: --{name} runs it" for name, what in left_out(config).items()]


def pytest_collection_modifyitems(config, items):
    kept, others = [], []
    for item in items:
        (others if any(map(item.get_closest_marker, left_out(config))) else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=others)


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        devices = ["cpu"]
        if REQUIRE_CUDA or cuda_is_built():
            devices.append(pytest.param("cuda", marks=pytest.mark.cuda))
        metafunc.parametrize("device", devices, indirect=True)


def _cuda() -> torch.device:
    if not (cuda_is_built() and torch.cuda.is_available()):
        reason = "no CUDA device" if cuda_is_built() else "fused_reg is built without CUDA"
        if REQUIRE_CUDA:
            pytest.fail(f"{reason}, and FUSED_REG_REQUIRE_CUDA=1")
        pytest.skip(reason)
    return torch.device("cuda")


@pytest.fixture
def device(request) -> torch.device:
    """Every device that this build has kernels for."""
    return _cuda() if getattr(request, "param", "cpu") == "cuda" else torch.device("cpu")


@pytest.fixture
def cuda() -> torch.device:
    """The CUDA device, for tests (marked `cuda`) of what a CPU does not have."""
    return _cuda()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def forward_mode():
    """torch's forward mode, which is loaded when it is first used. What torch says of itself then concerns no test."""
    from torch.autograd import forward_ad

    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore")
        forward_ad.make_dual(torch.ones(1), torch.ones(1))


@pytest.fixture
def threads():
    """Sets the number of threads; the old number comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def mesh(tmp_path):
    """A device mesh of this process alone, of CPUs."""
    dist = torch.distributed
    if not dist.is_available():
        pytest.skip("torch is built without torch.distributed")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()
